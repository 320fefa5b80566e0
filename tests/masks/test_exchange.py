"""Masks from and to torch.nn.utils.prune and the checkpoints of other packages."""

import importlib
import importlib.util

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import modmask_kernels as mm
from modmask_kernels.masks import export_masks, from_prune, import_masks, to_prune

CONVENTIONS = mm.masks.exchange.CONVENTIONS


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 4)))


def random_masks(model, names=("0.weight", "2.0.weight")):
    g = torch.Generator().manual_seed(1)
    return {n: torch.rand(model.get_parameter(n).shape, generator=g) < 0.4 for n in names}


def equal(masks, expected):
    return masks == mm.MaskSet.from_dict(expected)


# ---- plain dictionaries ----


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_plain_dictionaries(model, dtype):
    masks = random_masks(model)
    assert equal(import_masks({n: m.to(dtype) for n, m in masks.items()}, "bool"), masks)
    exported = export_masks(mm.MaskSet.from_dict(masks), "bool")
    assert exported.keys() == masks.keys()
    assert all(torch.equal(exported[n], masks[n]) for n in masks)
    wrapped = {f"module._orig_mod.{n}": m for n, m in masks.items()}
    assert equal(import_masks(wrapped, "bool", model=model), masks)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("file", ["masks.safetensors", "masks.pt", "checkpoint.pth"])
def test_what_is_exported_is_imported(model, convention, file, tmp_path):
    masks = random_masks(model)
    tensors = {n: t.contiguous() for n, t in export_masks(masks, convention).items()}
    if file == "masks.safetensors":
        safetensors.torch.save_file(tensors, tmp_path / file)
    elif file == "masks.pt":
        torch.save(tensors, tmp_path / file)
    else:
        state = {f"module.{n}": t for n, t in tensors.items()}
        torch.save({"epoch": 3, "arch": "cResNet18", "state_dict": state}, tmp_path / file)
    assert equal(import_masks(tmp_path / file, convention, model=model), masks)


def test_logits_survive(model):
    mm.mask_model(model, init=0.5)
    masks = mm.MaskSet.from_model(model, logits=True)
    for convention in ("neurosurgeon", "neurosurgeon-hard-concrete", "subnetwork-probing"):
        back = import_masks(export_masks(masks, convention), convention, model=model)
        assert back == masks
        assert all(torch.equal(back.logits[n], masks.logits[n]) for n in masks)


# ---- torch.nn.utils.prune ----


def test_from_and_to_pruned_models(model):
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 4)))
    plain.load_state_dict(model.state_dict())
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_structured(model[2][0], "weight", 1, dim=0)
    prune.l1_unstructured(model[2][0], "bias", 2)
    masks = from_prune(model)
    assert set(masks) == {"0.weight", "2.0.weight", "2.0.bias"}
    x = torch.randn(5, 6)
    assert torch.equal(masks.bake(plain)(x), model(x))
    assert to_prune(plain, masks) is plain
    assert prune.is_pruned(plain)
    assert torch.equal(plain(x), model(x))
    assert from_prune(plain) == masks


def test_models_that_are_not_pruned(model):
    with pytest.raises(ValueError, match=r"pruned by torch\.nn\.utils\.prune, found none"):
        from_prune(model)
    with pytest.raises(ValueError, match=r"masks: expected a parameter '5.weight'.*found none"):
        to_prune(model, {"5.weight": torch.ones(2).bool()})
    both = {"0.weight": torch.ones(8, 6).bool(), "2.0.weight": torch.ones(3, 4).bool()}
    with pytest.raises(ValueError, match=r"'2.0.weight' of shape \[3, 4\].* shape \[4, 8\]"):
        to_prune(model, both)
    with pytest.raises(
        TypeError, match=r"masks\['0.weight'\]: expected a bool tensor, got .*float"
    ):
        to_prune(model, {"0.weight": torch.rand(8, 6)})
    assert not prune.is_pruned(model)


# ---- other packages, by their formulas ----


