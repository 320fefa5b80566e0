"""Every study beside addmul-fnn: what is its own, and its smoke run with its report."""

# ruff: noqa: RUF001 - the multiplication sign belongs to the text

import itertools
import json
from types import MappingProxyType

import pytest
import torch

from modmask_kernels.experiments import EXPERIMENTS, Function, Run, get
from modmask_kernels.experiments.addmul_fnn import SMOKE as ADDMUL
from modmask_kernels.experiments.addmul_fnn import AddMulFNN
from modmask_kernels.experiments.addmul_lstm import random_halves
from modmask_kernels.experiments.arithmetic import ArithmeticReport
from modmask_kernels.experiments.pair_fnn import copy_weights
from modmask_kernels.experiments.study import bake, load_logits
from modmask_kernels.masks import mask_model
from modmask_kernels.masks.convert import maskable_parameters
from modmask_kernels.models import FeedForward
from modmask_kernels.report import Results
from modmask_kernels.report.html import draw_figures, render_html
from modmask_kernels.tasks import IO_MODES, PAIRS, AddPairsApart

OTHERS = [name for name in EXPERIMENTS if name != "addmul-fnn"]


def execute(path, experiment, **changes):
    settings = experiment.presets["smoke"].replace(**changes)
    run = Run.create(path, experiment, "smoke", settings, [0], threads=1)
    run.execute(progress=False)
    return run


@pytest.mark.parametrize("name", OTHERS)
def test_smoke(tmp_path, name):
    experiment = get(name)
    run = execute(tmp_path / "run", experiment, steps=20, mask_steps=10)
    metrics = json.loads((run.path / "metrics.json").read_text())["per_seed"][0]
    masks = experiment.load_masks(run.folder(0))
    assert set(metrics["accuracy"]) == {"unmasked", *experiment.conditions(masks)}
    for rates in metrics["accuracy"].values():
        assert list(rates) == list(experiment.measured)
        assert all(0 <= rate <= 100 for rate in rates.values())
    assert list(masks["control"]) == [layer["name"] for layer in metrics["layers"]]
    ends = experiment.io(list(masks["control"]))
    hidden = [layer for layer in metrics["layers"] if layer["name"] not in ends]
    assert metrics["hidden"]["size"] == sum(layer["size"] for layer in hidden) > 0
    for test, function in experiment.tests.items():
        assert "seed 0" in function(run), test
    for variant in ("fullmask", "ones"):
        text = experiment.tests["inverse"](run, exclude_io=variant)
        key = f"not_{next(iter(experiment.functions))}_{variant}"
        if key in metrics["accuracy"]:
            line = text.splitlines()[2].split()
            numbers = [float(word) for word in line[-2:]]
            assert numbers == pytest.approx([*metrics["accuracy"][key].values()], abs=0.005)
    run.write_metrics()
    page = experiment.page(Results.load(run.path))
    html = render_html(page, {f.name: {"light": "", "dark": ""} for f in page.figures})
    assert page.command.startswith(f"modmask run {name} --preset smoke")
    assert "agrees with its repetition" in html  # the test above left its record


@pytest.mark.parametrize("name", ["addmul-lstm", "pair-fnn"])
def test_figures_are_drawn(tmp_path, name):
    experiment = get(name)
    run = execute(tmp_path / "run", experiment, steps=4, mask_steps=4)
    page = experiment.page(Results.load(run.path))
    drawings = draw_figures(page)
    assert set(drawings) == {figure.name for figure in page.figures}
    # legible on a phone
    assert all(figure.size[0] <= 4.4 for figure in page.figures)


