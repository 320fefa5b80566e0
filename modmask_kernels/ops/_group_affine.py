"""Channels scaled and shifted by the parameters of their group.

Masks over the parameters of a normalisation, or over whole inputs or outputs of a layer, come to
this. The parameters of all groups are few; what is read is the batch, and what their gradients need
are its sums.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _native
from . import _library
from ._masked_product import FUSED_DTYPES

for _suffix in ("", "_cuda"):  # what a device has no kernels for goes to PyTorch
    _library.define_on_cuda(
        f"group_affine{_suffix}(Tensor x, Tensor scale, Tensor? shift) -> Tensor"
    )
    _library.define_on_cuda(
        f"group_affine_backward{_suffix}(Tensor dy, Tensor x, Tensor scale, bool need_x, "
        "bool need_scale, bool need_shift) -> (Tensor, Tensor, Tensor)"
    )


def _values(t: Tensor, like: Tensor) -> Tensor:
    """[groups, channels] against [groups, rows, channels, inner]."""
    return t.to(like.dtype)[:, None, :, None]


def _forward(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    y: Tensor
    if _native.cuda_unserved(x.device) is None:
        y = torch.ops.modmask.group_affine_cuda(x, scale, shift)
        return y
    y = x * _values(scale, x)
    return y.contiguous() if shift is None else y + _values(shift, x)


def _gradients(
    dy: Tensor, x: Tensor, scale: Tensor, need_x: bool, need_scale: bool, need_shift: bool
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...]
    if _native.cuda_unserved(dy.device) is None:
        found = torch.ops.modmask.group_affine_backward_cuda(
            dy, x, scale, need_x, need_scale, need_shift
        )
        return found
    none, wide = dy.new_empty(0), dy.to(scale.dtype)
    return (
        dy * _values(scale, dy) if need_x else none,
        (wide * x).sum((1, 3)) if need_scale else none.to(scale.dtype),
        wide.sum((1, 3)) if need_shift else none.to(scale.dtype),
    )


_library.implement("group_affine", "CUDA", _forward)
_library.implement("group_affine_backward", "CUDA", _gradients)


@_library.fake("group_affine")
def _fake(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_library.fake("group_affine_backward")
def _backward_fake(
    dy: Tensor, x: Tensor, scale: Tensor, need_x: bool, need_scale: bool, need_shift: bool
) -> tuple[Tensor, ...]:
    return tuple(
        t.new_empty(t.shape if need else 0)
        for t, need in ((dy, need_x), (scale, need_scale), (scale, need_shift))
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, _ = inputs
    # x is read for the gradient of scale only
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else x.new_empty(0), scale)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    x = x if needs[1] else dy  # of which only the dtype is asked for
    found = _differentiate(dy, x, scale, *needs)
    return tuple(d if need else None for d, need in zip(found, needs, strict=True))


_differentiate = _library.differentiable_once("group_affine_backward")
_operation = _library.differentiable("group_affine", _setup_context, _backward)


class _Scale(torch.autograd.Function):
    """`t * values`, whose gradient of `values` is summed in float32 or better."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, values: Tensor) -> Tensor:
        return t * values.to(t.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        t, values = ctx.saved_tensors
        need_t, need_values = ctx.needs_input_grad
        dt = dy * values.to(dy.dtype) if need_t else None
        dvalues = None
        if need_values:
            dvalues = (dy.to(values.dtype) * t).sum_to_size(values.shape)
        return dt, dvalues


def unserved(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no kernel serves an input like this one, and plain PyTorch does, or None."""
    if device.type != "cuda":
        return "plain PyTorch on this device"
    if dtype not in FUSED_DTYPES:
        return f"no fused kernel for {dtype}"
    return None if _native.cuda_loaded() else "the CUDA kernels are absent or ruled out"


def group_affine(x: Tensor, scale: Tensor, shift: Tensor | None, channel_dim: int) -> Tensor:
    """x with its channels scaled and shifted by the values of their group.

    Args:
        x: the batch in dimension 0, in groups one after the other.
        scale: `[groups, n]`, float32, or float64 beside float64 x. shift: likewise, or None.
        channel_dim: from which on the dimensions of x are channels, n in all; the rest is inner.

    Equivalent to::

        parts = x.chunk(groups)
        torch.cat([part * s + b for part, s, b in zip(parts, scale, shift)])
    """
    groups, channels = scale.shape
    dim, width = channel_dim % x.dim(), 1
    while width < channels and dim < x.dim():
        width *= x.shape[dim]
        dim += 1
    inner = math.prod(x.shape[dim:])
    rows = x.shape[0] * math.prod(x.shape[1 : channel_dim % x.dim()]) // groups
    parts = x.reshape(groups, rows, channels, inner)
    if unserved(x.dtype, x.device) is None:
        y: Tensor = _operation(parts, scale.float(), None if shift is None else shift.float())
    else:
        y = _Scale.apply(parts, scale.reshape(groups, 1, channels, 1))
        if shift is not None:
            y = y + shift.to(y.dtype).reshape(groups, 1, channels, 1)
    return y.reshape(x.shape)
