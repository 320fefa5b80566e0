"""Estimators as a setting of layers, models, learning runs and mask files."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import modmask_kernels as mm
from modmask_kernels import ops
from modmask_kernels.ops import estimators

ESTIMATORS = {
    "gumbel_sigmoid": estimators.gumbel_sigmoid(),
    "hard_concrete": estimators.hard_concrete(clamp=1e-4),
    "sigmoid": estimators.sigmoid(),
    "threshold": estimators.threshold(0.25),
    "top_k": estimators.top_k(0.3),
}
each_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, 8), nn.Linear(8, 3)
    )
    nn.init.normal_(model[2].bias)
    return model


def masked_network(name, **options):
    model = network()
    mm.mask_model(
        model,
        sets=["a", "b"],
        samples=2,
        estimator=ESTIMATORS[name],
        also=[nn.LayerNorm],
        bias=True,
        **options,
    )
    with torch.no_grad():
        for layer in mm.masks.masked_layers(model).values():
            for leaf in layer.masked:
                layer.logits_of(leaf).normal_(generator=torch.Generator().manual_seed(3))
    return model


def layers_of(model):
    return mm.masks.masked_layers(model)


@each_estimator
@pytest.mark.parametrize("mode", ["sample", "soft", "threshold", "noiseless"])
def test_modes(name, mode):
    """What a layer computes is what the operation with the mode's rule computes."""
    model = masked_network(name)
    estimator = ESTIMATORS[name]
    layer = model[4]
    layer.mode, layer.seed = mode, torch.tensor([4, 5])
    x = torch.randn(8, 8)
    rule = {
        "sample": {"seed": layer.seed, "hard": estimator.binary, "tau": layer.tau},
        "soft": {"seed": layer.seed, "hard": False, "tau": layer.tau},
        "threshold": {"seed": None, "hard": True, "tau": layer.tau},
        "noiseless": {"seed": None, "hard": False, "tau": 1.0},
    }[mode]
    if not estimator.draws:
        rule["seed"] = None
    masks = [
        ops.sample_mask(
            layer.weight_logits[s],
            samples=2,
            estimator=estimator,
            tensor_id=layer.tensor_id,
            **{**rule, "seed": None if rule["seed"] is None else rule["seed"][s]},
        )
        for s in range(2)
    ]
    biases = [
        ops.sample_mask(
            layer.bias_logits[s],
            samples=2,
            estimator=estimator,
            tensor_id=layer.bias_tensor_id,
            **{**rule, "seed": None if rule["seed"] is None else rule["seed"][s]},
        )
        for s in range(2)
    ]
    masks, biases = torch.cat(masks), torch.cat(biases)
    parts = [
        nn.functional.linear(part, layer.weight * m, layer.bias * b)
        for part, m, b in zip(x.chunk(len(masks)), masks, biases, strict=True)
    ]
    torch.testing.assert_close(layer(x), torch.cat(parts))


@each_estimator
def test_the_whole_model_and_its_gradients(name):
    model = masked_network(name).train()
    x = torch.randn(8, 2, 5, 5)
    model(x).square().sum().backward()
    for layer in layers_of(model).values():
        for leaf in layer.masked:
            gradient = layer.logits_of(leaf).grad
            assert gradient.isfinite().all()
            assert gradient.flatten(1).count_nonzero(1).all()


@each_estimator
def test_threshold_is_what_mask_sets_and_plain_layers_keep(name, tmp_path):
    model = masked_network(name)
    mm.use_set(model, "b")
    x = torch.randn(6, 2, 5, 5)
    with mm.set_mode(model, "threshold"):
        y = model(x)
    masks = mm.MaskSet.from_model(model, "b", logits=True)
    torch.testing.assert_close(masks.bake(model)(x), y)
    torch.testing.assert_close(model[4].to_dense("b").weight, masks.bake(model)[4].weight)
    kept = {n: m.sum() / m.numel() for n, m in masks.items()}
    if name == "top_k":
        assert abs(kept["3.weight"] - 0.3) < 0.01
    if name == "threshold":
        assert torch.equal(masks["4.weight"], model[4].weight_logits[1] > 0.25)
    masks.save(tmp_path / "b.safetensors")
    loaded = mm.MaskSet.load(tmp_path / "b.safetensors")
    assert loaded == masks
    assert loaded.metadata["settings"]["estimator"] == name
    loaded.apply(model, "a")
    assert torch.equal(model[4].weight_logits[0], model[4].weight_logits[1])
    without_logits = loaded & loaded
    without_logits.apply(model, "a")
    assert mm.MaskSet.from_model(model, "a") == masks


def test_masks_that_top_k_cannot_have():
    model = masked_network("top_k")
    masks = mm.MaskSet.from_model(model, "a")
    with pytest.raises(ValueError, match=r"is none that top_k\(fraction=0.3\) can have"):
        (~masks).apply(model, "a")


