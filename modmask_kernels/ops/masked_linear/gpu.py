"""`masked_linear` on CUDA tensors: which kernels compute it, and where their masks come from.

Those of Triton are for many rows of a group, those in CUDA C++ for few, mostly of float32, for
which there are no matrix units. Triton is imported at the first call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import _gpu, estimators
from .._batching import masks_per_set
from .._gpu_masks import (
    DECIDED,
    Masks,
    block_gradients,
    decided_bias,
    mask_words,
    masks_of,
    packed_only,
    words_shape,
)
from ..estimators import Estimator
from . import cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# offsets inside a tile have 32 bits
MOST_COLUMNS = 2**23
# weights from which masks are packed once for both passes
LEAST_SAVED = 2**20
_SAVED = _gpu.Way("triton", "bits", "packed by the forward pass", {})
# blocks along a dimension of a launch
MOST_BLOCKS = 2**16 - 1


def unserved_by_triton(
    dtype: torch.dtype, weight: Tensor, logits: Tensor, draw: tuple[Any, ...]
) -> str | None:
    """Why Triton's kernels alone do not serve, or None; `draw`: from `tensor_id` on."""
    if _gpu.absent() is not None:
        return _gpu.absent()
    if dtype not in DTYPES:
        return f"no fused kernel for {dtype}"
    special = packed_only(weight, logits, draw)
    if special is not None:
        return f"no GPU kernel for {special}"
    if max(weight.shape) > MOST_COLUMNS:
        return f"no GPU kernel for a weight with more than {MOST_COLUMNS} rows or columns"
    return None


def refusals(
    dtype: torch.dtype, weight: Tensor, logits: Tensor, draw: tuple[Any, ...]
) -> dict[str, str | None]:
    """Why the kernels of each kind do not serve, or None; what depends on the device is not asked.

    Triton multiplies with masks of any kind that the CUDA library packed. `draw`: the arguments of
    the schema from `tensor_id` on.
    """
    hard, code = draw[-7], draw[-6]
    no_cuda: str | None = None
    no_triton = unserved_by_triton(dtype, weight, logits, draw)
    if dtype not in DTYPES:
        no_cuda = f"no fused kernel for {dtype}"
    elif not _native.cuda_loaded():
        no_cuda = "the CUDA kernels are absent or ruled out"
    elif logits.shape[-weight.dim() :] != weight.shape and not (
        hard or estimators.NAMES[code] in DECIDED
    ):
        no_cuda = no_triton = "no GPU kernel for soft masks of logits smaller than the weight"
    elif packed_only(weight, logits, draw) and max(weight.shape) <= MOST_COLUMNS:
        no_triton = _gpu.absent()
    return {"cuda": no_cuda, "triton": no_triton}


def unserved(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    *draw: Any,
) -> str | None:
    """Why no kernel serves these arguments of the operation, or None."""
    found = refusals(x.dtype, weight, logits, draw)
    if None in found.values():
        return None
    return found["triton"] if _native.FORCED_BACKEND != "cuda" else found["cuda"]


def sizes(
    x: Tensor, weight: Tensor, masks: Masks, rows: int | None = None, tile: int | None = None
) -> _gpu.Product:
    """What the chooser looks at; `rows` of a group, those of x unless given."""
    if rows is None:
        rows = math.prod(x.shape[:-1]) // (masks.sets * masks.per_set)
    if tile is None:
        tile = 128
        if _gpu.absent() is None:
            from . import triton

            tile = triton.product_config(x.dtype, rows, regenerate=True).m
    return _gpu.Product(
        masks.sets,
        masks.per_set,
        rows,
        weight.shape[0],
        weight.shape[1],
        x.element_size(),
        tile,
        tf32(x),
        masks.hard,
        masks.quads(weight.shape[1]),
    )


def tf32(x: Tensor) -> bool:
    """Whether plain products of this dtype would be rounded to TF32."""
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _sources(masks: Masks, special: bool, kind: str) -> tuple[str, ...]:
    """Where the kernels of a kind can take these masks from."""
    if not masks.hard:
        return ("regenerate",)
    # in CUDA C++ a product draws Gumbel noise only
    plain = masks.noise and estimators.NAMES[masks.code] == "gumbel_sigmoid"
    return ("bits",) if special or (kind == "cuda" and not plain) else _gpu.SOURCES


