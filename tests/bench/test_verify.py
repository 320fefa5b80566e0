from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from modmask_kernels import ops
from modmask_kernels.bench import baselines
from modmask_kernels.bench.verify import (
    ConvProblem,
    GateError,
    Problem,
    check_distribution,
    check_finite,
    check_fused,
    check_packed_masks,
)


@pytest.fixture(params=["linear", "convolution"])
def problem(request: pytest.FixtureRequest) -> Problem:
    if request.param == "linear":
        return Problem.random(24, 40, 16, 4)
    return ConvProblem.random_images(24, 10, 6, 16, 4, kernel=3, stride=2, groups=2)


def naive(problem: Problem) -> Any:
    function: Any = baselines.naive_masked_linear
    if isinstance(problem, ConvProblem):
        function = functools.partial(
            baselines.naive_masked_conv2d,
            stride=problem.stride,
            padding=problem.padding,
            groups=problem.groups,
        )
    return lambda x, logits: function(x, problem.weight, logits, problem.bias, problem.samples)


def test_the_operations_pass(problem: Problem) -> None:
    shares = check_fused(problem)
    assert set(shares) == {"y", "grad_x", "grad_logits"}
    assert max(shares.values()) <= 1.0
    check_packed_masks(ops.sample_mask_packed, problem.logits, problem.samples)


def test_a_wrong_output_is_stopped(problem: Problem) -> None:
    def wrong(*args: Tensor) -> Tensor:
        return problem.fused(*args) * (1 + 1e-5)

    with pytest.raises(GateError, match=r"masked_(linear|conv2d), y: error"):
        check_fused(problem, wrong)


def test_a_wrong_gradient_is_stopped(problem: Problem) -> None:
    def wrong(x: Tensor, logits: Tensor, seed: Tensor) -> Tensor:
        return problem.fused(x, logits * 2 - logits.detach(), seed)

    with pytest.raises(GateError, match=r"masked_(linear|conv2d), grad_logits: error"):
        check_fused(problem, wrong)


def test_an_output_that_is_not_a_number_is_stopped(problem: Problem) -> None:
    def wrong(*args: Tensor) -> Tensor:
        return problem.fused(*args) * float("nan")

    with pytest.raises(GateError, match="error nan"):
        check_fused(problem, wrong)


def test_one_wrong_bit_is_stopped(problem: Problem) -> None:
    def wrong(*args: Tensor, **options: Any) -> Tensor:
        bits = ops.sample_mask_packed(*args, **options).clone()
        bits[0, 3] ^= 4
        return bits

    with pytest.raises(GateError, match=r"1 of (3840|4320) bits differ"):
        check_packed_masks(wrong, problem.logits, problem.samples)


@pytest.mark.parametrize("samples", [1, 4])
def test_naive_masking_has_the_right_distribution(samples: int) -> None:
    torch.manual_seed(0)
    images = ConvProblem.random_images(256, 6, 5, 16, samples, kernel=3)
    for problem in (Problem.random(256, 64, 16, samples), images):
        check_distribution(naive(problem), problem, name="naive")


@pytest.mark.parametrize(
    ("shift", "message"), [(1.0, "mean"), (-1.0, "mean")], ids=["keeps more", "keeps fewer"]
)
def test_masks_with_other_probabilities_are_stopped(shift: float, message: str) -> None:
    torch.manual_seed(0)
    problem = Problem.random(256, 64, 16, 4)
    function = naive(problem)
    with pytest.raises(GateError, match=message):
        check_distribution(lambda x, logits: function(x, logits + shift), problem, name="naive")


def test_too_large_a_gradient_is_stopped() -> None:
    torch.manual_seed(0)
    problem = Problem.random(256, 64, 16, 4)
    function = naive(problem)
    with pytest.raises(GateError, match="gradient of a logit"):
        check_distribution(
            lambda x, logits: function(x, 9 * logits - 8 * logits.detach()), problem, name="naive"
        )


@pytest.mark.parametrize("values", [None, torch.zeros(2), torch.tensor([1.0, float("inf")])])
def test_absent_zero_and_infinite_results_are_stopped(values: Tensor | None) -> None:
    with pytest.raises(GateError, match="other, y"):
        check_finite({"y": values}, name="other")
