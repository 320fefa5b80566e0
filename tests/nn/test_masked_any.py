import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modmask_kernels as mm
from modmask_kernels import ops
from modmask_kernels.nn import MaskedAny

MODULES = {
    "layer norm": (lambda: nn.LayerNorm(6), (12, 5, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (12, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (12, 6, 3)),
    "batch norm": (lambda: nn.BatchNorm1d(6).eval(), (12, 6, 3)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2), (12, 6, 5, 5)),
    "prelu": (lambda: nn.PReLU(6), (12, 6)),
    "embedding": (lambda: nn.Embedding(10, 6), (12, 7)),
}


class Scale(nn.Module):
    """A module of somebody's own, with a scalar parameter and a second argument."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x, other, *, by=1.0):
        return x * self.factor * by + other + self.shift


def make(name):
    torch.manual_seed(0)
    module, shape = MODULES[name]
    module = module()
    for p in module.parameters():
        nn.init.normal_(p)
    x = torch.randint(10, shape) if name == "embedding" else torch.randn(shape)
    return module, x


def masked(module, **options):
    layer = MaskedAny.from_dense(module, **options)
    with torch.no_grad():
        for name in layer.masked:
            layer.logits_of(name).normal_()
    return layer


@pytest.mark.parametrize("name", MODULES)
class TestModules:
    @pytest.mark.parametrize("mode", ["sample", "soft"])
    def test_groups_see_the_masks_of_their_set_and_sample(self, name, mode):
        module, x = make(name)
        layer = masked(module, sets=2, samples=3, mask_bias=True, tensor_id=4)
        layer.mode = mode
        layer.seed = torch.tensor([11, -12])
        parts = []
        for g, part in enumerate(x.chunk(6)):
            other = copy.deepcopy(module)
            for leaf in layer.masked:
                mask = ops.sample_mask(
                    layer.logits_of(leaf),
                    seed=layer.seed,
                    samples=3,
                    tensor_id=layer.tensor_ids[leaf],
                    hard=mode == "sample",
                )[g % 3, g // 3]
                getattr(other, leaf).data.mul_(mask)
            parts.append(other(part))
        torch.testing.assert_close(layer(x), torch.cat(parts))

    def test_kept_parameters_give_the_plain_module(self, name):
        module, x = make(name)
        expected, names = module(x), list(module.state_dict())
        layer = MaskedAny.from_dense(module, samples=4, mask_bias=True, init=100.0)
        for mode in ("sample", "threshold", "off"):
            layer.mode = mode
            torch.testing.assert_close(layer(x), expected)
        kept = [n for n in layer.state_dict() if not n.endswith("_logits")]
        assert sorted(kept) == sorted(names)

    def test_a_model_is_converted_and_restored(self, name):
        module, x = make(name)
        model = nn.Sequential(module, nn.Identity()).eval()
        expected, state = model(x), copy.deepcopy(model.state_dict())
        mm.mask_model(model, samples=2, init=100.0, also=[type(module)])
        assert type(model[0]) is MaskedAny
        assert "general path" in mm.explain(model)
        with mm.set_mode(model, "sample"):
            torch.testing.assert_close(model(x), expected)
        masks = mm.MaskSet.from_model(model)
        baked = masks.bake(model)
        torch.testing.assert_close(baked(x), expected)
        mm.unmask_model(model)
        assert model[0] is module
        assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())
        assert torch.equal(model(x), expected)

    def test_gradients_reach_the_logits_only(self, name):
        module, x = make(name)
        layer = masked(module, samples=2).train(module.training)
        layer.mode = "sample"
        layer(x).square().sum().backward()
        for leaf in layer.masked:
            assert layer.get_parameter(leaf).grad is None
            assert bool(layer.logits_of(leaf).grad.abs().sum() > 0)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
    def test_copies_behave_as_the_original(self, name, how):
        module, x = make(name)
        layer = masked(module, samples=2)
        layer.mode, layer.seed = "sample", torch.tensor([3])
        if how == "deepcopy":
            other = copy.deepcopy(layer)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(layer))
        else:
            buffer = io.BytesIO()
            torch.save(layer, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        assert torch.equal(layer(x), other(x))
        with torch.no_grad():
            other.get_parameter(other.masked[0]).zero_()
        assert not torch.equal(layer(x), other(x))


def test_dense_copies_have_the_mask_multiplied_in():
    module, x = make("layer norm")
    layer = masked(module)
    dense = layer.to_dense()
    assert type(dense) is nn.LayerNorm
    assert torch.equal(dense.weight, module.weight * (layer.weight_logits[0] > 0))
    assert dense.bias is not module.bias
    layer.mode = "threshold"
    torch.testing.assert_close(layer(x), dense(x))


def test_several_arguments_are_cut_alike():
    torch.manual_seed(0)
    module = Scale()
    layer = masked(module, samples=3)
    layer.seed = torch.tensor([7])
    x, other = torch.randn(6, 4), torch.randn(6, 1)
    parts = []
    for k in range(3):
        draw = {"seed": layer.seed[0], "sample_offset": k}
        factor, shift = (
            ops.sample_mask(layer.logits_of(n)[0], tensor_id=layer.tensor_ids[n], **draw)[0]
            for n in ("factor", "shift")
        )
        rows = slice(2 * k, 2 * k + 2)
        parts.append(x[rows] * (module.factor * factor) * 2.0 + other[rows] + module.shift * shift)
    torch.testing.assert_close(layer(x, other, by=2.0), torch.cat(parts))


def test_time_major_batches():
    module, _ = make("layer norm")
    layer = masked(module, samples=2)
    layer.seed, layer.batch_dim = torch.tensor([5]), 1
    x = torch.randn(3, 8, 6)
    swapped = copy.deepcopy(layer)
    swapped.batch_dim = 0
    torch.testing.assert_close(layer(x), swapped(x.transpose(0, 1)).transpose(0, 1))


def test_a_network_learns_masks_of_its_norms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    mm.mask_model(model, sets=["a", "b"], samples=2, also=[nn.LayerNorm])

    def data(step, generator):
        return torch.randn(8, 6, generator=generator), torch.arange(8) % 3

    def loss(output, batch):
        return F.cross_entropy(output, batch[1])

    result = mm.learn_masks(model, loss, {"a": data, "b": data}, 3, lr=0.5, progress=False)
    assert list(result.masks["a"]) == ["0.weight", "1.weight", "3.weight"]
    for name, p in mm.unmask_model(model).named_parameters():
        assert torch.equal(p, weights[name]), name


def test_compiles_as_one_graph():
    module, x = make("layer norm")
    layer = masked(module, samples=2)
    layer.seed = torch.tensor([5])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_wrong_uses_are_named():
    with pytest.raises(TypeError, match="module: expected a module without children"):
        MaskedAny.from_dense(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="LayerNorm has no parameter to mask"):
        MaskedAny.from_dense(nn.LayerNorm(3, elementwise_affine=False))
    layer = MaskedAny.from_dense(nn.LayerNorm(3), samples=4)
    with pytest.raises(ValueError, match=r"batch of x, shape \[6, 3\], .* 4 samples = 4 equal"):
        layer(torch.randn(6, 3))
    recurrent = MaskedAny.from_dense(nn.LSTM(3, 4, batch_first=True)).eval()
    with pytest.raises(TypeError, match="expected one output tensor of LSTM, got tuple"):
        recurrent(torch.randn(2, 5, 3))
    with pytest.warns(UserWarning, match="it returns several tensors"):
        mm.mask_model(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)), also=[nn.LSTM])
    with pytest.warns(UserWarning, match="it has children"):
        mm.mask_model(
            nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU())), also=[nn.Sequential]
        )
