"""Presets against the formulas of the published packages."""

import math

import pytest
import torch
from torch import nn

import modmask_kernels as mm
from modmask_kernels.ops.sample_mask import reference


def layer_of(name, keep=None):
    plain = nn.Linear(40, 30, bias=False)
    nn.init.ones_(plain.weight)
    layer = mm.mask_model(plain, samples=1, **mm.masks.preset(name, keep))
    layer.seed = torch.tensor([4])
    return layer


def mask_seen(layer):
    return layer(torch.eye(40)).detach().T


def uniform(layer, epsilon):
    words = reference.noise_words(1200, seed=torch.tensor(4), sample=0, tensor_id=layer.tensor_id)
    u = ((2 * words.view(30, 40) + 1).double() * 2.0**-24).clamp(epsilon, 1 - epsilon)
    return 1 - u  # our noise is mirrored, which is as likely


HARD_CONCRETE = {
    # name: (clamp of the noise, initial logit, what evaluation does)
    "cao2021": (1e-4, math.log((1.0 / 1.2) / (1 - 1.0 / 1.2)), "without temperature"),
    "neurosurgeon": (1e-4, 0.0, "binary"),
    "louizos2018": (1e-6, 0.0, "without temperature"),
    "l0-python": (1e-6, 0.0, "with temperature"),
    "edge-pruning": (1e-6, 10.0, "binary"),
}


@pytest.mark.parametrize("name", HARD_CONCRETE)
def test_hard_concrete(name):
    clamp, init, evaluation = HARD_CONCRETE[name]
    layer = layer_of(name)
    torch.testing.assert_close(layer.weight_logits, torch.full((1, 30, 40), init))
    with torch.no_grad():
        layer.weight_logits.normal_(std=6, generator=torch.Generator().manual_seed(1))
    logits = layer.weight_logits[0].detach().double()
    b, low, high = 2 / 3, -0.1, 1.1

    def stretched(s):
        return (s * (high - low) + low).clamp(0, 1)

    u = uniform(layer, clamp)
    drawn = stretched(torch.sigmoid((u.log() - (1 - u).log() + logits) / b))
    torch.testing.assert_close(mask_seen(layer.train()).double(), drawn, rtol=1e-4, atol=1e-5)
    value = {
        "without temperature": stretched(torch.sigmoid(logits)),
        "with temperature": stretched(torch.sigmoid(logits / b)),
        "binary": (stretched(torch.sigmoid(logits)) > 0.5).double(),
    }[evaluation]
    torch.testing.assert_close(mask_seen(layer.eval()).double(), value, rtol=1e-4, atol=1e-5)


def test_initial_logits_from_a_share():
    for name, expected in (
        ("cao2021", math.log((0.6 / 1.2) / (1 - 0.6 / 1.2))),
        ("neurosurgeon", 0.0),
        ("louizos2018", 0.0),
        ("continuous-sparsification", 0.0),
    ):
        assert math.isclose(mm.masks.preset(name, 0.5)["init"], expected, abs_tol=1e-12)
    assert math.isclose(mm.masks.preset("neurosurgeon", 0.9)["init"], math.log(9))
    # the gate without noise of Cao et al. is the share itself
    init = mm.masks.preset("cao2021")["init"]
    gate = 1.2 / (1 + math.exp(-init)) - 0.1
    assert math.isclose(gate, 0.9)


def test_csordas():
    layer = layer_of("csordas2021")
    torch.testing.assert_close(layer.weight_logits, torch.full((1, 30, 40), 2.0))
    with torch.no_grad():
        layer.weight_logits.copy_(torch.arange(1200).view(1, 30, 40) % 5 - 2)
    logits = layer.weight_logits[0].detach()
    u = uniform(layer, 0.0)
    # the noise of the package: u_a and u_b give a logistic number, one u does as well
    soft = torch.sigmoid(logits + u.log() - (1 - u).log())
    assert torch.equal(mask_seen(layer.train()), (soft > 0.5).float())
    assert torch.equal(mask_seen(layer.eval()), (logits >= 0).float())
    assert torch.equal(mm.MaskSet.from_model(layer)["weight"], logits > 0)


