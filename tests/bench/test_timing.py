from __future__ import annotations

import gc
from collections.abc import Sequence

import pytest

from modmask_kernels.bench.timing import calls_of, interleaved, percentile, ratio, time_functions


class Clock:
    """A clock that only moves when a candidate says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("values", "fraction", "expected"),
    [([3.0], 0.8, 3.0), ([4.0, 1.0], 0.5, 2.5), ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.2, 2.0)],
)
def test_percentile_interpolates(values: list[float], fraction: float, expected: float) -> None:
    assert percentile(values, fraction) == expected


def test_percentile_rejects_nothing_and_fractions_outside() -> None:
    with pytest.raises(ValueError, match="at least one number"):
        percentile([], 0.5)
    with pytest.raises(ValueError, match=r"1\.5"):
        percentile([1.0], 1.5)


def test_known_durations_give_known_statistics() -> None:
    clock = Clock()
    timings = time_functions(
        {"one": lambda: clock.spend(1.0), "three": lambda: clock.spend(3.0)},
        rounds=4,
        visit_seconds=3.0,
        clock=clock,
    )
    assert (timings["one"].median, timings["three"].median) == (1.0, 3.0)
    assert (timings["one"].calls, timings["three"].calls) == (12, 4)
    found = ratio(timings["three"], timings["one"])
    assert (found.value, found.p20, found.p80) == (3.0, 3.0, 3.0)


def test_ratio_by_round_survives_a_machine_that_slows_down() -> None:
    clock, speed = Clock(), [1.0]

    def candidate(seconds: float) -> None:
        clock.spend(seconds * speed[0])
        speed[0] *= 1.001

    timings = time_functions(
        {"a": lambda: candidate(1.0), "b": lambda: candidate(2.0)},
        rounds=20,
        visit_seconds=0.0,
        clock=clock,
    )
    found = ratio(timings["b"], timings["a"])
    assert found.value == pytest.approx(2.0, rel=0.05)
    assert found.p80 - found.p20 < 0.02


def test_candidates_take_turns_and_the_first_of_a_round_changes() -> None:
    order: list[str] = []

    def visitor(name: str, counts: list[int]) -> Sequence[float]:
        order.append(name)
        return [1.0] * counts[0]

    interleaved(
        {name: lambda n, name=name: visitor(name, [n]) for name in "abc"}, rounds=3, warmup=1
    )
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_the_first_call_of_a_visit_is_not_timed() -> None:
    clock, durations = Clock(), iter([100.0, 1.0, 2.0])
    assert calls_of(lambda: clock.spend(next(durations)), clock)(2) == [1.0, 2.0]


def test_collection_is_off_while_timing_and_on_again_after_an_error() -> None:
    seen = []

    def failing(count: int) -> Sequence[float]:
        seen.append(gc.isenabled())
        if len(seen) == 2:
            raise KeyboardInterrupt
        return [1.0] * count

    with pytest.raises(KeyboardInterrupt):
        interleaved({"a": failing}, rounds=1, warmup=1)
    assert seen == [True, False]
    assert gc.isenabled()


@pytest.mark.parametrize("name", ["rounds", "warmup", "max_calls"])
def test_counts_below_one_are_refused(name: str) -> None:
    arguments = {"rounds": 1, "warmup": 1, "max_calls": 1, name: 0}
    with pytest.raises(ValueError, match="at least 1"):
        interleaved({}, **arguments)
