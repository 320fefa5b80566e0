"""`top_k_mask` in plain PyTorch: a stable sort of all scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def top_k_mask(scores: Sequence[Tensor], k: int, largest: bool = True) -> list[Tensor]:
    """See `modmask_kernels.ops.top_k_mask`; arguments are assumed valid."""
    flat = torch.cat([t.flatten() for t in scores])
    order = torch.sort(flat, descending=largest, stable=True).indices
    kept = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    kept[order[:k]] = True
    parts = torch.split(kept, [t.numel() for t in scores])
    return [part.view(t.shape) for part, t in zip(parts, scores, strict=True)]
