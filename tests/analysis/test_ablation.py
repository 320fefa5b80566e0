"""Ablation by kind, with paired confidence intervals."""

import math
import statistics

import pytest
import torch
from torch import nn

import modmask_kernels as mm
from modmask_kernels import analysis
from modmask_kernels.files import read_json


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(), nn.ReLU(), nn.Linear(16, 4))


def masks_of(model, density=0.3, names=("0.weight", "3.weight")):
    g = torch.Generator().manual_seed(1)
    return {n: torch.rand(model.get_parameter(n).shape, generator=g) < density for n in names}


class Spy:
    """Scores that say what network was seen: its weights, and one number per example."""

    def __init__(self, model):
        self.x = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
        self.target = model.eval()(self.x).argmax(-1)
        self.seen = []

    def __call__(self, network):
        assert not network.training
        self.seen.append({n: p.detach().clone() for n, p in network.named_parameters()})
        return (network(self.x).argmax(-1) == self.target).float()


def test_kinds_remove_what_they_say(model):
    masks, spy = masks_of(model), Spy(model)
    state = {n: p.clone() for n, p in model.state_dict().items()}
    result = analysis.ablate(model, masks, spy, draws=3)
    assert all(torch.equal(state[n], p) for n, p in model.state_dict().items())
    kinds = ["intact", "zero"] + ["reinit"] * 3 + ["random"] * 3 + ["complement"] * 3
    assert len(spy.seen) == len(kinds)
    for kind, network in zip(kinds, spy.seen, strict=True):
        for name, mask in masks.items():
            weight, now = state[name], network[name]
            count = int(mask.sum())
            if kind == "intact":
                assert torch.equal(now, weight)
            elif kind == "zero":
                assert torch.equal(now, weight.masked_fill(mask, 0))
            elif kind == "reinit":
                assert torch.equal(now[~mask], weight[~mask])
                assert bool((now[mask] != weight[mask]).all())
                assert float(now.abs().max()) <= 1 / math.sqrt(weight.shape[1]) + 1e-6
            else:
                assert int((now == 0).sum()) == count
                assert torch.equal(now[now != 0], weight[now != 0])
                assert kind == "random" or not bool((now[mask] == 0).any())
        assert torch.equal(network["0.bias"], state["0.bias"])
    by_kind = {row["kind"]: row for row in result.rows}
    assert list(by_kind) == ["intact", "zero", "reinit", "random", "complement"]
    assert [by_kind[k]["draws"] for k in ("zero", "random")] == [1, 3]
    removed = sum(int(m.sum()) for m in masks.values()) / (8 * 16 + 16 * 4)
    assert by_kind["random"]["removed"] == pytest.approx(removed)
    assert by_kind["intact"]["mean"] == 1.0
    assert by_kind["intact"]["difference_low"] == by_kind["intact"]["difference_high"] == 0.0
    for kind, row in by_kind.items():
        assert row["mean"] == pytest.approx(float(result.scores["score"][kind].mean()))
        assert row["difference"] == pytest.approx(row["mean"] - 1.0)
        assert row["low"] <= row["mean"] <= row["high"]


def test_draws_follow_from_the_seed(model):
    masks = masks_of(model)
    networks = []
    # the first draw of "random", whatever is drawn before
    for seed, kinds in ((0, ["random"]), (0, ["zero", "complement", "random"]), (1, ["random"])):
        spy = Spy(model)
        analysis.ablate(model, masks, spy, draws=2, seed=seed, kinds=kinds, resamples=10)
        networks.append(spy.seen[-2])
    first, same, other = (n["0.weight"] for n in networks)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    analysis.ablate(model, masks, Spy(model), draws=1, kinds=["reinit"], resamples=5)
    assert torch.equal(state, torch.get_rng_state())


def test_a_mask_set_of_a_masked_model_and_its_complement(model):
    spy = Spy(model)
    masks = mm.MaskSet.from_dict(masks_of(model))
    plain = analysis.ablate(model, masks, spy, kinds=["zero"], resamples=10)
    masked = mm.mask_model(model, init=-1.0)
    assert analysis.ablate(masked, masks, spy, kinds=["zero"], resamples=10).rows == plain.rows
    rest = analysis.ablate(masked, ~masks, spy, kinds=["zero"], resamples=10)
    both = spy.seen[-1]["0.weight"], spy.seen[-3]["0.weight"]
    assert torch.equal(both[0] + both[1], masked.get_parameter("0.weight"))
    assert rest.rows[1]["removed"] == pytest.approx(1 - plain.rows[1]["removed"])


def test_reinitialisation_without_a_reset():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(400) * 3 + 5)

        def forward(self, x):
            return x * self.scale

    model = Scale()
    seen = []

    def evaluate(network):
        seen.append(network.scale.detach().clone())
        return torch.zeros(3)

    mask = {"scale": torch.ones(400, dtype=torch.bool)}
    analysis.ablate(model, mask, evaluate, kinds=["reinit"], draws=1, resamples=5)
    assert float(seen[1].mean()) == pytest.approx(5, abs=0.8)
    assert float(seen[1].std()) == pytest.approx(3, abs=0.6)


