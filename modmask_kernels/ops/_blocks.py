"""Logits smaller than their weight: each covers a block of neighbouring weights.

In every dimension the size of the logits divides that of the weight; a block is as long as the
quotient. Blocks lie side by side from the first weight on, in the order of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def divides(small: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether logits of shape `small` fit a weight of shape `shape`."""
    return len(small) == len(shape) and all(
        n == size or (n > 0 and size % n == 0) for n, size in zip(small, shape, strict=True)
    )


def _split(shape: Sequence[int], small: Sequence[int], within: bool) -> list[int]:
    """(blocks, size of a block) of every dimension, one after the other."""
    return [
        part
        for size, n in zip(shape, small, strict=True)
        for part in (n, (size // n if n else 1) if within else 1)
    ]


def times_blocks(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight * mask`, each value of `mask` for its block; the mask is not expanded in memory."""
    if mask.shape == weight.shape:
        return weight * mask
    blocks = weight.reshape(_split(weight.shape, mask.shape, True))
    return (blocks * mask.reshape(_split(mask.shape, mask.shape, False))).reshape(weight.shape)


def expand_blocks(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask at the size of the weight."""
    if mask.shape == torch.Size(shape):
        return mask
    thin = mask.reshape(_split(mask.shape, mask.shape, False))
    return thin.expand(_split(shape, mask.shape, True)).reshape(list(shape))


def scaled_side(x: Tensor, weight: Tensor, logits: Tensor) -> int | None:
    """The dimension of the weight that all masks scale as a whole, or None.

    0: every logit covers whole outputs, whose mask scales the result; 1: whole inputs, whose mask
    scales x. The product itself is then a plain one. Half precision on the CPU goes without this:
    the kernels sum in float32, while a plain product rounds what the gradient of the logits needs.
    """
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        return None
    small = logits.shape[-weight.dim() :]
    if small == weight.shape:
        return None
    if math.prod(small[1:]) == 1:
        return 0
    return 1 if small[0] == 1 and math.prod(small[2:]) == 1 else None


def n_largest(scores: Tensor, n: int, m: int) -> Tensor:
    """The n largest of every m consecutive scores along dimension 1, as a bool tensor.

    Of equal scores the first counts as larger; NaN is the smallest.
    """
    groups = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    groups = groups.movedim(1, -1)
    shape = groups.shape
    groups = groups.reshape(*shape[:-1], shape[-1] // m, m)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) < n).reshape(shape).movedim(-1, 1)
