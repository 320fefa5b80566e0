"""`masked_conv` on CUDA tensors: what the Triton kernels serve, and where their masks come from.

Triton is imported at the first call. Masks that only the CUDA library draws, of top_k, n of m or
blocks of weights, are packed by it before the product. Images are read and written as contiguous
[batch, channels, height, width], the layout of the fake kernels: pixels are neighbours there, and
the kernel's lanes too. A tensor in another layout, channels_last for instance, is copied once: less
than the uncoalesced reads of a convolution, each pixel as often as the kernel has taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import _native
from .. import _gpu, estimators
from .._convolution import shape_of_result
from .._gpu_masks import block_gradients, decided_bias, mask_words, masks_of, packed_only
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
    """Why no GPU kernel serves these arguments of the operation, or None."""
    reason = linear.refusals(x.dtype, weight, logits, draw)["triton"]
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
        triton.product_config(x.dtype, weight.shape[1 if backward else 0], tf32(x), backward).n,
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


def _choose(
    x: Tensor, weight: Tensor, masks: Masks, pixels: int, *, backward: bool = False
) -> _gpu.Choice:
    """Where the masks of a product on the device of x come from."""
    device = _gpu.device_of(x.device.index or 0) if x.is_cuda else _gpu.DEVICES[0]
    p = sizes(x, weight, masks, pixels, backward=backward)
    return choose(p, device, weight[0, 0].numel(), backward=backward)


def _refused(*arguments: Any) -> bool:
    """Whether the reference has to serve the operation on the device of its arguments."""
    x, weight, logits = arguments[:3]
    special = packed_only(weight, logits, arguments[10:]) is not None
    return unserved(*arguments) is not None or (special and not linear.runs_on(x.device))


def explain(
    weight: Tensor,
    logits: Tensor,
    samples: int,
    estimator: Estimator,
    n_of_m: tuple[int, int] | None = None,
    device: _gpu.Device | None = None,
    *,
    transposed: bool = False,
) -> tuple[str, str]:
    """The backend of a layer with this weight, `triton` or `reference`, and why.

    `transposed`: whether its product is the gradient of a convolution.
    """
    draw = (0, 1, 0, 0, samples, 1.0, True, *estimators.arguments(estimator, False), n_of_m)
    reason = linear.refusals(weight.dtype, weight, logits, draw)["triton"]
    special = packed_only(weight, logits, draw)
    if reason is None and special is not None and weight.is_cuda:
        reason = _native.cuda_unserved(weight.device)
    if reason is not None:
        return "reference", reason
    if special is not None:
        return "triton", f"masks packed by the CUDA kernels, then convolved: {special}"
    if transposed and weight[0, 0].numel() > 1:
        return "triton", "masks packed, then convolved: as the gradient of a convolution"
    seed = logits.new_empty(0) if estimator.draws else None  # it is not read
    masks = masks_of(logits, None, seed, weight.dim(), draw)
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
    if _refused(x, weight, logits, bias, bias_logits, seed, *rest):
        from . import product

        return product.reference(x, weight, logits, bias, bias_logits, seed, *rest)
    from ..sample_mask import triton as sample_mask
    from . import triton

    options, draw = rest[:4], rest[4:]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        x, weight = x.contiguous(), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        masks = masks_of(logits, bias_logits, seed, 4, draw)
        geometry = _geometry(x, weight, masks, *options)
        words = None
        if packed_only(weight, logits, draw) is None:
            choice = _choose(x, weight, masks, geometry.images * geometry.out_area)
            words = sample_mask.pack(masks) if choice.source == "bits" else None
        else:
            words = mask_words(masks, weight.shape, list(draw[-1]))
            masks = decided_bias(masks._replace(element_offset=0))  # where such words begin
        return triton.product(x, weight, masks, geometry, bias, words, tf32=tf32(x))


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    masks: Masks,
    geometry: Geometry,
    need_weight: bool,
    need_logits: bool,
    bits: Tensor | None,
    words: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dlogits), each where it is needed.

    Args:
        bits: masks that the CUDA library packed. words: where the kernel packs those it draws.
    """
    from . import triton

    given: dict[str, Any] = {"tf32": tf32(x)}
    dweight = dlogits = None
    if need_weight and bits is not None:
        whole = masks._replace(element_offset=0)  # where such words begin
        given |= {"need_weight": True, "need_logits": False, "words": bits}
        dweight, _ = triton.gradients(dy, x, weight, whole, geometry, **given)
        need_weight = False
    given = {"tf32": tf32(x)}
    if need_logits and masks.logits.shape[1:] != weight.shape:

        def of_group(g: int, plain: Masks) -> Tensor:
            part = slice(g * geometry.images, (g + 1) * geometry.images)
            _, d = triton.gradients(dy[part], x[part], weight, plain, geometry, **given)
            assert d is not None
            return d

        dlogits = block_gradients(masks, weight, of_group)
        need_logits = False
    if need_weight or need_logits:
        given |= {"need_weight": need_weight, "need_logits": need_logits, "words": words}
        found = triton.gradients(dy, x, weight, masks, geometry, **given)
        dweight = found[0] if need_weight else dweight
        dlogits = found[1] if need_logits else dlogits
    return dweight, dlogits


def backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The operation `modmask::masked_conv_backward`."""
    if _refused(*arguments[:-5]):
        from . import product

        return product.backward_reference(dy, *arguments)
    from ..sample_mask import triton as sample_mask
    from . import triton

    x, weight, logits, bias, bias_logits, seed = arguments[:6]
    options, draw = arguments[6:10], arguments[10:-5]
    need_x, need_weight, need_logits, need_bias, need_bias_logits = arguments[-5:]
    dx = dweight = dlogits = dbias = dbias_logits = None
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        operands = (x, weight, logits, bias, bias_logits)
        x, dy, weight = x.contiguous(), dy.contiguous(), weight.contiguous()
        masks = masks_of(logits, bias_logits, seed, 4, draw)
        geometry = _geometry(x, weight, masks, *options)
        # of masks by top_k only the slope is asked for, that of a threshold
        drawn = decided_bias(masks._replace(bias_logits=None))
        pixels = geometry.images * geometry.area
        bits = words = None
        packs = False
        if packed_only(weight, logits, draw) is not None:
            bits = (
                mask_words(masks, weight.shape, list(draw[-1])) if need_x or need_weight else None
            )
        elif need_x and _choose(dy, weight, drawn, pixels, backward=True).source == "bits":
            packs = triton.packs(drawn, geometry, need_weight, need_logits)
            words = sample_mask.empty_words(drawn) if packs else sample_mask.pack(drawn)
        if need_weight or need_logits:
            dweight, dlogits = _gradients(
                *(dy, x, weight, drawn, geometry, need_weight, need_logits),
                bits,
                words if packs else None,
            )
        if need_x:
            if bits is not None:
                words, drawn = bits, drawn._replace(element_offset=0)  # where such words begin
            dx = triton.product(
                dy, weight, drawn, geometry, None, words, backward=True, tf32=tf32(x)
            )
        if need_bias or need_bias_logits:
            assert bias is not None
            sums = linear.group_sums(dy.sum((2, 3), dtype=torch.float32), masks)
            dbias, dbias_logits = bias_gradients(sums, bias, masks, need_bias, need_bias_logits)
    return gradients_of((dx, dweight, dlogits, dbias, dbias_logits), operands)
