"""Masks over whole outputs or whole inputs: they scale, and the product is a plain one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import estimators
from ._group_affine import group_affine
from .estimators import GUMBEL_SIGMOID, Estimator
from .sample_mask import sample_mask
from .sample_mask.reference import mask_of_sample


def group_masks(
    logits: Tensor,
    tensor_id: int,
    element_offset: int,
    seed: Tensor | None,
    sample_offset: int,
    samples: int,
    tau: float,
    hard: bool,
    estimator: Estimator = GUMBEL_SIGMOID,
    antithetic: bool = False,
) -> Tensor:
    """The masks of every group, [sets * samples, logits of one set], of `logits` [sets, ...]."""
    logits = logits.flatten(1)
    if seed is None:
        return torch.stack(
            [
                mask_of_sample(row, seed=None, tau=tau, hard=hard, estimator=estimator)
                for row in logits
            ]
        )
    masks = sample_mask(
        logits,
        seed=seed.expand(logits.shape[0]),
        samples=samples,
        tau=tau,
        hard=hard,
        tensor_id=tensor_id,
        sample_offset=sample_offset,
        element_offset=element_offset,
        estimator=estimator,
        antithetic=antithetic,
    )
    return masks.transpose(0, 1).flatten(0, 1)


def _of_groups(t: Tensor, groups: int) -> Tensor:
    return t.reshape(groups, t.shape[0] // groups, *t.shape[1:])


def _along(values: Tensor, dim: int, dims: int) -> Tensor:
    """values [groups, n] against tensors of `dims` dimensions, groups and rows first."""
    shape = [values.shape[0], *[1] * (dims - 1)]
    shape[dim] = values.shape[1]
    return values.reshape(shape)


def scaled_product(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    side: int,
    channel_dim: int,
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    tensor_id: int,
    bias_tensor_id: int,
    sample_offset: int,
    element_offset: int,
    samples: int,
    tau: float,
    hard: bool,
    code: int,
    low: float,
    high: float,
    clamp: float,
    antithetic: bool,
) -> Tensor:
    """`product_per_group` where the mask scales the outputs (side 0) or the inputs (side 1).

    Args:
        product: of x, weight and bias, for the whole batch.
        side: see `scaled_side`.
        channel_dim: of the outputs in the result, and of the inputs in x; the batch is dimension 0.
    """
    if logits.dim() == weight.dim():
        logits = logits.unsqueeze(0)
    estimator = estimators.of_arguments(code, low, high, clamp)
    draw = (seed, sample_offset, samples, tau, hard, estimator, antithetic)
    masks = group_masks(logits, tensor_id, element_offset, *draw)
    groups = masks.shape[0]

    def scale(t: Tensor) -> Tensor:
        size, n = t.shape[channel_dim], weight.shape[side]
        values = masks.repeat_interleave(n // masks.shape[1], 1) if masks.shape[1] else masks
        # a grouped convolution has its inputs once per group
        values = values.repeat(1, size // n) if n else values
        return group_affine(t, values, None, channel_dim)

    if side == 1:
        x = scale(x)
    own_bias = bias if side == 1 and bias_logits is None else None
    y = product(x, weight, own_bias)
    if side == 0:
        y = scale(y)
    if bias is None or own_bias is not None:
        return y
    dim = channel_dim % y.dim() + 1
    if bias_logits is None:
        values = bias.expand(1, -1)
        return (y.unsqueeze(0) + _along(values, dim, y.dim() + 1)).squeeze(0)
    if bias_logits.dim() == 1:
        bias_logits = bias_logits.unsqueeze(0)
    values = bias * group_masks(bias_logits, bias_tensor_id, 0, *draw).to(bias.dtype)
    return (_of_groups(y, groups) + _along(values, dim, y.dim() + 1)).reshape(y.shape)
