"""Estimators: how a mask follows from logits and noise, and what its gradient is.

Operations and layers take `estimator` as one of these, or as a name for its published defaults.
`docs/estimators.md` has the formulas.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple


class Estimator(NamedTuple):
    """An estimator with its numbers; made by the functions of this module.

    Attributes:
        name: one of `NAMES`.
        low, high: the stretch of hard_concrete; the threshold of threshold, and 1 if a logit equal
            to it is kept; the fraction of top_k.
        clamp: of hard_concrete: uniform numbers are clamped to [clamp, 1 - clamp].
    """

    name: str = "gumbel_sigmoid"
    low: float = 0.0
    high: float = 0.0
    clamp: float = 0.0

    @property
    def draws(self) -> bool:
        """Whether masks are random; else all samples are the same, and one does."""
        return self.name in ("gumbel_sigmoid", "hard_concrete")

    @property
    def binary(self) -> bool:
        """Whether masks while learning are 0 or 1; else they are values between."""
        return self.name in ("gumbel_sigmoid", "threshold", "top_k")

    @property
    def default_tau(self) -> float:
        """The published temperature."""
        return 2.0 / 3.0 if self.name == "hard_concrete" else 1.0

    def describe(self) -> dict[str, float]:
        """The numbers that mean something for this estimator, by name."""
        if self.name == "hard_concrete":
            return {"low": self.low, "high": self.high, "clamp": self.clamp}
        if self.name == "threshold":
            return {"value": self.low} | ({"inclusive": 1.0} if self.high else {})
        if self.name == "top_k":
            return {"fraction": self.low}
        return {}

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value:g}" for name, value in self.describe().items())
        return f"{self.name}({options})" if options else self.name


def _number(value: Any) -> float:
    """A number as it is, NaN for anything else, which fits no range."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return math.nan


NAMES = ("gumbel_sigmoid", "hard_concrete", "sigmoid", "threshold", "top_k")


def gumbel_sigmoid() -> Estimator:
    """Kept with probability sigmoid(logit), the gradient that of the soft mask (Csordás 2021)."""
    return Estimator("gumbel_sigmoid")


def hard_concrete(stretch: tuple[float, float] = (-0.1, 1.1), *, clamp: float = 0.0) -> Estimator:
    """The soft mask, stretched and cut off at 0 and 1 (Louizos et al. 2018).

    Args:
        stretch: the interval (gamma, zeta) of the paper, which contains [0, 1]; the estimator has
            it as `low` and `high`.
        clamp: the uniform numbers are clamped to [clamp, 1 - clamp], as several packages do.

    Raises:
        ValueError: for an interval that does not contain [0, 1], or a clamp outside [0, 1/2).
    """
    try:
        low, high = (float(end) for end in stretch)
    except (TypeError, ValueError):
        raise ValueError(f"stretch: expected two numbers (gamma, zeta), got {stretch!r}") from None
    if not (-math.inf < low <= 0.0 and 1.0 <= high < math.inf):
        raise ValueError(f"stretch: expected an interval that contains [0, 1], got {stretch!r}")
    if not 0.0 <= _number(clamp) < 0.5:
        raise ValueError(f"clamp: expected a number in [0, 1/2), got {clamp!r}")
    return Estimator("hard_concrete", low, high, float(clamp))


def sigmoid() -> Estimator:
    """sigmoid(logit / tau) without noise; tau falls while learning (Savarese et al. 2020)."""
    return Estimator("sigmoid")


def threshold(value: float = 0.0, *, inclusive: bool = False) -> Estimator:
    """Kept above a threshold, the gradient passed on as it is (Mallya et al. 2018).

    Args:
        value: the threshold; Piggyback has 5e-3, and logits that begin at 1e-2.
        inclusive: whether a logit equal to it is kept.

    Raises:
        ValueError: for a threshold that is not finite.
    """
    if not math.isfinite(_number(value)):
        raise ValueError(f"value: expected a finite number, got {value!r}")
    return Estimator("threshold", float(value), float(inclusive))