def choose(
    p: _gpu.Product,
    device: _gpu.Device,
    masks: Masks,
    special: bool,
    kinds: tuple[str, ...],
    forced: str | None = _gpu.FORCED_SOURCE,
) -> _gpu.Way | None:
    """The kernels and the source of masks for a product; None where no kind serves."""
    jobs = p.sets * (p.per_set * math.ceil(p.rows / 8) + 7)
    ways = [
        _gpu.choose_way(p, device, (kind,), _sources(masks, special, kind), forced)
        for kind in kinds
        if kind != "cuda" or jobs <= 8 * MOST_BLOCKS
    ]
    if not ways:
        return None
    seconds = {key: t for way in ways for key, t in way.seconds.items()}
    best = min(ways, key=lambda way: seconds[way.kind, way.source])
    if len(ways) == 1:
        return best
    times = ", ".join(f"{k} {s} {1e6 * t:.0f} us" for (k, s), t in seconds.items())
    return best._replace(reason=f"predicted for {device.name}: {times}", seconds=seconds)


def runs_on(device: torch.device) -> bool:
    """Whether the CUDA library has code for a device."""
    return device.type == "cuda" and _native.cuda_unserved(device) is None


def _here(
    x: Tensor, weight: Tensor, logits: Tensor, masks: Masks, draw: tuple[Any, ...]
) -> _gpu.Way | None:
    """What computes a product of these tensors on their device; None: the reference."""
    found = refusals(x.dtype, weight, logits, draw)
    special = packed_only(weight, logits, draw) is not None
    if found["cuda"] is None and not runs_on(x.device):
        found["cuda"] = "not on this device"
        found["triton"] = "not on this device" if special else found["triton"]
    kinds = tuple(kind for kind in _gpu.KINDS if found[kind] is None)
    device = _gpu.device_of(x.device.index or 0) if x.is_cuda else _gpu.DEVICES[0]
    return choose(sizes(x, weight, masks), device, masks, special, kinds)


def _kernels(kind: str) -> ModuleType:
    """`product`, `gradients` and `masked_bias_gradients` of a kind."""
    if kind == "cuda":
        return cuda
    from . import triton

    return triton


def explain(
    weight: Tensor,
    logits: Tensor,
    samples: int,
    estimator: Estimator,
    n_of_m: tuple[int, int] | None = None,
    device: _gpu.Device | None = None,
) -> tuple[str, str]:
    """The backend of a layer with this weight, `cuda`, `triton` or `reference`, and why."""
    draw = (0, 1, 0, 0, samples, 1.0, True, *estimators.arguments(estimator, False), n_of_m)
    found = refusals(weight.dtype, weight, logits, draw)
    kinds = tuple(kind for kind in _gpu.KINDS if found[kind] is None)
    if not kinds:
        return "reference", str(unserved(weight, weight, logits, None, None, None, *draw))
    seed = logits.new_empty(0) if estimator.draws else None  # it is not read
    masks = masks_of(logits, None, seed, weight.dim(), draw)
    special = packed_only(weight, logits, draw) is not None
    device = device or _gpu.device_of(weight.device.index or 0)

    def way(rows: int) -> _gpu.Way:
        chosen = choose(sizes(weight, weight, masks, rows), device, masks, special, kinds)
        assert chosen is not None
        return chosen

    # by the rows of a group, one and the powers of two: where the way changes
    parts: list[tuple[_gpu.Way, int]] = []
    for rows in (2**i for i in range(15)):
        chosen = way(rows)
        if parts and parts[-1][0][:2] == chosen[:2]:
            parts[-1] = (chosen, rows)
        else:
            parts.append((chosen, rows))
    words = {"bits": "masks packed, then multiplied", "regenerate": "masks drawn in the product"}
    told = [
        f"{chosen.kind}, {words[chosen.source]}"
        + (f", up to {most} rows of a group" if i + 1 < len(parts) else "")
        for i, (chosen, most) in enumerate(parts)
    ]
    forced = _gpu.FORCED_SOURCE
    why = f"MODMASK_GPU_MASKS={forced}" if forced else f"by the model of {device.name}"
    if _kept(weight.dtype, weight, logits, draw):
        size = masks.per_set * math.prod(weight.shape) / 8
        why += f", packed masks kept for the gradient of x ({size / 2**20:.1f} MiB)"
    absent = [f"{kind}: {found[kind]}" for kind in _gpu.KINDS if found[kind] is not None]
    return parts[-1][0].kind, "; ".join([*told, why, *absent])


