"""`masked_conv_transpose2d` in plain PyTorch: one masked product per group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .._reference import product_per_group


def convolve_turned(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """A plain transposed convolution with a weight [out / groups, in, *kernel]."""
    before_h, after_h, before_w, after_w = padding
    weight = weight.transpose(0, 1)
    y = F.conv_transpose2d(x, weight, bias, tuple(stride), 0, 0, groups, tuple(dilation))
    return y[:, :, before_h : y.shape[2] - after_h, before_w : y.shape[3] - after_w]


def masked_conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None = None,
    bias_logits: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    **draw: Any,
) -> Tensor:
    """See `modmask_kernels.ops.masked_conv_transpose2d`; arguments are assumed valid.

    `padding`: rows cut off before and after the first spatial dimension, then the second.
    """

    def product(part: Tensor, masked: Tensor, bias: Tensor | None) -> Tensor:
        options = (stride, padding, dilation, groups)
        return convolve_turned(*options, part, masked.transpose(0, 1), bias)

    return product_per_group(product, x, weight, logits, bias, bias_logits, **draw)
