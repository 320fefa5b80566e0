"""Masks of every granularity over whole models, in mask sets and in files."""

import copy
import json
import pickle

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

import modmask_kernels as mm
from modmask_kernels import MaskSet
from modmask_kernels.masks.convert import find_record, masked_tensors
from modmask_kernels.nn import MaskedAny, MaskedConv2d, MaskedLinear
from modmask_kernels.nn.granularity import check_granularity, logits_shape
from modmask_kernels.ops._blocks import expand_blocks
from modmask_kernels.ops.sample_mask.reference import mask_of_sample

# granularity, then the logits of Conv2d(4, 6, (3, 2)) and Linear(48, 8)
TABLE = [
    ("weight", (6, 4, 3, 2), (8, 48)),
    ("row", (6, 1, 1, 1), (8, 1)),
    ("column", (1, 4, 1, 1), (1, 48)),
    ("kernel", (6, 4, 1, 1), (8, 48)),
    (("head", 2), (3, 1, 1, 1), (4, 1)),
    (("block", 2, 4), (3, 1, 1, 1), (4, 12)),
    (("block", 1, 2), (6, 2, 1, 1), (8, 24)),
    (("n:m", 2, 4), (6, 4, 3, 2), (8, 48)),
]
KINDS = [kind for kind, _, _ in TABLE]
IDS = [str(kind) for kind in KINDS]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 6, (3, 2), padding=(1, 0)),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 8),
        nn.LayerNorm(8),
    )


def images(count=12):
    return torch.randn(count, 4, 8, 5, generator=torch.Generator().manual_seed(1))


