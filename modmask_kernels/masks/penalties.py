"""Penalties on logits other than the linear one, and schedules of the temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.estimators import Estimator, resolve

PENALTIES = ("linear", "l0")


def _slope_and_shift(estimator: Estimator, tau: float) -> tuple[float, float]:
    """A mask is not 0 with probability sigmoid(slope * logit - shift)."""
    if estimator.name == "gumbel_sigmoid":
        return 1.0, 0.0
    if estimator.name == "sigmoid":
        return 1.0 / tau, 0.0
    if estimator.name == "hard_concrete" and estimator.low < 0.0:
        return 1.0, tau * math.log(-estimator.low / estimator.high)
    raise ValueError(
        "estimator: expected gumbel_sigmoid, sigmoid, or hard_concrete with a stretch below 0, "
        f"whose masks are 0 with a known probability, got {estimator}"
    )


def expected_l0(
    logits: Tensor, estimator: str | Estimator = "hard_concrete", tau: float = 2.0 / 3.0
) -> Tensor:
    """The probability of each mask value not to be 0; the sum is the expected size of the mask.

    Args:
        logits: any shape, floating point.
        estimator: "hard_concrete" (Louizos et al. 2018, equation 12; a `clamp` is neglected),
            "gumbel_sigmoid", or "sigmoid", where it is the mask itself.
        tau: the temperature.

    Returns:
        as `logits`, differentiable.

    Raises:
        ValueError: for an estimator without such a probability.

    Equivalent to, for hard_concrete::

        torch.sigmoid(logits - tau * math.log(-low / high))
    """
    slope, shift = _slope_and_shift(resolve(estimator), tau)
    return torch.sigmoid(logits * slope - shift)


def add_l0_gradient(
    gradient: Tensor, logits: Tensor, estimator: Estimator, tau: float, penalty: float
) -> None:
    """Adds the gradient of `penalty * expected_l0(logits).sum()` in place."""
    slope, _ = _slope_and_shift(estimator, tau)
    p = expected_l0(logits, estimator, tau)
    gradient.addcmul_(p, 1.0 - p, value=penalty * slope)


@dataclass(frozen=True)
class Annealing:
    """A temperature that falls from `start` to `end` over `steps`, by equal factors.

    Continuous sparsification (Savarese et al. 2020) has ``Annealing(1, 1 / 200, steps)``: its
    inverse temperature grows to 200.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps!r}")

    def __call__(self, step: int) -> float:
        """The temperature of a step, counted from 0; `end` from the last one on."""
        part = min(step, self.steps - 1) / max(self.steps - 1, 1)
        return float(self.start * (self.end / self.start) ** part)
