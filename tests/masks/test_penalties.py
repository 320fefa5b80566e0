"""The expected L0 penalty and schedules of the temperature, alone and in the learning loop."""

import math

import pytest
import torch
from torch import nn

import modmask_kernels as mm
from modmask_kernels.masks.penalties import add_l0_gradient
from modmask_kernels.ops import estimators

KINDS = {
    "hard_concrete": (estimators.hard_concrete(), 2 / 3),
    "wide": (estimators.hard_concrete((-0.5, 1.2)), 0.4),
    "gumbel_sigmoid": (estimators.gumbel_sigmoid(), 1.0),
    "sigmoid": (estimators.sigmoid(), 0.1),
}


@pytest.mark.parametrize("name", KINDS)
def test_gradient_of_the_expected_l0(name):
    estimator, tau = KINDS[name]
    logits = torch.linspace(-4, 4, 50, dtype=torch.float64).requires_grad_()
    p = mm.masks.expected_l0(logits, estimator, tau)
    (expected,) = torch.autograd.grad(0.3 * p.sum(), logits)
    found = torch.ones_like(logits)
    add_l0_gradient(found, logits.detach(), estimator, tau, 0.3)
    torch.testing.assert_close(found, 1 + expected)


def test_formula_of_louizos():
    logits = torch.linspace(-4, 4, 50, dtype=torch.float64)
    expected = torch.sigmoid(logits - 2 / 3 * math.log(0.1 / 1.1))
    torch.testing.assert_close(mm.masks.expected_l0(logits), expected)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "sigmoid"])
def test_how_often_masks_are_not_zero(name):
    estimator, tau = KINDS[name]
    for logit in (-1.0, 0.5):
        logits = torch.full((100_000,), logit)
        drawn = mm.ops.sample_mask(
            logits, seed=torch.tensor(2), tau=tau, hard=estimator.binary, estimator=estimator
        )
        expected = float(mm.masks.expected_l0(torch.tensor(logit), estimator, tau))
        assert abs(float((drawn > 0).float().mean()) - expected) < 6e-3


def test_annealing():
    schedule = mm.masks.Annealing(1.0, 1 / 200, 101)
    assert schedule(0) == 1.0
    assert math.isclose(schedule(50), 200**-0.5)
    assert math.isclose(schedule(100), 1 / 200)
    assert schedule(5000) == schedule(100)
    assert mm.masks.Annealing(2.0, 1.0, 1)(0) == 2.0
    for wrong in ((0.0, 1.0, 3), (1.0, math.inf, 3), (1.0, 0.5, 0)):
        with pytest.raises(ValueError, match="expected"):
            mm.masks.Annealing(*wrong)


def masked(estimator, **options):
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    return mm.mask_model(layer, samples=1, estimator=estimator, init=0.5, **options)


def data(step, generator):
    return (torch.randn(4, 6, generator=generator),)


def nothing(output, batch):
    return 0.0 * output.sum()


@pytest.mark.parametrize("name", KINDS)
def test_the_penalty_alone(name):
    estimator, tau = KINDS[name]
    model = masked(estimator, tau=tau)
    leaf = torch.full((4, 6), 0.5, requires_grad=True)
    optimiser = torch.optim.Adam([leaf], lr=0.1)
    for _ in range(5):
        optimiser.zero_grad()
        (0.7 * mm.masks.expected_l0(leaf, estimator, tau).sum()).backward()
        nn.utils.clip_grad_norm_([leaf], 1.0)
        optimiser.step()
    result = mm.learn_masks(
        model, nothing, data, 5, lr=0.1, penalty=0.7, penalty_form="l0", progress=False
    )
    torch.testing.assert_close(model.weight_logits[0].detach(), leaf.detach())
    assert result.masks["0"].metadata["learning"]["penalty_form"] == "l0"


def test_a_schedule_of_the_temperature(tmp_path):
    """Continuous sparsification, against the same loop in plain PyTorch."""
    model = masked("sigmoid", tau=3.0)
    schedule = mm.masks.Annealing(1.0, 0.05, 6)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    seen = []

    def loss(output, batch):
        seen.append(model.tau)
        return output.square().mean()

    options = {"lr": 0.05, "penalty": 1e-3, "penalty_form": "l0", "grad_clip": None}
    options |= {"tau": schedule, "progress": False}
    inputs = []

    def recorded(step, generator):
        inputs.append(data(step, generator)[0])
        return (inputs[-1],)

    path = tmp_path / "checkpoint.pt"
    mm.learn_masks(model, loss, recorded, 3, checkpoint=path, **options)
    result = mm.learn_masks(model, loss, recorded, 6, checkpoint=path, resume=True, **options)
    assert seen == [schedule(step) for step in range(6)]
    assert model.tau == 3.0
    leaf = torch.full((4, 6), 0.5, requires_grad=True)
    optimiser = torch.optim.Adam([leaf], lr=0.05)
    for step, x in enumerate(inputs):
        mask = torch.sigmoid(leaf / schedule(step))
        optimiser.zero_grad()
        y = nn.functional.linear(x, weight * mask, bias)
        (y.square().mean() + 1e-3 * mask.sum()).backward()
        optimiser.step()
    torch.testing.assert_close(model.weight_logits[0].detach(), leaf.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(result.masks["0"]["weight"], model.weight_logits[0] > 0)
    other = {**options, "tau": mm.masks.Annealing(1.0, 0.1, 6)}
    with pytest.raises(ValueError, match="resume: the checkpoint is of another run"):
        mm.learn_masks(model, loss, recorded, 7, checkpoint=path, resume=True, **other)


def test_wrong_input():
    model = masked("top_k")
    for options, message in (
        ({"penalty_form": "l0"}, "estimator: expected gumbel_sigmoid, sigmoid, or hard_concrete"),
        ({"penalty_form": "l1"}, r"penalty_form: expected one of \['linear', 'l0'\], got 'l1'"),
        ({"tau": lambda step: -1.0}, "tau: expected a positive number, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            mm.learn_masks(model, nothing, data, 1, progress=False, **options)
    with pytest.raises(TypeError, match=r"tau: expected a callable\(step\), got float"):
        mm.learn_masks(model, nothing, data, 1, progress=False, tau=0.5)
