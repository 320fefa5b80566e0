"""`select_linear` and `select_conv2d` on CUDA tensors: the CUDA kernels, else the reference.

Up to `MOST_ROWS` rows have a kernel that reads the weight once for every eight of them. Beyond, and
for convolutions, examples of one set are sorted together on the device, and a kernel multiplies
every set's with the weight, which it masks tile by tile. The reference has one product of a library
for each set that occurs: with many rows of few sets that is quicker, by its matrix units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import _gpu, _library
from .._convolution import shape_of_result
from .._masked_product import FUSED_DTYPES

_library.define_on_cuda(
    "select_linear_cuda(Tensor x, Tensor weight, Tensor masks, Tensor row_sets, Tensor? bias, "
    "Tensor? bias_masks) -> Tensor"
)
_library.define_on_cuda(
    "selected_product_cuda(Tensor x, Tensor weight, Tensor masks, Tensor? bias, "
    "Tensor? bias_masks, Tensor order, Tensor first_example, Tensor first_tile, int[] stride, "
    "int[] padding, int[] dilation, int groups) -> Tensor"
)

# the kernel reads the weight once for every eight rows
MOST_ROWS = 64
# places of a set in one block of the other kernel
TILE = 64
# what it reaches of the float32 units; instructions and launches of the reference for each set
_SHARE = 0.4
_PASSES = 12  # weight-sized, of bytes or more, to unpack a mask and to multiply with it
_LAUNCHES = 20


def unserved(x: Tensor) -> str | None:
    """Why no CUDA kernel serves an input like `x`, or None."""
    if x.dtype not in FUSED_DTYPES:
        return f"no CUDA kernel for {x.dtype}"
    return _native.cuda_unserved(x.device)


def predict(
    columns: int, sets: int, weights: int, element_size: int, tf32: bool, device: _gpu.Device
) -> dict[str, float]:
    """Seconds of a selection of `columns` places, which are of `sets` sets at most.

    Args:
        columns: places of the result that one output has in the whole batch.
        weights: how many there are.
    """
    operations = 2.0 * columns * weights
    of_set = _PASSES * weights * element_size / device.bandwidth + _LAUNCHES * _gpu.LAUNCH
    plain = operations / device.products(element_size, tf32)
    return {
        "cuda": operations / (_SHARE * device.products(4, False)) + 4 * _gpu.LAUNCH,
        "reference": sets * of_set + plain / _gpu.SHARE,
    }


def sorted_examples(row_sets: Tensor, sets: int, places: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order, first_example, first_tile): examples by their sets, and where those of a set begin.

    Nothing waits for the device.
    """
    order = torch.argsort(row_sets, stable=True)
    counts = row_sets.new_zeros(sets).scatter_add_(0, row_sets, torch.ones_like(row_sets))
    tiles = (counts * places + TILE - 1).div(TILE, rounding_mode="floor")
    none = row_sets.new_zeros(1)
    first_example, first_tile = (torch.cat([none, t.cumsum(0)]) for t in (counts, tiles))
    return order, first_example, first_tile


def _check_sets(row_sets: Tensor, masks: Tensor) -> None:
    # a graph that is being recorded cannot wait for the answer
    if not row_sets.shape[0] or (row_sets.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    least, most = torch.stack(torch.aminmax(row_sets)).tolist()
    if least < 0 or most >= masks.shape[0]:
        raise RuntimeError(
            f"row_sets must be at least 0 and below {masks.shape[0]}, the number of sets, "
            f"but has {least if least < 0 else most}"
        )


def _prefers_reference(x: Tensor, weight: Tensor, masks: Tensor, columns: int) -> bool:
    """Whether a product of a library for every set is predicted to be quicker, and possible."""
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():  # the reference waits
        return False
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    device = _gpu.device_of(x.device.index or 0)
    sets = min(masks.shape[0], x.shape[0])
    seconds = predict(columns, sets, weight.numel(), x.element_size(), tf32, device)
    return _native.FORCED_BACKEND is None and seconds["reference"] < seconds["cuda"]


def select_linear(
    reference: Callable[..., Tensor], x: Tensor, weight: Tensor, *rest: Any
) -> Tensor:
    """The operation `modmask::select_linear`."""
    masks, row_sets, bias, bias_masks = rest
    if unserved(x) is not None:
        return reference(x, weight, *rest)
    _check_sets(row_sets, masks)
    y: Tensor
    if x.dim() == 2 and x.shape[0] <= MOST_ROWS:
        y = torch.ops.modmask.select_linear_cuda(x, weight, *rest)
        return y
    places = math.prod(x.shape[1:-1])
    if _prefers_reference(x, weight, masks, x.shape[0] * places):
        return reference(x, weight, *rest)
    y = torch.ops.modmask.selected_product_cuda(
        x.reshape(x.shape[0], places, x.shape[-1]),
        *(weight, masks, bias, bias_masks),
        *(*sorted_examples(row_sets, masks.shape[0], places), [], [], [], 1),
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])


def select_conv(
    reference: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    masks: Tensor,
    row_sets: Tensor,
    bias: Tensor | None,
    bias_masks: Tensor | None,
    *options: Any,
) -> Tensor:
    """The operation `modmask::select_conv`."""
    given = (x, weight, masks, row_sets, bias, bias_masks, *options)
    if unserved(x) is not None:
        return reference(*given)
    _check_sets(row_sets, masks)
    stride, padding, dilation, groups = options
    places = math.prod(shape_of_result(x, weight, stride, padding, dilation)[2:])
    if _prefers_reference(x, weight, masks, x.shape[0] * places):
        return reference(*given)
    y: Tensor = torch.ops.modmask.selected_product_cuda(
        *(x, weight, masks, bias, bias_masks),
        *sorted_examples(row_sets, masks.shape[0], places),
        *(stride, padding, dilation, groups),
    )
    return y


def serve(name: str, reference: Callable[..., Tensor]) -> None:
    """Serve `modmask::<name>` on CUDA tensors by the kernels, or `reference`."""
    function: Callable[..., Tensor] = {"select_linear": select_linear, "select_conv": select_conv}[
        name
    ]

    def choose(*arguments: Any) -> Tensor:
        return function(reference, *arguments)

    _library.implement(name, "CUDA", choose)


def explain(weight: Tensor) -> tuple[str, str]:
    """The backend of a layer with this weight, and why."""
    reason = unserved(weight)
    if reason is not None:
        return "reference", reason
    rows = f"up to {MOST_ROWS} rows, then " if weight.dim() == 2 else ""
    return "cuda", (
        f"masks applied in the product, {rows}examples sorted by their sets; the reference where a "
        "model of the device predicts it to be quicker"
    )
