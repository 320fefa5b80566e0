"""`masked_linear` on CUDA tensors: what the Triton kernels serve, and where their masks come from.

Triton is imported at the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _gpu, estimators
from ..estimators import Estimator

if TYPE_CHECKING:
    from .._triton import Masks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# offsets inside a tile have 32 bits
MOST_COLUMNS = 2**23


def unserved(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    *draw: Any,
) -> str | None:
    """Why the Triton kernels do not serve these arguments of the operation, or None."""
    *_, code, _, _, _, _, n_of_m = draw
    if _gpu.absent() is not None:
        return _gpu.absent()
    if x.dtype not in DTYPES:
        return f"no fused kernel for {x.dtype}"
    if n_of_m:
        return "no GPU kernel for n_of_m"
    if estimators.NAMES[code] == "top_k":
        return "no GPU kernel for the estimator top_k"
    if logits.shape[-weight.dim() :] != weight.shape:
        return "no GPU kernel for logits smaller than the weight"
    if max(weight.shape) > MOST_COLUMNS:
        return f"no GPU kernel for a weight with more than {MOST_COLUMNS} rows or columns"
    return None


def masks_of(
    logits: Tensor,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    dims: int,
    draw: tuple[Any, ...],
) -> Masks:
    """The masks in the words of the kernels; `draw` from `tensor_id` on."""
    from .. import _triton

    return _triton.Masks(
        _triton.contiguous_sets(logits, dims),
        None if bias_logits is None else _triton.contiguous_sets(bias_logits, 1),
        seed,
        *draw[:-1],
    )


def sizes(x: Tensor, weight: Tensor, masks: Masks, rows: int | None = None) -> _gpu.Product:
    """What the chooser looks at; `rows` of a group, those of x unless given."""
    from . import triton

    if rows is None:
        rows = x.shape[0] // (masks.sets * masks.per_set)
    return _gpu.Product(
        masks.sets,
        masks.per_set,
        rows,
        weight.shape[0],
        weight.shape[1],
        x.element_size(),
        triton.product_config(x.dtype, rows, regenerate=True).m,
        tf32(x),
        masks.hard,
        masks.quads(weight.shape[1]),
    )


def tf32(x: Tensor) -> bool:
    """Whether plain products of this dtype would be rounded to TF32."""
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _words(x: Tensor, weight: Tensor, masks: Masks) -> Tensor | None:
    """Packed masks, where they are better than masks drawn in the product."""
    from ..sample_mask import triton

    device = _gpu.device_of(x.device.index or 0) if x.is_cuda else _gpu.DEVICES[0]
    choice = _gpu.choose(sizes(x, weight, masks), device)
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
    reason = unserved(weight, weight, logits, None, None, None, *drawn)
    if reason is not None:
        return "reference", reason
    seed = logits.new_empty(0) if estimator.draws else None  # it is not read
    draw = (0, 1, 0, 0, samples, 1.0, True, *drawn)
    masks = masks_of(logits, None, seed, weight.dim(), draw)
    if _gpu.FORCED_SOURCE is not None:
        return "triton", f"MODMASK_GPU_MASKS={_gpu.FORCED_SOURCE}"
    device = device or _gpu.device_of(weight.device.index or 0)
    rows = _gpu.crossover(lambda rows: sizes(weight, weight, masks, rows), device)
    if not rows:
        return "triton", f"masks packed, then multiplied, by the model of {device.name}"
    return "triton", (
        f"masks packed, then multiplied, but drawn in the product up to {rows} rows of a group, "
        f"by the model of {device.name}"
    )


def forward(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    *draw: Any,
) -> Tensor:
    """The operation `modmask::masked_linear`."""
    reason = unserved(x, weight, logits, bias, bias_logits, seed, *draw)
    if reason is not None:
        raise RuntimeError(f"masked_linear: {reason}")
    from . import triton

    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        weight = weight.contiguous()
        rows = x.flatten(0, -2).contiguous()
        masks = masks_of(logits, bias_logits, seed, 2, draw)
        words = _words(rows, weight, masks)
        y = triton.product(rows, weight, masks, bias, words, tf32=tf32(x))
    return y.view(*x.shape[:-1], weight.shape[0])


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
    """The operation `modmask::masked_linear_backward`."""
    draw, needs = rest[:-5], rest[-5:]
    reason = unserved(x, weight, logits, bias, bias_logits, seed, *draw)
    if reason is not None:
        raise RuntimeError(f"masked_linear_backward: {reason}")
    from . import triton

    need_x, need_weight, need_logits, need_bias, need_bias_logits = needs
    dx = dweight = dlogits = dbias = dbias_logits = None
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        weight = weight.contiguous()
        masks = masks_of(logits, bias_logits, seed, 2, draw)
        rows = x.flatten(0, -2).contiguous()
        of_rows = dy.flatten(0, -2).contiguous()
        if need_x:
            words = _words(of_rows, weight, masks)
            dx = triton.product(of_rows, weight, masks, None, words, backward=True, tf32=tf32(x))
        if need_weight or need_logits:
            dweight, dlogits = triton.gradients(
                of_rows,
                rows,
                weight,
                masks,
                need_weight=need_weight,
                need_logits=need_logits,
                tf32=tf32(x),
            )
        if need_bias or need_bias_logits:
            assert bias is not None
            dbias, dbias_logits = bias_gradients(
                group_sums(of_rows, masks),
                bias,
                masks,
                need_bias,
                need_bias_logits,
            )
    found = (dx, dweight, dlogits, dbias, dbias_logits)
    return gradients_of(found, (x, weight, logits, bias, bias_logits))


def gradients_of(
    found: tuple[Tensor | None, ...], operands: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    """The gradients of the five operands in their shapes; one that is not wanted is empty."""
    _, weight, logits, *_ = operands
    assert weight is not None
    assert logits is not None
    return tuple(
        (weight if i < 4 and i != 2 else logits).new_empty(0)
        if gradient is None or operand is None
        else gradient.view(operand.shape)
        for i, (gradient, operand) in enumerate(zip(found, operands, strict=True))
    )


def group_sums(dy: Tensor, masks: Masks) -> Tensor:
    """dy [groups * rows, ...] summed over the rows of every group, in float32."""
    groups = masks.sets * masks.per_set
    parts = dy.view(groups, dy.shape[0] // groups, *dy.shape[1:])
    return parts.sum(1, dtype=torch.float32)


def bias_gradients(
    sums: Tensor, bias: Tensor, masks: Masks, need_bias: bool, need_logits: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dbias, dbias_logits) of a bias, masked or not, from dy summed over the rows of a group."""
    from . import triton

    if masks.bias_logits is None:
        return sums.sum(0).to(bias.dtype) if need_bias else None, None
    return triton.masked_bias_gradients(
        sums, bias, masks, need_bias=need_bias, need_logits=need_logits
    )