@each_estimator
def test_copies(name):
    model = masked_network(name, antithetic=True, tau=0.5)
    for layer in layers_of(model).values():
        layer.seed = torch.tensor([4, 5])
    x = torch.randn(8, 2, 5, 5)
    y = model.train()(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
    shown = repr(model)
    assert ("estimator=" in shown) == (name != "gumbel_sigmoid")
    assert "antithetic=True" in shown


def test_defaults():
    model = masked_network("hard_concrete")
    assert model[4].tau == 2 / 3
    assert model[4].eval().effective_mode == "noiseless"
    assert model[4].train().effective_mode == "sample"
    assert masked_network("sigmoid")[4].eval().effective_mode == "threshold"
    model[4].estimator = "top_k"
    assert model[4].estimator == estimators.top_k(0.5)
    with pytest.raises(ValueError, match="estimator: expected one of"):
        model[4].estimator = "bernoulli"
    with pytest.raises(ValueError, match="estimator: expected one of"):
        mm.mask_model(network(), estimator="bernoulli")


def test_a_convention_that_keeps_zero():
    layer = nn.Linear(3, 2)
    masked = mm.mask_model(layer, init=0.0, inclusive=True).eval()
    x = torch.randn(4, 3)
    assert torch.allclose(masked(x), layer(x))
    assert mm.MaskSet.from_model(masked).density() == 0
    masked.inclusive = False
    assert torch.equal(masked(x), layer.bias.expand(4, 2))


@each_estimator
def test_learning(name, tmp_path):
    model = masked_network(name)
    target = {"a": torch.zeros(3), "b": torch.ones(3)}

    def data(step, generator):
        return (torch.randn(6, 2, 5, 5, generator=generator),)

    losses = {
        s: (lambda output, batch, t=t: (output - t).square().mean()) for s, t in target.items()
    }
    options = {"lr": 0.05, "seed": 3, "progress": False, "callback_every": 1}
    sources = dict.fromkeys(target, data)
    again = copy.deepcopy(model)
    result = mm.learn_masks(model, losses, sources, 6, **options)
    for row in result.metrics:
        masks = result.masks[row["set"]]
        if row["step"] == 6:
            assert math.isclose(row["kept"], masks.density(), abs_tol=1e-6)
    path = tmp_path / "checkpoint.pt"
    mm.learn_masks(again, losses, sources, 3, checkpoint=path, **options)
    resumed = mm.learn_masks(again, losses, sources, 6, checkpoint=path, resume=True, **options)
    for s in target:
        assert resumed.masks[s] == result.masks[s]
    for layer, other in zip(layers_of(model).values(), layers_of(again).values(), strict=True):
        assert torch.equal(layer.logits_of(layer.masked[0]), other.logits_of(layer.masked[0]))
    for layer in layers_of(again).values():
        layer.estimator = "top_k"
    with pytest.raises(ValueError, match=r"another run: its (estimator|samples)"):
        mm.learn_masks(again, losses, sources, 7, checkpoint=path, resume=True, **options)


@pytest.mark.parametrize("name", ["hard_concrete", "top_k"])
def test_compile(name):
    layer = masked_network(name)[4].train()
    layer.seed = torch.tensor([1, 2])
    x = torch.randn(8, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


@each_estimator
@pytest.mark.parametrize("mode", ["sample", "soft", "threshold", "noiseless"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.MultiheadAttention])
def test_layers_of_several_parameters(name, mode, kind):
    torch.manual_seed(0)
    plain = kind(8, 8) if kind is not nn.MultiheadAttention else kind(8, 2)
    layer = mm.mask_model(plain, samples=2, estimator=ESTIMATORS[name])
    layer.mode, layer.seed = mode, torch.tensor([4])
    assert "general path" not in mm.explain(layer)
    with torch.no_grad():
        for leaf in layer.masked:
            layer.logits_of(leaf).normal_()
    x = torch.randn(3, 4, 8)
    call = (lambda m, x: m(x, x, x)[0]) if kind is nn.MultiheadAttention else lambda m, x: m(x)[0]
    rule = layer._rule(mode)
    groups = 2 if rule["seed"] is not None else 1
    parts = []
    for g, part in enumerate(x.chunk(groups, dim=1)):
        values = {}
        for leaf, parameter in plain.named_parameters():
            values[leaf] = parameter
            if leaf in layer.masked:
                mask = ops.sample_mask(
                    layer.logits_of(leaf)[0],
                    tensor_id=layer.tensor_ids[leaf],
                    sample_offset=g,
                    **{**rule, "seed": None if rule["seed"] is None else rule["seed"][0]},
                )[0]
                values[leaf] = parameter * mask
        with torch.no_grad():
            parts.append(call(lambda *a, v=values: torch.func.functional_call(plain, v, a), part))
    with torch.no_grad():
        torch.testing.assert_close(call(layer, x), torch.cat(parts, 1), rtol=1e-4, atol=1e-5)
