"""`masked_lstm` and `masked_gru` on CUDA tensors: products around a time loop.

The input's part of the gates is one masked product for all steps, and so is the gradient of each
matrix. In between, one launch has the recurrent weight and its mask stay on the chip for the whole
sequence; where they do not fit, every step is a masked product and a kernel for the cell, or with
Triton alone its product and the cell in PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import _gpu, _library, estimators
from .._gpu_masks import masks_of
from ..estimators import Estimator
from ..masked_linear import gpu as linear_gpu
from ..masked_linear import product
from ..sample_mask import sample_mask, sample_mask_packed
from . import steps
from .reference import CELLS, GATES

_LOOP = (
    "Tensor weight, Tensor? bits, {}, Tensor? lengths, int cell, bool reverse, int groups, "
    "int samples"
)
_library.define_on_cuda(
    f"rnn_loop(Tensor gates, {_LOOP.format('Tensor? hidden_bias, Tensor? h0, Tensor? c0')}) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
_library.define_on_cuda(
    f"rnn_loop_backward(Tensor saved, {_LOOP.format('Tensor? dy, Tensor? dh_n, Tensor? dc_n')}) -> "
    "(Tensor, Tensor, Tensor)"
)

# values kept for the backward pass per unit, sequence and step
SAVED = 5


def unserved(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weight_ih: Tensor, *rest: Any
) -> str | None:
    """Why no kernel serves these arguments of the operation and the reference does, or None.

    What depends on the device is asked below the dispatcher, where no compiler looks on.
    """
    weight_hh, logits_ih, logits_hh, bias_ih, bias_hh, bias_logits_ih, bias_logits_hh = rest[:7]
    seed, _, _, _, ids, offset, samples, tau, hard, *how = rest[7:]
    if not hard:
        return "no GPU kernel for soft masks of a recurrent layer"
    if seed is not None and seed.dim() > 1:
        return "no GPU kernel for several draws of a set"
    of_input = (x, weight_ih, logits_ih, bias_ih, bias_logits_ih)
    of_state = (x, weight_hh, logits_hh, bias_hh, bias_logits_hh)
    for i, operands in enumerate((of_input, of_state)):
        reason = product.unserved(*operands, seed, *_draw(ids, i, offset, samples, tau, how))
        if reason is not None:
            return reason
    return None


def _kind(device: torch.device) -> str | None:
    """Whose kernels run the time loop on a device, or None."""
    if _native.cuda_unserved(device) is None:
        return "cuda"
    return "triton" if _gpu.absent() is None else None


def serve(reference: Callable[..., Any], backward_reference: Callable[..., Any]) -> None:
    """Serve the operations on CUDA tensors, by a reference where a device has no kernels."""

    def kind(x: Tensor, weight_hh: Tensor) -> str | None:
        empty = not x.shape[1] or not weight_hh.shape[1]
        return None if empty else _kind(x.device)

    def choose(*arguments: Any) -> tuple[Tensor, ...]:
        found = kind(arguments[0], arguments[4])
        if found is not None:
            return forward(*arguments, kind=found)
        y, h_n, c_n, _ = reference(*arguments)
        return y, h_n, c_n, y.new_empty(*y.shape[:2], SAVED, y.shape[2])

    def choose_backward(*arguments: Any) -> tuple[Tensor, ...]:
        found = kind(arguments[5], arguments[9])
        if found is not None:
            return backward(*arguments, kind=found)
        gradients: tuple[Tensor, ...] = backward_reference(*arguments)
        return gradients

    _library.implement("masked_rnn", "CUDA", choose)
    _library.implement("masked_rnn_backward", "CUDA", choose_backward)


# of a group: up to how many `explain` asks
_MOST_ROWS = 4096


def explain(
    cell: str,
    weight_hh: Tensor,
    logits_hh: Tensor,
    samples: int,
    estimator: Estimator,
    kind: str | None = None,
    fits: Callable[..., bool] = _native.rnn_fits,
) -> tuple[str, str]:
    """The backend of a recurrent layer, `cuda`, `triton` or `reference`, and why.

    `kind` and `fits`: what there is, unless it is that of the device.
    """
    rule = estimators.arguments(estimator, False)
    draw: tuple[Any, ...] = (0, 1, 0, 0, samples, 1.0, True, *rule, [])
    weight = weight_hh
    reason = product.unserved(weight, weight, logits_hh, None, None, None, *draw)
    kind = kind or _kind(weight.device)
    if reason is not None or kind is None:
        return "reference", reason or f"no GPU kernels for {weight.device}"
    if kind == "triton":
        why = _native.cuda_unserved(weight.device) or "asked for"
        return "triton", f"step by step, cells in PyTorch; cuda: {why}"
    groups = logits_hh.shape[0] * (samples if estimator.draws else 1)
    hidden = weight.shape[1]
    rows = 0
    while rows < _MOST_ROWS:
        more = max(1, 2 * rows)
        if not fits(weight.device, CELLS.index(cell), 1, more, groups, hidden):
            break
        rows = more
    if rows == _MOST_ROWS:
        return "cuda", "the time loop in one launch"
    by_steps = "step by step, a masked product and a kernel for the cell"
    if rows == 0:
        return "cuda", f"{by_steps}: the recurrent weight does not fit the chip"
    return "cuda", f"the time loop in one launch up to {rows} rows of a group, then {by_steps}"


def _draw(ids: Any, i: int, offset: int, samples: int, tau: float, how: Any) -> tuple[Any, ...]:
    """What a masked product is told of the masks of matrix i and its bias."""
    return (ids[i], ids[i + 2], offset, 0, samples, tau, True, *how, [])


def _rule(number: int, seed: Tensor | None, offset: int, samples: int, how: Any) -> dict[str, Any]:
    """The same for `sample_mask`."""
    code, low, high, clamp, antithetic = how
    return {
        "seed": seed,
        "samples": samples,
        "tensor_id": number,
        "sample_offset": offset,
        "estimator": estimators.of_arguments(code, low, high, clamp),
        "antithetic": antithetic,
    }


def _per_set(logits: Tensor, dims: int, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Logits [sets, ...] and a seed for each set."""
    logits = logits if logits.dim() > dims else logits.unsqueeze(0)
    return logits, None if seed is None else seed.expand(logits.shape[0])


