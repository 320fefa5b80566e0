"""`masked_conv_transpose1d` and `masked_conv_transpose2d`: one operation with their masks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._blocks import scaled_side
from .._convolution import numbers
from .._masked_product import check_batch, check_parameters, draw_arguments, lowered, positional
from .._scaled import scaled_product
from .._transposed import TransposedProduct
from ..estimators import Estimator
from ..masked_conv import product as plain
from . import reference

__all__ = ["masked_conv_transpose1d", "masked_conv_transpose2d"]


def _sizes(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    return [
        (x.shape[2 + d] - 1) * stride[d]
        + dilation[d] * (weight.shape[2 + d] - 1)
        + 1
        - padding[2 * d]
        - padding[2 * d + 1]
        for d in range(len(stride))
    ]


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
    groups: int,
    *_: Any,
) -> tuple[int, ...]:
    sizes = _sizes(x, weight, stride, padding, dilation)
    return (x.shape[0], weight.shape[1] * groups, *sizes)


_product = TransposedProduct(
    "masked_conv_transpose",
    "int[] stride, int[] padding, int[] dilation, int groups, ",
    positional(reference.masked_conv_transpose2d, "stride", "padding", "dilation", "groups"),
    _shape,
    plain=plain,
    options_count=4,
    channels_last=False,
)


def _masked_conv_transpose(
    dims: int,
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int],
    seed: Tensor | None,
    tensor_id: int,
    bias_tensor_id: int | None,
    sample_offset: int,
    element_offset: int,
    samples: int,
    tau: float,
    hard: bool,
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
    )
    unbatched = x.dim() == 1 + dims
    if unbatched:
        x = x.unsqueeze(0)
    spatial = "length" if dims == 1 else "height, width"
    if weight.dim() != 2 + dims or 0 in weight.shape[1:]:
        raise ValueError(
            f"weight must have shape [in, out / groups, *kernel] with {dims} kernel dimensions "
            f"and no size of 0, not {_check.shape_of(weight)}"
        )
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"groups must divide the {weight.shape[0]} input channels of weight, not {groups!r}"
        )
    if x.dim() != 2 + dims or x.shape[1] != weight.shape[0] or 0 in x.shape[2:]:
        batch, given = ("", x.squeeze(0)) if unbatched else ("batch, ", x)
        raise ValueError(
            f"x must have shape [{batch}{weight.shape[0]}, {spatial}] without a size of 0 to fit "
            f"weight {_check.shape_of(weight)}, not {_check.shape_of(given)}"
        )
    stride = numbers(stride, dims, "stride", 1)
    dilation = numbers(dilation, dims, "dilation", 1)
    cut = numbers(padding, dims, "padding", 0)
    added = numbers(output_padding, dims, "output_padding", 0)
    for s, d, n in zip(stride, dilation, added, strict=True):
        if n >= max(s, d):
            raise ValueError(
                f"output_padding must be smaller than stride or dilation, not {output_padding!r}"
            )
    outputs = weight.shape[1] * groups
    sets = check_parameters(x, weight, logits, bias, bias_logits, seed, outputs=outputs)
    check_batch(x, 0, sets, 1 if seed is None else samples, unbatched)
    if dims == 1:
        stride, dilation, cut, added = [1, *stride], [1, *dilation], [0, *cut], [0, *added]
        x, weight, logits = x.unsqueeze(2), weight.unsqueeze(2), logits.unsqueeze(-2)
    # rows of zeros behind x give those that lie beyond the product and see the bias only
    more = [max(-(-(a - p) // s), 0) for a, p, s in zip(added, cut, stride, strict=True)]
    if any(more):
        x = F.pad(x, (0, more[1], 0, more[0]))
    around = []
    for p, a, n, s in zip(cut, added, more, stride, strict=True):
        around += [p, p + n * s - a]
    if min(_sizes(x, weight, stride, around, dilation)) < 1:
        raise ValueError(f"padding {padding!r} leaves no output of x {_check.shape_of(x)}")
    options = (stride, around, dilation, groups)
    turned = (x, weight.transpose(0, 1), logits.transpose(-4, -3), bias, bias_logits)
    side = scaled_side(*turned[:3])
    if side is None:
        y = _product(x, weight, logits, bias, bias_logits, seed, *options, *draw)
    else:
        convolve = partial(reference.convolve_turned, *options)
        y = scaled_product(convolve, side, 1, *turned, seed, *draw[:-1])
    if dims == 1:
        y = y.squeeze(2)
    return y.squeeze(0) if unbatched else y


def masked_conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None = None,
    bias_logits: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    seed: Tensor | None = None,
    tensor_id: int = 0,
    bias_tensor_id: int | None = None,
    sample_offset: int = 0,
    element_offset: int = 0,
    samples: int = 1,
    tau: float = 1.0,
    hard: bool = True,
    estimator: str | Estimator = "gumbel_sigmoid",
    antithetic: bool = False,
) -> Tensor:
    r"""Transposed 2d convolution whose weight is masked anew for every group of the batch.

    As `masked_conv2d`; forward and backward are the kernels of its gradient (Dumoulin & Visin
    2016, section 4), in the layout that the weight has.

    Args:
        x: `[batch, in, height, width]`, or `[in, height, width]` for a single image; float32,
            bfloat16, float16 (fused on the CPU) or float64 (reference).
        weight: `[in, out / groups, kernel height, kernel width]`, dtype of `x`.
        logits: like `weight` or `[sets, *weight.shape]`, float32 (float64 beside float64 `x`);
            smaller as in `masked_conv2d`: with `[in, 1, 1, 1]` or `[1, out / groups, 1, 1]` a plain
            convolution is scaled by the mask, for other blocks the reference serves.
        bias: `[out]`. bias_logits: `[out]` or `[sets, out]`.
        stride, padding, output_padding, groups, dilation: as in
            `torch.nn.functional.conv_transpose2d`.
        seed, tensor_id, bias_tensor_id, sample_offset, element_offset, samples, tau, hard,
            estimator, antithetic: as in `masked_linear`.

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
        y = [F.conv_transpose2d(parts[s * samples + k], weight * masks[k, s], bias, stride,
                                padding, output_padding, groups, dilation)
             for s in range(sets) for k in range(samples)]
        return torch.cat(y)
    """
    return _masked_conv_transpose(
        2,
        x,
        weight,
        logits,
        bias,
        bias_logits,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        seed,
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


def masked_conv_transpose1d(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None = None,
    bias_logits: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    seed: Tensor | None = None,
    tensor_id: int = 0,
    bias_tensor_id: int | None = None,
    sample_offset: int = 0,
    element_offset: int = 0,
    samples: int = 1,
    tau: float = 1.0,
    hard: bool = True,
    estimator: str | Estimator = "gumbel_sigmoid",
    antithetic: bool = False,
) -> Tensor:
    """`masked_conv_transpose2d` in one dimension.

    Args:
        x: `[batch, in, length]` or `[in, length]`. weight: `[in, out / groups, kernel]`.
        logits, bias, bias_logits: as in `masked_conv_transpose2d`.
        stride, padding, output_padding, groups, dilation: as in
            `torch.nn.functional.conv_transpose1d`.
        seed, tensor_id, bias_tensor_id, sample_offset, element_offset, samples, tau, hard,
            estimator, antithetic: as in `masked_linear`.

    Returns:
        `[batch, out, length]`, dtype of `x`.

    Raises:
        ValueError, TypeError: as `masked_conv_transpose2d`.

    Equivalent to::

        y = masked_conv_transpose2d(x[:, :, None], weight[:, :, None], logits[..., None, :], ...)
        return y[:, :, 0]
    """
    return _masked_conv_transpose(
        1,
        x,
        weight,
        logits,
        bias,
        bias_logits,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        seed,
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
