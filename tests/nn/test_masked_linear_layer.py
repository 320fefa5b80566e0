import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modmask_kernels import ops
from modmask_kernels.nn import MaskedLinear


def layer_with_random_logits(**options):
    torch.manual_seed(0)
    layer = MaskedLinear(7, 5, **options)
    with torch.no_grad():
        layer.weight_logits.normal_()
        if layer.bias_logits is not None:
            layer.bias_logits.normal_()
    return layer


def test_the_constructor_is_that_of_linear():
    torch.manual_seed(3)
    dense = nn.Linear(7, 5)
    torch.manual_seed(3)
    layer = MaskedLinear(7, 5)
    assert torch.equal(layer.weight, dense.weight)
    assert torch.equal(layer.bias, dense.bias)
    assert layer.weight_logits.shape == (1, 5, 7)
    assert bool((layer.weight_logits == 2.0).all())
    assert MaskedLinear(7, 5, False).bias is None
    assert MaskedLinear(7, 5, True, "cpu", torch.bfloat16).weight.dtype == torch.bfloat16


def test_state_dict_keeps_the_old_names():
    layer = MaskedLinear(7, 5, sets=3, mask_bias=True)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "weight": (5, 7),
        "bias": (5,),
        "weight_logits": (3, 5, 7),
        "bias_logits": (3, 5),
    }
    dense = nn.Linear(7, 5)
    missing, unexpected = layer.load_state_dict(dense.state_dict(), strict=False)
    assert missing == ["weight_logits", "bias_logits"]
    assert unexpected == []
    assert torch.equal(layer.weight, dense.weight)
    layer.seed = torch.tensor([1, 2, 3])
    assert "seed" not in layer.state_dict()