def _bits(logits: Tensor, number: int, seed: Tensor | None, *draw: Any) -> Tensor:
    """The masks of a matrix, [samples, sets, bytes]."""
    logits, seeds = _per_set(logits, 2, seed)
    if seeds is not None:
        return sample_mask_packed(logits, **_rule(number, seeds, *draw))
    # without a seed there are no sets for it
    packed = [sample_mask_packed(of_set, **_rule(number, None, *draw)) for of_set in logits]
    return torch.stack([p[0] for p in packed]).unsqueeze(0)


def _hidden_bias(
    bias: Tensor | None, logits: Tensor | None, number: int, seed: Tensor | None, *draw: Any
) -> Tensor | None:
    """The masked bias of every group, [groups, gates * hidden]."""
    if bias is None:
        return None
    if logits is None:
        return bias.unsqueeze(0)
    logits, seeds = _per_set(logits, 1, seed)
    masks = sample_mask(logits, **_rule(number, seeds, *draw))  # [samples, sets, gates * hidden]
    return bias * masks.transpose(0, 1).flatten(0, 1)


def _triton_product(
    like: Tensor, weight: Tensor, logits: Tensor, seed: Tensor | None, draw: tuple[Any, ...]
) -> Callable[..., Tensor]:
    """Triton's product with the masked recurrent weight, whose masks are packed here once."""
    from ..masked_linear import triton
    from ..sample_mask import triton as sample_mask

    masks = masks_of(logits, None, seed, 2, draw)
    weight, words = weight.contiguous(), sample_mask.pack(masks)

    def multiply(rows: Tensor, backward: bool = False) -> Tensor:
        return triton.product(
            rows.contiguous(),
            weight,
            masks,
            None,
            words,
            backward=backward,
            tf32=linear_gpu.tf32(like),
        )

    return multiply


