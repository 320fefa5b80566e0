"""What one logit covers: a weight, a row, a column, a kernel, a head, a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from ..ops._blocks import divides

Granularity: TypeAlias = (
    Literal["weight", "row", "column", "kernel"]
    | tuple[Literal["head"], int]
    | tuple[Literal["block", "n:m"], int, int]
    | tuple[Literal["logits"], tuple[int, ...]]
)
"""What one logit of a masked layer covers.

"weight" one weight; "row" all weights into an output unit or output channel; "column" all weights
from an input unit or input channel; "kernel" the kernel between two channels of a convolution;
("head", d) the rows of d consecutive outputs; ("block", r, c) the weights from c consecutive inputs
to r consecutive outputs; ("n:m", n, m) one weight, of which n in every m consecutive inputs are
kept; ("logits", shape) whatever makes the logits of a set have that shape.
"""

_NUMBERS = {"head": 1, "block": 2, "n:m": 2}
_EXPECTED = (
    "'weight', 'row', 'column', 'kernel', ('head', d), ('block', r, c), ('n:m', n, m) or "
    "('logits', shape)"
)


def check_granularity(granularity: object) -> Granularity:
    """The granularity, as a tuple where it came as a list; ValueError for anything else."""
    found: Any = granularity
    checked: Any = None
    if isinstance(found, str):
        if found in ("weight", "row", "column", "kernel"):
            checked = found
    elif isinstance(found, (tuple, list)) and found:
        kind, *numbers = found
        if kind == "logits" and len(numbers) == 1 and isinstance(numbers[0], (tuple, list)):
            if _are_sizes(numbers[0]):
                checked = (kind, tuple(numbers[0]))
        elif len(numbers) == _NUMBERS.get(str(kind)) and _are_sizes(numbers):
            checked = None if kind == "n:m" and numbers[0] > numbers[1] else (kind, *numbers)
    if checked is None:
        raise ValueError(f"granularity: expected {_EXPECTED}, got {granularity!r}")
    result: Granularity = checked
    return result


def _are_sizes(numbers: Sequence[object]) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers)


def logits_shape(granularity: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one set's logits for a parameter of a shape.

    Parameters of less than two dimensions (biases, the weights of norms) have one logit per value.

    Raises:
        ValueError: if the parameter does not divide into such parts.
    """
    shape = tuple(shape)
    if granularity == "weight" or len(shape) < 2:
        return shape
    out, inputs, *kernel = shape
    kind, *numbers = (granularity,) if isinstance(granularity, str) else granularity
    if kind == "logits":
        small: tuple[int, ...] = numbers[0]
        if not divides(small, shape):
            raise ValueError(
                f"granularity: expected sizes that divide those of the weight {list(shape)}, "
                f"got {granularity!r}"
            )
        return small
    rows, columns = {
        "row": (1, inputs),
        "column": (out, 1),
        "kernel": (1, 1),
        "head": (*numbers[:1], inputs),
        "block": tuple(numbers),
        "n:m": (1, *numbers[1:]),
    }[kind]
    counts = []
    for size, part, what in ((out, rows, "outputs"), (inputs, columns, "inputs")):
        if part and size % part:
            raise ValueError(
                f"granularity: {granularity!r} needs a multiple of {part} {what}, the weight "
                f"{list(shape)} has {size}"
            )
        counts.append(size // part if part else 1)
    return shape if kind == "n:m" else (*counts, *(1 for _ in kernel))


def check_competing(granularity: Granularity, estimator: str, **modes: object) -> None:
    """Raise ValueError where masks would be n:m, but not the hard ones of the Gumbel-sigmoid."""
    if granularity[0] != "n:m":
        return
    if estimator != "gumbel_sigmoid":
        raise ValueError(
            f"estimator: granularity {granularity!r} needs 'gumbel_sigmoid', got {estimator!r}"
        )
    for name, mode in modes.items():
        if mode in ("soft", "noiseless"):
            raise ValueError(
                f"{name}: granularity {granularity!r} needs hard masks, soft ones do not compete; "
                f"got {mode!r}"
            )


def n_of_m(granularity: Granularity, dims: int) -> tuple[int, int] | None:
    """(n, m) for a parameter of `dims` dimensions, where its masks are n:m."""
    if granularity[0] != "n:m" or dims < 2:
        return None
    return granularity[1:]  # type: ignore[return-value]
