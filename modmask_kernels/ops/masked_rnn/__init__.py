"""`masked_lstm` and `masked_gru`: one mask per sequence, the whole time loop in one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import _batching, _check, _library, estimators
from .._masked_product import lowered, uses_kernel
from ..estimators import Estimator
from . import gpu, reference
from .reference import CELLS, GATES

__all__ = ["masked_gru", "masked_lstm"]

_NAMES = (
    "x",
    "h0",
    "c0",
    "weight_ih",
    "weight_hh",
    "logits_ih",
    "logits_hh",
    "bias_ih",
    "bias_hh",
    "bias_logits_ih",
    "bias_logits_hh",
)
_OPERANDS = (
    "Tensor x, Tensor? h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor logits_ih, "
    "Tensor logits_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? bias_logits_ih, "
    "Tensor? bias_logits_hh, Tensor? seed, Tensor? lengths, int cell, bool reverse, "
    "int[] tensor_ids, SymInt sample_offset, int samples, float tau, bool hard, "
    f"{estimators.SCHEMA}"
)
_GRADIENTS = len(_NAMES)
_TENSORS = _GRADIENTS + 2  # and seed and lengths, which have no gradient
# values kept for the backward pass per unit, sequence and step
_SAVED = {"lstm": 5, "gru": 4}
_LANES = {"avx512": 16, "avx2": 8, "plain": 4, None: 0}


def _by_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The reference with the arguments of the schema."""
    *operands, code, low, high, clamp, antithetic = arguments
    operands += [estimators.of_arguments(code, low, high, clamp), antithetic]
    return reference.masked_rnn(*operands)


def _reference(*arguments: Any) -> tuple[Tensor, ...]:
    return (*_by_reference(*arguments), arguments[0].new_empty(1))