def masked(kind, **options):
    options = {"sets": ["a", "b"], "samples": 3, **options}
    model = mm.mask_model(network(), granularity=kind, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_logits"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(("kind", "conv", "linear"), TABLE, ids=IDS)
def test_shapes_of_logits(kind, conv, linear):
    assert logits_shape(kind, (6, 4, 3, 2)) == conv
    assert logits_shape(kind, (8, 48)) == linear
    assert logits_shape(kind, (8,)) == (8,)
    assert check_granularity(json.loads(json.dumps(kind))) == kind
    model = masked(kind, bias=True, also=[nn.LayerNorm])
    assert model[0].weight_logits.shape == (2, *conv)
    assert model[4].weight_logits.shape == (2, *linear)
    assert model[4].bias_logits.shape == (2, 8)
    assert model[5].weight_logits.shape == (2, 8)
    if kind != "weight":
        assert f"granularity={kind!r}" in repr(model)
        assert find_record(model).settings["granularity"] == kind


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_model_computes_with_expanded_masks(kind):
    """Drawn and threshold masks, against the plain model with masked weights."""
    model, plain, x = masked(kind), network(), images()
    state = copy.deepcopy(plain.state_dict())
    seeds = torch.tensor([7, 8])
    for layer in (model[0], model[4]):
        layer.seed = seeds
    y = model(x)
    assert y.requires_grad
    layers = {"0.weight": model[0], "4.weight": model[4]}
    for g, part in enumerate(x.chunk(6)):
        s, k = divmod(g, 3)
        for name, layer in layers.items():
            weight = state[name]
            mask = mask_of_sample(
                layer.weight_logits.detach()[s],
                seed=seeds[s],
                sample=k,
                tensor_id=layer.tensor_id,
                n_of_m=layer.n_of_m("weight"),
            )
            plain.get_parameter(name).data = weight * expand_blocks(mask, weight.shape)
        torch.testing.assert_close(y[2 * g : 2 * g + 2], plain(part))
    model.eval()
    for name in ("a", "b"):
        with mm.use_set(model, name), torch.no_grad():
            y = model(x)
        masks = MaskSet.from_model(model, name)
        torch.testing.assert_close(y, masks.bake(model)(x))
        torch.testing.assert_close(y, masks.bake(network())(x))
        for place, layer in ((0, model[0]), (4, model[4])):
            dense = layer.to_dense(name)
            assert torch.equal(dense.weight, masks.bake(network())[place].weight)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_mask_sets(kind, tmp_path):
    model = masked(kind)
    a, b = (MaskSet.from_model(model, name, logits=True) for name in ("a", "b"))
    plain_a, plain_b = (MaskSet.from_dict(dict(s)) for s in (a, b))
    for name, mask in a.items():
        assert mask.dtype == torch.bool
        assert mask.shape == a.shapes[name] == model.get_parameter(name).shape
        assert a.mask_shapes[name] == model.get_parameter(f"{name}_logits").shape[1:]
    # algebra and counts are those of the masks at the size of the weights
    for ours, expected in [
        (a & b, plain_a & plain_b),
        (a | b, plain_a | plain_b),
        (a - b, plain_a - plain_b),
        (~a, ~plain_a),
        (a & plain_b, plain_a & plain_b),
        (plain_a - b, plain_a - plain_b),
        (a.subset(["4.weight"]), plain_a.subset(["4.weight"])),
    ]:
        assert ours == expected
        assert expected == ours
        assert ours.counts() == expected.counts()
        assert ours.density() == expected.density()
    assert (a == b) == (plain_a == plain_b)
    assert (a & b).mask_shapes == a.mask_shapes
    assert mm.analysis.iou(a["4.weight"], b["4.weight"]) == mm.analysis.iou(
        plain_a["4.weight"], plain_b["4.weight"]
    )
    # files
    path = tmp_path / "a.safetensors"
    a.save(path)
    loaded = MaskSet.load(path)
    assert loaded == a
    assert loaded.mask_shapes == a.mask_shapes
    assert loaded.metadata["settings"] == json.loads(json.dumps(a.metadata["settings"]))
    assert all(torch.equal(loaded.logits[n], a.logits[n]) for n in a)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["format_version"] == ("1" if kind == "weight" else "2")
        bits = file.get_tensor("mask/4.weight").numel()
    assert bits == -(-a.mask_shapes["4.weight"].numel() // 8)
    # back into models, with logits and without
    for source in (loaded, plain_a if kind in ("weight", ("n:m", 2, 4)) else a.subset(a)):
        target = masked(kind)
        source.apply(target, "b")
        assert MaskSet.from_model(target, "b") == a
    fine = masked("weight")
    a.apply(fine, "b")
    assert MaskSet.from_model(fine, "b") == a


def test_rows_that_choose_their_set():
    model, x = masked("row"), images()
    chosen = mm.select_masks(model)
    with mm.use_sets(chosen, ["a", "b"] * 6), torch.no_grad():
        y = chosen(x)
    for s, name in enumerate("ab"):
        baked = MaskSet.from_model(model, name).bake(model)
        torch.testing.assert_close(y[s::2], baked(x[s::2]))


def test_masks_too_fine_for_the_logits():
    fine = MaskSet.from_model(masked("weight"))
    before = masked("row")
    target = masked("row")
    with pytest.raises(ValueError, match=r"mask of '0.weight' .* the logits of the model are"):
        fine.apply(target)
    for name, tensor in masked_tensors({"": target[0]}).items():
        assert torch.equal(tensor.logits, before[0].weight_logits), name
    with pytest.raises(ValueError, match=r"mask of '0.weight' does not keep 2 of every 4 inputs"):
        fine.apply(masked(("n:m", 2, 4)))


def entry(model_kind, tmp_path, change):
    """A file whose list of masks is changed."""
    path = tmp_path / "mask.safetensors"
    MaskSet.from_model(masked(model_kind), logits=True).save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    listed = json.loads(metadata["masks"])
    change(listed, metadata)
    metadata["masks"] = json.dumps(listed)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("kind", "place", "value", "message"),
    [
        ("row", 2, [5, 1, 1, 1], r"\[5, 1, 1, 1\] of '0.weight' does not divide"),
        ("row", 2, [6, 1], r"does not divide"),
        ("row", 2, [3, 1, 1, 1], r"tensor 'mask/0.weight': bits are set beyond its 3"),
        ("row", 2, "row", r"masks: expected sizes"),
        (("n:m", 2, 4), 3, [2, 3], r"impossible \[n, m\] of '0.weight'"),
        (("n:m", 2, 4), 3, [4, 2], r"impossible \[n, m\]"),
        (("n:m", 2, 4), 3, [2.0, 4], r"expected \[n, m\]"),
        (("n:m", 2, 4), 3, [1, 4], r"logits/0.weight' contradicts its mask"),
    ],
)
def test_damaged_files(kind, place, value, message, tmp_path):
    def change(listed, metadata):
        listed[0][place] = value

    with pytest.raises(ValueError, match=message):
        MaskSet.load(entry(kind, tmp_path, change))


def test_the_first_version_knows_no_small_masks(tmp_path):
    def change(listed, metadata):
        metadata["format_version"] = "1"

    with pytest.raises(ValueError, match=r"masks: expected \[name, shape\]"):
        MaskSet.load(entry("row", tmp_path, change))


def source(step, generator):
    x = torch.randn(12, 4, 8, 5, generator=generator)
    return x, x.mean((1, 2, 3))


def loss(output, batch):
    return (output.mean(1) - batch[1]).square().mean()


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_learn_masks(kind, tmp_path):
    options = {"lr": 0.3, "progress": False, "callback_every": 2}
    model = masked(kind)
    result = mm.learn_masks(model, loss, {"a": source, "b": source}, 4, **options)
    for row in result.metrics[-2:]:
        assert row["kept"] == pytest.approx(result.masks[row["set"]].density())
    # in two parts, through a file
    parts = masked(kind)
    path = tmp_path / "checkpoint"
    mm.learn_masks(parts, loss, {"a": source, "b": source}, 2, checkpoint=path, **options)
    again = masked(kind)
    resumed = mm.learn_masks(
        again, loss, {"a": source, "b": source}, 4, checkpoint=path, resume=True, **options
    )
    for name in ("a", "b"):
        assert resumed.masks[name] == result.masks[name]
    other = masked("row" if kind == "weight" else "weight")
    with pytest.raises(ValueError, match=r"resume: the checkpoint is of another run"):
        mm.learn_masks(
            other, loss, {"a": source, "b": source}, 4, checkpoint=path, resume=True, **options
        )


def test_soft_masks():
    model = masked("row")
    with mm.set_mode(model, "soft"):
        model(images()).sum().backward()
    assert model[0].weight_logits.grad.any()


N_OF_M = ("n:m", 2, 4)


def test_n_of_m_is_refused_where_it_has_no_masks():
    needs_gumbel = r"estimator: granularity \('n:m', 2, 4\) needs 'gumbel_sigmoid', got 'top_k'"
    with pytest.raises(ValueError, match=needs_gumbel):
        mm.mask_model(network(), granularity=N_OF_M, estimator="top_k")
    with pytest.raises(ValueError, match=r"eval_mode: granularity .* needs hard masks.*'soft'"):
        mm.mask_model(network(), granularity=N_OF_M, eval_mode="soft")
    layer = MaskedLinear(8, 4, granularity=N_OF_M)
    with pytest.raises(ValueError, match=needs_gumbel):
        layer.estimator = "top_k"
    with pytest.raises(ValueError, match=r"^mode: granularity .* needs hard masks"):
        layer.mode = "soft"
    layer.mode, layer.estimator = "sample", "gumbel_sigmoid"
    model = mm.mask_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        samples=1,
        granularity=lambda name, _: N_OF_M if name == "1" else "weight",
    )
    with pytest.raises(ValueError, match=r"^mode: granularity .* needs hard masks"):
        mm.set_mode(model, "soft")
    assert [layer.mode for layer in model] == [None, None]

    def learn(**options):
        data = lambda step, generator: torch.ones(2, 4)  # noqa: E731
        mm.learn_masks(model, lambda y, _: y.sum(), data, 1, progress=False, **options)

    with pytest.raises(ValueError, match=r"^mode: granularity .* needs hard masks"):
        learn(mode="soft")
    with pytest.raises(ValueError, match=r"penalty_form: .* count is fixed, got 'l0' \('1.weight'"):
        learn(penalty_form="l0")
    learn()


