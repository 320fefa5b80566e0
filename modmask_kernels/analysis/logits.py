"""How decided a mask is: the distribution of its keep probabilities."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Logits = Tensor | Mapping[str, Tensor]


def _tensors(logits: Logits) -> list[Tensor]:
    return [logits] if isinstance(logits, Tensor) else list(logits.values())


def histogram(logits: Logits, bins: int = 500) -> Tensor:
    """Histogram of the keep probabilities sigmoid(logit) on [0, 1].

    Args:
        logits: a floating point tensor, or a mapping from name to tensors, counted together.
        bins: number of equal bins; the last one includes 1.

    Returns:
        int64 [bins]. Exact counts for every number of logits.

    Raises:
        ValueError: `bins` is below 1, or a logit is NaN.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    counts = torch.zeros(bins, dtype=torch.int64)
    for tensor in _tensors(logits):
        if torch.isnan(tensor).any():
            raise ValueError("logits must not be NaN")
        # a bin index per logit instead of torch.histc, whose float32 counts stop at 2**24
        index = (torch.sigmoid(tensor.detach()) * bins).long().clamp_(max=bins - 1)
        counts += torch.bincount(index.flatten(), minlength=bins).cpu()
    return counts


def undecided(logits: Logits, low: float = 0.1, high: float = 0.9) -> float:
    """Share of keep probabilities strictly between `low` and `high`; 0 if there are no logits."""
    between = total = 0
    for tensor in _tensors(logits):
        p = torch.sigmoid(tensor.detach())
        between += int(torch.count_nonzero((p > low) & (p < high)))
        total += tensor.numel()
    return between / max(total, 1)
