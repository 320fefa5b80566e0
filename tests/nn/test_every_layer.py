"""Every kind of masked layer under every estimator, granularity and feature: docs/matrix.md."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import modmask_kernels as mm
from modmask_kernels import _native, ops
from modmask_kernels.ops._blocks import expand_blocks
from modmask_kernels.ops.sample_mask.reference import mask_of_sample

LAYERS = {
    "Linear": lambda: nn.Linear(8, 12),
    "Conv1d": lambda: nn.Conv1d(8, 12, 3),
    "Conv2d": lambda: nn.Conv2d(8, 12, 3),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(8, 12, 3, stride=2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(8, 12, 3, stride=2),
    "HuggingFaceConv1D": lambda: Conv1D(12, 8),
    "LSTM": lambda: nn.LSTM(8, 12, batch_first=True),
    "GRU": lambda: nn.GRU(8, 12, batch_first=True),
    "LSTMCell": lambda: nn.LSTMCell(8, 12),
    "GRUCell": lambda: nn.GRUCell(8, 12),
    "MultiheadAttention": lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    "also": lambda: nn.Conv3d(8, 12, 2),
}
ESTIMATORS = ["gumbel_sigmoid", "hard_concrete", "sigmoid", "threshold", "top_k"]
GRANULARITIES = {
    "weight": "weight",
    "row": "row",
    "column": "column",
    "kernel": "kernel",
    "head": ("head", 2),
    "block": ("block", 2, 4),
    "n:m": ("n:m", 2, 4),
}
OUTPUTS_LAST = ["ConvTranspose1d", "ConvTranspose2d", "HuggingFaceConv1D"]
each_layer = pytest.mark.parametrize("name", LAYERS)


class Network(nn.Module):
    """One layer, from a tensor with the batch first to a tensor with the batch first."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.cell = isinstance(layer, nn.RNNCellBase)

    def forward(self, x):
        y = self.layer(x, x, x) if hasattr(self.layer, "num_heads") else self.layer(x)
        if self.cell:
            y = self.layer(x, y)
        return y[0] if isinstance(y, tuple) else y


def inputs_of(name, rows=8, seed=1):
    sizes = {"Conv1d": (5,), "Conv2d": (4, 5), "ConvTranspose1d": (5,), "ConvTranspose2d": (3, 2)}
    shape = (rows, 8)
    if name in sizes or name == "also":
        shape += sizes.get(name, (2, 3, 2))
    elif name in ("LSTM", "GRU", "MultiheadAttention"):
        shape = (rows, 3, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(name, **options):
    """A plain network and a masked one over a copy of it, with random logits and fixed seeds."""
    torch.manual_seed(0)
    plain = Network(LAYERS[name]()).eval()
    options = {"samples": 2, "also": [nn.Conv3d], **options}
    model = mm.mask_model(copy.deepcopy(plain), **options).train()
    layer = model.layer
    layer.seed = torch.arange(4, 4 + layer.sets)
    with torch.no_grad():
        for leaf in layer.masked:
            layer.logits_of(leaf).normal_()
    return plain, model


def logits_of(model):
    return {n: p for n, p in model.named_parameters() if n.endswith("_logits")}


def group_by_group(plain, layer, x, groups, mask_of):
    """`mask_of(leaf, group)`: a mask in the shape of the logits of one set."""
    parts = []
    for g, part in enumerate(x.chunk(groups)):
        masked = {}
        for leaf in layer.masked:
            weight = plain.layer.get_parameter(leaf)
            masked[f"layer.{leaf}"] = weight * expand_blocks(mask_of(leaf, g), weight.shape)
        parts.append(functional_call(plain, masked, (part,)))
    return torch.cat(parts)


@each_layer
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators(name, estimator):
    plain, model = make(name, estimator=estimator)
    layer, x = model.layer, inputs_of(name)
    rule = layer._rule("sample")

    def mask_of(leaf, g):
        return ops.sample_mask(
            layer.logits_of(leaf)[0],
            tensor_id=layer.tensor_ids[leaf],
            sample_offset=g,
            **{**rule, "seed": None if rule["seed"] is None else rule["seed"][0]},
        )[0]

    groups = 1 if rule["seed"] is None else 2
    expected = group_by_group(plain, layer, x, groups, mask_of)
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    logits = list(logits_of(model).values())
    got = torch.autograd.grad(found.square().mean(), logits)
    wanted = torch.autograd.grad(expected.square().mean(), logits)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    masks = mm.MaskSet.from_model(model)
    with mm.set_mode(model, "threshold"):
        torch.testing.assert_close(model(x), masks.bake(plain)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("granularity", "name"),
    [(g, n) for g in GRANULARITIES for n in LAYERS if g != "n:m" or n not in OUTPUTS_LAST],
)
def test_granularities(granularity, name):
    plain, model = make(name, granularity=GRANULARITIES[granularity])
    layer, x = model.layer, inputs_of(name)

    def mask_of(leaf, g):
        return mask_of_sample(
            layer.logits_of(leaf).detach()[0],
            seed=layer.seed[0],
            sample=g,
            tensor_id=layer.tensor_ids[leaf],
            n_of_m=layer.n_of_m(leaf),
        )

    y = model(x)
    expected = group_by_group(plain, layer, x, 2, mask_of)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for gradient in torch.autograd.grad(y.square().mean(), list(logits_of(model).values())):
        assert gradient.any()
    masks = mm.MaskSet.from_model(model)
    with mm.set_mode(model, "threshold"):
        torch.testing.assert_close(model(x), masks.bake(plain)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OUTPUTS_LAST)
def test_n_of_m_needs_outputs_first(name):
    with pytest.raises(ValueError, match=r"granularity: .* needs a weight \[out, in, ...\]"):
        make(name, granularity=("n:m", 2, 4))


def gradients(model, y):
    return torch.autograd.grad(y.float().square().mean(), list(logits_of(model).values()))


@each_layer
def test_compiles(name):
    torch.compiler.reset()
    _, model = make(name)
    x = inputs_of(name)
    y, expected = torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x)
    torch.testing.assert_close(y, expected)
    for got, wanted in zip(gradients(model, y), gradients(model, expected), strict=True):
        torch.testing.assert_close(got, wanted)


