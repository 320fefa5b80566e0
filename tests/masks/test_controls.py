"""Magnitude and random masks of a given or matched density."""

import pytest
import torch
from torch import nn

import modmask_kernels as mm


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3), nn.LayerNorm(3))


NAMES = ["0.weight", "2.weight"]
MAKERS = {"magnitude": mm.masks.magnitude_masks, "random": mm.masks.random_masks}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_density(kind, density):
    model = network()
    masks = MAKERS[kind](model, density)
    assert masks.names == NAMES
    assert masks.counts() == {
        "0.weight": (round(80 * density), 80),
        "2.weight": (round(24 * density), 24),
    }
    whole = MAKERS[kind](model, density, scope="model")
    assert sum(kept for kept, _ in whole.counts().values()) == round(104 * density)
    assert masks.metadata["control"] == kind
    masks.check(model)


@pytest.mark.parametrize("kind", MAKERS)
def test_matched(kind):
    model = mm.mask_model(network(), bias=True, samples=1)
    with torch.no_grad():
        for layer in mm.masks.masked_layers(model).values():
            for leaf in layer.masked:
                layer.logits_of(leaf).normal_()
    learned = mm.MaskSet.from_model(model)
    masks = MAKERS[kind](model, learned)
    assert masks.counts() == learned.counts()
    assert masks != learned
    whole = MAKERS[kind](model, learned, scope="model")
    assert whole.density() == learned.density()
    assert masks.bake(model)[0].weight.count_nonzero() == learned.counts()["0.weight"][0]
    assert MAKERS[kind](model, 0.5).names == learned.names


def test_magnitude_keeps_the_largest():
    model = network()
    masks = mm.masks.magnitude_masks(model, 0.3)
    for name, mask in masks.items():
        size = model.get_parameter(name).detach().abs()
        assert size[mask].min() >= size[~mask].max()
    masks = mm.masks.magnitude_masks(model, 0.3, scope="model")
    sizes = torch.cat([model.get_parameter(n).detach().abs().flatten() for n in NAMES])
    kept = torch.cat([masks[n].flatten() for n in NAMES])
    assert sizes[kept].min() >= sizes[~kept].max()


def test_random_masks_follow_the_seed():
    model = network()
    first = mm.masks.random_masks(model, 0.5, seed=3)
    assert first == mm.masks.random_masks(model, 0.5, seed=3)
    assert first != mm.masks.random_masks(model, 0.5, seed=4)


def test_wrong_input():
    model = network()
    for wrong, message in (
        ({"density": 1.5}, r"density: expected masks or a number in \[0, 1\], got 1.5"),
        ({"density": {"9.weight": torch.ones(2)}}, "the model has no parameter '9.weight'"),
        ({"density": 0.5, "scope": "layer"}, "scope: expected 'tensor' or 'model', got 'layer'"),
    ):
        with pytest.raises(ValueError, match=message):
            mm.masks.magnitude_masks(model, **wrong)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.LSTM(3, 4, 2), nn.GRUCell(4, 4)),
        lambda: nn.TransformerEncoderLayer(8, 2, 8),
        Tied,
    ],
    ids=["recurrent", "attention", "tied"],
)
def test_a_plain_model_gets_the_masks_of_a_masked_one(kind, make):
    torch.manual_seed(0)
    plain = make()
    masks = MAKERS[kind](plain, 0.5)
    matched = MAKERS[kind](plain, masks)
    model = mm.mask_model(plain)
    assert masks.names == mm.MaskSet.from_model(model).names
    assert masks.density() == pytest.approx(0.5, abs=0.01)
    assert matched.counts() == MAKERS[kind](model, masks).counts() == masks.counts()
    masks.apply(model)
    assert mm.MaskSet.from_model(model) == masks
