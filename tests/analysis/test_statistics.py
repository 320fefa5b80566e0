"""Confusion matrices, histograms and statistics."""

import math
import statistics

import pytest
import torch

from modmask_kernels import analysis


def test_confusion_by_hand():
    #            2+2  1+3  1+3  5+5  2*2  1*3  1*3
    results = torch.tensor([[4, 4, 4, 10, 4, 4, 4], [4, 3, 3, 25, 4, 3, 3]])
    requested = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    predictions = torch.tensor([4, 4, 3, 0, 4, 4, 3])
    counts = analysis.confusion_counts(predictions, results, requested)
    # rows: the sum, the product, neither; columns: add asked, mul asked. 2 and 2 count in both
    # rows.
    assert counts.tolist() == [[2, 2], [2, 2], [1, 0]]
    percent = analysis.confusion_percent(counts)
    assert percent.shape == (2, 3)
    assert percent.tolist() == [[40.0, 40.0, 20.0], [50.0, 50.0, 0.0]]
    assert torch.equal(percent.sum(1), torch.tensor([100.0, 100.0], dtype=torch.float64))


def test_confusion_of_an_operation_never_requested():
    counts = analysis.confusion_counts(
        torch.tensor([3]), torch.tensor([[3], [2]]), torch.tensor([0])
    )
    assert counts.tolist() == [[1, 0], [0, 0], [0, 0]]
    assert analysis.confusion_percent(counts).tolist() == [[100, 0, 0], [0, 0, 0]]


def test_confusion_shapes():
    with pytest.raises(ValueError, match="predictions"):
        analysis.confusion_counts(torch.zeros(3), torch.zeros(2, 4), torch.zeros(3))


def test_histogram():
    logits = torch.tensor([-100.0, 100.0, 0.0, 0.0, math.log(0.3 / 0.7)])
    counts = analysis.histogram(logits, bins=10)
    assert counts.tolist() == [1, 0, 0, 1, 0, 2, 0, 0, 0, 1]
    assert analysis.histogram({"a": logits, "b": logits}, bins=10).sum() == 10
    assert len(analysis.histogram(logits)) == 500
    with pytest.raises(ValueError, match="bins"):
        analysis.histogram(logits, bins=0)
    with pytest.raises(ValueError, match="NaN"):
        analysis.histogram(torch.tensor([math.nan]))


def test_undecided():
    logits = torch.logit(torch.tensor([0.05, 0.2, 0.5, 0.85, 0.95, 0.99], dtype=torch.float64))
    assert analysis.undecided(logits) == 3 / 6
    assert analysis.undecided({"a": logits, "b": logits[:1]}) == 3 / 7
    assert analysis.undecided(logits, 0.4, 0.6) == 1 / 6
    assert analysis.undecided(torch.zeros(0)) == 0.0


def test_mean_and_sample_standard_deviation():
    values = [1.0, 4.0, 5.5]
    result = analysis.mean_std(values)
    assert result.mean == statistics.mean(values)
    assert result.std == pytest.approx(statistics.stdev(values), rel=1e-15)
    assert analysis.mean_std([3]) == (3.0, None, [3.0])
    with pytest.raises(ValueError, match="at least one"):
        analysis.mean_std([])


def test_summarise_keeps_the_structure():
    runs = [
        {"a": 1, "b": [1.0, 2.0], "c": {"name": "x", "none": None}},
        {"a": 3, "b": [1.0, 4.0], "c": {"name": "x", "none": None}},
    ]
    summary = analysis.summarise(runs)
    assert summary["a"] == {"mean": 2.0, "std": math.sqrt(2), "values": [1.0, 3.0]}
    assert summary["b"][1]["mean"] == 3.0
    assert summary["c"] == {"name": "x", "none": None}
    with pytest.raises(ValueError, match="keys"):
        analysis.summarise([{"a": 1}, {"b": 1}])
    with pytest.raises(ValueError, match="lengths"):
        analysis.summarise([[1], [1, 2]])
    with pytest.raises(ValueError, match="at least one"):
        analysis.summarise([])
    assert analysis.summarise([{"a": "x"}, {"a": "y"}]) == {"a": None}
