"""The addition / multiplication study on the smoke preset: stages, results, resuming."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modmask_kernels import analysis
from modmask_kernels.experiments import Run, get, study
from modmask_kernels.experiments.addmul import SETS, accuracy, answer_counts, coinciding
from modmask_kernels.experiments.addmul_fnn import SMOKE, AddMulSettings
from modmask_kernels.experiments.study import load_logits, overlap
from modmask_kernels.masks import MaskSet, weight_hash
from modmask_kernels.tasks import OPERATIONS, AddMul

EXPERIMENT = get("addmul-fnn")


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def start(path, settings=SMOKE, seeds=(0,)):
    return Run.create(path, EXPERIMENT, "smoke", settings, list(seeds), threads=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished smoke run with two seeds."""
    run = start(tmp_path_factory.mktemp("runs") / "whole", seeds=(0, 1))
    run.execute(progress=False)
    return run


@pytest.fixture(scope="module")
def metrics(run):
    return json.loads((run.path / "metrics.json").read_text())


def contents(path):
    """Everything of a results folder that must not differ between two equal runs."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "provenance.json"
    }


# --- data of the stages ---------------------------------------------------------------------------


def test_sources_hold_only_their_own_operation():
    """Spec test (viii): the published code once gave every mask the data of the last one."""
    generator = torch.Generator().manual_seed(0)
    seen = {}
    for name, source in EXPERIMENT.sources(AddMulSettings(digits=2)).items():
        inputs = torch.cat([source(step, generator)[0] for step in range(20)])
        seen[name] = {OPERATIONS[i] for i in inputs[:, -2:].argmax(1).tolist()}
    assert seen == {"control": {"add", "mul"}, "add": {"add"}, "mul": {"mul"}}


@pytest.mark.parametrize("learning", ["joint", "separate"])
def test_every_stage_sees_only_its_own_subset(tmp_path, monkeypatch, learning):
    """Spec test (viii), through the whole run: what reaches the network, by stage."""
    seen = {}

    def watch(function, stage):
        def watched(output, batch):
            names = {OPERATIONS[i] for i in batch[0][:, -2:].argmax(1).tolist()}
            seen.setdefault(stage(), set()).update(names)
            return function(output, batch)

        return watched

    loss = EXPERIMENT.loss(SMOKE)
    learn = study.learn_masks

    def watching(model, losses, data, *arguments, **options):
        # the loss is called set by set, in the order of the sets
        calls = {"n": 0}
        names = list(data)

        def stage():
            calls["n"] += 1
            return names[(calls["n"] - 1) % len(names)]

        return learn(model, dict.fromkeys(losses, watch(loss, stage)), data, *arguments, **options)

    monkeypatch.setattr(EXPERIMENT, "loss", lambda _: watch(loss, lambda: "network"))
    monkeypatch.setattr(study, "learn_masks", watching)
    start(tmp_path / "run", SMOKE.replace(steps=20, mask_steps=20, learning=learning)).execute(
        progress=False
    )
    both = {"add", "mul"}
    assert seen == {"network": both, "control": both, "add": {"add"}, "mul": {"mul"}}


# --- stages ---------------------------------------------------------------------------------------


def test_the_weights_are_frozen(run):
    """Spec test (iv): the masks know the hash of the weights that they were learned for."""
    for seed in run.seeds:
        folder = run.folder(seed)
        model = EXPERIMENT.load(run.settings, folder)
        for key in SETS:
            mask = MaskSet.load(folder.mask(key))
            assert mask.metadata["weight_hash"] == weight_hash(model)
            mask.check(model)
            assert list(mask) == [f"layers.{n}.weight" for n in range(3)]


def test_logits_are_exported(run):
    folder = run.folder(0)
    masks = EXPERIMENT.load_masks(folder)
    for key in SETS:
        for name, logits in load_logits(folder, key).items():
            assert logits.dtype == torch.float32
            assert torch.equal(logits > 0, masks[key][name])


def test_joint_and_separate_learning_agree(tmp_path, run):
    """Each mask has data, noise, clipping and optimiser of its own."""
    other = start(tmp_path / "separate", SMOKE.replace(learning="separate"))
    other.execute(progress=False)
    for key in SETS:
        joint, alone = load_logits(run.folder(0), key), load_logits(other.folder(0), key)
        for name in joint:
            assert torch.equal(joint[name], alone[name])


def test_seeds_differ(run):
    a, b = (load_file(run.folder(seed).weights) for seed in run.seeds)
    assert not torch.equal(a["layers.0.weight"], b["layers.0.weight"])


# --- results --------------------------------------------------------------------------------------


class Answers(torch.nn.Module):
    """A network that answers every question with one fixed rule."""

    def __init__(self, task, rule):
        super().__init__()
        self.task, self.rule = task, rule

    def forward(self, inputs):
        n = self.task.n_digits
        digits = inputs[:, : 20 * n].reshape(-1, 2, n, 10).argmax(-1)
        first, second = (digits * 10 ** torch.arange(n)).sum(-1).unbind(1)
        number = self.rule(first, second, inputs[:, -2:].argmax(-1)) % self.task.modulus
        places = number.unsqueeze(-1) // 10 ** torch.arange(n) % 10
        return torch.nn.functional.one_hot(places, 10).flatten(1).float()


@pytest.mark.parametrize("n_digits", [1, 2])
def test_exact_evaluation(n_digits):
    task = AddMul(n_digits)
    equal = round(coinciding(task) * task.pairs / 100)
    numbers = range(10**n_digits)
    assert equal == sum((a + b - a * b) % 10**n_digits == 0 for a in numbers for b in numbers)

    perfect = Answers(task, lambda a, b, op: torch.where(op == 0, a + b, a * b))
    assert answer_counts(perfect, task).tolist() == [
        [task.pairs, equal],
        [equal, task.pairs],
        [0, 0],
    ]
    sums = Answers(task, lambda a, b, op: a + b)
    counts = answer_counts(sums, task)
    assert counts.tolist() == [[task.pairs] * 2, [equal] * 2, [0, 0]]
    assert accuracy(counts, task) == {
        "add": 100.0,
        "mul": pytest.approx(coinciding(task)),
    }


def test_the_control_gets_both_operations():
    assert SETS == {"control": ("add", "mul"), "add": ("add",), "mul": ("mul",)}


def test_metrics_of_a_seed(run, metrics):
    for seed, result in zip(run.seeds, metrics["per_seed"], strict=True):
        assert result["seed"] == seed
        masks = EXPERIMENT.load_masks(run.folder(seed))
        assert set(result["accuracy"]) == {"unmasked", *EXPERIMENT.conditions(masks)}
        for key, confusion in result["confusion"].items():
            counts, percent = torch.tensor(confusion["counts"]), confusion["percent"]
            assert counts.shape == (3, 2)
            for i, op in enumerate(OPERATIONS):
                assert result["accuracy"][key][op] == pytest.approx(float(counts[i, i]))
                assert sum(percent[i]) == pytest.approx(100)
        half = result["half_mask"]
        assert half["early"]["layers"] == ["layers.0.weight", "layers.1.weight"]
        assert half["late"]["layers"] == ["layers.2.weight"]
        for op in OPERATIONS:
            a = result["accuracy"]
            assert half["early"]["drop"][op] == a["control"][op] - a["early"][op]
            assert half["late"]["drop"][op] == a["control"][op] - a["late"][op]
        for key in SETS:
            logits = load_logits(run.folder(seed), key)
            assert result["undecided_percent"][key] == 100 * analysis.undecided(logits)
            assert len(result["histogram"][key]) == 500
            assert sum(result["histogram"][key]) == result["all"]["size"]
            last = result["learning"][key][-1]
            assert last["step"] == SMOKE.mask_steps
            assert last["kept_percent"] == pytest.approx(result["all"]["kept_percent"][key])


def test_overlap_by_hand():
    def masks(*rows):
        texts = ["".join(rows), rows[0], rows[1]]
        return {
            f"layers.{i}.weight": torch.tensor([[c == "1" for c in text]])
            for i, text in enumerate(texts)
        }

    control = masks("1111", "1111")
    add = masks("1100", "1010")
    mul = masks("1000", "0011")
    result = overlap(
        {"control": control, "add": add, "mul": mul},
        ["layers.0.weight", "layers.2.weight"],
        EXPERIMENT.layer_title,
    )
    both = [part["pairs"]["add & mul"] for part in (*result["layers"], result["hidden"])]
    layers = result["layers"]
    assert [layer["title"] for layer in layers] == ["input", "hidden 1", "output"]
    assert layers[1]["kept"] == {"control": 4, "add": 2, "mul": 1}
    assert both[1]["iou"] == 1 / 2
    assert both[1]["io_min"] == 1.0
    assert both[1]["chance_iou"] == pytest.approx(analysis.chance_iou(0.5, 0.25))
    assert both[1]["chance_io_min"] == pytest.approx(0.5)
    assert both[2]["iou"] == 1 / 3
    assert both[3] == both[1]
    total = result["all"]
    assert total["kept"] == {"control": 16, "add": 8, "mul": 6}
    assert total["shared_percent"]["add"] == 100 * (2 + 1 + 1) / 8
    assert total["shared_percent"]["mul"] == pytest.approx(100 * (2 + 1 + 1) / 6)
    assert total["remaining_percent"]["add"] == 50.0
    assert total["pairs"]["add & mul"]["kept_ratio"] == 6 / 8


def test_summary_has_mean_and_sample_deviation(metrics):
    values = [result["hidden"]["pairs"]["add & mul"]["iou"] for result in metrics["per_seed"]]
    entry = metrics["summary"]["hidden"]["pairs"]["add & mul"]["iou"]
    assert entry["values"] == values
    assert entry["mean"] == pytest.approx(sum(values) / 2)
    assert entry["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


def test_checkpoints_are_gone_when_a_seed_is_finished(run):
    assert not (run.folder(0).path / "checkpoints").exists()
    assert not list(run.path.rglob(".*"))


# --- resuming -------------------------------------------------------------------------------------


def kill_in(monkeypatch, where):
    """Make the next run die at a given place, once."""
    done = {"killed": False}

    def dying(module, name, when=lambda *a, **k: True):
        original = getattr(module, name)

        def function(*arguments, **options):
            if not done["killed"] and when(*arguments, **options):
                done["killed"] = True
                raise Killed
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, function)

    def at_step(cls, wanted, operations):
        original = cls.__call__

        def call(self, step, generator):
            if not done["killed"] and step == wanted and self.operations == operations:
                done["killed"] = True
                raise Killed
            return original(self, step, generator)

        monkeypatch.setattr(cls, "__call__", call)

    if where == "network":
        at_step(AddMul, 130, ("add", "mul"))
    elif where == "before the masks":
        dying(study, "mask_model")
    elif where == "masks":
        at_step(AddMul, 40, ("mul",))
    elif where == "between mask files":
        dying(MaskSet, "save", lambda self, path: Path(path).stem == "add")
    elif where == "after the mask files":
        dying(study, "write_json", lambda path, value: path.stem == "masks")
    elif where == "evaluation":
        dying(study, "overlap")
    else:
        raise AssertionError(where)
    return done


@pytest.mark.parametrize(
    "where",
    [
        "network",
        "before the masks",
        "masks",
        "between mask files",
        "after the mask files",
        "evaluation",
    ],
)
def test_resumes_bit_identical(tmp_path, monkeypatch, run, where):
    path = tmp_path / "killed"
    with monkeypatch.context() as patch:
        done = kill_in(patch, where)
        with pytest.raises(Killed):
            start(path, seeds=(0, 1)).execute(progress=False)
        assert done["killed"]
    assert not Run.open(path).finished
    Run.open(path).execute(progress=False)
    whole, resumed = contents(run.path), contents(path)
    assert whole.keys() == resumed.keys()
    for name, data in whole.items():
        assert data == resumed[name], name


def test_a_process_that_is_killed_resumes_bit_identical(tmp_path):
    """A real SIGKILL in the middle of learning the masks."""
    settings = SMOKE.replace(mask_steps=400)
    whole = start(tmp_path / "whole", settings)
    whole.execute(progress=False)

    path = tmp_path / "killed"
    words = "run addmul-fnn --preset smoke --mask-steps 400 --threads 1 --quiet --out"
    root = Path(study.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "modmask_kernels", *words.split(), str(path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.DEVNULL,
    )
    checkpoint = path / "seed-0" / "checkpoints" / "masks.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not (path / "seed-0" / "metrics.json").exists()

    Run.open(path).execute(progress=False)
    assert contents(whole.path) == contents(path)


def test_a_finished_run_is_left_alone(run, monkeypatch):
    before = contents(run.path)
    monkeypatch.setattr(EXPERIMENT, "run_seed", None)
    Run.open(run.path).execute(progress=False)
    assert contents(run.path) == before


def test_more_seeds_keep_the_first(tmp_path, run):
    path = tmp_path / "one"
    start(path, seeds=(0,)).execute(progress=False)
    first = contents(path / "seed-0")
    longer = Run.open(path)
    longer.extend([0, 1])
    longer.execute(progress=False)
    assert contents(path / "seed-0") == first
    assert contents(path) == contents(run.path)


def test_the_number_of_threads_is_that_of_the_run(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        EXPERIMENT, "run_seed", lambda *a: seen.append(torch.get_num_threads()) or {"seed": 0}
    )
    before = torch.get_num_threads()
    Run.create(tmp_path / "r", EXPERIMENT, "smoke", SMOKE, [0], before + 1).execute()
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


# --- results folders ------------------------------------------------------------------------------


def test_provenance(run):
    record = json.loads((run.folder(0).path / "provenance.json").read_text())
    assert record["torch"] == torch.__version__
    assert record["sessions"] == 1
    assert set(record["seconds"]) == {"network", "masks", "evaluation"}


def test_continuing_elsewhere_is_said(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_in(patch, "masks")
        with pytest.raises(Killed):
            start(path).execute(progress=False)
    capsys.readouterr()
    file = path / "seed-0" / "provenance.json"
    file.write_text(file.read_text().replace(torch.__version__, "1.0"))
    Run.open(path).execute(progress=False)
    assert f"bits may differ from those of an unbroken run: torch 1.0 to {torch.__version__}" in (
        capsys.readouterr().err
    )
    record = json.loads(file.read_text())
    assert (record["sessions"], record["torch"]) == (2, torch.__version__)


def test_a_folder_is_never_overwritten(tmp_path, run):
    with pytest.raises(FileExistsError, match="--resume"):
        start(run.path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="another folder"):
        start(tmp_path)


def test_a_device_that_is_absent_leaves_no_folder(tmp_path):
    for device in ("gpu", "xpu:7"):
        with pytest.raises(ValueError, match=f"setting device: '{device}' cannot be used here: "):
            start(tmp_path / "new", SMOKE.replace(device=device))
        assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_one_process_per_folder(tmp_path, monkeypatch):
    first = start(tmp_path / "new")

    def second(settings, seed, folder):
        with pytest.raises(ValueError, match="seed-0 is being run by another process"):
            Run.open(first.path).execute(progress=False)
        raise KeyboardInterrupt

    monkeypatch.setattr(first.experiment, "run_seed", second)
    with pytest.raises(KeyboardInterrupt):
        first.execute(progress=False)


def test_bad_folders(tmp_path, run):
    with pytest.raises(FileNotFoundError, match=r"no settings\.json"):
        Run.open(tmp_path)
    record = json.loads((run.path / "settings.json").read_text())

    def write(value):
        (tmp_path / "settings.json").write_text(value)

    write("{")
    with pytest.raises(ValueError, match="not a JSON file"):
        Run.open(tmp_path)
    write(json.dumps({**record, "format": 99}))
    with pytest.raises(ValueError, match="format 2"):
        Run.open(tmp_path)
    write(json.dumps({k: v for k, v in record.items() if k != "seeds"}))
    with pytest.raises(ValueError, match=r"damaged: .*seeds"):
        Run.open(tmp_path)
    write(json.dumps({**record, "settings": {**record["settings"], "speed": 1}}))
    with pytest.raises(ValueError, match="unknown setting speed"):
        Run.open(tmp_path)


def test_unfinished_runs_have_no_metrics(tmp_path):
    run = start(tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="seed 0 has no results"):
        run.write_metrics()


# --- tests on finished runs -----------------------------------------------------------------------


def test_inverse_test(run, metrics):
    text = EXPERIMENT.tests["inverse"](run)
    line = next(line for line in text.splitlines() if line.startswith("seed 1, mul"))
    numbers = [float(word) for word in line.split()[3:]]
    a = metrics["per_seed"][1]["accuracy"]
    expected = [a[key][op] for key in ("mul", "not_mul") for op in OPERATIONS]
    assert numbers == [pytest.approx(x, abs=0.005) for x in expected]
    assert EXPERIMENT.tests["inverse"](run, exclude_io="ones") != text
    assert EXPERIMENT.tests["inverse"](run, exclude_io="fullmask") != text


def test_half_mask_test(run, metrics):
    text = EXPERIMENT.tests["half-mask"](run)
    assert text.startswith("early: layers 1, 2 of 3\nlate: layers 3 of 3\n")
    line = next(line for line in text.splitlines() if line.startswith("seed 0, add"))
    a = metrics["per_seed"][0]["accuracy"]
    numbers = [float(word) for word in line.split()[3:6]]
    expected = [a[key]["add"] for key in ("control", "early", "late")]
    assert numbers == [pytest.approx(x, abs=0.005) for x in expected]
    assert EXPERIMENT.tests["half-mask"](run, early=1).startswith("early: layers 1 of 3\n")
    with pytest.raises(ValueError, match="early"):
        EXPERIMENT.tests["half-mask"](run, early=3)


def test_histogram_test(run, metrics):
    lines = EXPERIMENT.tests["histogram"](run, bins=4).splitlines()
    counts = [int(word) for word in lines[1].split()[-4:]]
    assert sum(counts) == metrics["per_seed"][0]["all"]["size"]


def test_stability(tmp_path):
    run = start(tmp_path / "run", SMOKE.replace(stability=True))
    run.execute(progress=False)
    result = json.loads((run.path / "metrics.json").read_text())
    first = EXPERIMENT.load_masks(run.folder(0))
    again = EXPERIMENT.load_masks(run.folder(0), "-again")
    stability = result["per_seed"][0]["tests"]["stability"]
    for key in SETS:
        assert stability["all"][key] == analysis.stability(first[key], again[key])
        assert not all(torch.equal(first[key][name], again[key][name]) for name in first[key])
    assert "control, again" in EXPERIMENT.tests["stability"](run)


def test_stability_of_a_finished_run(tmp_path):
    run = start(tmp_path / "run", SMOKE.replace(steps=20, mask_steps=20))
    run.execute(progress=False)
    assert json.loads((run.path / "metrics.json").read_text())["per_seed"][0]["tests"] == {}
    EXPERIMENT.tests["stability"](run)
    assert "stability" in json.loads((run.path / "metrics.json").read_text())["summary"]["tests"]


def test_tests_need_a_finished_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="--resume"):
        EXPERIMENT.tests["inverse"](start(tmp_path / "run"))
