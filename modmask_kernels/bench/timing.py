"""Interleaved timing: all candidates in one process, turn by turn, compared by medians."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt


def keep_freed_memory() -> bool:
    """Tells glibc to keep what a process frees for the next allocation.

    Otherwise a gradient that happens to lie at the end of the heap goes back to the system at every
    step and comes back page by page: which candidate pays for that is chance, and it can be a tenth
    of its time.

    Returns:
        whether the C library is one that can be told.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    largest = 4 * 1024 * 1024 * ctypes.sizeof(ctypes.c_long)  # that M_MMAP_THRESHOLD accepts
    return bool(mallopt(_M_MMAP_THRESHOLD, largest)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


Visitor = Callable[[int], Sequence[float]]
"""A candidate: given n, the seconds of n consecutive calls that follow a warm one."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate.

    Attributes:
        median, p20, p80: order statistics over all calls.
        calls: number of timed calls.
        visits: the median of each visit, in order, so that candidates can be compared round by
            round.
    """

    median: float
    p20: float
    p80: float
    calls: int
    visits: tuple[float, ...]


def summary(timings: Mapping[str, Timing]) -> dict[str, dict[str, float]]:
    """The statistics of every candidate without the single visits, for JSON."""
    return {
        name: {"median": t.median, "p20": t.p20, "p80": t.p80, "calls": t.calls}
        for name, t in timings.items()
    }


def percentile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between order statistics; `fraction` in [0, 1]."""
    if not values:
        raise ValueError("values: expected at least one number, got none")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction: expected a number in [0, 1], got {fraction}")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def calls_of(function: Callable[[], object], clock: Callable[[], float]) -> Visitor:
    """A candidate that is one function; its first call of every visit is not timed."""

    def visit(count: int) -> list[float]:
        # the candidate before this one left its own data in the caches
        function()
        seconds = []
        for _ in range(count):
            start = clock()
            function()
            seconds.append(clock() - start)
        return seconds

    return visit


def interleaved(
    candidates: Mapping[str, Visitor],
    *,
    rounds: int,
    visit_seconds: float = 0.02,
    max_calls: int = 50,
    warmup: int = 2,
) -> dict[str, Timing]:
    """Times candidates turn by turn, so that a change of clock rate or load meets all of them.

    Every round visits each candidate once, in an order that rotates from round to round. A visit
    makes as many calls as fit into `visit_seconds`, at least 1 and at most `max_calls`.

    Args:
        candidates: name to visitor.
        rounds: number of rounds, at least 1.
        visit_seconds: wanted length of a visit.
        max_calls: largest number of timed calls in a visit.
        warmup: visits of one call before the first round; the last sets the calls per visit.

    Returns:
        name to `Timing`, in the order given.
    """
    if rounds < 1 or warmup < 1 or max_calls < 1:
        raise ValueError(
            "rounds, warmup and max_calls: expected at least 1 each, "
            f"got {rounds}, {warmup} and {max_calls}"
        )
    counts = {}
    for name, visitor in candidates.items():
        seconds = 0.0
        for _ in range(warmup):
            seconds = statistics.median(visitor(1))
        wanted = int(visit_seconds / seconds) if seconds > 0.0 else max_calls
        counts[name] = max(1, min(wanted, max_calls))

    names = list(candidates)
    all_calls: dict[str, list[float]] = {name: [] for name in names}
    visits: dict[str, list[float]] = {name: [] for name in names}
    collected_before = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % max(len(names), 1)
            for name in names[first:] + names[:first]:
                timed = candidates[name](counts[name])
                all_calls[name].extend(timed)
                visits[name].append(statistics.median(timed))
    finally:
        if collected_before:
            gc.enable()
    return {
        name: Timing(
            median=statistics.median(all_calls[name]),
            p20=percentile(all_calls[name], 0.2),
            p80=percentile(all_calls[name], 0.8),
            calls=len(all_calls[name]),
            visits=tuple(visits[name]),
        )
        for name in names
    }


def time_functions(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    visit_seconds: float = 0.02,
    max_calls: int = 50,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """`interleaved` for plain functions without arguments."""
    return interleaved(
        {name: calls_of(function, clock) for name, function in functions.items()},
        rounds=rounds,
        visit_seconds=visit_seconds,
        max_calls=max_calls,
        warmup=warmup,
    )


@dataclass(frozen=True)
class Ratio:
    """How many times longer one candidate takes than another.

    Attributes:
        value: median over the rounds of the ratio within one round, which a slow phase of the
            machine meets on both sides.
        p20, p80: order statistics of the same ratios.
    """

    value: float
    p20: float
    p80: float


def ratio(candidate: Timing, baseline: Timing) -> Ratio:
    """`candidate` over `baseline`, both from the same run of `interleaved`."""
    by_round = [a / b for a, b in zip(candidate.visits, baseline.visits, strict=True)]
    return Ratio(
        value=statistics.median(by_round),
        p20=percentile(by_round, 0.2),
        p80=percentile(by_round, 0.8),
    )
