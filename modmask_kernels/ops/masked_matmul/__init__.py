"""`masked_matmul`: sampling, masking and the product with a weight [in, out] in one operation."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._blocks import scaled_side
from .._masked_product import check_batch, check_parameters, draw_arguments, lowered, positional
from .._scaled import scaled_product
from .._transposed import TransposedProduct
from ..estimators import Estimator
from ..masked_linear import product as plain
from . import reference

__all__ = ["masked_matmul"]


def _shape(x: Tensor, weight: Tensor, *_: Any) -> tuple[int, ...]:
    return (*x.shape[:-1], weight.shape[1])


_product = TransposedProduct(
    "masked_matmul",
    "",
    positional(reference.masked_matmul),
    _shape,
    plain=plain,
    options_count=0,
    channels_last=True,
)


def masked_matmul(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None = None,
    bias_logits: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    tensor_id: int = 0,
    bias_tensor_id: int | None = None,
    sample_offset: int = 0,
    element_offset: int = 0,
    samples: int = 1,
    tau: float = 1.0,
    hard: bool = True,
    batch_dim: int = 0,
    estimator: str | Estimator = "gumbel_sigmoid",
    antithetic: bool = False,
) -> Tensor:
    r"""`masked_linear` for a weight `[in, out]`, the layout of Hugging Face's `Conv1D`.

    Neither weight nor logits are transposed in memory, so the masks are those of `sample_mask` for
    the parameter as it is.

    Args:
        x: `[..., in]`; float32, bfloat16, float16 (fused on the CPU) or float64 (reference).
        weight: `[in, out]`, dtype of `x`.
        logits: `[in, out]` or `[sets, in, out]`, float32 (float64 beside float64 `x`); smaller as
            in `masked_linear`: with `[in / c, 1]` or `[1, out / r]` a plain product is scaled by
            the mask, for other blocks the reference serves.
        bias: `[out]`. bias_logits: `[out]` or `[sets, out]`.
        seed, tensor_id, bias_tensor_id, sample_offset, element_offset, samples, tau, hard,
            batch_dim, estimator, antithetic: as in `masked_linear`.

    Returns:
        `[..., out]`, dtype of `x`.

    Raises:
        ValueError: shapes or devices that do not fit; a batch that does not divide.
        TypeError: dtypes that do not fit.

    Under autocast `x`, `weight` and `bias` are cast, logits never. Gradients: `x`, `weight`,
    `logits`, `bias`, `bias_logits`; the fused operation has no second derivative.

    Equivalent to::

        masks = sample_mask(logits, seed=seed, samples=samples, tau=tau, hard=hard)
        parts = x.chunk(sets * samples, dim=batch_dim)
        y = [parts[s * samples + k] @ (weight * masks[k, s]) + bias
             for s in range(sets) for k in range(samples)]
        return torch.cat(y, dim=batch_dim)
    """
    _check.check_tensors(x=x, weight=weight, logits=logits)
    draw = draw_arguments(
        tensor_id,
        bias_tensor_id,
        sample_offset,
        element_offset,
        samples,
        tau,
        hard,
        estimator,
        antithetic,
    )
    x, weight, bias = lowered(x, weight, bias)  # type: ignore[assignment]
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape [in, out], not {_check.shape_of(weight)}")
    if x.dim() < 2 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"x must have shape [batch, ..., {weight.shape[0]}] to fit weight "
            f"{_check.shape_of(weight)}, not {_check.shape_of(x)}"
        )
    if not -x.dim() <= batch_dim < x.dim() - 1 or batch_dim == -1:
        raise ValueError(
            f"batch_dim must be a dimension of x {_check.shape_of(x)} other than the last, "
            f"not {batch_dim}"
        )
    sets = check_parameters(x, weight, logits, bias, bias_logits, seed, outputs=weight.shape[1])
    check_batch(x, batch_dim, sets, 1 if seed is None else samples)
    x = x.movedim(batch_dim, 0)
    turned = (x, weight.t(), logits.transpose(-1, -2), bias, bias_logits)
    side = scaled_side(*turned[:3])
    if side is None:
        y = _product(x, weight, logits, bias, bias_logits, seed, *draw)
    else:
        y = scaled_product(F.linear, side, -1, *turned, seed, *draw[:-1])
    return y.movedim(0, batch_dim)