@pytest.mark.parametrize("mode", IO_MODES)
def test_every_mode_runs_and_learning_order_does_not_matter(tmp_path, mode):
    experiment = get("pair-lstm")
    short = {"steps": 4, "mask_steps": 4, "io": mode, "state": 8}
    joint = execute(tmp_path / "joint", experiment, **short)
    alone = execute(tmp_path / "alone", experiment, learning="separate", **short)
    for key in experiment.masks:
        one, other = (load_logits(run.folder(0), key) for run in (joint, alone))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_groups_of_the_pairs_are_learned_as_if_alone(tmp_path):
    experiment = get("pair-fnn")
    joint = execute(tmp_path / "joint", experiment, steps=10, mask_steps=10)
    alone = execute(tmp_path / "alone", experiment, steps=10, mask_steps=10, learning="separate")
    assert (joint.folder(0).path / "masks-first-second.json").exists()
    assert (alone.folder(0).path / "masks-second.json").exists()
    for key in experiment.masks:
        one, other = (load_logits(run.folder(0), key) for run in (joint, alone))
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["pair-fnn", "pair-lstm"])
def test_every_mask_sees_only_its_pairs(name):
    experiment = get(name)
    found = {
        key: source.pairs for key, source in experiment.sources(experiment.presets["smoke"]).items()
    }
    assert found == {"control": PAIRS, "first": ("first",), "second": ("second",)}


def test_published_settings():
    fnn, lstm, addmul = (
        get(name).presets["paper"] for name in ("pair-fnn", "pair-lstm", "addmul-lstm")
    )
    assert (fnn.digits, fnn.size, fnn.penalty, fnn.copy_weights) == (2, "big", 4e-4, False)
    assert f"{fnn.alpha:.1e}" == "3.1e-06"
    for settings in (lstm, addmul):
        assert (settings.digits, settings.state, settings.layers) == (2, 256, 2)
        assert (settings.steps, settings.mask_steps, settings.penalty) == (20_000, 20_000, 1e-4)
    assert lstm.io == "together"


def test_published_networks():
    model = get("addmul-lstm").build(get("addmul-lstm").presets["paper"])
    sizes = [parameter.numel() for parameter in maskable_parameters(model).values()]
    assert sizes == [43_008, 262_144, 262_144, 262_144, 5_120]
    experiment = get("pair-lstm")
    for mode, sizes in (("together", (80, 40)), ("same_io", (40, 20)), ("same_input", (40, 40))):
        assert experiment.features(experiment.presets["paper"].replace(io=mode)) == sizes
    assert get("pair-fnn").features(get("pair-fnn").presets["paper"]) == (80, 40)


def test_layers_of_an_lstm():
    experiment = get("addmul-lstm")
    model = experiment.build(experiment.presets["smoke"].replace(layers=2))
    names = list(maskable_parameters(model))
    titles = [experiment.layer_title(name, names) for name in names]
    assert titles == ["input 1", "recurrent 1", "input 2", "recurrent 2", "output"]
    assert experiment.io(names) == ("lstm.weight_ih_l0", "output.weight")
    assert get("pair-lstm").halves(names)["early"] == names[:2]
    mask_model(model, ["a"], 4)  # all of them can be masked