def test_several_measures(model):
    def evaluate(network):
        y = network(torch.ones(6, 8) * torch.arange(6)[:, None])
        return {"first": y[:, 0], "second": y[:, 1]}

    result = analysis.ablate(model, masks_of(model), evaluate, kinds=["zero"], resamples=50)
    assert [(row["measure"], row["kind"]) for row in result.rows] == [
        ("first", "intact"),
        ("first", "zero"),
        ("second", "intact"),
        ("second", "zero"),
    ]
    with pytest.raises(ValueError, match="measure: expected one of"):
        result.compare("zero", "intact")
    found = result.compare("zero", "intact", "second")
    row = result.rows[3]
    assert found == (row["difference"], row["difference_low"], row["difference_high"])


# ---- statistics ----


def interval(a, b, **settings):
    options = {"seed": 0, "confidence": 0.95, "resamples": 4000, **settings}
    return analysis.ablation._interval(a.double(), None if b is None else b.double(), options)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    g = torch.Generator().manual_seed(0)
    values = torch.randn(1, 4000, generator=g, dtype=torch.float64)
    low, high = interval(values, None)[1:]
    spread = 1.96 * float(values.std()) / math.sqrt(4000)
    assert low == pytest.approx(float(values.mean()) - spread, abs=0.1 * spread)
    assert high == pytest.approx(float(values.mean()) + spread, abs=0.1 * spread)


def test_pairing_removes_what_the_networks_share():
    g = torch.Generator().manual_seed(0)
    hard = torch.randn(1, 500, generator=g)
    paired = interval(hard + 0.1, hard)
    assert paired == pytest.approx((0.1, 0.1, 0.1), abs=1e-6)
    unpaired = interval(hard + 0.1, torch.randn(1, 500, generator=g))
    assert unpaired.high - unpaired.low > 0.1


def test_draws_widen_the_interval():
    """Draws that differ by more than their examples: the interval is that of the draws."""
    g = torch.Generator().manual_seed(0)
    levels = torch.randn(20, 1, generator=g, dtype=torch.float64)
    low, high = interval(levels.expand(20, 300), None)[1:]
    spread = 1.96 * statistics.pstdev(levels.flatten().tolist()) / math.sqrt(20)
    assert (high - low) / 2 == pytest.approx(spread, rel=0.1)


def test_intervals_cover_the_truth():
    g = torch.Generator().manual_seed(3)
    covered = 0
    for trial in range(100):
        a = (torch.rand(1, 150, generator=g) < 0.7).double()
        b = (torch.rand(1, 150, generator=g) < 0.8).double()
        _, low, high = interval(a, b, resamples=200, seed=trial)
        covered += low <= -0.1 <= high
    assert 88 <= covered <= 99  # 95% of 100, give or take


def test_masks_of_another_network_are_refused(model):
    masks = mm.masks.random_masks(model, 0.3, seed=0)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(ValueError, match=r"the masks are for another model: .* the weights differ"):
        analysis.ablate(model, masks, Spy(model), draws=1)
    assert analysis.ablate(model, masks, Spy(model), draws=1, resamples=5, strict=False).rows


def test_results_are_files(model, tmp_path):
    result = analysis.ablate(model, masks_of(model), Spy(model), draws=2, resamples=20)
    path = tmp_path / "ablation.json"
    result.save(path)
    assert read_json(path) == result.to_dict()
    assert result.settings["method"].startswith("paired percentile bootstrap")
    assert result.compare("zero", "random").low <= result.compare("zero", "random").value


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"kinds": ["zap"]}, ValueError, r"kinds: expected a list of some of \['zero'"),
        ({"kinds": "zero"}, ValueError, "kinds: expected a list"),
        ({"draws": 0}, ValueError, "draws: expected an integer of at least 1, got 0"),
        ({"resamples": 1.5}, ValueError, "resamples: expected an integer"),
        ({"confidence": 95}, ValueError, "confidence: expected a number between 0 and 1, got 95"),
        ({"evaluate": lambda m: 0.5}, TypeError, "a mean alone has no paired interval"),
        ({"evaluate": lambda m: torch.ones(2, 2)}, ValueError, r"shape \[examples\], got \[2, 2\]"),
        ({"evaluate": lambda m: torch.tensor([math.nan])}, ValueError, "not finite"),
        ({"mask": {"0.weight": torch.ones(16, 8).bool()}}, ValueError, "keeps 128 of 128"),
        (
            {"mask": {"0.weight": torch.ones(16, 8)}},
            TypeError,
            r"mask\['0.weight'\]: .* bool tensor",
        ),
        ({"mask": {"none": torch.ones(1).bool()}, "kinds": ["zero"]}, ValueError, "no parameter"),
    ],
    ids=str,
)
def test_wrong_calls_are_named(model, change, kind, message):
    arguments = {"model": model, "mask": masks_of(model), "evaluate": Spy(model), **change}
    with pytest.raises(kind, match=message):
        analysis.ablate(**arguments)


def test_scores_of_changing_size_are_refused(model):
    sizes = iter([4, 5])
    with pytest.raises(ValueError, match=r"expected 4 scores .* got 5 for kind 'zero'"):
        analysis.ablate(model, masks_of(model), lambda m: torch.zeros(next(sizes)))
    names = iter(["a", "b"])
    with pytest.raises(ValueError, match=r"expected the measures \['a'\] .* got \['b'\]"):
        analysis.ablate(model, masks_of(model), lambda m: {next(names): torch.zeros(3)})
