import math

import pytest
import torch
from torch import nn

from modmask_kernels.models import FeedForward


@pytest.mark.parametrize(
    ("hidden", "weights"),
    [
        ((400, 400, 200), 260_800),
        ((800,) * 4, 1_969_600),
        ((2000,) * 4, 12_124_000),
        ((4000,) * 4, 48_248_000),
    ],
)
def test_published_sizes(hidden, weights):
    model = FeedForward(42, hidden, 20, device="meta")
    assert sum(layer.weight.numel() for layer in model.layers) == weights


def test_equivalent_to_a_sequential():
    model = FeedForward(5, (7, 6), 3)
    plain = nn.Sequential(model.layers[0], nn.ReLU(), model.layers[1], nn.ReLU(), model.layers[2])
    x = torch.randn(2, 4, 5)
    assert torch.equal(model(x), plain(x))


def test_single_layer_has_no_activation():
    model = FeedForward(5, (), 3)
    x = torch.randn(4, 5)
    assert torch.equal(model(x), model.layers[0](x))


def test_initial_values_are_those_of_linear_and_reproducible():
    a = FeedForward(100, (300,), 50, generator=torch.Generator().manual_seed(1))
    b = FeedForward(100, (300,), 50, generator=torch.Generator().manual_seed(1))
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    for layer in a.layers:
        bound = 1 / math.sqrt(layer.in_features)
        for parameter in (layer.weight, layer.bias):
            assert parameter.abs().max() <= bound
            assert parameter.abs().max() > 0.9 * bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_default_generator_is_pytorchs():
    torch.manual_seed(4)
    a = FeedForward(3, (4,), 2)
    torch.manual_seed(4)
    b = FeedForward(3, (4,), 2)
    assert torch.equal(a.layers[0].weight, b.layers[0].weight)


def test_bad_size():
    with pytest.raises(ValueError, match="hidden"):
        FeedForward(3, (0,), 2)
