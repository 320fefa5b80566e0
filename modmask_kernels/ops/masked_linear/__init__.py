"""`masked_linear`: sampling, masking and the matrix product in one operation."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._blocks import scaled_side
from .._masked_product import (
    MaskedProduct,
    check_batch,
    check_parameters,
    draw_arguments,
    explain,
    lowered,
    positional,
)
from .._scaled import scaled_product
from ..estimators import Estimator
from . import gpu, reference

__all__ = ["explain", "masked_linear"]


def _shape(x: Tensor, weight: Tensor, *_: Any) -> tuple[int, ...]:
    return (*x.shape[:-1], weight.shape[0])


product = MaskedProduct("masked_linear", "", positional(reference.masked_linear), _shape)
product.on_gpu(gpu.unserved, gpu.forward, gpu.backward)
product.saving_on_gpu(gpu.saves, gpu.words_of, gpu.forward_saving, gpu.backward_saving)


def _check_arguments(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    samples: int,
    n_of_m: tuple[int, int] | None,
    batch_dim: int,
) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape [out, in], not {_check.shape_of(weight)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must have shape [..., {weight.shape[1]}] to fit weight {_check.shape_of(weight)}, "
            f"not {_check.shape_of(x)}"
        )
    sets = check_parameters(x, weight, logits, bias, bias_logits, seed, n_of_m)
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
    n_of_m: tuple[int, int] | None = None,
    batch_dim: int = 0,
    estimator: str | Estimator = "gumbel_sigmoid",
    antithetic: bool = False,
) -> Tensor:
    r"""Linear layer whose weight is masked anew for every group of the batch.

    The batch is cut into `sets * samples` equal, contiguous groups; group `set * samples + sample`
    is multiplied with the weight masked by that sample of that set. Masks are sampled from
    `logits` (by default Gumbel-sigmoid, one uniform per weight; Csordás et al. 2020, section 2),
    applied and multiplied without ever existing at the size of the weight; the backward pass
    regenerates them from the seed. Forward is pure: equal arguments give equal bits.

    Args:
        x: `[..., in]`; float32, bfloat16, float16 (fused on the CPU) or float64 (reference).
        weight: `[out, in]`, dtype of `x`.
        logits: `[out, in]` or `[sets, out, in]`, float32 (float64 beside float64 `x`). A weight is
            kept with probability `sigmoid(logit)`. Also smaller, where every size divides that of
            the weight: `[out / r, in / c]` has one logit for each block of `r` x `c` weights. With
            `[out / r, 1]` or `[1, in / c]` a plain product is scaled by the mask.
        bias: `[out]`, dtype of `x`.
        bias_logits: `[out]` or `[sets, out]`; masks the bias likewise.
        seed: int64 tensor `[]` or `[sets]` on the device of `x`; `None` draws no noise and keeps
            weights with `logit > 0`, whatever `samples` says.
        tensor_id: names the weight in the noise; two tensors of a model need different ones.
        bias_tensor_id: the same for the bias; `tensor_id + 1` unless given.
        sample_offset: index of the first sample (rank r of a data-parallel job uses
            `r * samples`).
        element_offset: row-major index of `weight[0, 0]` in the whole parameter, for shards.
        samples: mask samples per set.
        tau: temperature of the surrogate; a hard mask's value does not depend on it.
        hard: exactly 0/1 with the straight-through gradient of the soft mask; else the soft mask
            `sigmoid((logit + log((1-u)/u)) / tau)`.
        n_of_m: `(n, m)` keeps, of every m consecutive inputs of an output, the n with the largest
            `logit + log((1-u)/u)`, or the largest logit without a seed; of equal ones the first.
            Logits have the shape of the weight, masks are hard, the gradient is that of the mask
            without `n_of_m` (n:m sparsity of Mishra et al. 2021; Zhou et al. 2021).
        batch_dim: the dimension of `x` that is cut into groups.
        estimator: how masks follow from logits and noise: a name or a value of
            `modmask_kernels.ops.estimators`; see `docs/estimators.md`.
        antithetic: samples 2j and 2j + 1 use the same uniform numbers, the second one as 1 - u.

    Returns:
        `[..., out]`, dtype of `x`.

    Raises:
        ValueError: shapes or devices that do not fit; a batch that does not divide.
        TypeError: dtypes that do not fit.

    Under autocast `x`, `weight` and `bias` are cast, logits never. Gradients: `x`, `weight`,
    `logits`, `bias`, `bias_logits`; the fused operation has no second derivative.

    Equivalent to::

        masks = sample_mask(logits, seed=seed, samples=samples, tau=tau, hard=hard)
        masks = masks.repeat_interleave(r, -2).repeat_interleave(c, -1)  # blocks of weights
        parts = x.chunk(sets * samples, dim=batch_dim)
        y = [F.linear(parts[s * samples + k], weight * masks[k, s], bias)
             for s in range(sets) for k in range(samples)]
        return torch.cat(y, dim=batch_dim)
    """
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
        n_of_m,
    )
    if batch_dim == 0:
        quick = product.quick(x, weight, logits, bias, bias_logits, seed, *draw)
        if quick is not None:
            return quick
    _check.check_tensors(x=x, weight=weight, logits=logits)
    x, weight, bias = lowered(x, weight, bias)  # type: ignore[assignment]
    _check_arguments(x, weight, logits, bias, bias_logits, seed, samples, n_of_m, batch_dim)
    x = x.movedim(batch_dim, 0)
    operands = (x, weight, logits, bias, bias_logits)
    side = scaled_side(*operands[:3])
    if side is None:
        y = product(*operands, seed, *draw)
    else:
        y = scaled_product(F.linear, side, -1, *operands, seed, *draw[:-1])
    return y.movedim(0, batch_dim)
