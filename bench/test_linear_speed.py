"""Single candidates under pytest-benchmark, to watch one of them while it is worked on.

    pytest bench --benchmark-group-by=param:case

The tables of the documentation come from `modmask bench`, which compares candidates turn by turn.
"""

from __future__ import annotations

from typing import Any

import pytest

from modmask_kernels.bench import baselines, linear
from modmask_kernels.bench.verify import Problem, check_masked_linear
from modmask_kernels.ops import masked_linear

CASES = linear.cases()


def name(case: linear.LinearCase) -> str:
    return f"{case.out_features}x{case.in_features}-{case.batch}-{case.samples}"


def problem_of(case: linear.LinearCase) -> Problem:
    return Problem.random(case.out_features, case.in_features, case.batch, case.samples)


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("candidate", ["plain", "fused", *linear.BASELINES])
def test_forward_and_backward(benchmark: Any, case: linear.LinearCase, candidate: str) -> None:
    problem = problem_of(case)
    if candidate == "plain":
        step = linear.plain_step(problem)
    elif candidate == "fused":
        check_masked_linear(masked_linear, problem)
        step = linear.fused_step(problem)
    else:
        try:
            step = linear.baseline_step(candidate, problem)
        except baselines.NotAvailableError as error:
            pytest.skip(str(error))
    benchmark(step)


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("part", ["noise", "products", "copy"])
def test_floor(benchmark: Any, case: linear.LinearCase, part: str) -> None:
    benchmark(linear.floor_functions(problem_of(case))[part])