def _backward_reference(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    y: Tensor,
    saved: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    operands, rest, needs = arguments[:_GRADIENTS], arguments[_GRADIENTS:-1], arguments[-1]
    wanted = [t is not None and bool(needs >> i & 1) for i, t in enumerate(operands)]
    with _library.graph():
        leaves = [
            None if t is None else t.detach().requires_grad_(want)
            for t, want in zip(operands, wanted, strict=True)
        ]
        results = _by_reference(*leaves, *rest)
    # without steps y depends on nothing
    given = [
        (t, d)
        for t, d in zip(results, (dy, dh_n, dc_n), strict=True)
        if d is not None and t.requires_grad
    ]
    found = torch.autograd.grad(
        [t for t, _ in given],
        [t for t, want in zip(leaves, wanted, strict=True) if want and t is not None],
        [d for _, d in given],
        allow_unused=True,
        materialize_grads=True,
    )
    grads = iter(found)
    return tuple(next(grads) if want else y.new_empty(0) for want in wanted)


_library.define(f"masked_rnn({_OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor)", _reference)
_library.define(
    "masked_rnn_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor y, Tensor saved, "
    f"{_OPERANDS}, int needs) -> ({', '.join(['Tensor'] * _GRADIENTS)})",
    _backward_reference,
)


@_library.fake("masked_rnn")
def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weight_hh, logits_ih, seed = rest[3], rest[4], rest[10]
    cell, samples = CELLS[rest[12]], rest[16]
    if any(t is not None and t.device != x.device for t in rest[: _TENSORS - 1]):
        raise RuntimeError(f"masked_rnn: all tensors must be on the device of x, {x.device}")
    steps, batch, _ = x.shape
    hidden = weight_hh.shape[1]
    sets = logits_ih.shape[0] if logits_ih.dim() == 3 else 1
    groups = sets * _batching.masks_per_set(seed, samples)
    lanes = _LANES[_native.capability()]
    saved: int | tuple[int, ...] = 1
    if x.device.type == "cuda":
        saved = (steps, batch, gpu.SAVED, hidden)
    elif lanes:
        rows = (batch // groups + lanes - 1) // lanes * lanes
        saved = groups * steps * _SAVED[cell] * hidden * rows + 1
    return (
        x.new_empty(steps, batch, hidden),
        x.new_empty(batch, hidden),
        x.new_empty(batch if cell == "lstm" else 0, hidden),
        x.new_empty(saved),
    )


@_library.fake("masked_rnn_backward")
def _backward_fake(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    y: Tensor,
    saved: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    needs = arguments[-1]
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if t is not None and needs >> i & 1
        else y.new_empty(0)
        for i, t in enumerate(arguments[:_GRADIENTS])
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, _, _, saved = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSORS], y, saved)
    ctx.rest = inputs[_TENSORS:]


def _backward(
    ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    *tensors, y, saved = ctx.saved_tensors
    wanted = [
        bool(need) and t is not None
        for need, t in zip(ctx.needs_input_grad[:_GRADIENTS], tensors, strict=False)
    ]
    needs = sum(1 << i for i, want in enumerate(wanted) if want)
    grads = _differentiate(dy, dh_n, dc_n, y, saved, *tensors, *ctx.rest, needs)
    return (
        *(grad if want else None for grad, want in zip(grads, wanted, strict=True)),
        *(None,) * (2 + len(ctx.rest)),
    )


gpu.serve(_reference, _backward_reference)
_differentiate = _library.differentiable_once("masked_rnn_backward", _batching.recurrent_backward)
_operation = _library.differentiable("masked_rnn", _setup_context, _backward, _batching.recurrent)


def _check_dtype(x: Tensor, weight_ih: Tensor, weight_hh: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, not {x.dtype}")
    if x.dtype != weight_ih.dtype == weight_hh.dtype:
        raise TypeError(f"x must have the dtype of the weights, {weight_ih.dtype}, not {x.dtype}")


def _check_parameter(
    t: Tensor | None, name: str, shape: tuple[int, ...], x: Tensor, dtypes: Sequence[torch.dtype]
) -> None:
    if t is None:
        return
    # logits of one set may come without its dimension
    shapes = [shape[1:], shape] if "logits" in name and shape[0] == 1 else [shape]
    if tuple(t.shape) not in shapes:
        expected = " or ".join(str(list(s)) for s in shapes)
        raise ValueError(f"{name} must have shape {expected}, not {_check.shape_of(t)}")
    if t.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, not {t.dtype}")
    _check.check_device(t, name, x, "x")


def _masked_rnn(
    cell: str,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    logits_ih: Tensor,
    logits_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    bias_logits_ih: Tensor | None,
    bias_logits_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    *,
    lengths: Tensor | None,
    reverse: bool,
    seed: Tensor | None,
    tensor_ids: Sequence[int],
    sample_offset: int,
    samples: int,
    tau: float,
    hard: bool,
    batch_dim: int,
    estimator: str | Estimator,
    antithetic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check.check_tensors(
        x=x, weight_ih=weight_ih, weight_hh=weight_hh, logits_ih=logits_ih, logits_hh=logits_hh
    )
    _check.check_optional_tensors(
        bias_ih=bias_ih,
        bias_hh=bias_hh,
        bias_logits_ih=bias_logits_ih,
        bias_logits_hh=bias_logits_hh,
        h0=h0,
        c0=c0,
        lengths=lengths,
    )
    x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0 = lowered(  # type: ignore[assignment]
        x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0
    )
    tensor_ids = tuple(tensor_ids)
    if len(tensor_ids) != 4:
        raise ValueError(f"tensor_ids must be four numbers, not {tensor_ids}")
    for number in tensor_ids:
        _check.check_draw(samples, tau, number, sample_offset, 0)
    if batch_dim not in (0, 1):
        raise ValueError(f"batch_dim must be 0 or 1, not {batch_dim}")
    if x.dim() != 3:
        order = "[steps, batch, in]" if batch_dim == 1 else "[batch, steps, in]"
        raise ValueError(f"x must have shape {order}, not {_check.shape_of(x)}")
    if batch_dim == 0:
        x = x.transpose(0, 1)
    gates = GATES[cell]
    if weight_hh.dim() != 2 or weight_hh.shape[0] != gates * weight_hh.shape[1]:
        raise ValueError(
            f"weight_hh must have shape [{gates} * hidden, hidden], "
            f"not {_check.shape_of(weight_hh)}"
        )
    batch, hidden = x.shape[1], weight_hh.shape[1]
    out = gates * hidden
    sets = logits_ih.shape[0] if logits_ih.dim() == 3 else 1
    if sets < 1:
        raise ValueError("logits_ih must have at least one set, not 0")
    _check_dtype(x, weight_ih, weight_hh)
    own = (x.dtype,)
    wide = (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,)
    for t, name, shape, dtypes in (
        (weight_ih, "weight_ih", (out, x.shape[2]), own),
        (weight_hh, "weight_hh", (out, hidden), own),
        (logits_ih, "logits_ih", (sets, out, x.shape[2]), wide),
        (logits_hh, "logits_hh", (sets, out, hidden), wide),
        (bias_ih, "bias_ih", (out,), own),
        (bias_hh, "bias_hh", (out,), own),
        (bias_logits_ih, "bias_logits_ih", (sets, out), wide),
        (bias_logits_hh, "bias_logits_hh", (sets, out), wide),
        (h0, "h0", (batch, hidden), own),
        (c0, "c0", (batch, hidden), own),
        (lengths, "lengths", (batch,), (torch.int64,)),
    ):
        _check_parameter(t, name, shape, x, dtypes)
    logits_ih, logits_hh, bias_logits_ih, bias_logits_hh = (  # type: ignore[assignment]
        t.unsqueeze(0) if t is not None and t.dim() == dims else t
        for t, dims in (
            (logits_ih, 2),
            (logits_hh, 2),
            (bias_logits_ih, 1),
            (bias_logits_hh, 1),
        )
    )
    # a graph that is being recorded cannot wait for the answer
    recorded = lengths is not None and lengths.is_cuda and torch.cuda.is_current_stream_capturing()
    if lengths is not None and batch and not (_library.traced() or lengths.is_meta or recorded):
        low, high = (int(n) for n in lengths.aminmax())
        if low < 0 or high > x.shape[0]:
            raise ValueError(
                f"lengths must be from 0 to {x.shape[0]}, the number of steps, "
                f"not {low if low < 0 else high}"
            )
    for bias, logits, name in (
        (bias_ih, bias_logits_ih, "bias_logits_ih"),
        (bias_hh, bias_logits_hh, "bias_logits_hh"),
    ):
        if logits is not None and bias is None:
            raise ValueError(f"{name} must come with its bias, which is None")
    _check.check_seed(seed, sets, x, "x")
    groups = sets * (1 if seed is None else samples)
    if batch % groups:
        raise ValueError(
            f"the batch of x, {batch} (dimension {batch_dim}), does not divide into {sets} sets * "
            f"{groups // sets} samples = {groups} equal groups"
        )

    arguments: tuple[Any, ...] = (
        *(x, h0, c0, weight_ih, weight_hh, logits_ih, logits_hh),
        *(bias_ih, bias_hh, bias_logits_ih, bias_logits_hh),
        *(seed, lengths, CELLS.index(cell), reverse, list(tensor_ids)),
        *(sample_offset, samples, tau, hard, *estimators.arguments(estimator, antithetic)),
    )
    if uses_kernel(x) or (x.is_cuda and gpu.unserved(*arguments) is None):
        # the kernels compute in float32; weights are as large as they are, whatever the samples
        wide_ones = (t if t is None else t.float() for t in arguments[:_GRADIENTS])
        y, h_n, c_n, _ = _operation(*wide_ones, *arguments[_GRADIENTS:])
        y, h_n, c_n = (t.to(x.dtype) for t in (y, h_n, c_n))
    else:
        y, h_n, c_n = _by_reference(*arguments)
    return y.transpose(0, 1) if batch_dim == 0 else y, h_n, c_n


def masked_lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    logits_ih: Tensor,
    logits_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    bias_logits_ih: Tensor | None = None,
    bias_logits_hh: Tensor | None = None,
    *,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    seed: Tensor | None = None,
    tensor_ids: Sequence[int] = (0, 1, 2, 3),
    sample_offset: int = 0,
    samples: int = 1,
    tau: float = 1.0,
    hard: bool = True,
    batch_dim: int = 1,
    estimator: str | Estimator = "gumbel_sigmoid",
    antithetic: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""One direction of one LSTM layer whose weights are masked anew for every group of the batch.

    The batch is cut into `sets * samples` equal, contiguous groups; group `set * samples + sample`
    runs through the whole sequence with one draw of the masks of both matrices (Csordás et al.
    2020, section 2: one mask per sequence). Forward and backward are one operation each; masked
    weights exist once per thread, whatever `samples` is, and masks are regenerated in the backward
    pass. Forward is pure: equal arguments give equal bits.

    Args:
        x: `[steps, batch, in]`, or `[batch, steps, in]` with `batch_dim=0`; float32, bfloat16,
            float16 (fused on the CPU, computed in float32) or float64 (reference).
        weight_ih: `[4 * hidden, in]`, gates in the order i, f, g, o of `torch.nn.LSTM`; dtype of
            `x`, as `weight_hh`, the biases and the states.
        weight_hh: `[4 * hidden, hidden]`.
        logits_ih, logits_hh: shapes of the weights, or `[sets, *weight]`; float32 (float64 beside
            float64 `x`). A weight is kept with probability `sigmoid(logit)`.
        bias_ih, bias_hh: `[4 * hidden]`.
        bias_logits_ih, bias_logits_hh: `[4 * hidden]` or `[sets, 4 * hidden]`; mask the biases.
        h0, c0: `[batch, hidden]`; zeros unless given.
        lengths: int64 `[batch]`: sequence b has steps `0 .. lengths[b] - 1`; results beyond are 0,
            final states are those of its own end.
        reverse: from the last step to the first.
        seed: int64 tensor `[]` or `[sets]`; `None` draws no noise and keeps weights with
            `logit > 0`, whatever `samples` says.
        tensor_ids: name weight_ih, weight_hh, bias_ih and bias_hh in the noise.
        sample_offset, samples, tau, hard: as in `masked_linear`.
        batch_dim: 1, or 0 for batch-first inputs.
        estimator, antithetic: as in `masked_linear`; top_k ranks each of the four parameters by
            itself.

    Returns:
        `y`, with `hidden` in place of `in`, and `(h_n, c_n)`, each `[batch, hidden]`; dtype of `x`.

    Raises:
        ValueError: shapes or devices that do not fit; a batch that does not divide.
        TypeError: dtypes that do not fit.

    Under autocast `x`, weights, biases and states are cast, logits never. Gradients: all tensors
    but `seed` and `lengths`; the fused operation has no second derivative.

    Equivalent to::

        m_ih = sample_mask(logits_ih, seed=seed, samples=samples, tensor_id=tensor_ids[0])
        m_hh = sample_mask(logits_hh, seed=seed, samples=samples, tensor_id=tensor_ids[1])
        for g, part in enumerate(x.chunk(sets * samples, dim=1)):
            s, k = divmod(g, samples)
            weights = [weight_ih * m_ih[k, s], weight_hh * m_hh[k, s], bias_ih, bias_hh]
            y, h_n, c_n = torch.lstm(part, states[g], weights, True, 1, 0.0, False, False, False)
    """
    y, h_n, c_n = _masked_rnn(
        "lstm",
        *(x, weight_ih, weight_hh, logits_ih, logits_hh),
        *(bias_ih, bias_hh, bias_logits_ih, bias_logits_hh, h0, c0),
        lengths=lengths,
        reverse=reverse,
        seed=seed,
        tensor_ids=tensor_ids,
        sample_offset=sample_offset,
        samples=samples,
        tau=tau,
        hard=hard,
        batch_dim=batch_dim,
        estimator=estimator,
        antithetic=antithetic,
    )
    return y, (h_n, c_n)


def masked_gru(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    logits_ih: Tensor,
    logits_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    bias_logits_ih: Tensor | None = None,
    bias_logits_hh: Tensor | None = None,
    *,
    h0: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    seed: Tensor | None = None,
    tensor_ids: Sequence[int] = (0, 1, 2, 3),
    sample_offset: int = 0,
    samples: int = 1,
    tau: float = 1.0,
    hard: bool = True,
    batch_dim: int = 1,
    estimator: str | Estimator = "gumbel_sigmoid",
    antithetic: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""One direction of one GRU layer whose weights are masked anew for every group of the batch.

    As `masked_lstm`, with the cell of `torch.nn.GRU`: gates r, z, n, so weights of `3 * hidden`
    rows, and no cell state.

    Args:
        x, weight_ih, weight_hh, logits_ih, logits_hh, bias_ih, bias_hh, bias_logits_ih,
            bias_logits_hh, h0, lengths, reverse, seed, tensor_ids, sample_offset, samples, tau,
            hard, batch_dim, estimator, antithetic: as in `masked_lstm`.

    Returns:
        `y` and `h_n` `[batch, hidden]`, dtype of `x`.

    Raises:
        ValueError: shapes or devices that do not fit; a batch that does not divide.
        TypeError: dtypes that do not fit.

    Equivalent to::

        m_ih = sample_mask(logits_ih, seed=seed, samples=samples, tensor_id=tensor_ids[0])
        m_hh = sample_mask(logits_hh, seed=seed, samples=samples, tensor_id=tensor_ids[1])
        for g, part in enumerate(x.chunk(sets * samples, dim=1)):
            s, k = divmod(g, samples)
            weights = [weight_ih * m_ih[k, s], weight_hh * m_hh[k, s], bias_ih, bias_hh]
            y, h_n = torch.gru(part, states[g], weights, True, 1, 0.0, False, False, False)
    """
    y, h_n, _ = _masked_rnn(
        "gru",
        *(x, weight_ih, weight_hh, logits_ih, logits_hh),
        *(bias_ih, bias_hh, bias_logits_ih, bias_logits_hh, h0, None),
        lengths=lengths,
        reverse=reverse,
        seed=seed,
        tensor_ids=tensor_ids,
        sample_offset=sample_offset,
        samples=samples,
        tau=tau,
        hard=hard,
        batch_dim=batch_dim,
        estimator=estimator,
        antithetic=antithetic,
    )
    return y, h_n