def theirs(convention, state):
    """The masks of NeuroSurgeon in evaluation: by its formulas, and by itself where installed."""
    masks = {}
    for leaf in ("weight", "bias"):
        p = state[f"{leaf}_mask_params"]
        if convention == "neurosurgeon":
            masks[leaf] = p > 0
        else:
            masks[leaf] = (torch.sigmoid(p) * (1.1 - -0.1) + -0.1).clamp(0.0, 1.0) > 0.5
    if importlib.util.find_spec("NeuroSurgeon") is not None:
        masking = importlib.import_module("NeuroSurgeon.Masking")
        hard = convention == "neurosurgeon-hard-concrete"
        kind = masking.HardConcreteLinear if hard else masking.ContSparseLinear
        layer = kind.from_layer(nn.Linear(6, 8), mask_bias=True)
        layer.load_state_dict(state, strict=False)
        layer.train(False)
        for leaf, mask in masks.items():
            assert torch.equal(layer._compute_mask(f"{leaf}_mask_params").bool(), mask)
    return masks


@pytest.mark.parametrize("convention", ["neurosurgeon", "neurosurgeon-hard-concrete"])
def test_neurosurgeon_reads_and_writes_the_same_masks(convention):
    g = torch.Generator().manual_seed(0)
    state = {
        "weight": torch.randn(8, 6, generator=g),
        "weight_mask_params": torch.randn(8, 6, generator=g),
        "bias_mask_params": torch.randn(8, generator=g),
    }
    masks = import_masks({f"wrapped_model.0.{n}": t for n, t in state.items()}, convention)
    assert equal(masks, {f"0.{n}": m for n, m in theirs(convention, state).items()})
    chosen = random_masks(nn.Linear(6, 8), ("weight", "bias"))
    read = theirs(convention, export_masks(chosen, convention))
    assert all(torch.equal(read[n], chosen[n]) for n in chosen)


@pytest.mark.parametrize("convention", ["neurosurgeon", "neurosurgeon-hard-concrete"])
def test_masks_of_neurons_are_spread_over_their_weights(convention):
    linear, conv = nn.Linear(3, 4), nn.Conv2d(2, 4, 3)
    state = {
        "fc.weight": linear.weight,
        "fc.weight_mask_params": torch.tensor([[1.0], [-1.0], [2.0], [0.0]]),
        "conv.weight": conv.weight,
        "conv.weight_mask_params": torch.randn(4, 1, 3, 3),
    }
    masks = import_masks(state, convention)
    assert torch.equal(masks["fc.weight"].int(), torch.tensor([[1], [0], [1], [0]]).expand(4, 3))
    expected = (state["conv.weight_mask_params"] > 0).expand(4, 2, 3, 3)
    assert torch.equal(masks["conv.weight"], expected)
    del state["fc.weight"]
    with pytest.raises(ValueError, match=r"shape of 'fc.weight' is not in the source.* the model"):
        import_masks(state, convention)


def test_hard_concrete_next_to_zero_follows_the_rounding_of_the_formula():
    p = torch.tensor([-1e-3, -1e-8, -0.0, 0.0, 1e-8, 1e-7, 1e-3])
    kept = torch.sigmoid(p) * (1.1 - -0.1) + -0.1 > 0.5
    masks = import_masks({"a.weight_mask_params": p}, "neurosurgeon-hard-concrete")
    assert torch.equal(masks["a.weight"], kept)
    assert torch.equal(masks.logits["a.weight"] > 0, kept)