def top_k(fraction: float = 0.5) -> Estimator:
    """The largest logits of each tensor kept, the gradient passed on as it is (edge-popup).

    Of n logits, ``n - floor((1 - fraction) * n)`` are kept; of equal ones the first.

    Args:
        fraction: how much to keep, in [0, 1].

    Raises:
        ValueError: for a fraction outside [0, 1].

    Source: Ramanujan et al. 2020, "What's Hidden in a Randomly Weighted Neural Network?"
    """
    if not 0.0 <= _number(fraction) <= 1.0:
        raise ValueError(f"fraction: expected a number in [0, 1], got {fraction!r}")
    return Estimator("top_k", float(fraction))


_DEFAULTS = {
    "gumbel_sigmoid": gumbel_sigmoid(),
    "hard_concrete": hard_concrete(),
    "sigmoid": sigmoid(),
    "threshold": threshold(),
    "top_k": top_k(),
}
GUMBEL_SIGMOID = _DEFAULTS["gumbel_sigmoid"]


def resolve(estimator: str | Estimator) -> Estimator:
    """The estimator itself, or that of a name with its published numbers.

    Raises:
        ValueError: for an unknown name.
        TypeError: for something else.
    """
    if isinstance(estimator, Estimator):
        if estimator.name in _DEFAULTS:
            return estimator
    elif isinstance(estimator, str):
        found = _DEFAULTS.get(estimator)
        if found is not None:
            return found
    else:
        raise TypeError(
            f"estimator: expected a name or an Estimator, got {type(estimator).__name__}"
        )
    name = estimator.name if isinstance(estimator, Estimator) else estimator
    raise ValueError(f"estimator: expected one of {list(NAMES)}, got {name!r}")


def of_settings(settings: Mapping[str, Any]) -> Estimator:
    """The estimator that settings of `mask_model` describe, as mask files hold them.

    Raises:
        ValueError: for settings that describe none.
    """
    name = settings.get("estimator", "gumbel_sigmoid")
    if not isinstance(name, str):
        raise ValueError(f"estimator: expected a name, got {str(name)[:80]}")
    chosen = resolve(name)
    options = settings.get("estimator_options", {})
    if not isinstance(options, Mapping) or not all(
        isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
        for value in options.values()
    ):
        raise ValueError(f"estimator_options: expected numbers by name, got {str(options)[:80]}")
    numbers: dict[str, Any] = {
        _FIELDS.get(str(name), str(name)): float(value) for name, value in options.items()
    }
    if not numbers.keys() <= set(Estimator._fields[1:]):
        raise ValueError(f"estimator_options: unknown names among {list(options)[:8]}")
    return chosen._replace(**numbers)


# the names of `Estimator.describe` that are not those of its fields
_FIELDS = {"value": "low", "inclusive": "high", "fraction": "low"}


def kept_count(fraction: float, count: int) -> int:
    """How many of `count` logits top_k keeps."""
    return count - int((1.0 - fraction) * count)


def check_whole(estimator: Estimator, element_offset: int) -> None:
    """Raise where top_k would rank a part of the logits."""
    if estimator.name == "top_k" and element_offset:
        raise ValueError(
            "element_offset must be 0 for top_k, which ranks the logits of a whole tensor, "
            f"not {element_offset}"
        )


# what the schemas of the operations say of an estimator, last of the arguments that draw masks
SCHEMA = "int estimator, float low, float high, float clamp, bool antithetic"


def arguments(
    estimator: str | Estimator, antithetic: bool
) -> tuple[int, float, float, float, bool]:
    """The arguments of `SCHEMA`."""
    name, low, high, clamp = resolve(estimator)
    return NAMES.index(name), low, high, clamp, antithetic


def of_arguments(code: int, low: float, high: float, clamp: float) -> Estimator:
    """The inverse of `arguments`."""
    return Estimator(NAMES[code], low, high, clamp)
