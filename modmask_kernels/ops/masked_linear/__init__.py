"""`masked_linear`: sampling, masking and the matrix product in one operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import _check, _library
from . import reference

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_DRAW = (
    "Tensor? seed, int tensor_id, int bias_tensor_id, SymInt sample_offset, SymInt element_offset, "
    "int samples, float tau, bool hard"
)


def _forward_reference(
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
) -> Tensor:
    return reference.masked_linear(
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
    )


def _backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    *draw_and_needs: Any,
) -> tuple[Tensor, ...]:
    draw, needs = draw_and_needs[:8], draw_and_needs[8:]
    given = (x, weight, logits, bias, bias_logits)
    with torch.enable_grad():
        leaves: list[Any] = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip(given, needs, strict=True)
        ]
        y = _forward_reference(*leaves, *draw)
    wanted = [t for t, need in zip(leaves, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(y, wanted, dy) if wanted else ())
    return tuple(next(grads) if need else dy.new_empty(0) for need in needs)


_library.define(
    "masked_linear(Tensor x, Tensor weight, Tensor logits, Tensor? bias, Tensor? bias_logits, "
    f"{_DRAW}) -> Tensor",
    _forward_reference,
)
_library.define(
    "masked_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor logits, Tensor? bias, "
    f"Tensor? bias_logits, {_DRAW}, bool need_x, bool need_weight, bool need_logits, "
    "bool need_bias, bool need_bias_logits) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_reference,
)


@_library.fake("masked_linear")
def _forward_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_library.fake("masked_linear_backward")
def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    *draw_and_needs: Any,
) -> tuple[Tensor, ...]:
    likes = (x, weight, logits, bias, bias_logits)
    return tuple(
        torch.empty_like(like, memory_format=torch.contiguous_format)
        if need and like is not None
        else (weight if i < 4 and i != 2 else logits).new_empty(0)
        for i, (like, need) in enumerate(zip(likes, draw_and_needs[8:], strict=True))
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.draw = inputs[6:]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:5]
    x, weight, logits, bias, bias_logits, seed = ctx.saved_tensors
    grads = _differentiate(dy, x, weight, logits, bias, bias_logits, seed, *ctx.draw, *needs)
    return (
        *(g if need else None for g, need in zip(grads, needs, strict=True)),
        *(None,) * 8,
    )


_operation = torch.ops.modmask.masked_linear.default
_apply = _library.differentiable("masked_linear", _setup_context, _backward)
_differentiate = _library.differentiable_once("masked_linear_backward")


def _fits(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    samples: int,
) -> bool:
    """Whether all plainly fits a batch in the first dimension; False asks for a close look."""
    rows, columns = weight.shape if weight.dim() == 2 else (-1, -1)
    device, dtype = x.device, x.dtype
    lead = logits.shape[:-2]  # () or (sets,)
    sets = lead.numel()
    return (
        x.dim() > 1
        and x.shape[-1] == columns
        and len(lead) < 2
        and sets > 0
        and logits.shape == (*lead, rows, columns)
        and logits.dtype is torch.float32
        and logits.device == device
        and weight.dtype is dtype
        and dtype in FUSED_DTYPES
        and weight.device == device
        and (
            bias is None
            or (bias.shape == (rows,) and bias.dtype is dtype and bias.device == device)
        )
        and (
            bias_logits is None
            or (
                bias is not None
                and bias_logits.shape == (*lead, rows)
                and bias_logits.dtype is torch.float32
                and bias_logits.device == device
            )
        )
        and (
            seed is None
            or (
                isinstance(seed, Tensor)
                and seed.dtype is torch.int64
                and (seed.dim() == 0 or seed.shape == (sets,))
                and seed.device == device
            )
        )
        and x.shape[0] % (sets * (1 if seed is None else samples)) == 0
    )


def _check_arguments(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    samples: int,
    batch_dim: int,
) -> None:
    if logits.dim() == 2:
        logits = logits.unsqueeze(0)
    if bias_logits is not None and bias_logits.dim() == 1:
        bias_logits = bias_logits.unsqueeze(0)
    _check.check_seed(seed, logits.shape[0] if logits.dim() == 3 else None, x, "x")
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape [out, in], not {_check.shape_of(weight)}")
    out, inputs = weight.shape
    if x.dim() < 1 or x.shape[-1] != inputs:
        raise ValueError(
            f"x must have shape [..., {inputs}] to fit weight {_check.shape_of(weight)}, "
            f"not {_check.shape_of(x)}"
        )
    if logits.dim() != 3 or logits.shape[1:] != weight.shape or logits.shape[0] < 1:
        raise ValueError(
            f"logits must have shape [{out}, {inputs}] or [sets, {out}, {inputs}] like weight, "
            f"not {_check.shape_of(logits)}"
        )
    sets = logits.shape[0]
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias must have shape [{out}], not {_check.shape_of(bias)}")
    if bias_logits is not None:
        if bias is None:
            raise ValueError("bias_logits came without a bias")
        if bias_logits.shape != (sets, out):
            raise ValueError(
                f"bias_logits must have shape [{out}] or [{sets}, {out}], "
                f"not {_check.shape_of(bias_logits)}"
            )
    if not -x.dim() <= batch_dim < x.dim() - 1 or batch_dim == -1:
        if x.dim() == 1:
            raise ValueError("x must have a batch dimension: shape [..., in] with two or more")
        raise ValueError(
            f"batch_dim must be a dimension of x {_check.shape_of(x)} other than the last, "
            f"not {batch_dim}"
        )
    batch = x.shape[batch_dim]
    groups = sets * (1 if seed is None else samples)
    if batch % groups:
        raise ValueError(
            f"the batch of x, {batch} (dimension {batch_dim} of {_check.shape_of(x)}), does not "
            f"divide into {sets} sets * {groups // sets} samples = {groups} equal groups"
        )
    if not x.is_floating_point():
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, not {x.dtype}")
    for t, name in ((weight, "weight"), (bias, "bias")):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, not {t.dtype}")
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    for t, name in ((logits, "logits"), (bias_logits, "bias_logits")):
        if t is not None and t.dtype not in (torch.float32, wanted):
            raise TypeError(f"{name} must be float32, not {t.dtype}")
    for t, name in (
        (weight, "weight"),
        (logits, "logits"),
        (bias, "bias"),
        (bias_logits, "bias_logits"),
    ):
        if t is not None:
            _check.check_device(t, name, x, "x")


def _below_autograd(*inputs: Any) -> Tensor:
    # the registered gradient looks at every call, even of one that needs none
    with torch._C._AutoDispatchBelowAutograd():
        y: Tensor = _operation(*inputs)
    return y


class _MaskedLinear(torch.autograd.Function):
    """The registered gradient without the generic machinery, dearer than a small layer."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.save_for_backward(*inputs[:6])
        ctx.draw = inputs[6:]
        return _below_autograd(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: the registered operation refuses, with a reason
            return _backward(ctx, dy)
        with torch._C._AutoDispatchBelowAutograd():
            return _backward(ctx, dy)


def _uses_kernel(x: Tensor) -> bool:
    return x.device.type in ("cpu", "meta") and x.dtype in FUSED_DTYPES and _native.enabled()


def explain(x: Tensor) -> tuple[str, str]:
    """The backend that serves an input like `x` (`cpu` or `reference`), and why."""
    if _uses_kernel(x):
        return "cpu", f"compiled kernels, capability {_native.capability()}"
    if _native.FORCED_BACKEND == "reference":
        return "reference", "MODMASK_BACKEND=reference"
    if not _native.available():
        return "reference", f"the compiled kernels are absent: {_native.LOAD_ERROR}"
    if x.dtype not in FUSED_DTYPES:
        return "reference", f"no fused kernel for {x.dtype}"
    return "reference", f"no fused kernel for device {x.device.type}"


def masked_linear(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None = None,
    bias_logits: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    tensor_id: int = 0,
    bias_tensor_id: int | None = None,
    sample_offset: int = 0,
    element_offset: int = 0,
    samples: int = 1,
    tau: float = 1.0,
    hard: bool = True,
    batch_dim: int = 0,
) -> Tensor:
    r"""Linear layer whose weight is masked anew for every group of the batch.

    The batch is cut into `sets * samples` equal, contiguous groups; group `set * samples + sample`
    is multiplied with the weight masked by that sample of that set. Masks are sampled from
    `logits` (Gumbel-sigmoid, one uniform per weight; Csordás et al. 2020, section 2), binarised,
    applied and multiplied without ever existing at the size of the weight; the backward pass
    regenerates them from the seed. Forward is pure: equal arguments give equal bits.

    Args:
        x: `[..., in]`; float32, bfloat16, float16 (fused on the CPU) or float64 (reference).
        weight: `[out, in]`, dtype of `x`.
        logits: `[out, in]` or `[sets, out, in]`, float32 (float64 beside float64 `x`). A weight is
            kept with probability `sigmoid(logit)`.
        bias: `[out]`, dtype of `x`.
        bias_logits: `[out]` or `[sets, out]`; masks the bias likewise.
        seed: int64 tensor `[]` or `[sets]` on the device of `x`; `None` keeps weights with
            `logit > 0`, whatever `samples` says.
        tensor_id: names the weight in the noise; two tensors of a model need different ones.
        bias_tensor_id: the same for the bias; `tensor_id + 1` unless given.
        sample_offset: index of the first sample (rank r of a data-parallel job uses
            `r * samples`).
        element_offset: row-major index of `weight[0, 0]` in the whole parameter, for shards.
        samples: mask samples per set.
        tau: temperature of the surrogate; a hard mask's value does not depend on it.
        hard: exactly 0/1 with the straight-through gradient of the soft mask; else the soft mask
            `sigmoid((logit + log((1-u)/u)) / tau)`.
        batch_dim: the dimension of `x` that is cut into groups.

    Returns:
        `[..., out]`, dtype of `x`.

    Raises:
        ValueError: shapes or devices that do not fit; a batch that does not divide.
        TypeError: dtypes that do not fit.

    Under autocast `x`, `weight` and `bias` are cast, logits never. Gradients: `x`, `weight`,
    `logits`, `bias`, `bias_logits`; there is no second derivative.

    Equivalent to::

        masks = sample_mask(logits, seed=seed, samples=samples, tau=tau, hard=hard)
        parts = x.chunk(sets * samples, dim=batch_dim)
        y = [F.linear(parts[s * samples + k], weight * masks[k, s], bias)
             for s in range(sets) for k in range(samples)]
        return torch.cat(y, dim=batch_dim)
    """
    _check.check_tensors(x=x, weight=weight, logits=logits)
    if _library.autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check.check_draw(samples, tau, tensor_id, sample_offset, element_offset)
    if batch_dim or not _fits(x, weight, logits, bias, bias_logits, seed, samples):
        _check_arguments(x, weight, logits, bias, bias_logits, seed, samples, batch_dim)
    if bias_tensor_id is None:
        bias_tensor_id = (tensor_id + 1) % 2**32
    elif not 0 <= bias_tensor_id < 2**32:
        raise ValueError(f"bias_tensor_id must be in [0, 2**32), not {bias_tensor_id}")

    moved = batch_dim % x.dim() != 0
    if moved:
        x = x.movedim(batch_dim, 0)
    call: Callable[..., Tensor]
    if not _uses_kernel(x):
        call = _forward_reference
    elif _library.traced():
        call = _apply
    else:
        call = _MaskedLinear.apply if torch.is_grad_enabled() else _below_autograd
    y = call(
        x,
        weight,
        logits,
        bias,
        bias_logits,
        seed,
        tensor_id,
        bias_tensor_id,
        sample_offset,
        element_offset,
        samples,
        tau,
        hard,
    )
    return y.movedim(0, batch_dim) if moved else y
