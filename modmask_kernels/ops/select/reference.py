"""`select_linear` and `select_conv2d` in plain PyTorch: one masked product per set that occurs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sample_mask import unpack_bits


def _per_set(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    masks: Tensor,
    row_sets: Tensor,
    bias: Tensor | None,
    bias_masks: Tensor | None,
) -> Tensor:
    parts, rows = [], []
    for s in torch.unique(row_sets).tolist():
        rows.append((row_sets == s).nonzero().squeeze(1))
        masked = weight * unpack_bits(masks[s], weight.shape)
        b = bias
        if bias is not None and bias_masks is not None:
            b = bias * unpack_bits(bias_masks[s], bias.shape)
        parts.append(product(x[rows[-1]], masked, b))
    if not parts:  # an empty batch
        return product(x, weight, bias)
    y = torch.cat(parts)
    return y.new_empty(y.shape).index_copy(0, torch.cat(rows), y)


def select_linear(
    x: Tensor,
    weight: Tensor,
    masks: Tensor,
    row_sets: Tensor,
    bias: Tensor | None = None,
    bias_masks: Tensor | None = None,
) -> Tensor:
    """See `modmask_kernels.ops.select_linear`; arguments are assumed valid."""
    return _per_set(F.linear, x, weight, masks, row_sets, bias, bias_masks)


def select_conv2d(
    x: Tensor,
    weight: Tensor,
    masks: Tensor,
    row_sets: Tensor,
    bias: Tensor | None = None,
    bias_masks: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """See `modmask_kernels.ops.select_conv2d`; arguments are assumed valid.

    `padding`: zeros before and after the first spatial dimension, then the second.
    """
    before_h, after_h, before_w, after_w = padding

    def convolve(part: Tensor, masked: Tensor, bias: Tensor | None) -> Tensor:
        padded = F.pad(part, (before_w, after_w, before_h, after_h))
        return F.conv2d(padded, masked, bias, tuple(stride), 0, tuple(dilation), groups)

    return _per_set(convolve, x, weight, masks, row_sets, bias, bias_masks)