def test_piggyback_and_hidden_networks():
    layer = layer_of("piggyback")
    assert (layer.weight_logits == 1e-2).all()
    with torch.no_grad():
        layer.weight_logits.normal_(std=0.01)
    expected = (layer.weight_logits[0] > 5e-3).float()
    for mode in (True, False):
        assert torch.equal(mask_seen(layer.train(mode)), expected)
    layer = layer_of("hidden-networks", 0.3)
    with torch.no_grad():
        layer.weight_logits.uniform_()
    order = layer.weight_logits[0].detach().flatten().argsort()
    expected = torch.ones(1200)
    expected[order[: int((1 - 0.3) * 1200)]] = 0
    for mode in (True, False):
        assert torch.equal(mask_seen(layer.train(mode)), expected.view(30, 40))


def test_continuous_sparsification():
    layer = layer_of("continuous-sparsification")
    with torch.no_grad():
        layer.weight_logits.normal_()
    logits = layer.weight_logits[0].detach()
    for beta in (1.0, 200.0):
        layer.tau = 1 / beta
        expected = torch.sigmoid(beta * logits)
        torch.testing.assert_close(mask_seen(layer.train()), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(mask_seen(layer.eval()), (logits > 0).float())


@pytest.mark.parametrize("shape", [(40, 30), (1, 1)])
def test_edge_pruning_ends_with_the_expected_count(shape):
    """deterministic_z_from_log_alpha(log_alpha, apply_one=True) of the package."""
    plain = nn.Linear(*shape, bias=False)
    layer = mm.mask_model(plain, sets=["a", "b"], samples=1, **mm.masks.preset("edge-pruning"))
    with torch.no_grad():
        layer.weight_logits.normal_(std=2, generator=torch.Generator().manual_seed(1))
    for index, name in enumerate(("a", "b")):
        log_alpha = layer.weight_logits[index].detach().double()
        x = (0 - -0.1) / (1.1 - -0.1)
        at_zero = torch.sigmoid(2 / 3 * (math.log(x) - math.log(1 - x)) - log_alpha)
        zeros = int(at_zero.clamp(1e-6, 1 - 1e-6).sum().round())
        soft = torch.sigmoid(log_alpha / (2 / 3) * 0.8).flatten()
        soft[soft.topk(zeros, largest=False).indices] = 0
        found = mm.masks.expected_count_masks(layer, name)
        assert torch.equal(found["weight"], (soft > 0).view(log_alpha.shape))
        assert found.metadata["set"] == name
        assert 0 <= found.density() <= 1


def test_expected_count_of_small_logits_and_wrong_estimators():
    layer = mm.mask_model(nn.Linear(8, 6, bias=False), granularity="row")
    with torch.no_grad():
        layer.weight_logits.copy_(torch.arange(6.0).view(1, 6, 1) * 4 - 10)
    kept = round(float(torch.sigmoid(layer.weight_logits.detach()).sum()))
    found = mm.masks.expected_count_masks(layer)["weight"]
    assert found.shape == (6, 8)
    assert torch.equal(found.all(1), torch.arange(6) >= 6 - kept)
    with pytest.raises(ValueError, match="estimator: expected"):
        mm.masks.expected_count_masks(mm.mask_model(nn.Linear(2, 2), estimator="top_k"))
    with pytest.raises(ValueError, match="weight has n:m masks"):
        mm.masks.expected_count_masks(mm.mask_model(nn.Linear(4, 2), granularity=("n:m", 2, 4)))


def test_wrong_input():
    with pytest.raises(ValueError, match="name: expected one of"):
        mm.masks.preset("cao")
    with pytest.raises(ValueError, match=r"keep: expected a number between 0 and 1, got 1\.0"):
        mm.masks.preset("cao2021", 1.0)
