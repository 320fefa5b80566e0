"""`select_linear`, `select_conv1d`, `select_conv2d`: every row of a batch sees its own mask set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import _check, _library
from .._convolution import check_convolution, shape_of_result
from .._masked_product import FUSED_DTYPES, lowered, uses_kernel
from . import gpu, reference

__all__ = ["select_conv1d", "select_conv2d", "select_linear"]

_OPERANDS = (
    "Tensor x, Tensor weight, Tensor masks, Tensor row_sets, Tensor? bias, Tensor? bias_masks"
)


class _Selected:
    """A registered operation for inference."""

    def __init__(
        self,
        name: str,
        options: str,
        reference: Callable[..., Tensor],
        shape: Callable[..., Sequence[int]],
    ) -> None:
        self._reference = reference
        _library.define(f"{name}({_OPERANDS}{options}) -> Tensor", reference)

        @_library.fake(name)
        def fake(x: Tensor, *rest: Any) -> Tensor:
            return x.new_empty(shape(x, *rest))

        self._operation = getattr(torch.ops.modmask, name).default
        gpu.serve(name, reference)
        self._traced = _library.without_gradient(
            name,
            "selection by row is for inference. Learn masks with masked_linear and masked_conv2d, "
            "or call it under torch.no_grad().",
        )

    def __call__(self, *arguments: Any) -> Tensor:
        y: Tensor
        x = arguments[0]
        on_gpu = x.is_cuda and x.dtype in FUSED_DTYPES and _native.cuda_loaded()
        if not uses_kernel(x) and not on_gpu:
            y = self._reference(*arguments)
        elif _library.traced() or torch.is_grad_enabled():
            y = self._traced(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                y = self._operation(*arguments)
        return y


_linear = _Selected(
    "select_linear",
    "",
    reference.select_linear,
    lambda x, weight, *_: (*x.shape[:-1], weight.shape[0]),
)
_conv = _Selected(
    "select_conv",
    ", int[] stride, int[] padding, int[] dilation, int groups",
    reference.select_conv2d,
    lambda x, weight, masks, row_sets, bias, bias_masks, stride, padding, dilation, _: (
        shape_of_result(x, weight, stride, padding, dilation)
    ),
)


def _check_selection(
    x: Tensor,
    weight: Tensor,
    masks: Tensor,
    row_sets: Tensor,
    bias: Tensor | None,
    bias_masks: Tensor | None,
    batch: int,
) -> None:
    """Raise unless everything but the shapes of x and weight fits."""
    _check.check_optional_tensors(bias=bias, bias_masks=bias_masks)
    if not x.is_floating_point():
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, not {x.dtype}")
    for t, name in ((weight, "weight"), (bias, "bias")):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, not {t.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], not {_check.shape_of(bias)}")
    if bias_masks is not None and bias is None:
        raise ValueError("bias_masks came without a bias")
    for t, name, count in (
        (masks, "masks", weight.numel()),
        (bias_masks, "bias_masks", weight.shape[0]),
    ):
        if t is None:
            continue
        if t.dtype != torch.uint8:
            raise TypeError(f"{name} must be uint8, packed as by pack_bits, not {t.dtype}")
        octets = (count + 7) // 8
        if t.dim() != 2 or t.shape[0] < 1 or t.shape[1] != octets:
            raise ValueError(
                f"{name} must have shape [sets, {octets}], 8 of {count} elements in a byte, "
                f"not {_check.shape_of(t)}"
            )
    sets = masks.shape[0]
    if bias_masks is not None and bias_masks.shape[0] != sets:
        raise ValueError(f"bias_masks must have {sets} sets like masks, not {bias_masks.shape[0]}")
    if row_sets.dtype != torch.int64:
        raise TypeError(f"row_sets must be int64, not {row_sets.dtype}")
    if row_sets.shape != (batch,):
        raise ValueError(
            f"row_sets must have shape [{batch}], one set for each row of x "
            f"{_check.shape_of(x)}, not {_check.shape_of(row_sets)}"
        )
    for t, name in (
        (weight, "weight"),
        (masks, "masks"),
        (row_sets, "row_sets"),
        (bias, "bias"),
        (bias_masks, "bias_masks"),
    ):
        if t is not None:
            _check.check_device(t, name, x, "x")
    # a graph that is being recorded cannot wait for the answer
    recorded = row_sets.is_cuda and torch.cuda.is_current_stream_capturing()
    if not (_library.traced() or row_sets.is_meta or batch == 0 or recorded):
        low, high = (int(n) for n in row_sets.aminmax())
        if low < 0 or high >= sets:
            raise ValueError(
                f"row_sets must be at least 0 and below {sets}, the number of sets, "
                f"not {low if low < 0 else high}"
            )


def select_linear(
    x: Tensor,
    weight: Tensor,
    masks: Tensor,
    row_sets: Tensor,
    bias: Tensor | None = None,
    bias_masks: Tensor | None = None,
    *,
    batch_dim: int = 0,
) -> Tensor:
    r"""Linear layer in which every row of the batch sees the weight under a mask of its own.

    For inference with many mask sets over one weight. Masks stay packed, one bit per weight and
    set: they are read tile by tile, and no masked weight exists as a whole. The rows may come in
    any order; those of one set share the work of masking.

    Args:
        x: `[..., in]`; float32, bfloat16, float16 (fused on the CPU) or float64 (reference).
        weight: `[out, in]`, dtype of `x`.
        masks: uint8 `[sets, ceil(out * in / 8)]`, each row packed by `pack_bits`.
        row_sets: int64 `[batch]`, the set of each row.
        bias: `[out]`, dtype of `x`.
        bias_masks: uint8 `[sets, ceil(out / 8)]`; masks the bias likewise.
        batch_dim: the dimension of `x` that `row_sets` speaks of.

    Returns:
        `[..., out]`, dtype of `x`.

    Raises:
        ValueError: shapes, devices or set numbers that do not fit.
        TypeError: dtypes that do not fit.
        RuntimeError: where a gradient is asked for.

    Under autocast `x`, `weight` and `bias` are cast.

    Equivalent to::

        rows = [F.linear(x[r], weight * unpack_bits(masks[s], weight.shape), bias)
                for r, s in enumerate(row_sets)]
        return torch.stack(rows)
    """
    _check.check_tensors(x=x, weight=weight, masks=masks, row_sets=row_sets)
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape [out, in], not {_check.shape_of(weight)}")
    if x.dim() < 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must have shape [batch, ..., {weight.shape[1]}] to fit weight "
            f"{_check.shape_of(weight)}, not {_check.shape_of(x)}"
        )
    if not -x.dim() <= batch_dim < x.dim() - 1 or batch_dim == -1:
        raise ValueError(
            f"batch_dim must be a dimension of x {_check.shape_of(x)} other than the last, "
            f"not {batch_dim}"
        )
    x, weight, bias = lowered(x, weight, bias)  # type: ignore[assignment]
    _check_selection(x, weight, masks, row_sets, bias, bias_masks, x.shape[batch_dim])
    y = _linear(x.movedim(batch_dim, 0), weight, masks, row_sets, bias, bias_masks)
    return y.movedim(0, batch_dim)


def _select_conv(
    dims: int,
    x: Tensor,
    weight: Tensor,
    masks: Tensor,
    row_sets: Tensor,
    bias: Tensor | None,
    bias_masks: Tensor | None,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    _check.check_tensors(x=x, weight=weight, masks=masks, row_sets=row_sets)
    stride, padding, dilation = check_convolution(
        dims, x, weight, stride, padding, dilation, groups
    )
    x, weight, bias = lowered(x, weight, bias)  # type: ignore[assignment]
    _check_selection(x, weight, masks, row_sets, bias, bias_masks, x.shape[0])
    if dims == 1:
        stride, dilation, padding = [1, *stride], [1, *dilation], [0, 0, *padding]
        x, weight = x.unsqueeze(2), weight.unsqueeze(2)
    y = _conv(x, weight, masks, row_sets, bias, bias_masks, stride, padding, dilation, groups)
    return y.squeeze(2) if dims == 1 else y


def select_conv2d(
    x: Tensor,
    weight: Tensor,
    masks: Tensor,
    row_sets: Tensor,
    bias: Tensor | None = None,
    bias_masks: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""2d convolution in which every image sees the weight under a mask of its own.

    For inference with many mask sets over one weight, see `select_linear`.

    Args:
        x: `[batch, in, height, width]`; float32, bfloat16, float16 (fused on the CPU) or float64
            (reference).
        weight: `[out, in / groups, kernel height, kernel width]`, dtype of `x`.
        masks: uint8 `[sets, ceil(weight elements / 8)]`, each row packed by `pack_bits`.
        row_sets: int64 `[batch]`, the set of each image.
        bias, bias_masks: as in `select_linear`.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; padding also as
            "valid" or "same".

    Returns:
        `[batch, out, height, width]`, dtype of `x`.

    Raises:
        ValueError: shapes, options, devices or set numbers that do not fit.
        TypeError: dtypes that do not fit.
        RuntimeError: where a gradient is asked for.

    Equivalent to::

        images = [F.conv2d(x[r : r + 1], weight * unpack_bits(masks[s], weight.shape), bias,
                           stride, padding, dilation, groups)
                  for r, s in enumerate(row_sets)]
        return torch.cat(images)
    """
    return _select_conv(
        2, x, weight, masks, row_sets, bias, bias_masks, stride, padding, dilation, groups
    )


def select_conv1d(
    x: Tensor,
    weight: Tensor,
    masks: Tensor,
    row_sets: Tensor,
    bias: Tensor | None = None,
    bias_masks: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`select_conv2d` in one dimension.

    Args:
        x: `[batch, in, length]`. weight: `[out, in / groups, kernel]`.
        masks, row_sets, bias, bias_masks: as in `select_conv2d`.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv1d`.

    Returns:
        `[batch, out, length]`, dtype of `x`.

    Raises:
        ValueError, TypeError, RuntimeError: as `select_conv2d`.

    Equivalent to::

        y = select_conv2d(x[:, :, None], weight[:, :, None], masks, row_sets, bias, ...)
        return y[:, :, 0]
    """
    return _select_conv(
        1, x, weight, masks, row_sets, bias, bias_masks, stride, padding, dilation, groups
    )
