"""`masked_conv1d` and `masked_conv2d`: sampling, masking and the convolution in one operation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .. import _check
from .._blocks import scaled_side
from .._convolution import check_convolution, shape_of_result
from .._masked_product import (
    MaskedProduct,
    check_batch,
    check_parameters,
    draw_arguments,
    lowered,
    positional,
)
from .._scaled import scaled_product
from ..estimators import Estimator
from . import gpu, reference

__all__ = ["masked_conv1d", "masked_conv2d"]


def _shape(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *_: Any,
) -> tuple[int, ...]:
    return shape_of_result(x, weight, stride, padding, dilation)


product = MaskedProduct(
    "masked_conv",
    "int[] stride, int[] padding, int[] dilation, int groups, ",
    positional(reference.masked_conv2d, "stride", "padding", "dilation", "groups"),
    _shape,
)
product.on_gpu(gpu.unserved, gpu.forward, gpu.backward)


def _masked_conv(
    dims: int,
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    seed: Tensor | None,
    tensor_id: int,
    bias_tensor_id: int | None,
    sample_offset: int,
    element_offset: int,
    samples: int,
    tau: float,
    hard: bool,
    n_of_m: tuple[int, int] | None,
    estimator: str | Estimator,
    antithetic: bool,
) -> Tensor:
    _check.check_tensors(x=x, weight=weight, logits=logits)
    x, weight, bias = lowered(x, weight, bias)  # type: ignore[assignment]
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
    unbatched = x.dim() == 1 + dims
    if unbatched:
        x = x.unsqueeze(0)
    stride, padding, dilation = check_convolution(
        dims, x, weight, stride, padding, dilation, groups, unbatched
    )
    sets = check_parameters(x, weight, logits, bias, bias_logits, seed, n_of_m)
    check_batch(x, 0, sets, 1 if seed is None else samples, unbatched)
    if dims == 1:
        stride, dilation, padding = [1, *stride], [1, *dilation], [0, 0, *padding]
        x, weight, logits = x.unsqueeze(2), weight.unsqueeze(2), logits.unsqueeze(-2)
    operands = (x, weight, logits, bias, bias_logits)
    options = (stride, padding, dilation, groups)
    side = scaled_side(*operands[:3])
    if side is None:
        y = product(*operands, seed, *options, *draw)
    else:
        convolve = partial(reference.convolve, *options)
        y = scaled_product(convolve, side, 1, *operands, seed, *draw[:-1])
    if dims == 1:
        y = y.squeeze(2)
    return y.squeeze(0) if unbatched else y


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None = None,
    bias_logits: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    seed: Tensor | None = None,
    tensor_id: int = 0,
    bias_tensor_id: int | None = None,
    sample_offset: int = 0,
    element_offset: int = 0,
    samples: int = 1,
    tau: float = 1.0,
    hard: bool = True,
    n_of_m: tuple[int, int] | None = None,
    estimator: str | Estimator = "gumbel_sigmoid",
    antithetic: bool = False,
) -> Tensor:
    r"""2d convolution whose weight is masked anew for every group of the batch.

    The batch is cut into `sets * samples` equal, contiguous groups; group `set * samples + sample`
    is convolved with the weight masked by that sample of that set. Masks are sampled from
    `logits` (by default Gumbel-sigmoid, one uniform per weight; Csordás et al. 2020, section 2),
    applied and multiplied tile by tile: neither a masked weight nor the patches of the input ever
    exist as a whole, and the backward pass regenerates the masks from the seed. Forward is pure:
    equal arguments give equal bits.

    Args:
        x: `[batch, in, height, width]`, or `[in, height, width]` for a single image; float32,
            bfloat16, float16 (fused on the CPU) or float64 (reference).
        weight: `[out, in / groups, kernel height, kernel width]`, dtype of `x`.
        logits: like `weight` or `[sets, *weight.shape]`, float32 (float64 beside float64 `x`). A
            weight is kept with probability `sigmoid(logit)`. Also smaller, where every size
            divides that of the weight: `[out, in / groups, 1, 1]` has one logit per kernel, with
            `[out, 1, 1, 1]` or `[1, in / groups, 1, 1]` a plain convolution is scaled by the mask.
        bias: `[out]`, dtype of `x`.
        bias_logits: `[out]` or `[sets, out]`; masks the bias likewise.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; padding also as
            "valid" or "same".
        seed, tensor_id, bias_tensor_id, sample_offset, element_offset, samples, tau, hard, n_of_m,
            estimator, antithetic: as in `masked_linear`; the inputs of `n_of_m` are channels at
            one place of the kernel.

    Returns:
        `[batch, out, height, width]`, dtype of `x`.

    Raises:
        ValueError: shapes, options or devices that do not fit; a batch that does not divide.
        TypeError: dtypes that do not fit.

    Under autocast `x`, `weight` and `bias` are cast, logits never. Gradients: `x`, `weight`,
    `logits`, `bias`, `bias_logits`; the fused operation has no second derivative.

    Equivalent to::

        masks = sample_mask(logits, seed=seed, samples=samples, tau=tau, hard=hard)
        parts = x.chunk(sets * samples)
        y = [F.conv2d(parts[s * samples + k], weight * masks[k, s], bias, stride, padding,
                      dilation, groups)
             for s in range(sets) for k in range(samples)]
        return torch.cat(y)
    """
    return _masked_conv(
        2,
        x,
        weight,
        logits,
        bias,
        bias_logits,
        stride,
        padding,
        dilation,
        groups,
        seed,
        tensor_id,
        bias_tensor_id,
        sample_offset,
        element_offset,
        samples,
        tau,
        hard,
        n_of_m,
        estimator,
        antithetic,
    )


def masked_conv1d(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None = None,
    bias_logits: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    seed: Tensor | None = None,
    tensor_id: int = 0,
    bias_tensor_id: int | None = None,
    sample_offset: int = 0,
    element_offset: int = 0,
    samples: int = 1,
    tau: float = 1.0,
    hard: bool = True,
    n_of_m: tuple[int, int] | None = None,
    estimator: str | Estimator = "gumbel_sigmoid",
    antithetic: bool = False,
) -> Tensor:
    """`masked_conv2d` in one dimension.

    Args:
        x: `[batch, in, length]` or `[in, length]`. weight: `[out, in / groups, kernel]`.
        logits, bias, bias_logits: as in `masked_conv2d`.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv1d`.
        seed, tensor_id, bias_tensor_id, sample_offset, element_offset, samples, tau, hard, n_of_m,
            estimator, antithetic: as in `masked_conv2d`.

    Returns:
        `[batch, out, length]`, dtype of `x`.

    Raises:
        ValueError, TypeError: as `masked_conv2d`.

    Equivalent to::

        y = masked_conv2d(x[:, :, None], weight[:, :, None], logits[..., None, :], bias, ...)
        return y[:, :, 0]
    """
    return _masked_conv(
        1,
        x,
        weight,
        logits,
        bias,
        bias_logits,
        stride,
        padding,
        dilation,
        groups,
        seed,
        tensor_id,
        bias_tensor_id,
        sample_offset,
        element_offset,
        samples,
        tau,
        hard,
        n_of_m,
        estimator,
        antithetic,
    )