def test_subnetwork_probing_tiles_its_scores():
    """The package's own product: the weight seen as [a, out / a, b, in / b] times the scores."""
    g = torch.Generator().manual_seed(0)
    weight, scores = torch.randn(6, 8, generator=g), torch.randn(1, 3, 1, 2, generator=g)
    state = {"bert.query.weight": weight, "bert.query.mask.mask_scores": scores}
    masks = import_masks(state, "subnetwork-probing")
    gates = (torch.sigmoid(scores) * 1.2 - 0.1).clamp(0, 1)
    binary = (gates > 0.5).float()
    expected = (weight.reshape(2, 3, 4, 2) * binary).reshape(6, 8)
    assert torch.equal(weight * masks["bert.query.weight"], expected)
    state["bert.query.mask.mask_scores"] = torch.zeros(1, 4, 1, 2)
    with pytest.raises(ValueError, match=r"\[1, out / a, 1, in / b\].*\[6, 8\].*\[1, 4, 1, 2\]"):
        import_masks(state, "subnetwork-probing")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 1.0])
def test_hidden_networks_keep_the_largest_scores(keep):
    scores = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    masks = import_masks({"module.conv1.scores": scores}, "hidden-networks", keep=keep)
    order = scores.abs().flatten().argsort()
    expected = torch.ones(180)
    expected[order[: int((1 - keep) * 180)]] = 0
    assert torch.equal(masks["conv1.weight"], expected.bool().view_as(scores))
    x, weight = torch.randn(1, 4, 6, 6), torch.randn(5, 4, 3, 3)
    subnet = expected.view_as(scores)
    assert torch.equal(F.conv2d(x, weight * masks["conv1.weight"]), F.conv2d(x, weight * subnet))


# ---- bad input ----


@pytest.mark.parametrize(
    ("state", "convention", "options", "message"),
    [
        ({}, "peer", {}, r"convention: expected one of .*got 'peer'"),
        ({"a.weight": torch.zeros(2)}, "neurosurgeon", {}, r"weight_mask_params.*found none"),
        ({"a.weight": torch.tensor([0.5])}, "bool", {}, r"expected 0 and 1 in 'a.weight'"),
        ({"a.scores": torch.randn(4)}, "hidden-networks", {}, r"keep: .*'a.scores'.*prune_rate"),
        ({"a.scores": torch.randn(4)}, "hidden-networks", {"keep": 2.0}, r"keep: .*got 2.0"),
        ({"a.weight": torch.ones(4)}, "bool", {"keep": 0.5}, r"'hidden-networks' only"),
        (
            {"a.weight_mask_params": torch.tensor([float("nan"), 1.0])},
            "neurosurgeon",
            {},
            r"'a.weight_mask_params' holds values that are not finite",
        ),
        (
            {"a.weight": torch.zeros(4, 3), "a.weight_mask_params": torch.zeros(2, 3)},
            "neurosurgeon",
            {},
            r"shape \[2, 3\] does not fit the weight \[4, 3\]",
        ),
        (
            {"a.weight_mask_params": torch.zeros(2, 3)},
            "neurosurgeon",
            {"model": nn.Linear(3, 2)},
            r"model: expected a parameter 'a.weight'",
        ),
    ],
    ids=str,
)
def test_wrong_sources_are_named(state, convention, options, message):
    with pytest.raises(ValueError, match=message):
        import_masks(state, convention, **options)


@pytest.mark.parametrize("value", [[1.0], None, torch.ones(2, dtype=torch.complex64)], ids=str)
def test_values_that_are_no_tensors_of_real_numbers_are_named(value):
    for name, convention in (("a.weight", "bool"), ("a.weight_mask_params", "neurosurgeon")):
        with pytest.raises(TypeError, match=f"source: expected a tensor of real .* '{name}'"):
            import_masks({name: value}, convention)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        import_masks(tmp_path / "none.pt", "bool")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a checkpoint of plain tensors"):
        import_masks(tmp_path / "bad.pt", "bool")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="expected a state dict, got list"):
        import_masks(tmp_path / "list.pt", "bool")
    torch.save({"a": nn.Linear(1, 1)}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="not a checkpoint of plain tensors"):
        import_masks(tmp_path / "code.pt", "bool")
    with pytest.raises(ValueError, match=r"has no name for the mask of '0.bias'"):
        export_masks({"0.bias": torch.ones(2).bool()}, "hidden-networks")
    with pytest.raises(ValueError, match="convention: expected one of"):
        export_masks({}, "peer")
