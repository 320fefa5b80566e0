"""Mean and sample standard deviation over runs, also of whole results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Statistic(NamedTuple):
    """Mean, sample standard deviation (None for a single value) and the values themselves."""

    mean: float
    std: float | None
    values: list[float]


def mean_std(values: Sequence[float]) -> Statistic:
    """Mean and sample standard deviation (n - 1).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("mean_std needs at least one value")
    numbers = [float(value) for value in values]
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) == 1:
        return Statistic(mean, None, numbers)
    variance = math.fsum((value - mean) ** 2 for value in numbers) / (len(numbers) - 1)
    return Statistic(mean, math.sqrt(variance), numbers)


def summarise(results: Sequence[Any]) -> Any:
    """`mean_std` of every number in results of one structure.

    Args:
        results: one result per run: a number, or a mapping or list of results. All have the same
            keys and lengths.

    Returns:
        The same structure with a dict {"mean", "std", "values"} in place of every number. Values
        that are no numbers (text, None, bool) are kept if all runs agree and become None otherwise.

    Raises:
        ValueError: the structures differ.
    """
    if not results:
        raise ValueError("summarise needs at least one result")
    first = results[0]
    if isinstance(first, Mapping):
        if any(not isinstance(r, Mapping) or r.keys() != first.keys() for r in results):
            raise ValueError("the results have different keys")
        return {key: summarise([r[key] for r in results]) for key in first}
    if isinstance(first, list | tuple):
        if any(not isinstance(r, list | tuple) or len(r) != len(first) for r in results):
            raise ValueError("the results have lists of different lengths")
        return [summarise(list(column)) for column in zip(*results, strict=True)]
    numbers = [r for r in results if isinstance(r, int | float) and not isinstance(r, bool)]
    if len(numbers) == len(results):
        return mean_std(numbers)._asdict()
    return first if all(r == first for r in results) else None
