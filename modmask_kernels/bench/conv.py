"""masked_conv2d, forward and backward, against plain and naive convolutions."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

from tqdm import tqdm

from . import baselines
from .linear import fused_step, naive_step, plain_step, verdict
from .timing import keep_freed_memory, ratio, summary, time_functions
from .verify import ConvProblem, check_distribution, check_fused

SLOWER_THAN_NAIVE = 1.05  # the most that any row may be


@dataclass(frozen=True)
class ConvCase:
    """One row of the table: square images and kernels, padded to keep the size at a stride of 1."""

    out_channels: int
    in_channels: int
    size: int
    kernel: int
    batch: int
    samples: int
    stride: int = 1
    groups: int = 1
    target: float | None = None  # largest wanted ratio to the plain layer

    def problem(self) -> ConvProblem:
        """Random inputs of this row."""
        return ConvProblem.random_images(
            self.out_channels,
            self.in_channels,
            self.size,
            self.batch,
            self.samples,
            kernel=self.kernel,
            stride=self.stride,
            groups=self.groups,
        )


def cases(quick: bool = False) -> list[ConvCase]:
    """The rows of the full table, or of the short one."""
    targets = [
        ConvCase(64, 64, 32, 3, 64, 1, target=1.05),
        ConvCase(64, 64, 32, 3, 64, 4, target=1.15),
        ConvCase(512, 512, 4, 3, 64, 1, target=1.15),
        ConvCase(512, 512, 4, 3, 64, 4, target=1.5),
    ]
    if quick:
        return targets[3:]
    others = [
        ConvCase(64, 3, 32, 3, 64, 4),
        ConvCase(128, 64, 32, 3, 64, 4, stride=2),
        ConvCase(128, 64, 32, 1, 64, 4, stride=2),
        ConvCase(256, 64, 16, 1, 64, 4),
        ConvCase(96, 96, 14, 3, 64, 4),
        ConvCase(128, 128, 16, 3, 64, 4, groups=4),
        ConvCase(64, 64, 32, 3, 64, 4, groups=64),
        ConvCase(64, 64, 32, 3, 64, 4, stride=2, groups=64),
    ]
    return targets + others


def run_case(case: ConvCase, *, rounds: int, visit_seconds: float = 0.1) -> dict[str, object]:
    """Checks and times one row.

    Returns:
        a JSON-able dict; every number that the table shows.

    Raises:
        GateError: a candidate is wrong; nothing is timed then.
    """
    problem = case.problem()
    error_shares = check_fused(problem)
    naive = functools.partial(
        baselines.naive_masked_conv2d,
        stride=problem.stride,
        padding=problem.padding,
        groups=problem.groups,
    )
    check_distribution(
        lambda x, logits: naive(x, problem.weight, logits, problem.bias, problem.samples),
        problem,
        name="naive masking",
    )
    timings = time_functions(
        {
            "plain": plain_step(problem),
            "fused": fused_step(problem),
            "naive": naive_step(problem, naive),
        },
        rounds=rounds,
        visit_seconds=visit_seconds,
    )
    to_plain = ratio(timings["fused"], timings["plain"])
    to_naive = ratio(timings["fused"], timings["naive"])
    return {
        **asdict(case),
        "dtype": "float32",
        "ratio_to_plain": asdict(to_plain),
        "verdict": verdict(to_plain.value, case.target),
        "naive_ratio_to_plain": asdict(ratio(timings["naive"], timings["plain"])),
        "ratio_to_naive": asdict(to_naive),
        "verdict_naive": verdict(to_naive.value, SLOWER_THAN_NAIVE),
        "error_over_allowed": error_shares,
        "seconds": summary(timings),
    }


def run(*, quick: bool = False, progress: bool = True) -> list[dict[str, object]]:
    """All rows of the table; see `run_case`."""
    keep_freed_memory()
    rows = []
    bar = tqdm(cases(quick), desc="masked_conv2d", unit="shape", disable=not progress)
    for case in bar:
        bar.set_postfix_str(
            f"{case.in_channels} to {case.out_channels}, {case.size}x{case.size}, "
            f"samples {case.samples}"
        )
        rows.append(run_case(case, rounds=3 if quick else 9))
    return rows
