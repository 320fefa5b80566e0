"""The inverse-mask test and the half-mask test; spec tests (v) and (vi)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modmask_kernels import analysis
from modmask_kernels.masks import MaskSet, mask_model, set_mode, use_set
from modmask_kernels.models import FeedForward


@pytest.fixture
def model():
    return FeedForward(6, (10, 8), 4, generator=torch.Generator().manual_seed(0))


def random_masks(model, density=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(p.shape, generator=generator) < density
        for name, p in model.named_parameters()
        if name.endswith("weight")
    }


@pytest.mark.parametrize("logit", [1.0, -1.0])
def test_constant_logits_are_the_whole_and_the_empty_network(model, logit):
    """Spec test (v): all logits +1, the unmasked network; all -1, zeroed masked tensors."""
    x = torch.randn(12, 6)
    plain = FeedForward(6, (10, 8), 4)
    plain.load_state_dict(model.state_dict())
    if logit < 0:
        with torch.no_grad():
            for layer in plain.layers:
                layer.weight.zero_()
    expected = plain(x)

    masked = mask_model(model, init=logit)
    use_set(masked, 0)
    set_mode(masked, "threshold")
    torch.testing.assert_close(masked(x), expected)
    baked = MaskSet.from_model(masked).bake(masked)
    assert torch.equal(baked(x), expected)


def test_a_logit_of_zero_removes_its_weight(model):
    """One rule everywhere: keep iff logit > 0."""
    masked = mask_model(model, init=0.0)
    assert not any(mask.any() for mask in MaskSet.from_model(masked).values())


def test_inverse_of_inverse_and_union(model):
    """Spec test (vi)."""
    masks = random_masks(model)
    inverse = analysis.inverse_mask(masks)
    for name, mask in masks.items():
        assert torch.equal(analysis.inverse_mask(inverse)[name], mask)
        assert bool((mask | inverse[name]).all())
        assert not bool((mask & inverse[name]).any())
    same = MaskSet.from_dict(masks)
    assert ~~same == same
    assert all(bool(mask.all()) for mask in (same | ~same).values())
    assert ~same == MaskSet.from_dict(inverse)


def test_inverse_variants(model):
    masks, control = random_masks(model), random_masks(model, seed=1)
    names = list(masks)
    io = (names[0], names[-1])
    full = analysis.inverse_mask(masks, exclude_io="fullmask", io=io, control=control)
    ones = analysis.inverse_mask(masks, exclude_io="ones", io=io, control=control)
    for name in io:
        assert torch.equal(full[name], control[name])
        assert bool(ones[name].all())
    for result in (full, ones):
        assert torch.equal(result[names[1]], ~masks[names[1]])


def test_inverse_errors(model):
    masks = random_masks(model)
    with pytest.raises(ValueError, match="exclude_io must be"):
        analysis.inverse_mask(masks, exclude_io="some")
    with pytest.raises(ValueError, match="io names no masked parameter: x"):
        analysis.inverse_mask(masks, exclude_io="ones", io=["x"])
    with pytest.raises(ValueError, match="control"):
        analysis.inverse_mask(masks, exclude_io="fullmask", io=list(masks)[:1])


def test_perfect_modules():
    """Two functions in separate blocks: the inverse of one leaves the other untouched."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False))
    block = torch.block_diag(torch.ones(3, 2), torch.ones(3, 2)).bool()
    with torch.no_grad():
        net[0].weight.mul_(block)
        net[2].weight.mul_(block.T)
    first = torch.zeros(6, 4, dtype=torch.bool)
    first[:3, :2] = True
    module = {"0.weight": first, "2.weight": first.T.contiguous()}
    x = torch.randn(20, 4)
    whole = net(x)

    def evaluate(model):
        y = model(x)
        return {
            "first": float((y[:, :2] == whole[:, :2]).all()),
            "second": float((y[:, 2:] == whole[:, 2:]).all()),
        }

    result = analysis.inverse_mask_test(net, module, evaluate)
    assert result.masked == {"first": 1.0, "second": 0.0}
    assert result.inverse == {"first": 0.0, "second": 1.0}
    # with inputs and outputs left to the control, the hidden rest of this net is whole
    ones = {name: torch.ones_like(mask) for name, mask in module.items()}
    kept = analysis.inverse_mask_test(
        net, module, evaluate, exclude_io="fullmask", io=list(module), control=ones
    )
    assert kept.inverse == {"first": 1.0, "second": 1.0}


@pytest.mark.parametrize(("layers", "early"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3)])
def test_early_half_is_the_first_half_rounded_up(layers, early):
    names = [f"layer{i}" for i in range(layers)]
    assert analysis.early_half(names) == names[:early]


def test_early_half_by_number():
    names = list("abcde")
    assert analysis.early_half(names, 2) == ["a", "b"]
    for wrong in (0, 5, -1):
        with pytest.raises(ValueError, match="early"):
            analysis.early_half(names, wrong)


def test_half_masks(model):
    masks = random_masks(model)
    first, second, third = masks
    early, late = analysis.half_masks(masks)
    assert torch.equal(early[first], masks[first])
    assert torch.equal(early[second], masks[second])
    assert bool(early[third].all())
    assert bool(late[first].all())
    assert bool(late[second].all())
    assert torch.equal(late[third], masks[third])


def test_half_mask_test(model):
    masks = random_masks(model)
    x = torch.randn(9, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def by_hand(kept):
        y = x
        for i, layer in enumerate(model.layers):
            y = F.linear(y, layer.weight * kept[f"layers.{i}.weight"], layer.bias)
            y = y.relu() if i < 2 else y
        return float(y.detach().sum())

    # the order of the mapping must not matter
    shuffled = {name: masks[name] for name in reversed(masks)}
    result = analysis.half_mask_test(
        model, shuffled, lambda net: {"sum": float(net(x).detach().sum())}
    )
    early, late = analysis.half_masks(masks)
    assert result.early == ["layers.0.weight", "layers.1.weight"]
    assert result.late == ["layers.2.weight"]
    assert result.whole["sum"] == pytest.approx(by_hand(masks))
    assert result.early_masked["sum"] == pytest.approx(by_hand(early))
    assert result.late_masked["sum"] == pytest.approx(by_hand(late))
    assert result.early_drop["sum"] == result.whole["sum"] - result.early_masked["sum"]
    assert result.late_drop["sum"] == result.whole["sum"] - result.late_masked["sum"]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_half_masks_of_wrapped_and_tied_networks():
    first, last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    middle = nn.Linear(4, 4, bias=False)
    middle.weight = first.weight
    model = nn.DataParallel(nn.Sequential(middle, last))
    masks = {name: torch.ones(4, 4, dtype=torch.bool) for name in ("0.weight", "1.weight")}
    result = analysis.half_mask_test(model, masks, lambda net: {"zero": 0.0})
    assert (result.early, result.late) == (["0.weight"], ["1.weight"])
