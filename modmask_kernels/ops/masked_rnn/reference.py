"""`masked_lstm` and `masked_gru` in plain PyTorch: a loop over time per group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..estimators import GUMBEL_SIGMOID, Estimator
from ..sample_mask.reference import mask_of_sample

CELLS = ("lstm", "gru")
GATES = {"lstm": 4, "gru": 3}


Matrices = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # weights, biases: input, hidden


def lstm_step(x: Tensor, h: Tensor, c: Tensor, matrices: Matrices) -> tuple[Tensor, Tensor]:
    """One step of `torch.nn.LSTM`."""
    w_ih, w_hh, b_ih, b_hh = matrices
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(x: Tensor, h: Tensor, c: Tensor, matrices: Matrices) -> tuple[Tensor, Tensor]:
    """One step of `torch.nn.GRU`; c passes through."""
    w_ih, w_hh, b_ih, b_hh = matrices
    x_r, x_z, x_n = F.linear(x, w_ih, b_ih).chunk(3, dim=-1)
    h_r, h_z, h_n = F.linear(h, w_hh, b_hh).chunk(3, dim=-1)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return n + z * (h - n), c


STEPS = {"lstm": lstm_step, "gru": gru_step}


def masked_rnn(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    logits_ih: Tensor,
    logits_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    bias_logits_ih: Tensor | None,
    bias_logits_hh: Tensor | None,
    seed: Tensor | None,
    lengths: Tensor | None,
    cell: int,
    reverse: bool,
    tensor_ids: Sequence[int],
    sample_offset: int,
    samples: int,
    tau: float,
    hard: bool,
    estimator: Estimator = GUMBEL_SIGMOID,
    antithetic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [steps, batch, hidden], h_n, c_n (empty for a GRU); arguments are assumed valid."""
    sets = logits_ih.shape[0] if logits_ih.dim() == 3 else 1
    seeds = None if seed is None else seed.expand(sets).unsqueeze(1) if seed.dim() < 2 else seed
    samples = 1 if seeds is None else samples
    of_set = samples * (1 if seeds is None else seeds.shape[1])
    steps, batch, _ = x.shape
    rows, hidden = batch // (sets * of_set), weight_hh.shape[1]
    parameters = (weight_ih, weight_hh, bias_ih, bias_hh)
    all_logits = (logits_ih, logits_hh, bias_logits_ih, bias_logits_hh)
    outputs, h_last, c_last = [], [], []
    for g in range(sets * of_set):
        s, k = divmod(g, of_set)
        draw, k = divmod(k, samples)
        masked: list[Tensor | None] = []
        for parameter, logits, number in zip(parameters, all_logits, tensor_ids, strict=True):
            if parameter is None or logits is None:
                masked.append(parameter)
                continue
            mask = mask_of_sample(
                logits.reshape(sets, *parameter.shape)[s],
                seed=None if seeds is None else seeds[s, draw],
                sample=sample_offset + k,
                tensor_id=number,
                tau=tau,
                hard=hard,
                estimator=estimator,
                antithetic=antithetic,
            )
            masked.append(parameter * mask.to(parameter.dtype))
        part = slice(g * rows, (g + 1) * rows)
        h, c = (x.new_zeros(rows, hidden) if t is None else t[part] for t in (h0, c0))
        y: list[Tensor] = [x.new_empty(0)] * steps
        for t in reversed(range(steps)) if reverse else range(steps):
            new_h, new_c = STEPS[CELLS[cell]](x[t, part], h, c, cast(Matrices, masked))
            y[t] = new_h
            if lengths is not None:
                runs = (t < lengths[part]).unsqueeze(1)
                new_h, new_c = torch.where(runs, new_h, h), torch.where(runs, new_c, c)
                y[t] = torch.where(runs, new_h, torch.zeros_like(new_h))
            h, c = new_h, new_c
        outputs.append(torch.stack(y) if y else x.new_empty(0, rows, hidden))
        h_last.append(h)
        c_last.append(c)
    c_n = torch.cat(c_last) if CELLS[cell] == "lstm" else x.new_empty(0, hidden)
    return torch.cat(outputs, dim=1), torch.cat(h_last), c_n
