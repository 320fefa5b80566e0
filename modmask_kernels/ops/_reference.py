"""A product with a masked weight in plain PyTorch, differentiable by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._blocks import times_blocks
from .estimators import GUMBEL_SIGMOID, Estimator
from .sample_mask.reference import mask_of_sample


def product_per_group(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    *,
    seed: Tensor | None,
    tensor_id: int,
    bias_tensor_id: int,
    sample_offset: int,
    element_offset: int,
    samples: int,
    tau: float,
    hard: bool,
    n_of_m: tuple[int, int] | None = None,
    estimator: Estimator = GUMBEL_SIGMOID,
    antithetic: bool = False,
    batch_dim: int = 0,
) -> Tensor:
    """`product(part of x, masked weight, masked bias)` of every group; arguments are valid."""
    # logits of a single set may come without the set dimension
    logits = logits if logits.dim() == weight.dim() + 1 else logits.unsqueeze(0)
    sets = logits.shape[0]
    if bias_logits is not None and bias_logits.dim() == 1:
        bias_logits = bias_logits.unsqueeze(0)
    if seed is None:
        samples = 1
    elif seed.dim() == 0:
        seed = seed.expand(sets, 1)
    else:
        seed = seed.reshape(sets, -1)
    of_set = samples if seed is None else samples * seed.shape[1]
    groups = sets * of_set

    rows = x.shape[batch_dim] // groups
    parts = []
    for g in range(groups):
        s, k = divmod(g, of_set)
        draw, k = divmod(k, samples)

        def mask(
            of: Tensor,
            name: int,
            offset: int = 0,
            n_of_m: tuple[int, int] | None = None,
            s: int = s,
            draw: int = draw,
            sample: int = sample_offset + k,
        ) -> Tensor:
            return mask_of_sample(
                of[s],
                seed=None if seed is None else seed[s, draw],
                sample=sample,
                tensor_id=name,
                element_offset=offset,
                tau=tau,
                hard=hard,
                n_of_m=n_of_m,
                estimator=estimator,
                antithetic=antithetic,
            )

        b = bias
        if bias is not None and bias_logits is not None:
            b = bias * mask(bias_logits, bias_tensor_id).to(bias.dtype)
        drawn = mask(logits, tensor_id, element_offset, n_of_m).to(weight.dtype)
        masked = times_blocks(weight, drawn)
        parts.append(product(x.narrow(batch_dim, g * rows, rows), masked, b))
    return torch.cat(parts, dim=batch_dim)
