"""Which operation did a network answer, when which was asked?"""

from __future__ import annotations

import torch
from torch import Tensor

OUTCOMES = ("add", "mul", "neither")


def confusion_counts(predictions: Tensor, results: Tensor, requested: Tensor) -> Tensor:
    """Counts of answers by outcome and requested operation.

    An answer that equals both results counts in both rows, so that a column may hold more than its
    questions.

    Args:
        predictions: int64 [n], the answered numbers.
        results: int64 [operations, n], the result of every operation for the row's arguments.
        requested: int64 [n], the requested operation as an index into `results`.

    Returns:
        int64 [operations + 1, operations]: row = outcome (the operations, then neither of them),
        column = requested operation. For addition and multiplication 3 x 2.

    Raises:
        ValueError: the shapes do not fit.
    """
    operations = results.shape[0]
    if predictions.shape != requested.shape or results.shape[1:] != predictions.shape:
        raise ValueError(
            "predictions and requested must be [n] and results [operations, n], got "
            f"{tuple(predictions.shape)}, {tuple(requested.shape)} and {tuple(results.shape)}"
        )
    equal = results == predictions
    outcome = torch.cat((equal, ~equal.any(0, keepdim=True)))
    asked = requested == torch.arange(operations, device=requested.device).unsqueeze(-1)
    return (outcome.unsqueeze(1) & asked.unsqueeze(0)).sum(-1)


def confusion_percent(counts: Tensor) -> Tensor:
    """The plotted matrix: one row per requested operation, normalised to 100 %.

    Args:
        counts: int64 [operations + 1, operations] of `confusion_counts`.

    Returns:
        float64 [operations, operations + 1]; a row of zeros for an operation never requested.
    """
    rows = counts.to(torch.float64).T
    return 100 * rows / rows.sum(1, keepdim=True).clamp(min=1)