@pytest.mark.parametrize("kind", ["row", ("n:m", 2, 4)])
def test_copies(kind):
    model = masked(kind)
    x = images()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(3)
        y = model(x)
        torch.manual_seed(3)
        assert torch.equal(other(x), y)
    fresh = mm.mask_model(network(1), granularity=kind, sets=["a", "b"], samples=3)
    fresh.load_state_dict(model.state_dict())
    assert MaskSet.from_model(fresh) == MaskSet.from_model(model)
    assert model.half()[0].weight_logits.dtype == torch.float32
    assert repr(mm.unmask_model(model)) == repr(network())


def test_a_granularity_per_layer():
    def granularity(name, module):
        return "row" if isinstance(module, nn.Conv2d) else ("block", 4, 16)

    model = mm.mask_model(network(), granularity=granularity)
    assert model[0].weight_logits.shape == (1, 6, 1, 1, 1)
    assert model[4].weight_logits.shape == (1, 2, 3)
    assert find_record(model).settings["granularity"] == {"0": "row", "4": ("block", 4, 16)}


def test_a_row_of_an_embedding_is_a_token():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    masked = mm.mask_model(model, granularity="row", also=[nn.Embedding], samples=2)
    assert isinstance(masked[0], MaskedAny)
    assert masked[0].weight_logits is masked[1].weight_logits
    assert masked[0].weight_logits.shape == (1, 10, 1)
    tokens = torch.arange(10).view(2, 5)
    with torch.no_grad():
        masked[0].weight_logits[0, 3:] = -50.0
        masked[0].weight_logits[0, :3] = 50.0
    found = masked[0](tokens).view(10, 4).abs().sum(1) > 0
    assert found.tolist() == [True] * 3 + [False] * 7
    assert masked[1](torch.ones(2, 4))[:, 3:].abs().max() == 0


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        ("rows", r"granularity: expected 'weight', 'row', .* got 'rows'"),
        (("head",), r"got \('head',\)"),
        (("head", 0), r"got \('head', 0\)"),
        (("block", 2), r"got \('block', 2\)"),
        (("n:m", 4, 2), r"got \('n:m', 4, 2\)"),
        (("logits", 3), r"got \('logits', 3\)"),
        (None, r"got None"),
        (("head", 5), r"\('head', 5\) needs a multiple of 5 outputs, .* has 6 \(layer '0'\)"),
        (("block", 2, 3), r"needs a multiple of 3 inputs, the weight \[6, 4, 3, 2\] has 4"),
        (("n:m", 1, 5), r"needs a multiple of 5 inputs"),
        (
            ("logits", (6, 4, 2, 1)),
            r"expected sizes that divide those of the weight \[6, 4, 3, 2\]",
        ),
    ],
)
def test_errors(granularity, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        mm.mask_model(model, granularity=granularity)
    assert all(p.requires_grad for p in model.parameters())
    assert not isinstance(model[0], MaskedConv2d)


def test_a_shared_weight_needs_one_granularity():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"granularity: '0' and '1' share a weight"):
        mm.mask_model(model, granularity=lambda name, _: "row" if name == "0" else "column")


