import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import modmask_kernels as mm
from modmask_kernels import ops
from modmask_kernels.nn import (
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedHuggingFaceConv1D,
)

LAYERS = {
    "1d": (
        lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1, groups=2),
        MaskedConvTranspose1d,
        (12, 6, 5),
    ),
    "2d": (
        lambda: nn.ConvTranspose2d(6, 4, (3, 2), stride=2, padding=1, dilation=(1, 2)),
        MaskedConvTranspose2d,
        (12, 6, 5, 4),
    ),
    "2d without bias": (
        lambda: nn.ConvTranspose2d(3, 4, 4, bias=False),
        MaskedConvTranspose2d,
        (12, 3, 2, 2),
    ),
    "Conv1D": (lambda: Conv1D(4, 6), MaskedHuggingFaceConv1D, (12, 7, 6)),
}


def make(name, **options):
    torch.manual_seed(0)
    kind, masked, shape = LAYERS[name]
    plain = kind()
    for p in plain.parameters():
        nn.init.normal_(p)
    layer = masked.from_dense(copy.deepcopy(plain), **options)
    with torch.no_grad():
        for leaf in layer.masked:
            layer.logits_of(leaf).normal_()
    return plain, layer, torch.randn(shape)


@pytest.mark.parametrize("name", LAYERS)
class TestLayers:
    @pytest.mark.parametrize("mode", ["sample", "soft"])
    def test_groups_see_the_masks_of_their_set_and_sample(self, name, mode):
        plain, layer, x = make(name, sets=2, samples=3, mask_bias=True, tensor_id=4)
        layer.mode, layer.seed = mode, torch.tensor([11, -12])
        parts = []
        for g, part in enumerate(x.chunk(6)):
            masked = {
                leaf: getattr(plain, leaf)
                * ops.sample_mask(
                    layer.logits_of(leaf),
                    seed=layer.seed,
                    samples=3,
                    tensor_id=layer.tensor_ids[leaf],
                    hard=mode == "sample",
                )[g % 3, g // 3]
                for leaf in layer.masked
            }
            parts.append(functional_call(plain, masked, (part,)))
        torch.testing.assert_close(layer(x), torch.cat(parts))

    def test_a_model_is_converted_learned_baked_and_restored(self, name):
        plain, _, x = make(name)
        model = nn.Sequential(plain, nn.Identity())
        state = copy.deepcopy(model.state_dict())
        expected = model(x)
        mm.mask_model(model, samples=2, init=100.0, bias=True)
        assert type(model[0]) is LAYERS[name][1]
        assert "general path" not in mm.explain(model)
        for mode in ("sample", "threshold", "off"):
            with mm.set_mode(model, mode):
                torch.testing.assert_close(model(x), expected)
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p)
        mm.learn_masks(
            model,
            lambda y, batch: y.square().mean(),
            lambda step, generator: (x,),
            2,
            lr=0.3,
            progress=False,
        )
        masks = mm.MaskSet.from_model(model)
        with mm.set_mode(model, "threshold"):
            found = model(x)
        baked = masks.bake(model)
        assert type(baked[0]) is type(plain)
        torch.testing.assert_close(baked(x), found)
        torch.testing.assert_close(model[0].to_dense()(x), found)
        other = pickle.loads(pickle.dumps(copy.deepcopy(model[0])))
        other.mode = "threshold"
        torch.testing.assert_close(other(x), found)
        mm.unmask_model(model)
        assert model[0] is plain
        assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())

    @pytest.mark.parametrize(
        ("kind", "outputs", "inputs"),
        [("row", 1, 0), ("column", 0, 1), (("head", 2), 2, 0), (("block", 2, 3), 2, 3)],
        ids=str,
    )
    def test_granularity_speaks_of_outputs_and_inputs(self, name, kind, outputs, inputs):
        plain, layer, x = make(name, samples=2, granularity=kind)
        n, m = plain.weight.shape[:2]
        logits = layer.logits_of("weight")
        expected = (1, n // (inputs or n), m // (outputs or m))
        assert logits.shape[:3] == expected
        layer.mode = "threshold"
        torch.testing.assert_close(layer(x), layer.to_dense()(x))
        model = mm.mask_model(nn.Sequential(plain), granularity=kind)
        assert model[0].weight_logits.shape == logits.shape

    def test_compiles_as_one_graph(self, name):
        _, layer, x = make(name, samples=2)
        layer.seed = torch.tensor([5])
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


def test_the_output_size_may_be_given():
    plain, layer, x = make("2d")
    layer.mode = "off"
    size = [12, 4, 10, 8]
    assert torch.equal(layer(x, size[2:]), plain(x, size[2:]))
    with torch.no_grad():
        layer.weight_logits.fill_(9.0)
    layer.mode = "threshold"
    torch.testing.assert_close(layer(x, size), plain(x, size))


def test_constructors():
    torch.manual_seed(2)
    plain = nn.ConvTranspose2d(3, 4, 2, 2, 1, 1)
    torch.manual_seed(2)
    layer = MaskedConvTranspose2d(3, 4, 2, 2, 1, 1, samples=2, mask_bias=True)
    assert torch.equal(layer.weight, plain.weight)
    assert "samples=2" in repr(layer)
    made = MaskedHuggingFaceConv1D(4, 6)
    assert made.weight.shape == (6, 4)
    assert type(mm.unmask_model(made)) is Conv1D
    assert "nf=4, nx=6" in repr(made)


def test_wrong_uses_are_named():
    with pytest.raises(ValueError, match="mask_bias: expected False"):
        MaskedConvTranspose1d(2, 2, 1, bias=False, mask_bias=True)
    with pytest.raises(TypeError, match="conv: expected a transformers"):
        MaskedHuggingFaceConv1D.from_dense(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"granularity: \('n:m', 1, 2\) needs a weight \[out, in"):
        MaskedConvTranspose1d(2, 2, 1, granularity=("n:m", 1, 2))
    with pytest.raises(ValueError, match=r"x must have shape \[batch, ..., 6\]"):
        MaskedHuggingFaceConv1D(4, 6)(torch.randn(2, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["row", "column", ("block", 2, 3)])
def test_coarse_masks_of_weights_stored_by_inputs(granularity, dtype):
    """As a Linear layer with the weight turned; explain says what runs on the reference."""
    torch.manual_seed(0)
    turned, straight = Conv1D(8, 6), nn.Linear(6, 8)
    with torch.no_grad():
        straight.weight.copy_(turned.weight.normal_().t())
        straight.bias.copy_(turned.bias)
    x = torch.randn(8, 6).to(dtype)
    outputs = []
    for plain in (turned, straight):
        layer = mm.mask_model(plain.to(dtype), samples=2, granularity=granularity, init=0.0)
        layer.seed = torch.tensor([5])
        layer.tensor_ids["weight"] = 1
        outputs.append(layer.train()(x))
        line = mm.explain(layer)
        if mm.explain(x).startswith("cpu"):
            fused, scaled = plain is straight, granularity in ("row", "column")
            if scaled and dtype == torch.float32:
                assert line == "(root): cpu (a plain product, scaled by the masks)"
            else:
                assert line.startswith(f"(root): {'cpu' if fused else 'reference (no fused'}")
    if granularity in ("row", "column"):  # the logits of blocks have another order
        rounding = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(*outputs, rtol=rounding, atol=rounding)