class NothingForTheHost(TorchDispatchMode):
    """Over fake tensors, which know no values: no value is copied to the device either."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves((args, kwargs, result))
        devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)}
        assert len(devices) < 2, f"{function} copies between {devices}"
        assert "lift_fresh" not in str(function), "a tensor is made from values of the host"
        return result


def fake_call(model, x, device):
    """The output for fake tensors on a device, and the fake logits."""
    with FakeTensorMode() as mode:
        state = {
            n: torch.empty_like(mode.from_tensor(t), device=device).requires_grad_(t.requires_grad)
            for n, t in (*model.named_parameters(), *model.named_buffers())
        }
        x = torch.empty_like(mode.from_tensor(x), device=device)
        with NothingForTheHost():
            y = functional_call(model, state, (x,))
            if device == "cpu":  # autograd asks for the drivers of any other
                logits = [t for n, t in state.items() if n.endswith("_logits")]
                torch.autograd.grad(y.square().mean(), logits)
    return y


@each_layer
@pytest.mark.parametrize("estimator", ["gumbel_sigmoid", "hard_concrete", "threshold"])
def test_asks_the_host_nothing(name, estimator, monkeypatch):
    """What a CUDA graph can record: no value read, no size by values, no copy to the device.

    Not top_k, which looks for NaN in the logits.
    """
    _, model = make(name, estimator=estimator)
    x = inputs_of(name)
    shape = model(x).shape
    assert fake_call(model, x, "cpu").shape == shape  # the operations, kernels left out
    assert fake_call(model, x, "cuda").device.type == "cuda"
    monkeypatch.setattr(_native, "FORCED_BACKEND", "reference")
    assert fake_call(model, x, "cpu").shape == shape


def test_what_asks_the_host_is_found():
    class Asks(nn.Module):
        def __init__(self, ask):
            super().__init__()
            self.ask = ask
            self.logits = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return x * self.logits.sum() * self.ask(x)

    for ask, kind in [
        (lambda x: x.sum().item(), DataDependentOutputException),
        (lambda x: x[x > 0].sum(), DynamicOutputShapeException),
        (lambda x: torch.tensor(2.0, device=x.device), AssertionError),
    ]:
        for device in ("cpu", "cuda"):
            with pytest.raises(kind):
                fake_call(Asks(ask), torch.ones(3), device)


@each_layer
def test_autocast(name):
    _, model = make(name)
    x = inputs_of(name)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    for got, wanted in zip(gradients(model, y), gradients(model, expected), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.05 * float(wanted.abs().max()))


@each_layer
def test_checkpointing(name):
    _, model = make(name)
    x = inputs_of(name)
    found = gradients(model, checkpoint(model, x, use_reentrant=False))
    for got, wanted in zip(found, gradients(model, model(x)), strict=True):
        assert torch.equal(got, wanted)


@each_layer
def test_functional_transforms(name):
    """Gradients of the logits for several seeds at once."""
    _, model = make(name)
    x = inputs_of(name, 4)

    def loss(logits, seed):
        model.layer.seed = seed
        return functional_call(model, logits, (x,)).square().mean()

    logits = {n: p.detach() for n, p in logits_of(model).items()}
    seeds = torch.arange(3)[:, None]
    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(logits, seeds)
    for n, seed in enumerate(seeds):
        model.layer.seed = seed
        for got, wanted in zip(found.values(), gradients(model, model(x)), strict=True):
            torch.testing.assert_close(got[n], wanted, rtol=1e-4, atol=1e-6)


@each_layer
def test_bakes_and_exports(name):
    plain, model = make(name)
    x = inputs_of(name)
    baked = mm.MaskSet.from_model(model).bake(model).eval()
    assert [type(m) for m in baked.modules()] == [type(m) for m in plain.modules()]
    with mm.set_mode(model, "threshold"):
        torch.testing.assert_close(baked(x), model(x), rtol=1e-4, atol=1e-5)
    program = torch.export.export(baked, (x,))
    calls = {n.target for n in program.graph.nodes if n.op == "call_function"}
    assert {c.namespace for c in calls if isinstance(c, torch._ops.OpOverload)} == {"aten"}
    torch.testing.assert_close(program.module()(x), baked(x))


@each_layer
def test_copies(name):
    _, model = make(name)
    x = inputs_of(name)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert mm.MaskSet.from_model(other) == mm.MaskSet.from_model(model)


@each_layer
def test_state_dicts_both_ways(name):
    plain, model = make(name)
    names = list(logits_of(model))
    fresh = mm.mask_model(Network(LAYERS[name]()), also=[nn.Conv3d])
    missing, unexpected = fresh.load_state_dict(plain.state_dict(), strict=False)
    assert sorted(missing) == sorted(names)
    assert not unexpected
    fresh.load_state_dict(model.state_dict())
    assert mm.MaskSet.from_model(fresh) == mm.MaskSet.from_model(model)
    other = Network(LAYERS[name]())
    missing, unexpected = other.load_state_dict(fresh.state_dict(), strict=False)
    assert not missing
    assert sorted(unexpected) == sorted(names)
    torch.testing.assert_close(other(inputs_of(name)), plain(inputs_of(name)))


@each_layer
def test_learns_and_resumes(name, tmp_path):
    def learn(model, steps, **options):
        return mm.learn_masks(
            model,
            lambda y, batch: y.square().mean(),
            {s: lambda step, generator: (inputs_of(name, 4, step),) for s in "ab"},
            steps,
            lr=0.3,
            progress=False,
            **options,
        )

    def start():
        return make(name, sets=["a", "b"])[1]

    model = start()
    before = {n: p.clone() for n, p in model.named_parameters()}
    whole = learn(model, 4)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == (not n.endswith("_logits")), n
    path = tmp_path / "run"
    learn(start(), 2, checkpoint=path)
    resumed = learn(start(), 4, checkpoint=path, resume=True)
    for s in "ab":
        for n, logits in whole.masks[s].logits.items():
            assert torch.equal(logits, resumed.masks[s].logits[n])


@each_layer
@torch.no_grad()
def test_rows_choose_their_sets(name):
    plain, model = make(name, sets=["a", "b"])
    x = inputs_of(name)
    chosen = mm.select_masks(model.eval())
    with mm.use_sets(chosen, ["a", "b"] * 4):
        y = chosen(x)
    for s, set_name in enumerate("ab"):
        baked = mm.MaskSet.from_model(model, set_name).bake(plain)
        torch.testing.assert_close(y[s::2], baked(x[s::2]), rtol=1e-4, atol=1e-5)


@each_layer
def test_is_restored(name):
    plain, model = make(name)
    restored = mm.unmask_model(model)
    assert [type(m) for m in restored.modules()] == [type(m) for m in plain.modules()]
    assert list(restored.state_dict()) == list(plain.state_dict())
    assert torch.equal(restored.eval()(inputs_of(name)), plain(inputs_of(name)))
