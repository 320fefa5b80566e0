"""`masked_linear` in plain PyTorch: one masked product per group, differentiable by autograd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._reference import product_per_group
from ..estimators import GUMBEL_SIGMOID, Estimator


def masked_linear(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None = None,
    bias_logits: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    tensor_id: int = 0,
    bias_tensor_id: int = 1,
    sample_offset: int = 0,
    element_offset: int = 0,
    samples: int = 1,
    tau: float = 1.0,
    hard: bool = True,
    n_of_m: tuple[int, int] | None = None,
    estimator: Estimator = GUMBEL_SIGMOID,
    antithetic: bool = False,
    batch_dim: int = 0,
) -> Tensor:
    """See `modmask_kernels.ops.masked_linear`; arguments are assumed valid."""
    return product_per_group(
        F.linear,
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
        n_of_m=n_of_m,
        estimator=estimator,
        antithetic=antithetic,
        batch_dim=batch_dim,
    )