def _product(
    way: _gpu.Way,
    a: Tensor,
    weight: Tensor,
    masks: Masks,
    bias: Tensor | None,
    n_of_m: list[int],
    special: bool,
    backward: bool,
    words: Tensor | None = None,
) -> Tensor:
    """x (W*M)^T + bias, or dy (W*M), as chosen; `words`: those of `_packed`."""
    options: dict[str, Any] = {"backward": backward, "tf32": tf32(a)}
    if way.source == "bits" and (way.kind == "cuda" or special):
        words = mask_words(masks, weight.shape, n_of_m)
        masks = masks._replace(element_offset=0)  # where such words begin
    elif way.source == "bits":
        words = _packed(masks, weight) if words is None else words
        options["spread"] = _spread(masks, weight)
    if way.kind == "triton":
        masks = decided_bias(masks)
    bias = None if bias is None else bias.contiguous()
    y: Tensor = _kernels(way.kind).product(a, weight, masks, bias, words, **options)
    return y


def _spread(masks: Masks, weight: Tensor) -> bool:
    """Whether Triton packs these masks in the order that its product unpacks quicker."""
    from . import triton

    return triton.rows_are_words(masks, weight.shape[1])


def _packed(masks: Masks, weight: Tensor) -> Tensor:
    """The masks of all groups, packed by Triton."""
    from ..sample_mask import triton

    return triton.pack(masks, spread=_spread(masks, weight))


def _gradients(
    way: _gpu.Way,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    masks: Masks,
    n_of_m: list[int],
    special: bool,
    need_weight: bool,
    need_logits: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dlogits) by the kernels of the product; see `_product`."""
    dweight = dlogits = None
    coarse = masks.logits.shape[1:] != weight.shape
    if need_logits and coarse:
        rows = x.shape[0] // (masks.sets * masks.per_set)

        def of_group(g: int, plain: Masks) -> Tensor:
            part = slice(g * rows, (g + 1) * rows)
            _, d = _kernels(way.kind).gradients(dy[part], x[part], weight, plain, tf32=tf32(x))
            assert isinstance(d, Tensor)
            return d

        dlogits = block_gradients(masks, weight, of_group)
        need_logits = False
    if need_weight and (special or way.kind == "cuda"):
        words = mask_words(masks, weight.shape, n_of_m) if special else None
        whole = masks
        if coarse:
            empty = weight.new_empty((masks.sets, *weight.shape), dtype=torch.float32)
            whole = masks._replace(logits=empty, element_offset=0)
        dweight, _ = cuda.gradients(
            dy, x, weight, whole, need_weight=True, need_logits=False, words=words
        )
        need_weight = False
    if need_weight or need_logits:
        # of masks by top_k only the slope is asked for, that of a threshold
        decided = decided_bias(masks._replace(bias_logits=None))
        found = _kernels(way.kind).gradients(
            dy,
            x,
            weight,
            decided,
            need_weight=need_weight,
            need_logits=need_logits,
            tf32=tf32(x),
        )
        dweight = found[0] if need_weight else dweight
        dlogits = found[1] if need_logits else dlogits
    return dweight, dlogits


def saves(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    *draw: Any,
) -> bool:
    """Whether the packed masks of the forward pass are kept for the gradient of x."""
    return x.requires_grad and _kept(x.dtype, weight, logits, draw)


def _kept(dtype: torch.dtype, weight: Tensor, logits: Tensor, draw: tuple[Any, ...]) -> bool:
    """Whether packed masks are worth keeping: Triton's, of weights that are not small, for products
    of matrix units. Compilers ask too: it looks at no sizes of x and at no device."""
    element_offset, hard = draw[3], draw[6]
    return (
        _gpu.SAVES
        and hard
        and (dtype.itemsize == 2 or tf32(weight))
        and weight.numel() >= LEAST_SAVED
        and element_offset % 4 == 0
        and unserved_by_triton(dtype, weight, logits, draw) is None
    )


def words_of(x: Tensor, weight: Tensor, logits: Tensor, *rest: Any) -> tuple[int, ...]:
    """The shape of the masks that `forward_saving` gives."""
    seed, samples = rest[2], rest[7]
    sets = logits.shape[0] if logits.dim() == 3 else 1
    return words_shape(sets, masks_per_set(seed, samples), weight.numel())


def forward_saving(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    *draw: Any,
) -> tuple[Tensor, Tensor]:
    """The operation `modmask::masked_linear_saving`: y and the packed masks of all groups."""
    masks = masks_of(logits, bias_logits, seed, 2, draw)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        rows, weight = x.flatten(0, -2).contiguous(), weight.contiguous()
        words = _packed(masks, weight)
        y = _product(_SAVED, rows, weight, masks, bias, [], False, False, words)
    return y.view(*x.shape[:-1], weight.shape[0]), words


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
    from . import product

    masks = masks_of(logits, bias_logits, seed, 2, draw)
    way = _here(x, weight, logits, masks, draw)
    if way is None:
        return product.reference(x, weight, logits, bias, bias_logits, seed, *draw)
    special = packed_only(weight, logits, draw) is not None
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        rows = x.flatten(0, -2).contiguous()
        y = _product(way, rows, weight.contiguous(), masks, bias, list(draw[-1]), special, False)
    return y.view(*x.shape[:-1], weight.shape[0])


def backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The operation `modmask::masked_linear_backward`."""
    return _backward(dy, None, *arguments)


