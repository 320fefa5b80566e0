"""The tolerance rule: our error against a float64 reference is at most twice that of plain PyTorch
in the same dtype, plus one unit in the last place of the largest output."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def unit_in_last_place(t: Tensor) -> float:
    """Of the largest element of `t`, in its dtype."""
    largest = float(t.detach().abs().max()) if t.numel() else 0.0
    if largest == 0.0:
        return float(torch.finfo(t.dtype).smallest_normal)
    return float(torch.finfo(t.dtype).eps) * 2.0 ** math.floor(math.log2(largest))


def error(ours: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, in float64."""
    return float((ours.double() - exact).abs().max()) if ours.numel() else 0.0


def check_close(results: Iterable[tuple[str, Tensor, Tensor, Tensor]]) -> None:
    """Checks (name, ours, plain, exact in float64)."""
    for name, ours, plain, exact in results:
        assert exact.dtype == torch.float64, name
        assert ours.shape == plain.shape == exact.shape, name
        assert ours.dtype == plain.dtype, name
        assert bool(ours.isfinite().all()), f"{name} is not finite"
        allowed = 2 * error(plain, exact) + unit_in_last_place(exact.to(ours.dtype))
        got = error(ours, exact)
        assert got <= allowed, f"{name}: error {got:.3g}, allowed {allowed:.3g}"
