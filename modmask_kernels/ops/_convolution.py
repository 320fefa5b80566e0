"""Options of convolutions: their forms, checks and sizes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import _check


def _rooms(x: Tensor, weight: Tensor, padding: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """By how much the padded input exceeds the kernel in each spatial dimension."""
    return [
        x.shape[2 + d]
        + padding[2 * d]
        + padding[2 * d + 1]
        - dilation[d] * (weight.shape[2 + d] - 1)
        - 1
        for d in range(len(dilation))
    ]


def shape_of_result(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """[batch, out, *sizes], from options as `check_convolution` returns them."""
    rooms = _rooms(x, weight, padding, dilation)
    sizes = (room // step + 1 for room, step in zip(rooms, stride, strict=True))
    return (x.shape[0], weight.shape[0], *sizes)


def numbers(value: int | Sequence[int], dims: int, name: str, least: int) -> list[int]:
    """One number per spatial dimension."""
    numbers = [value] * dims if isinstance(value, int) else list(value)
    if len(numbers) == 1:
        numbers = numbers * dims
    if len(numbers) != dims or any(isinstance(n, bool) or int(n) != n for n in numbers):
        raise ValueError(f"{name} must be one integer or {dims}, not {value!r}")
    if any(n < least for n in numbers):
        raise ValueError(f"{name} must be at least {least}, not {value!r}")
    return numbers


def _paddings(
    padding: int | str | Sequence[int],
    dims: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Zeros before and after each spatial dimension."""
    if isinstance(padding, str):
        if padding == "valid":
            return [0] * (2 * dims)
        if padding != "same":
            raise ValueError(f"padding must be numbers, 'valid' or 'same', not {padding!r}")
        if any(s != 1 for s in stride):
            raise ValueError(f"padding='same' needs a stride of 1, not {tuple(stride)}")
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [n for total in totals for n in (total // 2, total - total // 2)]
    return [n for n in numbers(padding, dims, "padding", 0) for _ in range(2)]


def check_convolution(
    dims: int,
    x: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    unbatched: bool = False,
) -> tuple[list[int], list[int], list[int]]:
    """Raise unless x [batch, channels, *sizes], weight and options fit.

    `unbatched`: the batch, of size 1, is not the caller's.

    Returns:
        stride, zeros before and after each spatial dimension, dilation.
    """
    spatial = "length" if dims == 1 else "height, width"
    if weight.dim() != 2 + dims:
        raise ValueError(
            f"weight must have shape [out, in / groups, *kernel] with {dims} kernel dimensions, "
            f"not {_check.shape_of(weight)}"
        )
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be at least 1, not {groups!r}")
    if x.dim() != 2 + dims or x.shape[1] != weight.shape[1] * groups:
        batch, given = ("", x.squeeze(0)) if unbatched else ("batch, ", x)
        raise ValueError(
            f"x must have shape [{batch}{weight.shape[1] * groups}, {spatial}] to fit weight "
            f"{_check.shape_of(weight)} and groups={groups}, not {_check.shape_of(given)}"
        )
    if weight.shape[0] % groups:
        raise ValueError(
            f"groups={groups} does not divide the {weight.shape[0]} output channels of weight"
        )
    kernel = weight.shape[2:]
    if weight.shape[1] == 0 or any(n == 0 for n in kernel):
        raise ValueError(f"weight must not have a size of 0, got {_check.shape_of(weight)}")
    stride = numbers(stride, dims, "stride", 1)
    dilation = numbers(dilation, dims, "dilation", 1)
    padding = _paddings(padding, dims, kernel, stride, dilation)
    for d, room in enumerate(_rooms(x, weight, padding, dilation)):
        if room < 0:
            raise ValueError(
                f"x is smaller than the kernel: {x.shape[2 + d]} with padding "
                f"{padding[2 * d]} + {padding[2 * d + 1]}, but the kernel needs "
                f"{dilation[d] * (weight.shape[2 + d] - 1) + 1}"
            )
    return stride, padding, dilation