def backward_saving(dy: Tensor, words: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The operation `modmask::masked_linear_saving_backward`; `words`: of `forward_saving`."""
    return _backward(dy, words, *arguments)


def _backward(dy: Tensor, words: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    x, weight, logits, bias, bias_logits, seed = arguments[:6]
    draw, needs = arguments[6:-5], arguments[-5:]
    from . import product

    masks = masks_of(logits, bias_logits, seed, 2, draw)
    way = _here(x, weight, logits, masks, draw) if words is None else _SAVED
    if way is None:
        return product.backward_reference(dy, *arguments)
    special, n_of_m = packed_only(weight, logits, draw) is not None, list(draw[-1])
    need_x, need_weight, need_logits, need_bias, need_bias_logits = needs
    dx = dweight = dlogits = dbias = dbias_logits = None
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        weight = weight.contiguous()
        rows, of_rows = (t.flatten(0, -2).contiguous() for t in (x, dy))
        if need_weight or need_logits:
            dweight, dlogits = _gradients(
                *(way, of_rows, rows, weight, masks, n_of_m, special), need_weight, need_logits
            )
        if need_x:
            dx = _product(way, of_rows, weight, masks, None, n_of_m, special, True, words)
        if need_bias or need_bias_logits:
            assert bias is not None
            dbias, dbias_logits = bias_gradients(
                group_sums(of_rows, masks),
                bias,
                masks,
                need_bias,
                need_bias_logits,
                _kernels(way.kind).masked_bias_gradients,
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
    sums: Tensor,
    bias: Tensor,
    masks: Masks,
    need_bias: bool,
    need_logits: bool,
    kernel: Callable[..., tuple[Tensor | None, Tensor | None]] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dbias, dbias_logits) of a bias, masked or not, from dy summed over the rows of a group.

    `kernel`: for a masked bias; Triton's unless given.
    """
    if masks.bias_logits is None:
        return sums.sum(0).to(bias.dtype) if need_bias else None, None
    if kernel is None:
        kernel = _kernels("triton").masked_bias_gradients
    if kernel is not cuda.masked_bias_gradients:
        masks = decided_bias(masks)
    return kernel(sums, bias.contiguous(), masks, need_bias=need_bias, need_logits=need_logits)
