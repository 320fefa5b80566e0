import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modmask_kernels as mm
from modmask_kernels import ops
from modmask_kernels.nn import MaskedConv1d, MaskedConv2d

KINDS = {1: (nn.Conv1d, MaskedConv1d, F.conv1d), 2: (nn.Conv2d, MaskedConv2d, F.conv2d)}
OPTIONS = [
    {},
    {"padding": 1, "stride": 2},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"groups": 3},
    {"bias": False},
    {"padding": 2, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect", "stride": 2},
    {"padding": "same", "padding_mode": "replicate"},
]


def inputs(dims, batch=12):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, 6, *(9, 8)[:dims], generator=g)


def layer_with_random_logits(dims, **options):
    torch.manual_seed(0)
    layer = KINDS[dims][1](6, 9, 3, **options)
    with torch.no_grad():
        layer.weight_logits.normal_()
        if layer.bias_logits is not None:
            layer.bias_logits.normal_()
    return layer


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
class TestOptions:
    def test_kept_weights_give_the_plain_layer(self, dims, options):
        plain, masked, _ = KINDS[dims]
        torch.manual_seed(3)
        dense = plain(6, 9, 3, **options)
        torch.manual_seed(3)
        layer = masked(6, 9, 3, **options, samples=2)
        assert torch.equal(layer.weight, dense.weight)
        x = inputs(dims)
        for mode in ("off", "threshold", "sample"):
            layer.mode = mode
            layer.weight_logits.data.fill_(100.0)
            torch.testing.assert_close(layer(x), dense(x))
        layer.mode = "off"
        assert torch.equal(layer(x), dense(x))

    def test_groups_see_the_mask_of_their_set_and_sample(self, dims, options):
        plain = KINDS[dims][0]
        layer = layer_with_random_logits(dims, sets=2, samples=3, tensor_id=4, **options)
        layer.seed = torch.tensor([11, -12])
        x = inputs(dims)
        masks = ops.sample_mask(layer.weight_logits, tensor_id=4, seed=layer.seed, samples=3)
        dense, parts = plain(6, 9, 3, **options), []
        for g, part in enumerate(x.chunk(6)):
            dense.weight.data = layer.weight * masks[g % 3, g // 3]
            if layer.bias is not None:
                dense.bias.data = layer.bias.data
            parts.append(dense(part))
        torch.testing.assert_close(layer(x), torch.cat(parts))

    def test_dense_and_back(self, dims, options):
        plain, masked, _ = KINDS[dims]
        dense = plain(6, 9, 3, **options)
        layer = masked.from_dense(dense, sets=["a", "b"])
        assert layer.weight is dense.weight
        assert not layer.weight.requires_grad
        with torch.no_grad():
            layer.weight_logits.normal_()
        back = layer.to_dense("b")
        assert type(back) is plain
        assert repr(back) == repr(dense)
        assert torch.equal(back.weight, dense.weight * (layer.weight_logits[1] > 0))
        layer.mode, layer.active_sets = "threshold", (1, 1)
        torch.testing.assert_close(layer(inputs(dims)), back(inputs(dims)))

    def test_a_model_is_converted_and_restored(self, dims, options):
        plain, masked, _ = KINDS[dims]
        model = nn.Sequential(plain(6, 9, 3, **options), nn.ReLU())
        x = inputs(dims)
        expected, names = model(x), list(model.state_dict())
        mm.mask_model(model, samples=2, init=100.0)
        assert isinstance(model[0], masked)
        torch.testing.assert_close(model(x), expected)
        mm.unmask_model(model)
        assert list(model.state_dict()) == names
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dims", [1, 2])
class TestLayer:
    def test_gradients_reach_logits_only(self, dims):
        layer = KINDS[dims][1].from_dense(KINDS[dims][0](6, 9, 3), mask_bias=True, samples=2)
        layer.train()
        layer(inputs(dims)).square().sum().backward()
        assert layer.weight.grad is None
        assert bool(layer.weight_logits.grad.abs().sum() > 0)
        assert bool(layer.bias_logits.grad.abs().sum() > 0)

    def test_state_dict_keeps_the_old_names(self, dims):
        layer = layer_with_random_logits(dims, sets=2, mask_bias=True)
        assert list(layer.state_dict()) == ["weight", "bias", "weight_logits", "bias_logits"]
        dense = KINDS[dims][0](6, 9, 3)
        missing, unexpected = layer.load_state_dict(dense.state_dict(), strict=False)
        assert (missing, unexpected) == (["weight_logits", "bias_logits"], [])

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
    def test_copies_behave_as_the_original(self, dims, how):
        layer = layer_with_random_logits(dims, sets=2, samples=2, padding=1)
        layer.seed = torch.tensor([3, 4])
        if how == "deepcopy":
            other = copy.deepcopy(layer)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(layer))
        else:
            buffer = io.BytesIO()
            torch.save(layer, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        x = inputs(dims)
        assert torch.equal(layer(x), other(x))

    def test_logits_stay_in_float32(self, dims):
        layer = layer_with_random_logits(dims, samples=2).to(torch.bfloat16)
        assert layer.weight.dtype == torch.bfloat16
        assert layer.weight_logits.dtype == torch.float32
        assert layer(inputs(dims).bfloat16()).dtype == torch.bfloat16

    def test_an_unbatched_input(self, dims):
        layer = layer_with_random_logits(dims).eval()
        x = inputs(dims, 1)
        assert torch.equal(layer(x[0]), layer(x)[0])

    def test_compiles_as_one_graph(self, dims):
        layer = layer_with_random_logits(dims, samples=2, padding=1)
        layer.seed = torch.tensor([5])
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(inputs(dims)), layer(inputs(dims)))

    def test_meta_device(self, dims):
        layer = KINDS[dims][1](6, 9, 3, device="meta", samples=2)
        assert layer(inputs(dims).to("meta")).shape == (12, 9, *(7, 6)[:dims])

    def test_repr_shows_the_options(self, dims):
        layer = KINDS[dims][1](6, 9, 3, padding=1, groups=3, sets=["a"], samples=4, mask_bias=True)
        text = repr(layer)
        for part in ("6, 9", "padding=(1", "groups=3", "sets=['a']", "samples=4", "mask_bias=True"):
            assert part in text

    def test_wrong_options_are_named(self, dims):
        masked = KINDS[dims][1]
        with pytest.raises(ValueError, match="mask_bias"):
            masked(6, 9, 3, bias=False, mask_bias=True)
        with pytest.raises(ValueError, match="padding_mode"):
            masked(6, 9, 3, padding_mode="zero")
        with pytest.raises(ValueError, match="samples"):
            masked(6, 9, 3, samples=0)
        with pytest.raises(TypeError, match=r"conv: expected a torch\.nn\.Conv"):
            masked.from_dense(nn.Linear(3, 4))
        with pytest.raises(ValueError, match=r"batch of x, 12 .* 5 samples = 5"):
            masked(6, 9, 3, samples=5)(inputs(dims))


def test_a_network_learns_masks_and_keeps_its_weights():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(54, 3),
    )
    weights = {name: p.clone() for name, p in model.named_parameters()}
    mm.mask_model(model, sets=["left", "right"], samples=2)

    def data(step, generator):
        return torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8) % 3

    def loss(output, batch):
        return F.cross_entropy(output, batch[1])

    result = mm.learn_masks(
        model, loss, {"left": data, "right": data}, steps=4, lr=0.5, penalty=1e-3, progress=False
    )
    assert set(result.masks) == {"left", "right"}
    for name, p in mm.unmask_model(model).named_parameters():
        assert torch.equal(p, weights[name]), name
    mask = result.masks["left"]
    assert mask["3.weight"].shape == (6, 6, 3, 3)
    baked = mask.bake(model)
    assert torch.equal(baked[3].weight, model[3].weight * mask["3.weight"])
    assert all(
        type(m) in (nn.Conv2d, nn.Linear)
        for m in baked
        if hasattr(m, "weight") and m.weight.dim() > 1
    )
