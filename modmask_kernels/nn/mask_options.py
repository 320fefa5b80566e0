"""The options of every masked layer, beside those of its plain counterpart."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, TypeVar, cast

from .granularity import Granularity

Method = TypeVar("Method", bound=Callable[..., Any])


class MaskOptions(TypedDict, total=False):
    """What every masked layer and its `from_dense` take beside the arguments of the plain layer.

    Keys, all optional:
        sets: number of mask sets, or their names. 1 by default.
        samples: mask samples per batch and set, in the modes "sample" and "soft". 1 by default.
        tau: temperature of the surrogate gradient and of soft masks. 1.0 by default.
        mask_bias: whether the biases stand under masks too. False by default; True is an error
            for a layer without bias, and ignored by `from_dense` where there is none.
        init: initial value of all logits. 2.0 by default: sigmoid(2.0) = 0.88 is kept at first.
        tensor_id: number of the first masked parameter in its model; the others follow it. It
            selects the stream of noise, so two parameters that share one seed need different
            numbers. 0 by default.
        granularity: what one logit covers, "weight", "row", "column" or others: see `Granularity`
            and docs/granularity.md. A masked bias always has one logit per value. "weight" by
            default.
    """

    sets: int | Sequence[str]
    samples: int
    tau: float
    mask_bias: bool
    init: float
    tensor_id: int
    granularity: Granularity


DEFAULTS: MaskOptions = {
    "sets": 1,
    "samples": 1,
    "tau": 1.0,
    "mask_bias": False,
    "init": 2.0,
    "tensor_id": 0,
    "granularity": "weight",
}


# what a layer has beside its options, for whoever expects it among them
_ATTRIBUTES = ("estimator", "mode", "eval_mode", "eval_tau", "antithetic", "inclusive", "batch_dim")


def with_defaults(options: MaskOptions, layer: str) -> MaskOptions:
    """All options; TypeError names those that the class `layer` of layers does not have."""
    unknown = sorted(options.keys() - DEFAULTS.keys())
    if unknown:
        settable = [f"layer.{name}" for name in unknown if name in _ATTRIBUTES]
        hint = f"; set {' and '.join(settable)} of the finished layer" if settable else ""
        raise TypeError(
            f"{layer}: expected arguments of the plain layer, or {', '.join(DEFAULTS)}, "
            f"got {', '.join(map(repr, unknown))}{hint}"
        )
    return {**DEFAULTS, **options}


def takes_mask_options(method: Method) -> Method:
    """Let `help` and `inspect.signature` show each mask option, instead of ``**options``."""
    signature = inspect.signature(method)
    *shown, _ = signature.parameters.values()
    for name, default in DEFAULTS.items():
        annotation = MaskOptions.__annotations__[name].__forward_arg__
        shown.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
        )
    cast(Any, method).__signature__ = signature.replace(parameters=shown)
    return method
