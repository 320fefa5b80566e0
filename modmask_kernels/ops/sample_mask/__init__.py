"""`sample_mask`: masks drawn from logits, as values or as packed bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import _batching, _check, _library, estimators
from .._masked_product import check_hard
from ..estimators import Estimator
from . import gpu, reference


def _values_reference(
    logits: Tensor,
    seed: Tensor | None,
    samples: int,
    tau: float,
    hard: bool,
    tensor_id: int,
    sample_offset: int,
    element_offset: int,
    code: int,
    low: float,
    high: float,
    clamp: float,
    antithetic: bool,
    n_of_m: Sequence[int],
) -> Tensor:
    return reference.sample_mask(
        logits,
        seed=seed,
        samples=samples,
        tau=tau,
        hard=hard,
        tensor_id=tensor_id,
        sample_offset=sample_offset,
        element_offset=element_offset,
        estimator=estimators.of_arguments(code, low, high, clamp),
        antithetic=antithetic,
        n_of_m=(n_of_m[0], n_of_m[1]) if n_of_m else None,
    )


def _packed_reference(logits: Tensor, seed: Tensor | None, samples: int, *where: Any) -> Tensor:
    values = _values_reference(logits.detach(), seed, samples, 1.0, True, *where)
    leading = values.shape[: 1 + _set_dims(seed)]
    rows = values.reshape(leading.numel(), -1)
    if not rows.shape[0]:
        return rows.new_empty((*leading, -(-rows.shape[1] // 8)), dtype=torch.uint8)
    return torch.stack([pack_bits(row > 0) for row in rows]).reshape(*leading, -1)


def _backward_reference(
    dvalues: Tensor,
    logits: Tensor,
    seed: Tensor | None,
    samples: int,
    tau: float,
    *where: Any,
) -> Tensor:
    with _library.graph():
        leaf = logits.detach().requires_grad_()
        values = _values_reference(leaf, seed, samples, tau, True, *where)
    return torch.autograd.grad(values, leaf, dvalues)[0]


def _set_dims(seed: Tensor | None) -> int:
    """The dimensions of the sets: one where each has its seed, or seeds."""
    return 0 if seed is None else min(seed.dim(), 1)


def _each_by_itself(arguments: Sequence[Any]) -> bool:
    """Whether the mask of a logit, without a seed, depends on no other logit."""
    *_, code, _, _, _, _, n_of_m = arguments
    return estimators.NAMES[code] != "top_k" and not n_of_m


_WHERE = (
    f"int tensor_id, SymInt sample_offset, SymInt element_offset, {estimators.SCHEMA}, int[] n_of_m"
)
_SCHEMAS: dict[str, Callable[..., Tensor]] = {
    "sample_mask(Tensor logits, Tensor? seed, int samples, float tau, bool hard, "
    f"{_WHERE}) -> Tensor": _values_reference,
    "sample_mask_packed(Tensor logits, Tensor? seed, int samples, "
    f"{_WHERE}) -> Tensor": _packed_reference,
    "sample_mask_backward(Tensor dvalues, Tensor logits, Tensor? seed, int samples, float tau, "
    f"{_WHERE}) -> Tensor": _backward_reference,
}
for _schema, _reference in _SCHEMAS.items():
    _library.define(_schema, _reference)
    gpu.serve(_schema, _reference)
_library.define_on_cuda("pack_bits_cuda(Tensor mask) -> Tensor")


@_library.fake("pack_bits_cuda")
def _pack_fake(mask: Tensor) -> Tensor:
    return mask.new_empty((mask.numel() + 7) // 8, dtype=torch.uint8)


@_library.fake("sample_mask")
def _values_fake(logits: Tensor, seed: Tensor | None, samples: int, *_: Any) -> Tensor:
    return logits.new_empty((_batching.masks_per_set(seed, samples), *logits.shape))


@_library.fake("sample_mask_packed")
def _packed_fake(logits: Tensor, seed: Tensor | None, samples: int, *_: Any) -> Tensor:
    dims = _set_dims(seed)
    count = logits[0].numel() if dims else logits.numel()
    leading = (_batching.masks_per_set(seed, samples), *logits.shape[:dims])
    return logits.new_empty((*leading, (count + 7) // 8), dtype=torch.uint8)


@_library.fake("sample_mask_backward")
def _backward_fake(dvalues: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, seed, samples, tau, _, *where = inputs
    ctx.save_for_backward(logits, seed)
    ctx.draw = (samples, tau, *where)


def _backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    dlogits = _differentiate(dvalues, *ctx.saved_tensors, *ctx.draw)
    return (dlogits, *(None,) * (2 + len(ctx.draw)))


_sample = _library.differentiable(
    "sample_mask", _setup_context, _backward, _batching.samples(_each_by_itself)
)
_differentiate = _library.differentiable_once(
    "sample_mask_backward", _batching.samples_backward(_each_by_itself)
)
# bytes hold the bits of one parameter
_library.batched("sample_mask_packed", together=_batching.samples(lambda _: False))


def _check_arguments(
    logits: Tensor,
    seed: Tensor | None,
    samples: int,
    tau: float,
    tensor_id: int,
    sample_offset: int,
    element_offset: int,
    hard: bool,
    estimator: Estimator,
    n_of_m: Sequence[int] | None,
) -> None:
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits must be float32 (or float64), not {logits.dtype}")
    _check.check_seed(seed, None, logits, "logits")
    if seed is not None and seed.dim():
        if logits.dim() < 1 or logits.shape[0] != seed.shape[0]:
            raise ValueError(
                f"logits must have shape [{seed.shape[0]}, ...] beside a seed of shape "
                f"{_check.shape_of(seed)} (one per set), not {_check.shape_of(logits)}"
            )
        if not seed.shape[0]:
            raise ValueError("seed must not be empty")
    _check.check_draw(samples, tau, tensor_id, sample_offset, element_offset)
    estimators.check_whole(estimator, element_offset)
    check_hard(n_of_m, hard, estimator)
    shape = logits.shape[_set_dims(seed) :]
    if n_of_m is not None and (len(shape) < 2 or shape[1] % n_of_m[1]):
        raise ValueError(
            f"n_of_m needs logits [out, in, ...] of one parameter, whose in divides into groups of "
            f"{n_of_m[1]}, not {list(shape)}"
        )


def _fused(logits: Tensor) -> bool:
    if logits.dtype != torch.float32:
        return False
    if logits.is_cuda:
        return bool(_native.cuda_loaded())
    return logits.device.type in ("cpu", "meta") and _native.enabled()


def sample_mask(
    logits: Tensor,
    *,
    seed: Tensor | None,
    samples: int = 1,
    tau: float = 1.0,
    hard: bool = True,
    tensor_id: int = 0,
    sample_offset: int = 0,
    element_offset: int = 0,
    n_of_m: tuple[int, int] | None = None,
    estimator: str | Estimator = "gumbel_sigmoid",
    antithetic: bool = False,
) -> Tensor:
    r"""Masks drawn from logits: Gumbel-sigmoid samples with the straight-through gradient.

    A weight is kept iff `u < sigmoid(logit)`, with one uniform `u` per weight from Philox4x32-7
    (noise version 1; see `docs/concepts.md`). The difference of the two Gumbel variables of
    Csordás et al. (2020, section 2) is a logistic variable, so this is the same distribution.

    Args:
        logits: any shape, float32 (fused on the CPU) or float64 (reference); with a seed of shape
            `[sets]` its first dimension is the sets.
        seed: int64 tensor `[]` or `[sets]` on the device of `logits`; `None` draws no noise: one
            mask of all the logits, as one set, kept where `logit > 0`.
        samples: number of masks per set.
        tau: temperature of the soft mask and of the surrogate gradient.
        hard: exactly 0/1; else `sigmoid((logit + log((1-u)/u)) / tau)`.
        tensor_id: position of the parameter in its model.
        sample_offset: index of the first sample.
        element_offset: row-major index of the first logit (of each set) in the whole parameter.
        n_of_m: `(n, m)` keeps n of every m consecutive logits along the second dimension of the
            parameter, its inputs, as in `masked_linear`.
        estimator: how masks follow from logits and noise: a name or a value of
            `modmask_kernels.ops.estimators`; see `docs/estimators.md`.
        antithetic: samples 2j and 2j + 1 use the same uniform numbers, the second one as 1 - u.

    Returns:
        `[samples, *logits.shape]`, dtype of `logits`. The gradient with respect to `logits` is
        that of the soft mask, `s * (1 - s) / tau`.

    Raises:
        ValueError, TypeError: arguments that do not fit, by name.

    Equivalent to::

        u = (2 * k + 1) * 2**-24                    # k: 23 random bits
        soft = torch.sigmoid((logits + torch.log((1 - u) / u)) / tau)
        mask = (u < torch.sigmoid(logits)).to(soft.dtype)
        return mask + (soft - soft.detach()) if hard else soft
    """
    chosen = estimators.resolve(estimator)
    where = (tensor_id, sample_offset, element_offset)
    _check_arguments(logits, seed, samples, tau, *where, hard, chosen, n_of_m)
    call: Callable[..., Tensor] = _sample if _fused(logits) else _values_reference
    drawn = (*estimators.arguments(chosen, antithetic), list(n_of_m or ()))
    return call(logits, seed, samples, tau, hard, *where, *drawn)


def sample_mask_packed(
    logits: Tensor,
    *,
    seed: Tensor | None,
    samples: int = 1,
    tensor_id: int = 0,
    sample_offset: int = 0,
    element_offset: int = 0,
    n_of_m: tuple[int, int] | None = None,
    estimator: str | Estimator = "gumbel_sigmoid",
    antithetic: bool = False,
) -> Tensor:
    r"""The masks of `sample_mask`, one bit per weight; no gradient.

    Args:
        logits: as in `sample_mask`.
        seed: as in `sample_mask`.
        samples: as in `sample_mask`.
        tensor_id: as in `sample_mask`.
        sample_offset: as in `sample_mask`.
        element_offset, n_of_m: as in `sample_mask`.
        estimator, antithetic: as in `sample_mask`; masks are hard whatever the estimator.

    Returns:
        uint8 `[samples, ceil(n / 8)]`, or `[samples, sets, ceil(n / 8)]` with a seed per set; bit
        `i & 7` of byte `i >> 3` is element `i` in row-major order, and bits beyond the last
        element are 0.

    Raises:
        ValueError, TypeError: arguments that do not fit, by name.

    Equivalent to::

        masks = sample_mask(logits, seed=seed, samples=samples) > 0
        return torch.stack([pack_bits(m) for m in masks])
    """
    chosen = estimators.resolve(estimator)
    where = (tensor_id, sample_offset, element_offset)
    _check_arguments(logits, seed, samples, 1.0, *where, True, chosen, n_of_m)
    drawn = (*estimators.arguments(chosen, antithetic), list(n_of_m or ()))
    call = torch.ops.modmask.sample_mask_packed if _fused(logits) else _packed_reference
    packed: Tensor = call(logits.detach(), seed, samples, *where, *drawn)
    return packed


def pack_bits(mask: Tensor) -> Tensor:
    """Packs a mask, one bit per element in row-major order, the lowest bit first.

    Args:
        mask: bool tensor of any shape, or integers, of which all but 0 count as kept.

    Returns:
        uint8 `[ceil(n / 8)]`; bits beyond the last element are 0.

    Raises:
        TypeError: a `mask` that is no tensor, or one of floating point: say which values are kept,
            for a hard mask ``mask > 0``.

    Equivalent to::

        torch.from_numpy(numpy.packbits(mask.numpy().ravel() != 0, bitorder="little"))
    """
    _check.check_tensors(mask=mask)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask must be bool or of integers, not {mask.dtype}: use mask > 0")
    kept = mask != 0
    if kept.is_cuda and not _library.traced() and _native.cuda_unserved(kept.device) is None:
        bits: Tensor = torch.ops.modmask.pack_bits_cuda(kept)
        return bits
    flat = kept.reshape(-1).to(torch.uint8)
    octets = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    packed = octets[:, 0].clone()
    for bit in range(1, 8):
        packed |= octets[:, bit] << bit
    return packed


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack_bits`.

    Args:
        packed: uint8 `[ceil(n / 8)]`.
        shape: shape of the mask, of n elements.

    Returns:
        bool tensor of that shape.

    Raises:
        ValueError: a `packed` of another length.
        TypeError: a `packed` of another dtype, or that is no tensor; a `shape` that is none.

    Equivalent to::

        bits = numpy.unpackbits(packed.numpy(), count=n, bitorder="little")
        torch.from_numpy(bits).bool().view(shape)
    """
    _check.check_tensors(packed=packed)
    try:
        size = torch.Size(shape)
    except TypeError:
        raise TypeError(f"shape must be a list of sizes, not {shape!r}") from None
    count = size.numel()
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8, not {packed.dtype}")
    if packed.shape != ((count + 7) // 8,):
        raise ValueError(
            f"packed must have shape [{(count + 7) // 8}] for a mask of shape {list(size)}, "
            f"not {_check.shape_of(packed)}"
        )
    bits = torch.stack([packed >> bit & 1 for bit in range(8)], dim=1)
    return bits.reshape(-1)[:count].bool().view(size)
