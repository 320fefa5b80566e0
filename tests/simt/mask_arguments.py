"""What the functions of `modmask_kernels.ops` say of masks, as the CUDA kernels take it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from modmask_kernels import ops
from modmask_kernels.ops import estimators

CUT = np.dtype(
    {"names": ["value", "ties"], "formats": ["f4", "i8"], "offsets": [0, 8], "itemsize": 16}
)


def mask_arguments(
    logits: Tensor,
    seed: Tensor | None,
    *,
    samples: int = 1,
    tau: float = 1.0,
    tensor_id: int = 0,
    sample_offset: int = 0,
    element_offset: int = 0,
    estimator: str | estimators.Estimator = "gumbel_sigmoid",
    antithetic: bool = False,
    n_of_m: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Of logits [sets, ...]; seed [], [sets], [sets, draws] or None."""
    chosen = estimators.resolve(estimator)
    draws = seed.shape[1] if seed is not None and seed.dim() == 2 else 1
    cuts = top_k_cuts(logits, chosen) if chosen.name == "top_k" else None
    keep, among = n_of_m or (0, 0)
    return {
        "seeds": None if seed is None else seed.reshape(-1).numpy(),
        "seed_stride": draws if seed is not None and seed.dim() else 0,
        "sets": logits.shape[0],
        "samples": 1 if seed is None else draws * samples,
        "draws": draws,
        "sample_offset": sample_offset,
        "element_offset": element_offset,
        "tensor_id": tensor_id,
        "tau": tau,
        "estimator": estimators.NAMES.index(chosen.name),
        "low": chosen.low,
        "high": chosen.high,
        "clamp": chosen.clamp,
        "antithetic": antithetic,
        "cuts": cuts,
        "keep": keep,
        "among": among,
        "stride": logits[0, 0, 0].numel() if n_of_m else 1,
    }


def top_k_cuts(logits: Tensor, estimator: estimators.Estimator) -> np.ndarray:
    """Where the kept logits of every set end: the last value, and before which of its equals."""

    def cut(row: Tensor) -> tuple[float, int]:
        kept = ops.top_k_mask(row, estimators.kept_count(estimator.low, row.numel()))
        if not kept.any():
            return float("inf"), 0
        value = row[kept].min()
        return float(value), int(torch.nonzero(kept & (row == value)).max()) + 1

    return np.array([cut(row) for row in logits.flatten(1)], CUT)


def bytes_of(t: Tensor | None) -> np.ndarray | None:
    """The memory of a tensor; bfloat16, which NumPy has not, as integers."""
    if t is None:
        return None
    t = t.detach()
    return (t.view(torch.int16) if t.element_size() == 2 else t).numpy()
