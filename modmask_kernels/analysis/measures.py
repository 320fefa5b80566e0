"""Overlap, sharing and size of masks (arXiv 2010.02066 and its official implementation).

A mask of one tensor is a bool tensor, True where the weight is kept. A mask of a model is a mapping
from parameter name to such a tensor; a `MaskSet` is one. Counts are exact integers, results are
Python floats. The edges are defined everywhere: two empty masks have IoU 1, an empty mask has IoMin
1 with anything and shares 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

Masks = Mapping[str, Tensor]


def _count(mask: Tensor) -> int:
    return int(torch.count_nonzero(mask))


def _check_tensor(mask: object, name: str) -> None:
    if not isinstance(mask, Tensor):
        hint = (
            "; for the masks of a whole model there are total_shared, total_remaining, stability "
            "(IoU), overall_io_min and MaskSet.density()"
        )
        raise TypeError(
            f"{name} must be the mask of one tensor, got {type(mask).__name__}"
            + (hint if isinstance(mask, Mapping) else "")
        )


def _check(a: Tensor, b: Tensor, first: str = "a", second: str = "b") -> None:
    for name, mask in ((first, a), (second, b)):
        _check_tensor(mask, name)
        if mask.dtype != torch.bool:
            raise TypeError(f"{name} must be a bool tensor, got {mask.dtype}")
    if a.shape != b.shape:
        raise ValueError(
            f"{first} and {second} must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def _names(masks: Sequence[Masks], exclude: Iterable[str] = ()) -> list[str]:
    """Parameter names that all masks have in common, which must be all that each has."""
    for one in masks:
        if not isinstance(one, Mapping):
            raise TypeError(
                f"expected the masks of a model by parameter name, got {type(one).__name__}"
            )
    names = list(masks[0])
    for other in masks[1:]:
        if set(other) != set(names):
            odd = sorted(set(names) ^ set(other))
            raise ValueError(f"the masks cover different parameters: {', '.join(odd)}")
    left_out = set(exclude)
    unknown = left_out - set(names)
    if unknown:
        raise ValueError(f"exclude names no masked parameter: {', '.join(sorted(unknown))}")
    return [name for name in names if name not in left_out]


def density(mask: Tensor) -> float:
    """Kept fraction of one tensor; 0 for a tensor without elements.

    Raises:
        TypeError: for the masks of a whole model; a `MaskSet` has a method `density`.
    """
    _check_tensor(mask, "mask")
    return _count(mask) / max(mask.numel(), 1)


def kept_counts(masks: Masks) -> dict[str, tuple[int, int]]:
    """(kept, total) of every tensor."""
    return {name: (_count(mask), mask.numel()) for name, mask in masks.items()}


def iou(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two masks of one tensor; 1 if both are empty.

    Raises:
        TypeError: a mask is not bool.
        ValueError: the shapes differ.

    Equivalent to:
        (a & b).sum() / (a | b).sum()
    """
    _check(a, b)
    union = _count(a | b)
    return _count(a & b) / union if union else 1.0


def io_min(a: Tensor, b: Tensor) -> float:
    """Intersection over the smaller mask; 1 if one is a subset of the other, or empty.

    Raises:
        TypeError: a mask is not bool.
        ValueError: the shapes differ.

    Equivalent to:
        (a & b).sum() / min(a.sum(), b.sum())
    """
    _check(a, b)
    smaller = min(_count(a), _count(b))
    return _count(a & b) / smaller if smaller else 1.0


def chance_iou(p: float, q: float) -> float:
    """Expected IoU of two independent masks with kept fractions p and q: pq / (p + q - pq).

    Expected counts are divided, which is exact for large tensors. 1 if both are empty, as in `iou`.
    """
    union = p + q - p * q
    return p * q / union if union else 1.0


def chance_io_min(p: float, q: float) -> float:
    """Expected IoMin of two independent masks with kept fractions p and q: max(p, q).

    Expected counts are divided, pq / min(p, q). 1 if one is empty, as in `io_min`.
    """
    return max(p, q) if min(p, q) > 0 else 1.0


def _union(masks: Sequence[Tensor], like: Tensor) -> Tensor:
    return reduce(torch.logical_or, masks, torch.zeros_like(like))


def _several(others: Sequence[Any]) -> Sequence[Any]:
    """Those masks; TypeError for the masks of one model."""
    if isinstance(others, Mapping):
        raise TypeError(f"others: expected a list of masks, got one {type(others).__name__}")
    return others


def shared(mask: Tensor, others: Sequence[Tensor]) -> float:
    """Fraction of a mask's weights that at least one other mask keeps too; 0 for an empty mask.

    Raises:
        TypeError: a mask is not bool.
        ValueError: the shapes differ.

    Equivalent to:
        (mask & torch.stack(others).any(0)).sum() / max(mask.sum(), 1)
    """
    _check_tensor(mask, "mask")
    for other in _several(others):
        _check(mask, other, "mask", "others")
    return _count(mask & _union(others, mask)) / max(_count(mask), 1)


