"""`masked_conv` on CUDA tensors: what the Triton kernels serve, and where their masks come from.

Triton is imported at the first call. Images are read and written as contiguous
[batch, channels, height, width], the layout of the fake kernels: pixels are neighbours there, and
the kernel's lanes too. A tensor in another layout, channels_last for instance, is copied once: less
than the uncoalesced reads of a convolution, each pixel as often as the kernel has taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _gpu, estimators
from .._convolution import shape_of_result
from .._gpu_masks import masks_of
from ..estimators import Estimator
from ..masked_linear import gpu as linear
from ..masked_linear.gpu import MOST_COLUMNS, bias_gradients, gradients_of

if TYPE_CHECKING:
    from .._triton import Masks
    from .triton import Geometry

# pixels of a tile at most, and elements between the first and the last of them
TILE = 128
MOST_ELEMENTS = 2**31


def unserved(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *draw: Any,
) -> str | None:
    """Why the Triton kernels do not serve these arguments of the operation, or None."""
    reason = linear.unserved_by_triton(x.dtype, weight, logits, draw)
    if reason is not None:
        return reason
    if max(weight[:1].numel(), weight[:, :1].numel()) > MOST_COLUMNS:
        return f"no GPU kernel for more than {MOST_COLUMNS} weights of a channel"
    y = shape_of_result(x, weight, stride, padding, dilation)
    for _, channels, height, width in (x.shape, y):
        # tiles begin anywhere, but their pixels are near one another
        images = min(TILE // max(height * width, 1) + 2, max(x.shape[0], 1))
        if (
            images * channels * height * width >= MOST_ELEMENTS
            or x.shape[0] * height * width >= MOST_ELEMENTS
        ):
            return "no GPU kernel for images of this size"
    return None


def _geometry(
    x: Tensor,
    weight: Tensor,
    masks: Masks,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    parts: int,
) -> Geometry:
    from . import triton

    _, _, out_height, out_width = shape_of_result(x, weight, stride, padding, dilation)
    outputs, inputs, *kernel = weight.shape
    return triton.Geometry(
        x.shape[0] // (masks.sets * masks.per_set),
        parts,
        inputs,
        outputs // parts,
        (x.shape[2], x.shape[3]),
        (out_height, out_width),
        (kernel[0], kernel[1]),
        stride,
        padding,
        dilation,
    )


def tf32(x: Tensor) -> bool:
    """Whether plain convolutions of this dtype would be rounded to TF32."""
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return x.dtype == torch.float32 and conv.fp32_precision == "tf32"


def sizes(
    x: Tensor, weight: Tensor, masks: Masks, pixels: int, *, backward: bool = False
) -> _gpu.Product:
    """What the chooser looks at; `pixels` of a group, each beside a column of patches."""
    from . import triton

    outputs, depth = weight.shape[0], weight[:1].numel()
    return _gpu.Product(
        masks.sets,
        masks.per_set,
        pixels,
        outputs,
        depth,
        x.element_size(),
        triton.product_config(x.dtype, tf32=tf32(x)).n,
        tf32(x),
        masks.hard,
        masks.quads(weight.shape[1] if backward else depth),
    )


def choose(
    p: _gpu.Product, device: _gpu.Device, taps: int, *, backward: bool = False
) -> _gpu.Choice:
    """Where the masks of a convolution, or of the gradient of its x, come from."""
    if backward and taps > 1 and p.hard and _gpu.FORCED_SOURCE is None:
        reason = "noise of a transposed weight takes four times the instructions"
        return _gpu.Choice("bits", reason, _gpu.predict(p, device))
    return _gpu.choose(p, device)


def _words(
    x: Tensor, weight: Tensor, masks: Masks, pixels: int, *, backward: bool = False
) -> Tensor | None:
    """Packed masks, where they are better than masks drawn in the product."""
    from ..sample_mask import triton

    device = _gpu.device_of(x.device.index or 0) if x.is_cuda else _gpu.DEVICES[0]
    p = sizes(x, weight, masks, pixels, backward=backward)
    choice = choose(p, device, weight[0, 0].numel(), backward=backward)
    return triton.pack(masks) if choice.source == "bits" else None


def explain(
    weight: Tensor,
    logits: Tensor,
    samples: int,
    estimator: Estimator,
    n_of_m: tuple[int, int] | None = None,
    device: _gpu.Device | None = None,
) -> tuple[str, str]:
    """The backend of a layer with this weight, `triton` or `reference`, and why."""
    drawn = (*estimators.arguments(estimator, False), n_of_m)
    reason = linear.unserved_by_triton(weight.dtype, weight, logits, drawn)
    if reason is not None:
        return "reference", reason
    seed = logits.new_empty(0) if estimator.draws else None  # it is not read
    masks = masks_of(logits, None, seed, weight.dim(), (0, 1, 0, 0, samples, 1.0, True, *drawn))
    if _gpu.FORCED_SOURCE is not None:
        return "triton", f"MODMASK_GPU_MASKS={_gpu.FORCED_SOURCE}"
    device = device or _gpu.device_of(weight.device.index or 0)
    most = _gpu.crossover(lambda pixels: sizes(weight, weight, masks, pixels), device)
    which = f", but drawn in the convolution up to {most} pixels of a group" if most else ""
    return "triton", f"masks packed, then convolved{which}, by the model of {device.name}"


def forward(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    *rest: Any,
) -> Tensor:
    """The operation `modmask::masked_conv`."""
    reason = unserved(x, weight, logits, bias, bias_logits, seed, *rest)
    if reason is not None:
        raise RuntimeError(f"masked_conv: {reason}")
    from . import triton

    options, draw = rest[:4], rest[4:]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        x, weight = x.contiguous(), weight.contiguous()
        masks = masks_of(logits, bias_logits, seed, 4, draw)
        geometry = _geometry(x, weight, masks, *options)
        words = _words(x, weight, masks, geometry.images * geometry.out_area)
        return triton.product(x, weight, masks, geometry, bias, words, tf32=tf32(x))


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """The operation `modmask::masked_conv_backward`."""
    options, draw, needs = rest[:4], rest[4:-5], rest[-5:]
    reason = unserved(x, weight, logits, bias, bias_logits, seed, *options, *draw)
    if reason is not None:
        raise RuntimeError(f"masked_conv_backward: {reason}")
    from . import triton

    need_x, need_weight, need_logits, need_bias, need_bias_logits = needs
    dx = dweight = dlogits = dbias = dbias_logits = None
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        x, dy, weight = x.contiguous(), dy.contiguous(), weight.contiguous()
        masks = masks_of(logits, bias_logits, seed, 4, draw)
        geometry = _geometry(x, weight, masks, *options)
        if need_x:
            pixels = geometry.images * geometry.area
            words = _words(dy, weight, masks, pixels, backward=True)
            dx = triton.product(
                dy, weight, masks, geometry, None, words, backward=True, tf32=tf32(x)
            )
        if need_weight or need_logits:
            dweight, dlogits = triton.gradients(
                dy,
                x,
                weight,
                masks,
                geometry,
                need_weight=need_weight,
                need_logits=need_logits,
                tf32=tf32(x),
            )
        if need_bias or need_bias_logits:
            assert bias is not None
            sums = linear.group_sums(dy.sum((2, 3), dtype=torch.float32), masks)
            dbias, dbias_logits = bias_gradients(sums, bias, masks, need_bias, need_bias_logits)
    found = (dx, dweight, dlogits, dbias, dbias_logits)
    return gradients_of(found, (x, weight, logits, bias, bias_logits))
