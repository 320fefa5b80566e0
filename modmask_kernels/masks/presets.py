"""The conventions of published packages as options of `mask_model`.

They differ in the noise, the value of a mask without noise, and the initial logits, so that equal
words give different masks. `docs/estimators.md` has the formulas side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..ops import estimators


def _logit(p: float) -> float:
    return math.log(p / (1.0 - p))


def _hard_concrete(clamp: float, init: float, **options: Any) -> dict[str, Any]:
    rule = estimators.hard_concrete((-0.1, 1.1), clamp=clamp)
    return {"estimator": rule, "tau": 2.0 / 3.0, "init": init, **options}


# name -> options of mask_model, from the share of masks that the package keeps at first
_PRESETS: dict[str, tuple[float, Callable[[float], dict[str, Any]]]] = {
    # hard Gumbel-sigmoid samples; evaluation keeps logits >= 0, set operations > 0
    "csordas2021": (
        1.0 / (1.0 + math.exp(-2.0)),
        lambda p: {
            "estimator": estimators.gumbel_sigmoid(),
            "tau": 1.0,
            "init": _logit(p),
            "inclusive": True,
        },
    ),
    # subnetwork-probing; the gate without noise, not its probability, is p at first
    "cao2021": (0.9, lambda p: _hard_concrete(1e-4, _logit((p + 0.1) / 1.2), eval_tau=1.0)),
    # binary in evaluation: the stretched gate above 1/2, which is logit > 0
    "neurosurgeon": (
        0.5,
        lambda p: _hard_concrete(1e-4, _logit(min(max(p, 1e-4), 0.9999)), eval_mode="threshold"),
    ),
    # uniform numbers of (1e-6, 1 - 1e-6) there, clamped to it here
    "louizos2018": (0.5, lambda p: _hard_concrete(1e-6, _logit(p), eval_tau=1.0)),
    # the gate without noise has the temperature too
    "l0-python": (0.5, lambda p: _hard_concrete(1e-6, _logit(p), eval_tau=2.0 / 3.0)),
    # logits of 10 with noise of 0.01 there; `expected_count_masks` is what it evaluates
    "edge-pruning": (
        1.0 / (1.0 + math.exp(-10.0)),
        lambda p: _hard_concrete(1e-6, _logit(p), eval_mode="threshold"),
    ),
    "piggyback": (
        1.0,
        lambda p: {"estimator": estimators.threshold(5e-3), "init": 1e-2},
    ),
    # which ranks |scores|; here scores are ranked as they are
    "hidden-networks": (
        0.5,
        lambda p: {"estimator": estimators.top_k(p), "init": 0.0},
    ),
    # without that package's factor 1 / sigmoid(initial logit) on the weights
    "continuous-sparsification": (
        0.5,
        lambda p: {"estimator": estimators.sigmoid(), "tau": 1.0, "init": _logit(p)},
    ),
}
PRESETS = tuple(_PRESETS)


def preset(name: str, keep: float | None = None) -> dict[str, Any]:
    """Options of `mask_model` that follow the convention of a published package.

    Args:
        name: one of `PRESETS`.
        keep: what the package calls the initial share of kept weights (`mask_p`,
            `mask_init_percentage`, one minus `droprate_init`), for "hidden-networks" the share that
            is kept throughout; None is its default. "piggyback" has none.

    Returns:
        keyword arguments, as in ``mask_model(model, **preset("cao2021"))``.

    Raises:
        ValueError: for an unknown name, or a share outside (0, 1).
    """
    if name not in _PRESETS:
        raise ValueError(f"name: expected one of {list(PRESETS)}, got {name!r}")
    usual, options = _PRESETS[name]
    share = usual if keep is None else keep
    if keep is not None and not 0.0 < keep < 1.0:
        raise ValueError(f"keep: expected a number between 0 and 1, got {keep!r}")
    return options(share)
