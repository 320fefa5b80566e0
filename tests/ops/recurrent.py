"""A masked recurrent layer as a whole as on a GPU, both ways, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from modmask_kernels.ops import estimators
from modmask_kernels.ops import masked_rnn as masked_rnn_module
from modmask_kernels.ops.masked_rnn.reference import CELLS, GATES

from .tolerance import check_close

WHOLE = [
    {},
    {"bias": True, "mask_bias": True, "lengths": True},
    {"bias": True, "reverse": True, "lengths": True},
    {"seed": None, "reverse": True},
    {"estimator": "hard_concrete", "antithetic": True, "states": False, "bias": True},
    {"steps": 0},
]


def check_whole(
    cell: str, options: dict[str, Any], forward: Callable[..., Any], backward: Callable[..., Any]
) -> None:
    """`forward` and `backward` have the arguments of the operations."""
    o = {"steps": 4, "bias": False, "mask_bias": False, "lengths": False, "states": True} | options
    sets, samples, rows, inputs, hidden = 2, 2, 5, o.get("inputs", 7), 12
    seed = o.get("seed", torch.tensor([3, 4]))
    batch, width = rows * sets * (1 if seed is None else samples), GATES[cell] * hidden
    g = torch.Generator().manual_seed(3)

    def random(*shape, when=True):
        return torch.randn(*shape, generator=g) if when else None

    operands = [
        random(o["steps"], batch, inputs),
        random(batch, hidden, when=o["states"]),
        random(batch, hidden, when=o["states"] and cell == "lstm"),
        random(width, inputs) / inputs**0.5,
        random(width, hidden) / hidden**0.5,
        random(sets, width, inputs),
        random(sets, width, hidden),
        *(random(width, when=o["bias"]) for _ in range(2)),
        *(random(sets, width, when=o["mask_bias"]) for _ in range(2)),
    ]
    chosen = estimators.arguments(o.get("estimator", "gumbel_sigmoid"), o.get("antithetic", False))
    lengths = torch.arange(batch) % (o["steps"] + 1) if o["lengths"] else None
    rule = (CELLS.index(cell), o.get("reverse", False), (4, 5, 6, 7), 1, samples, 1.0, True)
    rest = (seed, lengths, *rule, *chosen)
    needs = sum(1 << i for i, t in enumerate(operands) if t is not None)
    dy, dh_n = random(o["steps"], batch, hidden), random(batch, hidden)
    dc_n = random(batch, hidden, when=cell == "lstm")

    def exact(dtype):
        wide = [None if t is None else t.to(dtype) for t in operands]
        y, h_n, c_n, saved = masked_rnn_module._reference(*wide, *rest)
        ds = (t if t is None else t.to(dtype) for t in (dy, dh_n, dc_n))
        return [
            y,
            h_n,
            c_n,
            *masked_rnn_module._backward_reference(*ds, y, saved, *wide, *rest, needs),
        ]

    y, h_n, c_n, saved = forward(*operands, *rest)
    ours = [y, h_n, c_n, *backward(dy, dh_n, dc_n, y, saved, *operands, *rest, needs)]
    names = ["y", "h_n", "c_n", *("d" + name for name in masked_rnn_module._NAMES)]
    check_close(zip(names, ours, exact(torch.float32), exact(torch.float64), strict=True))
