"""The inverse-mask test and the half-mask test (arXiv 2010.02066)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..masks import MaskSet
from ..masks.convert import unwrapped

Evaluate = Callable[[nn.Module], Mapping[str, float]]
ExcludeIO = Literal["none", "fullmask", "ones"]


def inverse_mask(
    masks: Mapping[str, Tensor],
    *,
    exclude_io: ExcludeIO = "none",
    io: Iterable[str] = (),
    control: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The complement of a mask, tensor by tensor.

    Args:
        masks: bool tensors by parameter name.
        exclude_io: what the tensors named in `io` get: "none" the complement as all others,
            "fullmask" the control's mask, "ones" no mask. Where functions have inputs of their
            own, inverting the first layer breaks one trivially; these variants ask for the rest.
        io: names of the input and output tensors.
        control: mask of the whole task, needed for "fullmask".

    Returns:
        bool tensors under the same names.

    Raises:
        ValueError: an unknown variant, an unknown name in `io`, or "fullmask" without `control`.
    """
    if exclude_io not in ("none", "fullmask", "ones"):
        raise ValueError(f"exclude_io must be 'none', 'fullmask' or 'ones', got {exclude_io!r}")
    inverse = {name: ~mask for name, mask in masks.items()}
    if exclude_io == "none":
        return inverse
    io = list(io)
    unknown = [name for name in io if name not in inverse]
    if unknown:
        raise ValueError(f"io names no masked parameter: {', '.join(unknown)}")
    if exclude_io == "ones":
        return inverse | {name: torch.ones_like(masks[name]) for name in io}
    if control is None:
        raise ValueError("exclude_io='fullmask' needs the mask of the whole task as `control`")
    return inverse | {name: control[name] for name in io}


def early_half(names: Sequence[str], early: int | None = None) -> list[str]:
    """Names of the early half of L tensors in network order: the first ceil(L / 2).

    That is the study's choice for the addition / multiplication networks, layers 0-2 of 5,
    carried over to other depths (0-1 of 4, 0-1 of 3). For the double addition it took `early` = 2
    of 5.

    Raises:
        ValueError: `early` leaves one half empty although there are two tensors or more.
    """
    count = (len(names) + 1) // 2 if early is None else early
    if not 0 < count < max(len(names), 2):
        raise ValueError(f"early must be between 1 and {len(names) - 1}, got {count}")
    return list(names[:count])


def half_masks(
    masks: Mapping[str, Tensor], early: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The mask on its early half only, and on its late half only; the other half is kept whole.

    Args:
        masks: bool tensors in network order.
        early: how many tensors are early (default: see `early_half`).

    Returns:
        (early masked, late masked), each with all names.
    """
    chosen = set(early_half(list(masks), early))
    ones = {name: torch.ones_like(mask) for name, mask in masks.items()}
    return (
        {name: mask if name in chosen else ones[name] for name, mask in masks.items()},
        {name: ones[name] if name in chosen else mask for name, mask in masks.items()},
    )


class InverseMaskResult(NamedTuple):
    """Results with the mask and with its complement."""

    masked: dict[str, float]
    inverse: dict[str, float]


class HalfMaskResult(NamedTuple):
    """Results with the whole mask and with either half; a drop is whole minus half."""

    early: list[str]
    late: list[str]
    whole: dict[str, float]
    early_masked: dict[str, float]
    late_masked: dict[str, float]
    early_drop: dict[str, float]
    late_drop: dict[str, float]


def _evaluate(
    model: nn.Module, masks: Mapping[str, Tensor], evaluate: Evaluate
) -> dict[str, float]:
    return dict(evaluate(MaskSet.from_dict(masks).bake(model)))


def inverse_mask_test(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    evaluate: Evaluate,
    *,
    exclude_io: ExcludeIO = "none",
    io: Iterable[str] = (),
    control: Mapping[str, Tensor] | None = None,
) -> InverseMaskResult:
    """Evaluate a network with a mask and with its complement.

    If the mask holds the module of a function, its complement cannot compute that function; what
    the complement does to other functions tells whether they use the same weights. A weak drop
    does not prove the mask wrong: a wide network may hold a second copy.

    Args:
        model: the network, dense or masked. It is not changed.
        masks: bool tensors by parameter name.
        evaluate: called with a plain copy of the network; returns named numbers.
        exclude_io, io, control: see `inverse_mask`.
    """
    inverse = inverse_mask(masks, exclude_io=exclude_io, io=io, control=control)
    return InverseMaskResult(_evaluate(model, masks, evaluate), _evaluate(model, inverse, evaluate))


def half_mask_test(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    evaluate: Evaluate,
    *,
    early: int | None = None,
) -> HalfMaskResult:
    """Evaluate a network with its mask on the early half of the tensors only, and on the late half.

    The drop against the whole mask asks whether masked layers still speak the language of the
    unmasked ones.

    Args:
        model: the network, dense or masked. It is not changed.
        masks: bool tensors by parameter name, usually those of the control mask. Their order is
            that of the network's parameters, whatever that of the mapping.
        evaluate: called with a plain copy of the network; returns named numbers.
        early: how many tensors are early (default: the first half, rounded up).
    """
    parameters = unwrapped(model).named_parameters(remove_duplicate=False)
    names = [name for name, _ in parameters if name in masks]
    masks = {name: masks[name] for name in names}
    chosen = early_half(names, early)
    first, second = half_masks(masks, early)
    whole = _evaluate(model, masks, evaluate)
    early_masked = _evaluate(model, first, evaluate)
    late_masked = _evaluate(model, second, evaluate)
    return HalfMaskResult(
        early=chosen,
        late=[name for name in names if name not in chosen],
        whole=whole,
        early_masked=early_masked,
        late_masked=late_masked,
        early_drop={key: whole[key] - early_masked[key] for key in whole},
        late_drop={key: whole[key] - late_masked[key] for key in whole},
    )
