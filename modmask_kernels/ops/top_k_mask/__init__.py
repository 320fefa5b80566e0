"""`top_k_mask`: the k largest of many scores, over many tensors, without a sort or a copy."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from ... import _native
from .. import _check, _library
from .._masked_product import FUSED_DTYPES, uses_kernel
from ..sample_mask import pack_bits
from . import gpu, reference


def _reference(scores: Sequence[Tensor], k: int, largest: bool, packed: bool) -> list[Tensor]:
    if any(bool(t.isnan().any()) for t in scores):
        raise RuntimeError("scores must not hold NaN")
    masks = reference.top_k_mask(scores, k, largest)
    return [pack_bits(mask) for mask in masks] if packed else masks


_library.define(
    "top_k_mask(Tensor[] scores, SymInt k, bool largest, bool packed) -> Tensor[]", _reference
)
gpu.serve(_reference)


@_library.fake("top_k_mask")
def _fake(scores: Sequence[Tensor], k: int, largest: bool, packed: bool) -> list[Tensor]:
    if packed:
        return [t.new_empty((t.numel() + 7) // 8, dtype=torch.uint8) for t in scores]
    return [t.new_empty(t.shape, dtype=torch.bool) for t in scores]


@overload
def top_k_mask(scores: Tensor, k: int, *, largest: bool = True, packed: bool = False) -> Tensor: ...
@overload
def top_k_mask(
    scores: Sequence[Tensor], k: int, *, largest: bool = True, packed: bool = False
) -> list[Tensor]: ...
def top_k_mask(
    scores: Tensor | Sequence[Tensor], k: int, *, largest: bool = True, packed: bool = False
) -> Tensor | list[Tensor]:
    """Masks of the k largest scores over all tensors together, exactly.

    The k-th largest score is found by counting digits of the scores in three passes (radix
    selection), so that nothing is sorted or copied: beside the masks the kernel needs a few
    kilobytes, whatever the number of scores.

    Args:
        scores: a tensor or several, of any shapes, all float32, all bfloat16 or all float16 (fused
            on the CPU), or all float64 (reference). NaN is an error.
        k: how many scores to keep, from 0 to their number.
        largest: False keeps the k smallest.
        packed: 1 bit per score as from `pack_bits`, instead of bool.

    Returns:
        For a tensor its bool mask, for several a list of masks, with exactly k ones in all. Of
        equal scores the first are kept, in the order of the tensors and row-major within each; -0
        and 0 are equal. With `packed`, uint8 tensors `[ceil(numel / 8)]`.

    Raises:
        ValueError: no tensors, k out of range, NaN, or several devices.
        TypeError: dtypes that differ or do not fit; k is no integer.

    Equivalent to::

        flat = torch.cat([t.flatten() for t in scores])
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept[torch.sort(flat, descending=largest, stable=True).indices[:k]] = True
        return [part.view(t.shape) for part, t in zip(kept.split(sizes), scores)]
    """
    several = [scores] if isinstance(scores, Tensor) else list(scores)
    if not several:
        raise ValueError("scores must hold at least one tensor")
    for n, t in enumerate(several):
        _check.check_tensors(**{f"scores[{n}]": t})
        if t.dtype not in (*FUSED_DTYPES, torch.float64):
            raise TypeError(f"scores must be float32, float64, bfloat16 or float16, not {t.dtype}")
        if t.dtype != several[0].dtype:
            raise TypeError(
                f"scores must have one dtype, not {several[0].dtype} and, for scores[{n}], "
                f"{t.dtype}"
            )
        _check.check_device(t, f"scores[{n}]", several[0], "scores[0]")
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"k must be an integer, not {k!r}") from None
    total = sum(t.numel() for t in several)
    if not 0 <= k <= total:
        raise ValueError(f"k must be from 0 to the number of scores, {total}, not {k}")
    several = [t.detach() for t in several]
    masks = (
        _selected(several, k, largest, packed)
        if _library.traced()
        else _checked(several, k, largest, packed)
    )
    return masks[0] if isinstance(scores, Tensor) else masks


def _selected(scores: list[Tensor], k: int, largest: bool, packed: bool) -> list[Tensor]:
    first = scores[0]
    fused = uses_kernel(first) or (
        first.is_cuda and first.dtype in FUSED_DTYPES and _native.cuda_loaded()
    )
    operation = torch.ops.modmask.top_k_mask.default if fused else _reference
    masks: list[Tensor] = operation(scores, k, largest, packed)
    return masks


def _checked(scores: list[Tensor], k: int, largest: bool, packed: bool) -> list[Tensor]:
    """With an error that says where NaN is."""
    try:
        return _selected(scores, k, largest, packed)
    except RuntimeError as error:
        if "must not hold NaN" not in str(error):
            raise
        bad = next(n for n, t in enumerate(scores) if bool(t.isnan().any()))
        raise ValueError(f"scores must not hold NaN, but scores[{bad}] does") from None
