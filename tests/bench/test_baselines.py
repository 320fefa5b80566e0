from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modmask_kernels.bench import baselines
from modmask_kernels.models import FeedForward


def test_gumbel_sigmoid_is_0_or_1_with_the_probability_of_its_logit() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([-3.0, 0.0, 2.0]).repeat(20_000, 1)
    masks = baselines.gumbel_sigmoid(logits, samples=2)
    assert masks.shape == (2, 20_000, 3)
    assert bool(((masks == 0) | (masks == 1)).all())
    keep = torch.sigmoid(logits[0])
    error = (keep * (1 - keep) / 40_000).sqrt()
    assert bool(((masks.mean((0, 1)) - keep).abs() < 4 * error).all())


def test_gumbel_sigmoid_passes_the_gradient_of_the_soft_sample() -> None:
    logits = torch.zeros(50_000, requires_grad=True)
    torch.manual_seed(0)
    baselines.gumbel_sigmoid(logits).sum().backward()
    assert logits.grad is not None
    # at logit 0 the soft sample is uniform, so E[s (1 - s)] = 1/6
    assert float(logits.grad.mean()) == pytest.approx(1 / 6, abs=2e-3)
    assert float(logits.grad.min()) >= 0.0


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_naive_masked_linear_cuts_the_batch_into_parts(samples: int) -> None:
    x, weight = torch.randn(8, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    logits, bias = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    torch.manual_seed(1)
    y = baselines.naive_masked_linear(x, weight, logits, bias, samples)
    torch.manual_seed(1)
    masks = baselines.gumbel_sigmoid(logits, samples).view(samples, 3, 5)
    parts = [
        part @ (weight * mask).t() + bias
        for part, mask in zip(x.chunk(samples), masks, strict=True)
    ]
    torch.testing.assert_close(y, torch.cat(parts))


@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize("groups", [1, 3])
def test_naive_masked_conv2d_cuts_the_batch_into_parts(samples: int, groups: int) -> None:
    x = torch.randn(8, 6, 5, 7, dtype=torch.float64)
    weight = torch.randn(9, 6 // groups, 3, 3, dtype=torch.float64)
    logits, bias = torch.randn_like(weight), torch.randn(9, dtype=torch.float64)
    options = {"stride": 2, "padding": 1, "groups": groups}
    torch.manual_seed(1)
    y = baselines.naive_masked_conv2d(x, weight, logits, bias, samples, **options)
    torch.manual_seed(1)
    masks = baselines.gumbel_sigmoid(logits, samples).view(samples, *logits.shape)
    parts = [
        F.conv2d(part, weight * mask, bias, **options)
        for part, mask in zip(x.chunk(samples), masks, strict=True)
    ]
    torch.testing.assert_close(y, torch.cat(parts))


def test_naive_masked_model_converts_every_linear_and_freezes() -> None:
    model = nn.Sequential(FeedForward(6, (5,), 4), nn.ReLU(), nn.Linear(4, 2))
    masked = baselines.naive_masked_model(model, 2)
    trainable = [name for name, p in masked.named_parameters() if p.requires_grad]
    assert trainable == [
        "0.layers.0.weight_logits",
        "0.layers.1.weight_logits",
        "2.weight_logits",
    ]
    assert all(p.requires_grad for p in model.parameters())
    assert masked(torch.randn(4, 6)).shape == (4, 2)


def test_neurosurgeon_absent_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, package: str | None = None) -> object:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(baselines.NotAvailableError, match="pip install neurosurgeon"):
        baselines.neurosurgeon_linear(torch.zeros(2, 3), None)


@pytest.mark.parametrize("samples", [1, 4])
def test_naive_layers_under_masks_of_ones_are_the_plain_ones(samples: int) -> None:
    torch.manual_seed(0)
    linear, conv = nn.Linear(3, 5), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    x, images = torch.randn(8, 7, 3), torch.randn(8, 4, 9, 9)
    naive_linear = baselines.NaiveMaskedLinear(linear, samples, init=1000.0)
    naive_conv = baselines.NaiveMaskedConv2d(conv, samples, init=1000.0)
    torch.testing.assert_close(naive_linear(x), linear(x))
    torch.testing.assert_close(naive_conv(images), conv(images))


@pytest.mark.parametrize("samples", [1, 2])
def test_naive_masked_lstm_cuts_the_batch_into_parts(
    samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plain = torch.nn.LSTM(3, 5, 2)
    layer = baselines.NaiveMaskedLSTM(plain, samples)
    x = torch.randn(4, 6, 3)
    masks: list[Tensor] = []

    def drawn(logits: Tensor, count: int = 1) -> Tensor:
        masks.append(torch.randint(0, 2, (count, *logits.shape)).float())
        return masks[-1] if count > 1 else masks[-1][0]

    monkeypatch.setattr(baselines, "gumbel_sigmoid", drawn)
    y, _ = layer(x)
    weights = [n for n, _ in plain.named_parameters() if "weight" in n]
    for k, part in enumerate(x.chunk(samples, dim=1)):
        masked = {n: plain.get_parameter(n) * masks[i][k] for i, n in enumerate(weights)}
        expected, _ = torch.func.functional_call(plain, masked, (part,))
        torch.testing.assert_close(y.chunk(samples, dim=1)[k], expected)