def transfer_sharing(mask: Tensor, earlier: Sequence[Tensor]) -> float:
    """Fraction of a task's mask that earlier tasks used already: `shared` with their masks."""
    return shared(mask, earlier)


def total_shared(masks: Masks, others: Sequence[Masks]) -> float:
    """Fraction of all weights of a mask, over all tensors, that another mask keeps too.

    This is the "total shared %" of the study (as a fraction): the denominator is the mask's own
    count. 0 for an empty mask.
    """
    kept = both = 0
    for name in _names([masks, *_several(others)]):
        for other in others:
            _check(masks[name], other[name], "masks", "others")
        kept += _count(masks[name])
        both += _count(masks[name] & _union([other[name] for other in others], masks[name]))
    return both / max(kept, 1)


def chance_total_shared(masks: Masks, other: Masks) -> float:
    """Expected `total_shared` if `other` kept each tensor's fraction of weights independently.

    The kept fractions of `other`, weighted by the counts of `masks`; 0 for an empty mask.
    """
    kept = expected = 0.0
    for name in _names([masks, other]):
        count = _count(masks[name])
        kept += count
        expected += count * density(other[name])
    return expected / kept if kept else 0.0


def shared_of_union(masks: Masks, others: Sequence[Masks]) -> float:
    """Shared weights of a mask over the union of *all* masks (the reference's "all/shared").

    The denominator differs from that of `total_shared`. 0 if all masks are empty.
    """
    union = both = 0
    for name in _names([masks, *_several(others)]):
        rest = _union([other[name] for other in others], masks[name])
        both += _count(masks[name] & rest)
        union += _count(masks[name] | rest)
    return both / max(union, 1)


def remaining(control: Tensor, mask: Tensor) -> float:
    """Fraction of the control mask's weights that `mask` keeps; 0 for an empty control mask."""
    _check(control, mask, "control", "mask")
    return _count(control & mask) / max(_count(control), 1)


def total_remaining(control: Masks, masks: Masks) -> float:
    """`remaining` over all tensors: the ratio of the sums."""
    return total_shared(control, [masks])


def removed_per_row(control: Tensor, mask: Tensor) -> Tensor:
    """Percentage of the control's weights that `mask` lacks, for every row (output unit).

    Args:
        control: bool [rows, ...].
        mask: bool of the same shape.

    Returns:
        float64 [rows]; 0 for a row without control weights.
    """
    _check(control, mask, "control", "mask")
    rows = control.flatten(1) if control.dim() > 1 else control.unsqueeze(1)
    lost = (rows & ~mask.reshape(rows.shape)).sum(1).to(torch.float64)
    return 100 * lost / rows.sum(1).clamp(min=1)


def stability(a: Masks, b: Masks, exclude: Iterable[str] = ()) -> float:
    """Overall IoU of two masks of a model: the sum of intersections over the sum of unions.

    Two masks learned for the same data with other noise say how high the IoU can be at all.

    Args:
        a: a mask of a model.
        b: another one, of the same parameters.
        exclude: parameter names to leave out, such as an output layer that both masks share.
    """
    union = both = 0
    for name in _names([a, b], exclude):
        _check(a[name], b[name])
        both += _count(a[name] & b[name])
        union += _count(a[name] | b[name])
    return both / union if union else 1.0


def chance_stability(a: Masks, b: Masks, exclude: Iterable[str] = ()) -> float:
    """Expected `stability` of two independent masks with the kept fractions of `a` and `b`.

    Expected counts are summed over the tensors and divided; for one tensor it is `chance_iou`.
    """
    union = both = 0.0
    for name in _names([a, b], exclude):
        _check(a[name], b[name])
        p, q, size = density(a[name]), density(b[name]), a[name].numel()
        both += size * p * q
        union += size * (p + q - p * q)
    return both / union if union else 1.0


def chance_overall_io_min(a: Masks, b: Masks, exclude: Iterable[str] = ()) -> float:
    """Expected `overall_io_min` of two independent masks with the kept fractions of `a` and `b`.

    Expected counts are summed over the tensors and divided; for one tensor it is `chance_io_min`.
    """
    kept_a = kept_b = both = 0.0
    for name in _names([a, b], exclude):
        _check(a[name], b[name])
        p, q, size = density(a[name]), density(b[name]), a[name].numel()
        both += size * p * q
        kept_a += size * p
        kept_b += size * q
    smaller = min(kept_a, kept_b)
    return both / smaller if smaller else 1.0


def overall_io_min(a: Masks, b: Masks, exclude: Iterable[str] = ()) -> float:
    """Overall IoMin: the sum of intersections over the smaller sum of kept weights."""
    kept_a = kept_b = both = 0
    for name in _names([a, b], exclude):
        _check(a[name], b[name])
        both += _count(a[name] & b[name])
        kept_a += _count(a[name])
        kept_b += _count(b[name])
    smaller = min(kept_a, kept_b)
    return both / smaller if smaller else 1.0