def forward(*arguments: Any, kind: str = "cuda") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operation `modmask::masked_rnn`."""
    x, h0, c0, weight_ih, weight_hh, logits_ih, logits_hh, bias_ih, bias_hh = arguments[:9]
    bias_logits_ih, bias_logits_hh, seed, lengths, cell, reverse, ids = arguments[9:16]
    offset, samples, tau, _, *how = arguments[16:]
    draw = (offset, samples, how)
    gates = product(
        *(x.transpose(0, 1), weight_ih, logits_ih, bias_ih, bias_logits_ih, seed),
        *_draw(ids, 0, offset, samples, tau, how),
    ).transpose(0, 1)
    bias = _hidden_bias(bias_hh, bias_logits_hh, ids[3], seed, *draw)
    if kind == "triton":
        of_masks = _draw(ids, 1, offset, samples, tau, how)
        multiply = _triton_product(gates, weight_hh, logits_hh, seed, of_masks)
        if bias is not None:
            bias = bias.repeat_interleave(gates.shape[1] // bias.shape[0], 0)
        return steps.forward(gates, multiply, bias, h0, c0, lengths, CELLS[cell], reverse)
    bits = _bits(logits_hh, ids[1], seed, *draw)
    of_groups = bits.shape[0] * bits.shape[1]
    y, h_n, c_n, saved = torch.ops.modmask.rnn_loop(
        *(gates, weight_hh, bits, None if bias is None else bias.expand(of_groups, -1), h0, c0),
        *(lengths, cell, reverse, of_groups, bits.shape[0]),
    )
    return y, h_n, c_n, saved


def backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    y: Tensor,
    saved: Tensor,
    *arguments: Any,
    kind: str = "cuda",
) -> tuple[Tensor, ...]:
    """The operation `modmask::masked_rnn_backward`."""
    x, h0, _, weight_ih, weight_hh, logits_ih, logits_hh, bias_ih, bias_hh = arguments[:9]
    bias_logits_ih, bias_logits_hh, seed, lengths, cell, reverse, ids = arguments[9:16]
    offset, samples, tau, _, *how = arguments[16:-1]
    if kind == "triton":
        of_masks = _draw(ids, 1, offset, samples, tau, how)
        multiply = _triton_product(saved, weight_hh, logits_hh, seed, of_masks)
        dgates, dh0, dc0 = steps.backward(
            *(saved, functools.partial(multiply, backward=True), dy, dh_n, dc_n),
            *(lengths, CELLS[cell], reverse),
        )
    else:
        bits = _bits(logits_hh, ids[1], seed, offset, samples, how)
        dgates, dh0, dc0 = torch.ops.modmask.rnn_loop_backward(
            *(saved, weight_hh, bits, dy, dh_n, dc_n),
            *(lengths, cell, reverse, bits.shape[0] * bits.shape[1], bits.shape[0]),
        )
    gates = GATES[CELLS[cell]]
    of_input = dgates if gates == 4 else dgates[:, :, [0, 1, 3]]
    needs = [bool(arguments[-1] >> i & 1) and t is not None for i, t in enumerate(arguments[:11])]
    found: list[Tensor] = [y.new_empty(0)] * 11
    for i, (inputs, gradient, places) in enumerate(
        ((x, of_input, (0, 3, 5, 7, 9)), (_before(y, h0, lengths, reverse), dgates, (4, 6, 8, 10)))
    ):
        # the gradient of h, of the state before each step, came with the loop
        wanted = [needs[p] for p in places]
        if i:
            wanted.insert(0, False)
        results = torch.ops.modmask.masked_linear_backward(
            gradient[:, :, :gates].flatten(2).transpose(0, 1),
            inputs.transpose(0, 1),
            *((weight_hh, logits_hh, bias_hh, bias_logits_hh) if i else ()),
            *(() if i else (weight_ih, logits_ih, bias_ih, bias_logits_ih)),
            *(seed, *_draw(ids, i, offset, samples, tau, how), *wanted),
        )
        for place, result in zip(places, results[i:], strict=True):
            found[place] = result
    found[0] = found[0].transpose(0, 1) if needs[0] else found[0]
    found[1], found[2] = dh0, dc0
    return tuple(
        t.contiguous() if need else y.new_empty(0) for t, need in zip(found, needs, strict=True)
    )


def _before(y: Tensor, h0: Tensor | None, lengths: Tensor | None, reverse: bool) -> Tensor:
    """The state before each step that a sequence has; of the others anything finite."""
    steps = y.shape[0]
    start = torch.zeros_like(y[:1]) if h0 is None else h0.unsqueeze(0)[: steps and 1]
    if not reverse:
        return torch.cat([start, y[:-1]])
    before = torch.cat([y[1:], start])
    if lengths is None or h0 is None:
        return before
    times = torch.arange(steps, device=y.device).unsqueeze(1)
    return torch.where((times == lengths - 1).unsqueeze(2), start, before)