@pytest.mark.parametrize("mode", ["sample", "soft"])
@pytest.mark.parametrize("mask_bias", [False, True])
def test_groups_see_the_mask_of_their_set_and_sample(mode, mask_bias):
    layer = layer_with_random_logits(sets=2, samples=3, mask_bias=mask_bias, tensor_id=4)
    layer.mode = mode
    layer.seed = torch.tensor([11, -12])
    x = torch.randn(12, 7)
    options = {"seed": layer.seed, "samples": 3, "hard": mode == "sample"}
    masks = ops.sample_mask(layer.weight_logits, tensor_id=4, **options)
    parts = []
    for g, part in enumerate(x.chunk(6)):
        bias = layer.bias
        if mask_bias:
            bias = bias * ops.sample_mask(layer.bias_logits, tensor_id=5, **options)[g % 3, g // 3]
        parts.append(F.linear(part, layer.weight * masks[g % 3, g // 3], bias))
    torch.testing.assert_close(layer(x), torch.cat(parts))


def test_time_major_input_is_cut_along_the_batch():
    layer = layer_with_random_logits(sets=2, samples=2)
    layer.seed = torch.tensor([1, 2])
    x = torch.randn(3, 8, 7)
    layer.batch_dim = 1
    time_major = layer(x)
    layer.batch_dim = 0
    batch_major = layer(x.transpose(0, 1).contiguous())
    torch.testing.assert_close(time_major, batch_major.transpose(0, 1))


def test_samples_of_one_batch_equal_single_sample_passes():
    layer = layer_with_random_logits(samples=4)
    layer.seed = torch.tensor([5])
    x = torch.randn(8, 7)
    whole = layer(x)
    for k, part in enumerate(x.chunk(4)):
        single = ops.masked_linear(
            part,
            layer.weight,
            layer.weight_logits,
            layer.bias,
            seed=layer.seed,
            sample_offset=k,
        )
        torch.testing.assert_close(whole.chunk(4)[k], single)
    layer.samples, layer.sample_offset = 2, 2  # the second of two data-parallel ranks
    torch.testing.assert_close(layer(x[4:]), whole[4:])


def test_the_mode_follows_training_unless_set():
    layer = layer_with_random_logits(samples=2)
    layer.seed = torch.tensor([9])
    x = torch.randn(4, 7)
    threshold = F.linear(x, layer.weight * (layer.weight_logits[0] > 0), layer.bias)
    torch.testing.assert_close(layer.eval()(x), threshold)
    assert not torch.allclose(layer.train()(x), threshold)
    sampled = layer(x)
    layer.eval()
    layer.mode = "sample"
    assert torch.equal(layer(x), sampled)
    layer.mode = "off"
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.mode = None
    torch.testing.assert_close(layer(x), threshold)
    with pytest.raises(ValueError, match=r"mode: expected 'sample'.*got 'sampled'"):
        layer.mode = "sampled"
    layer.eval_mode = "off"
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with pytest.raises(ValueError, match=r"eval_mode: expected 'sample'.*got 'sof'"):
        layer.eval_mode = "sof"


@pytest.mark.parametrize("mask_bias", [False, True])
def test_positive_logits_are_the_plain_layer_negative_ones_zero(mask_bias):
    layer = MaskedLinear(7, 5, mask_bias=mask_bias).eval()
    x = torch.randn(6, 7)
    logits = [layer.weight_logits] + ([layer.bias_logits] if mask_bias else [])
    for values in logits:
        nn.init.constant_(values, 1.0)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    for values in logits:
        nn.init.constant_(values, -1.0)
    expected = torch.zeros(6, 5) if mask_bias else layer.bias.expand(6, 5)
    torch.testing.assert_close(layer(x), expected)
    nn.init.constant_(layer.weight_logits, 0.0)  # the rule is > 0
    torch.testing.assert_close(layer(x), expected)


def test_a_layer_draws_its_seeds_from_the_default_generator():
    layer = layer_with_random_logits(sets=2, samples=2)
    x = torch.randn(8, 7)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


def test_a_part_of_the_sets_may_be_active():
    layer = layer_with_random_logits(sets=3, samples=2)
    layer.seed = torch.tensor([1, 2, 3])
    x = torch.randn(12, 7)
    everything = layer(x)
    layer.active_sets = (1, 2)
    torch.testing.assert_close(layer(x[4:]), everything[4:])
    layer.active_sets = (2, 1)
    torch.testing.assert_close(layer(x[8:]), everything[8:])
    layer(x[8:]).sum().backward()
    assert not layer.weight_logits.grad[:2].any()
    assert layer.weight_logits.grad[2].any()
    layer.active_sets = None
    assert torch.equal(layer(x), everything)
    layer.seed = torch.tensor(7)  # one for all sets
    everything = layer(x)
    layer.active_sets = (1, 2)
    torch.testing.assert_close(layer(x[4:]), everything[4:])
    for wrong in [(0, 4), (-1, 1), (3, 1), (0, 0), (0.5, 1), (1,), 2]:
        with pytest.raises(ValueError, match=r"active_sets: expected .* within 3 sets"):
            layer.active_sets = wrong


def test_from_dense_shares_and_freezes_and_to_dense_multiplies_in():
    dense = nn.Linear(7, 5)
    layer = MaskedLinear.from_dense(dense, sets=["a", "b"], samples=2, mask_bias=True)
    assert layer.weight is dense.weight
    assert layer.bias is dense.bias
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    with torch.no_grad():
        layer.weight_logits.normal_()
        layer.bias_logits.normal_()
    plain = layer.to_dense("b")
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight, dense.weight * (layer.weight_logits[1] > 0))
    assert torch.equal(plain.bias, dense.bias * (layer.bias_logits[1] > 0))
    layer.active_sets = (1, 1)
    x = torch.randn(4, 7)
    torch.testing.assert_close(layer.eval()(x), plain(x))
    without_bias = MaskedLinear.from_dense(nn.Linear(7, 5, bias=False), mask_bias=True)
    assert without_bias.bias_logits is None
    assert without_bias.to_dense().bias is None
    with pytest.raises(ValueError, match=r"set: expected one of \['a', 'b'\]"):
        layer.to_dense("c")
    with pytest.raises(TypeError, match=r"linear: expected a torch.nn.Linear, got ReLU"):
        MaskedLinear.from_dense(nn.ReLU())


def test_logits_stay_in_float32():
    layer = MaskedLinear(7, 5, mask_bias=True)
    layer.weight_logits.grad = torch.ones_like(layer.weight_logits)
    for convert in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()):
        convert(layer)
        assert layer.weight.dtype != torch.float32
        assert layer.weight_logits.dtype == torch.float32
        assert layer.weight_logits.grad.dtype == torch.float32
        assert layer.bias_logits.dtype == torch.float32
    assert nn.Sequential(layer).bfloat16()[0].weight_logits.dtype == torch.float32


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_behave_as_the_original(how):
    layer = layer_with_random_logits(sets=["a", "b"], samples=2, mask_bias=True, tensor_id=3)
    layer.mode, layer.batch_dim = "soft", 1
    layer.seed = torch.tensor([4, 5])
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    x = torch.randn(3, 4, 7)
    assert torch.equal(other(x), layer(x))
    assert other.set_names == ("a", "b")
    assert other.weight_logits is not layer.weight_logits


def test_meta_device():
    layer = MaskedLinear(7, 5, device="meta", sets=2, samples=2, mask_bias=True)
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(8, 7, device="meta")).shape == (8, 5)
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    assert bool((real.weight_logits == 2.0).all())
    assert real(torch.randn(8, 7)).shape == (8, 5)


def test_functional_call_uses_the_given_logits():
    layer = layer_with_random_logits().eval()
    x = torch.randn(4, 7)
    ones = {"weight_logits": torch.ones_like(layer.weight_logits)}
    y = torch.func.functional_call(layer, ones, (x,))
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias))
    logits = layer.weight_logits.detach().clone().requires_grad_()
    layer.mode = "sample"
    torch.func.functional_call(layer, {"weight_logits": logits}, (x,)).sum().backward()
    assert logits.grad is not None
    assert layer.weight_logits.grad is None


