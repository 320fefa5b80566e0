"""`masked_linear`: sampling, masking and the matrix product in one operation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _check
from .._masked_product import (
    MaskedProduct,
    check_batch,
    check_parameters,
    explain,
    lowered,
    number_of_bias,
    positional,
)
from . import reference

__all__ = ["explain", "masked_linear"]


def _shape(x: Tensor, weight: Tensor, *_: Any) -> tuple[int, ...]:
    return (*x.shape[:-1], weight.shape[0])


_product = MaskedProduct("masked_linear", "", positional(reference.masked_linear), _shape)


def _check_arguments(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    samples: int,
    batch_dim: int,
) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape [out, in], not {_check.shape_of(weight)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must have shape [..., {weight.shape[1]}] to fit weight {_check.shape_of(weight)}, "
            f"not {_check.shape_of(x)}"
        )
    sets = check_parameters(x, weight, logits, bias, bias_logits, seed)
    if not -x.dim() <= batch_dim < x.dim() - 1 or batch_dim == -1:
        if x.dim() == 1:
            raise ValueError("x must have a batch dimension: shape [..., in] with two or more")
        raise ValueError(
            f"batch_dim must be a dimension of x {_check.shape_of(x)} other than the last, "
            f"not {batch_dim}"
        )
    check_batch(x, batch_dim, sets, 1 if seed is None else samples)


def masked_linear(
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
) -> Tensor:
    r"""Linear layer whose weight is masked anew for every group of the batch.

    The batch is cut into `sets * samples` equal, contiguous groups; group `set * samples + sample`
    is multiplied with the weight masked by that sample of that set. Masks are sampled from
    `logits` (Gumbel-sigmoid, one uniform per weight; Csordás et al. 2020, section 2), binarised,
    applied and multiplied without ever existing at the size of the weight; the backward pass
    regenerates them from the seed. Forward is pure: equal arguments give equal bits.

    Args:
        x: `[..., in]`; float32, bfloat16, float16 (fused on the CPU) or float64 (reference).
        weight: `[out, in]`, dtype of `x`.
        logits: `[out, in]` or `[sets, out, in]`, float32 (float64 beside float64 `x`). A weight is
            kept with probability `sigmoid(logit)`.
        bias: `[out]`, dtype of `x`.
        bias_logits: `[out]` or `[sets, out]`; masks the bias likewise.
        seed: int64 tensor `[]` or `[sets]` on the device of `x`; `None` keeps weights with
            `logit > 0`, whatever `samples` says.
        tensor_id: names the weight in the noise; two tensors of a model need different ones.
        bias_tensor_id: the same for the bias; `tensor_id + 1` unless given.
        sample_offset: index of the first sample (rank r of a data-parallel job uses
            `r * samples`).
        element_offset: row-major index of `weight[0, 0]` in the whole parameter, for shards.
        samples: mask samples per set.
        tau: temperature of the surrogate; a hard mask's value does not depend on it.
        hard: exactly 0/1 with the straight-through gradient of the soft mask; else the soft mask
            `sigmoid((logit + log((1-u)/u)) / tau)`.
        batch_dim: the dimension of `x` that is cut into groups.

    Returns:
        `[..., out]`, dtype of `x`.

    Raises:
        ValueError: shapes or devices that do not fit; a batch that does not divide.
        TypeError: dtypes that do not fit.

    Under autocast `x`, `weight` and `bias` are cast, logits never. Gradients: `x`, `weight`,
    `logits`, `bias`, `bias_logits`; there is no second derivative.

    Equivalent to::

        masks = sample_mask(logits, seed=seed, samples=samples, tau=tau, hard=hard)
        parts = x.chunk(sets * samples, dim=batch_dim)
        y = [F.linear(parts[s * samples + k], weight * masks[k, s], bias)
             for s in range(sets) for k in range(samples)]
        return torch.cat(y, dim=batch_dim)
    """
    _check.check_draw(samples, tau, tensor_id, sample_offset, element_offset)
    draw = (
        tensor_id,
        number_of_bias(tensor_id, bias_tensor_id),
        sample_offset,
        element_offset,
        samples,
        tau,
        hard,
    )
    if batch_dim == 0:
        quick = _product.quick(x, weight, logits, bias, bias_logits, seed, *draw)
        if quick is not None:
            return quick
    _check.check_tensors(x=x, weight=weight, logits=logits)
    x, weight, bias = lowered(x, weight, bias)  # type: ignore[assignment]
    _check_arguments(x, weight, logits, bias, bias_logits, seed, samples, batch_dim)
    x = x.movedim(batch_dim, 0)
    y = _product(x, weight, logits, bias, bias_logits, seed, *draw)
    return y.movedim(0, batch_dim)
