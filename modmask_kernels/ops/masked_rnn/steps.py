"""The time loop step by step: a masked product, then the cell in PyTorch.

What `modmask::rnn_loop` and its gradient compute in CUDA C++, for GPUs with the kernels of Triton
alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# gradients by unit, sequence and step: i, f, g, o; r, z, the recurrent part of n, n
Product = Callable[[Tensor], Tensor]


def _state(given: Tensor | None, like: Tensor, shape: tuple[int, int]) -> Tensor:
    return like.new_zeros(shape) if given is None else given


def _running(lengths: Tensor | None, t: int) -> Tensor | None:
    return None if lengths is None else (t < lengths).unsqueeze(1)


def _choose(runs: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if runs is None else torch.where(runs, new, old)


def forward(
    gates: Tensor,
    product: Product,
    hidden_bias: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h_n, c_n, saved).

    Args:
        gates: the input's part with its bias, `[steps, batch, gates * hidden]`.
        product: of the state `[batch, hidden]` with the masked recurrent weight of every group.
        hidden_bias: `[batch, gates * hidden]`.
    """
    steps, batch, width = gates.shape
    hidden = width // (4 if cell == "lstm" else 3)
    y, saved = gates.new_empty(steps, batch, hidden), gates.new_empty(steps, batch, 5, hidden)
    h, c = (_state(s, gates, (batch, hidden)) for s in (h0, c0))
    for t in reversed(range(steps)) if reverse else range(steps):
        recurrent = product(h)
        if hidden_bias is not None:
            recurrent = recurrent + hidden_bias
        if cell == "lstm":
            i, f, g, o = (gates[t] + recurrent).chunk(4, 1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            torch.stack((i, f, g, o, c), 1, out=saved[t])
            new_c = f * c + i * g
            new_h = o * new_c.tanh()
        else:
            x_r, x_z, x_n = gates[t].chunk(3, 1)
            h_r, h_z, h_n = recurrent.chunk(3, 1)
            r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
            n = (x_n + r * h_n).tanh()
            torch.stack((r, z, n, h_n, h), 1, out=saved[t])
            new_h, new_c = n + z * (h - n), c
        runs = _running(lengths, t)
        y[t] = _choose(runs, new_h, torch.zeros_like(h))
        h, c = _choose(runs, new_h, h), _choose(runs, new_c, c)
    return y, h.clone(), c.clone() if cell == "lstm" else c.new_empty(0, hidden), saved


def backward(
    saved: Tensor,
    product: Product,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dgates `[steps, batch, 4, hidden]`, dh0, dc0).

    `product`: of gradients of the gates, `[batch, gates * hidden]`, with the same weight.
    """
    steps, batch, _, hidden = saved.shape
    dgates = saved.new_empty(steps, batch, 4, hidden)
    dh, dc = (_state(s, saved, (batch, hidden)) for s in (dh_n, dc_n))
    for t in range(steps) if reverse else reversed(range(steps)):
        d = dh if dy is None else dh + dy[t]
        one, two, three, four, before = saved[t].unbind(1)
        if cell == "lstm":
            i, f, g, o = one, two, three, four
            tanh_c = (f * before + i * g).tanh()
            grad = dc + d * o * (1 - tanh_c * tanh_c)
            parts = (
                grad * g * i * (1 - i),
                grad * before * f * (1 - f),
                grad * i * (1 - g * g),
                d * tanh_c * o * (1 - o),
            )
            new_dc, passed = grad * f, torch.zeros_like(dh)
        else:
            r, z, n, h_n = one, two, three, four
            dn = d * (1 - z) * (1 - n * n)
            parts = (dn * h_n * r * (1 - r), d * (before - n) * z * (1 - z), dn * r, dn)
            new_dc, passed = dc, d * z
        torch.stack(parts, 1, out=dgates[t])
        runs = _running(lengths, t)
        if runs is not None:
            dgates[t].masked_fill_(~runs.unsqueeze(2), 0.0)
        recurrent = dgates[t] if cell == "lstm" else dgates[t, :, :3]
        dh = _choose(runs, passed, dh) + product(recurrent.flatten(1).contiguous())
        dc = _choose(runs, new_dc, dc)
    return dgates, dh.clone(), dc.clone() if cell == "lstm" else dc.new_empty(0, hidden)