def test_gradients_go_to_logits_and_not_to_frozen_weights():
    layer = MaskedLinear.from_dense(nn.Linear(7, 5), samples=2)
    layer.seed = torch.tensor([3])
    x = torch.randn(6, 7)
    target = torch.randn(6, 5)
    ((layer(x) - target) ** 2).sum().backward()
    assert layer.weight.grad is None
    # dL/dl = w * dL/dw' * s (1 - s), summed over the samples (spec 1.2)
    expected = torch.zeros(5, 7)
    for k in range(2):
        draw = {"seed": layer.seed, "sample_offset": k}
        hard = ops.sample_mask(layer.weight_logits.detach(), **draw)[0, 0]
        soft = ops.sample_mask(layer.weight_logits.detach(), hard=False, **draw)[0, 0]
        part, wanted = x.chunk(2)[k], target.chunk(2)[k]
        error = 2 * (F.linear(part, layer.weight * hard, layer.bias) - wanted)
        expected += layer.weight.detach() * (error.T @ part).detach() * soft * (1 - soft)
    torch.testing.assert_close(layer.weight_logits.grad[0], expected, rtol=1e-4, atol=1e-5)


def test_trainable_weights_get_gradients():
    layer = MaskedLinear(7, 5, samples=2)
    layer(torch.randn(4, 7)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None


@pytest.mark.parametrize("mode", ["sample", "soft", "threshold", "off"])
def test_compiles_as_one_graph_with_a_dynamic_batch(mode):
    torch.compiler.reset()
    layer = layer_with_random_logits(sets=2, samples=2)
    layer.mode = mode
    layer.seed = torch.tensor([1, 2])
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 8, 20):
        x = torch.randn(batch, 7, requires_grad=True)
        y, expected = compiled(x), layer(x)
        torch.testing.assert_close(y, expected)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        (wanted,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(grad, wanted)


def test_compiles_without_a_seed():
    torch.compiler.reset()
    layer = layer_with_random_logits(samples=2)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(6, 7)
    assert not torch.equal(compiled(x), compiled(x))
    compiled(x).sum().backward()
    assert layer.weight_logits.grad is not None


def test_an_empty_batch_behaves_as_in_linear():
    layer = layer_with_random_logits(sets=2, samples=2)
    y = layer(torch.randn(0, 7))
    assert y.shape == (0, 5)
    y.sum().backward()
    assert not layer.weight_logits.grad.any()


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="sets: expected at least 1, got 0"):
        MaskedLinear(2, 2, sets=0)
    with pytest.raises(ValueError, match="sets: expected distinct names"):
        MaskedLinear(2, 2, sets=["a", "a"])
    with pytest.raises(ValueError, match="sets: expected a number or a list of names, got the str"):
        MaskedLinear(2, 2, sets="add")
    with pytest.raises(ValueError, match="samples: expected an integer of at least 1, got 0"):
        MaskedLinear(2, 2, samples=0)
    with pytest.raises(ValueError, match="tau: expected a positive number, got 0"):
        MaskedLinear(2, 2, tau=0)
    with pytest.raises(ValueError, match="mask_bias: expected False for a layer without bias"):
        MaskedLinear(2, 2, bias=False, mask_bias=True)


def test_inputs_that_do_not_fit_are_rejected_with_the_numbers():
    layer = MaskedLinear(7, 5, sets=2, samples=4)
    with pytest.raises(ValueError, match=r"12.*2 sets \* 4 samples = 8"):
        layer(torch.randn(12, 7))
    with pytest.raises(ValueError, match="7"):
        layer(torch.randn(8, 6))
    with pytest.raises(TypeError, match="dtype"):
        layer(torch.randn(8, 7, dtype=torch.float64))


def test_repr_shows_the_mask_options():
    text = repr(MaskedLinear(7, 5, sets=["a", "b"], samples=4, tau=0.5, mask_bias=True))
    for part in ("in_features=7", "['a', 'b']", "samples=4", "tau=0.5", "mask_bias=True"):
        assert part in text