@pytest.mark.parametrize("kind", [*KINDS[1:], ("head", 8), ("logits", (2, 8))], ids=str)
def test_attention(kind):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(16, 2, batch_first=True, add_bias_kv=True)
    model = mm.mask_model(copy.deepcopy(plain), granularity=kind, samples=2, bias=True)
    assert model.bias_k_logits.shape == (1, 1, 1, 16)
    with torch.no_grad():
        for name in model.masked:
            model.logits_of(name).normal_()
    x, other = torch.randn(4, 3, 16), torch.randn(4, 5, 16)
    baked = MaskSet.from_model(model).bake(plain)
    model.seed = torch.tensor([3])
    drawn = [copy.deepcopy(plain) for _ in range(2)]
    for k, module in enumerate(drawn):
        for name in model.masked:
            mask = mask_of_sample(
                model.logits_of(name).detach()[0],
                seed=model.seed[0],
                sample=k,
                tensor_id=model.tensor_ids[name],
                n_of_m=model.n_of_m(name),
            )
            parameter = module.get_parameter(name)
            parameter.data *= expand_blocks(mask, parameter.shape)
    for inputs in [(x, x, x), (x, other, other), (x, other, other + 1)]:
        model.mode = "threshold"
        torch.testing.assert_close(model(*inputs)[0], baked(*inputs)[0])
        model.mode = "sample"
        parts = [[t[2 * k : 2 * k + 2] for t in inputs] for k in range(2)]
        expected = [module(*part)[0] for module, part in zip(drawn, parts, strict=True)]
        torch.testing.assert_close(model(*inputs)[0], torch.cat(expected))
    model.mode = "off"
    torch.testing.assert_close(model(x, other, other)[0], plain(x, other, other)[0])


def test_a_layer_by_hand():
    layer = MaskedLinear(6, 4, granularity=("logits", (2, 3)), init=1.0)
    assert layer.weight_logits.shape == (1, 2, 3)
    assert (layer.weight_logits == 1).all()
    layer.eval()
    with torch.no_grad():
        layer.weight_logits[0, 0, 1] = -1
    x = torch.eye(6)
    y = (layer(x) - layer.bias).T
    assert (y[:2, 2:4] == 0).all()
    torch.testing.assert_close(y[2:], layer.weight[2:])