@pytest.mark.parametrize("count", [3, 5])
def test_random_halves(count):
    names = [str(n) for n in range(count)]
    halves = random_halves(names)
    assert len(halves) == min(5, len(list(itertools.combinations(names, -(-count // 2)))))
    assert len({tuple(half) for half in halves.values()}) == len(halves)
    assert all(len(half) == -(-count // 2) for half in halves.values())
    assert random_halves(names) == halves


# --- copied weights, and perfect modules ----------------------------------------------------------


def test_copied_weights_serve_both_pairs(tmp_path):
    task = AddPairsApart(1)
    model = FeedForward(task.in_features, (16, 16), task.out_features)
    second = [p[len(p) // 2 :].clone() for p in model.layers[-1].parameters()]
    columns = model.layers[0].weight[:, task.width :].clone()
    copy_weights(model)
    answers = [
        task.answers(model(inputs), pair)
        for inputs, _, pair in (task.all_rows(name) for name in PAIRS)
    ]
    assert torch.equal(answers[0], answers[1])
    # those of pair 2 are what they were
    assert torch.equal(model.layers[0].weight[:, task.width :], columns)
    for old, parameter in zip(second, model.layers[-1].parameters(), strict=True):
        assert torch.equal(parameter[len(parameter) // 2 :], old)

    experiment = get("pair-fnn")
    run = execute(tmp_path / "run", experiment, steps=10, mask_steps=4, copy_weights=True)
    clean = json.loads(run.folder(0).metrics.read_text())["accuracy"]["unmasked"]
    assert clean["first"] == clean["second"]
    page = experiment.page(Results.load(run.path))
    assert any("positive control" in finding.headline for finding in page.findings)
    assert "--copy-weights" in page.command


def perfect_modules():
    """A network that adds two pairs in two blocks, and the mask of each block."""
    task = AddPairsApart(1)
    model = FeedForward(task.in_features, (200, 200), task.out_features)
    masks = {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.layers[0].bias.fill_(-1)
        for slot, name in enumerate(PAIRS):
            before = [layer.weight != 0 for layer in model.layers]
            for a, b in itertools.product(range(10), repeat=2):
                unit = 100 * slot + 10 * a + b
                model.layers[0].weight[unit, [20 * slot + a, 20 * slot + 10 + b]] = 1
                model.layers[1].weight[unit, unit] = 1
                model.layers[2].weight[10 * slot + (a + b) % 10, unit] = 1
            masks[name] = {
                f"layers.{n}.weight": (layer.weight != 0) & ~old
                for n, (layer, old) in enumerate(zip(model.layers, before, strict=True))
            }
    control = {name: mask | masks["second"][name] for name, mask in masks["first"].items()}
    return model, {"control": control, **masks}


def test_perfect_modules():
    """Spec test: the inverse of one block leaves the other block untouched, whatever the ends."""
    experiment = get("pair-fnn")
    settings = experiment.presets["quick"].replace(hidden=(200, 200))
    model, masks = perfect_modules()
    found = {
        key: experiment.measure(bake(model, mask), settings)["accuracy"]
        for key, mask in experiment.conditions(masks).items()
    }
    assert experiment.measure(model, settings) == {
        "accuracy": {"first": 100.0, "second": 100.0},
        "both_percent": 100.0,
    }
    assert found["control"] == found["early"] == found["late"] == {"first": 100, "second": 100}
    for own, other in (PAIRS, PAIRS[::-1]):
        assert found[own] == {own: 100, other: 10}
        for variant in ("", "_fullmask", "_ones"):
            assert found[f"not_{own}{variant}"] == {own: 10, other: 100}


# --- the foundation: any number of functions ------------------------------------------------------


class ThreeReport(ArithmeticReport):
    pass


class Three(AddMulFNN):
    """Addition, multiplication, and both once more, as a study of three functions."""

    name = "three"
    functions = MappingProxyType(
        {
            "add": Function("+", "addition", "additions", "first"),
            "mul": Function("×", "multiplication", "multiplications", "second"),
            "both": Function("±", "either", "questions", "fourth"),
        }
    )
    report_type = ThreeReport

    def sources(self, settings):
        sources = super().sources(settings)
        return {**sources, "both": sources["control"]}

    def measure(self, model, settings):
        rates = super().measure(model, settings)["accuracy"]
        return {"accuracy": {**rates, "both": sum(rates.values()) / 2}}


def test_a_study_of_three_functions(tmp_path, monkeypatch):
    experiment = Three()
    monkeypatch.setitem(EXPERIMENTS, "three", experiment)
    settings = ADDMUL.replace(steps=10, mask_steps=10, stability=True)
    run = Run.create(tmp_path / "run", experiment, "smoke", settings, [0, 1], threads=1)
    run.execute(progress=False)
    metrics = json.loads((run.path / "metrics.json").read_text())["per_seed"][0]
    assert list(metrics["hidden"]["pairs"]) == ["add & mul", "add & both", "mul & both"]
    masks = experiment.load_masks(run.folder(0))
    kept = {key: torch.cat([m.flatten() for m in mask.values()]) for key, mask in masks.items()}
    shared = kept["add"] & (kept["mul"] | kept["both"])
    expected = 100 * int(shared.sum()) / max(int(kept["add"].sum()), 1)
    assert metrics["all"]["shared_percent"]["add"] == pytest.approx(expected)
    page = experiment.page(Results.load(run.path))
    html = render_html(page, {f.name: {"light": "", "dark": ""} for f in page.figures})
    assert "Overlap of the × and the ± mask" in html
    assert "all operations" in html
