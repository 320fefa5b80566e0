"""`masked_conv2d` in plain PyTorch: one masked convolution per group."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .._reference import product_per_group


def masked_conv2d(
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
    seed: Tensor | None = None,
    tensor_id: int = 0,
    bias_tensor_id: int = 1,
    sample_offset: int = 0,
    element_offset: int = 0,
    samples: int = 1,
    tau: float = 1.0,
    hard: bool = True,
) -> Tensor:
    """See `modmask_kernels.ops.masked_conv2d`; arguments are assumed valid.

    `padding`: zeros before and after the first spatial dimension, then the second.
    """
    before_h, after_h, before_w, after_w = padding

    def convolve(part: Tensor, masked: Tensor, bias: Tensor | None) -> Tensor:
        padded = F.pad(part, (before_w, after_w, before_h, after_h))
        return F.conv2d(padded, masked, bias, tuple(stride), 0, tuple(dilation), groups)

    return product_per_group(
        convolve,
        x,
        weight,
        logits,
        bias,
        bias_logits,
        seed=seed,
        tensor_id=tensor_id,
        bias_tensor_id=bias_tensor_id,
        sample_offset=sample_offset,
        element_offset=element_offset,
        samples=samples,
        tau=tau,
        hard=hard,
    )
