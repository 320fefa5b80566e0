"""`masked_conv_transpose2d` in plain PyTorch: one masked product per group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .._reference import product_per_group


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
    before_h, after_h, before_w, after_w = padding

    def product(part: Tensor, masked: Tensor, bias: Tensor | None) -> Tensor:
        y = F.conv_transpose2d(part, masked, bias, tuple(stride), 0, 0, groups, tuple(dilation))
        return y[:, :, before_h : y.shape[2] - after_h, before_w : y.shape[3] - after_w]

    return product_per_group(product, x, weight, logits, bias, bias_logits, **draw)
