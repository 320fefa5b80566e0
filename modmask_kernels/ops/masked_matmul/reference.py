"""`masked_matmul` in plain PyTorch: one masked product per group, differentiable by autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._reference import product_per_group


def masked_matmul(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None = None,
    bias_logits: Tensor | None = None,
    **draw: Any,
) -> Tensor:
    """See `modmask_kernels.ops.masked_matmul`; arguments are assumed valid."""

    def product(part: Tensor, masked: Tensor, bias: Tensor | None) -> Tensor:
        y = part @ masked
        return y if bias is None else y + bias

    return product_per_group(product, x, weight, logits, bias, bias_logits, **draw)
