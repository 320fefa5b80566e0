"""`masked_conv2d` in plain PyTorch: one masked convolution per group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from .._reference import product_per_group
from ..estimators import GUMBEL_SIGMOID, Estimator


def convolve(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """A plain convolution with the padding of `masked_conv2d` below."""
    before_h, after_h, before_w, after_w = padding
    around = (before_h, before_w)
    if (after_h, after_w) != around:
        x = F.pad(x, (before_w, after_w, before_h, after_h))
        around = (0, 0)
    return F.conv2d(x, weight, bias, tuple(stride), around, tuple(dilation), groups)


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
    n_of_m: tuple[int, int] | None = None,
    estimator: Estimator = GUMBEL_SIGMOID,
    antithetic: bool = False,
) -> Tensor:
    """See `modmask_kernels.ops.masked_conv2d`; arguments are assumed valid.

    `padding`: zeros before and after the first spatial dimension, then the second.
    """
    return product_per_group(
        partial(convolve, stride, padding, dilation, groups),
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
        n_of_m=n_of_m,
        estimator=estimator,
        antithetic=antithetic,
    )
