import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modmask_kernels
from modmask_kernels.masks import learn_masks, mask_model, masked_layers
from modmask_kernels.masks.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(modmask_kernels.__file__).parents[1]


def masked(seed=0, bias=False):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    return mask_model(model, sets=["control", "add", "mul"], samples=2, bias=bias)


class Stateful:
    """Data with state of its own: a row is never seen twice in an epoch."""

    def __init__(self, rows=24):
        self.rows = rows
        self.order = torch.arange(0)
        self.fail_at = None

    def __call__(self, step, generator):
        if step == self.fail_at:
            raise OSError("connection lost")
        if len(self.order) < 8:
            self.order = torch.randperm(self.rows, generator=generator)
        chosen, self.order = self.order[:8], self.order[8:]
        x = torch.linspace(-1, 1, self.rows * 6).view(self.rows, 6)[chosen]
        return x, chosen % 4

    def state_dict(self):
        return {"order": self.order, "note": ("plain", 1, 2.5, None, True)}

    def load_state_dict(self, state):
        self.order = state["order"]


def noisy(step, generator):
    x = torch.randn(8, 6, generator=generator)
    return x + 0.1 * torch.randn(8, 6), (x[:, 0] > 0).long()  # the default generator too


def data():
    return {"control": Stateful(), "mul": Stateful(40), "add": noisy}


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


def learn(model, sources, steps=20, **options):
    return learn_masks(
        model, loss, sources, steps, penalty=1e-2, lr=0.1, callback_every=3, progress=False,
        **options,
    )  # fmt: skip


def without_times(metrics):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in metrics]


def assert_same_result(a, b):
    assert a.step == b.step
    assert without_times(a.metrics) == without_times(b.metrics)
    assert a.masks == b.masks
    for name, masks in a.masks.items():
        for key in masks:
            assert torch.equal(masks.logits[key], b.masks[name].logits[key])


@pytest.mark.parametrize("sets", [None, ["control", "mul"], ["add"]])
@pytest.mark.parametrize("broken", [4, 5, 13, 19])
def test_a_broken_run_resumes_to_the_same_bits(tmp_path, sets, broken):
    path = tmp_path / "run.pt"
    torch.manual_seed(1)
    unbroken = learn(masked(), data(), sets=sets)

    def stop(step, generator):
        if step == broken:
            raise OSError("connection lost")
        return noisy(step, generator)

    failing = data()
    for source in failing.values():
        if isinstance(source, Stateful):
            source.fail_at = broken
    failing["add"] = stop
    torch.manual_seed(1)
    with pytest.raises(OSError, match="connection lost"):
        learn(masked(), failing, sets=sets, checkpoint=path, checkpoint_every=5)
    assert path.exists() == (broken >= 5)
    torch.manual_seed(1 if broken < 5 else 99)
    resumed = learn(masked(), data(), sets=sets, checkpoint=path, checkpoint_every=5, resume=True)
    assert_same_result(resumed, unbroken)
    # a run that is finished is not run again
    again = learn(masked(), data(), sets=sets, checkpoint=path, resume=True)
    assert_same_result(again, unbroken)
    assert again.time >= resumed.time * 0.5


def test_a_finished_run_can_be_extended(tmp_path):
    path = tmp_path / "run.pt"
    torch.manual_seed(1)
    whole = learn(masked(), data())
    torch.manual_seed(1)
    learn(masked(), data(), steps=12, checkpoint=path)
    longer = learn(masked(), data(), checkpoint=path, resume=True)
    for name, masks in longer.masks.items():
        assert all(torch.equal(masks.logits[n], whole.masks[name].logits[n]) for n in masks)
    with pytest.raises(ValueError, match="steps: the checkpoint has 20 steps, more than 5"):
        learn(masked(), data(), steps=5, checkpoint=path, resume=True)


def test_the_union_clip_resumes_too(tmp_path):
    path = tmp_path / "run.pt"
    options = {"sets": ["control"], "union_clip": True, "grad_clip": 0.01}
    unbroken = learn(masked(bias=True), data(), **options)
    sources = data()
    sources["control"].fail_at = 14
    with pytest.raises(OSError, match="connection lost"):
        learn(masked(bias=True), sources, checkpoint=path, checkpoint_every=6, **options)
    resumed = learn(masked(bias=True), data(), checkpoint=path, resume=True, **options)
    assert_same_result(resumed, unbroken)


SCRIPT = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
from test_learn_resume import *
folder, part = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)

def killed(step, generator):
    if part == "kill in a step" and step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return noisy(step, generator)

if part == "kill in a checkpoint":
    fsync, count = os.fsync, 0
    def fsync_or_die(handle):
        global count
        count += 1
        if count == 5:  # each checkpoint syncs the file and its folder: in the third one
            os.ftruncate(handle, 1000)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)
    os.fsync = fsync_or_die

torch.manual_seed(1)
path = folder / "run.pt"
if part.startswith("kill"):
    learn(masked(), {{**data(), "add": killed}}, checkpoint=path, checkpoint_every=4)
else:
    unbroken = learn(masked(), data())
    step = load_checkpoint(path)["step"]
    torch.manual_seed(77)
    resumed = learn(masked(), data(), checkpoint=path, checkpoint_every=4, resume=True)
    assert_same_result(resumed, unbroken)
    print("same bits from step", step)
"""


@pytest.mark.parametrize(("part", "step"), [("kill in a step", 12), ("kill in a checkpoint", 8)])
def test_a_killed_process_loses_nothing(tmp_path, part, step):
    def run(name):
        return subprocess.run(
            [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent)), tmp_path, name],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    first = run(part)
    assert first.returncode == -9, first.stderr
    second = run("compare")
    assert second.returncode == 0, second.stderr
    assert second.stdout.strip() == f"same bits from step {step}"
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("seed", {"seed": 5}),
        ("learning", {"grad_clip": 0.5}),
        ("learning", {"mode": "soft"}),
        ("sets", {"sets": ["control"]}),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, name, options):
    path = tmp_path / "run.pt"
    learn(masked(), data(), steps=3, checkpoint=path)
    model = masked()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"resume: the checkpoint is of another run: its {name}"):
        learn(model, data(), checkpoint=path, resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert model.training


def test_a_checkpoint_of_another_noise_or_number_of_processes_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    for first in (False, True):
        model, other = masked(), masked()
        for layer in masked_layers(model if first else other).values():
            layer.antithetic = True
        learn(model, data(), steps=3, checkpoint=path)
        with pytest.raises(ValueError, match="another run: its antithetic"):
            learn(other, data(), checkpoint=path, resume=True)
    state = load_checkpoint(path)
    state["identity"]["processes"] = 2
    save_checkpoint(path, state)
    with pytest.raises(ValueError, match="another run: its processes is 2, now None"):
        learn(model, data(), checkpoint=path, resume=True)


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    learn(masked(), data(), steps=3, checkpoint=path)
    with pytest.raises(ValueError, match="its weight_hash"):
        learn(masked(seed=3), data(), checkpoint=path, resume=True)
    with pytest.raises(ValueError, match="its tensors"):
        learn(masked(bias=True), data(), checkpoint=path, resume=True)


def test_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    learn(masked(), data(), steps=3, checkpoint=path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"run.pt: not a readable checkpoint"):
            learn(masked(), data(), checkpoint=path, resume=True)
    torch.save({"step": 3}, path)
    with pytest.raises(ValueError, match=r"run.pt: not a checkpoint of learn_masks"):
        learn(masked(), data(), checkpoint=path, resume=True)
    save_checkpoint(path, {"format_version": 9})
    with pytest.raises(ValueError, match="format version 9, expected 1"):
        learn(masked(), data(), checkpoint=path, resume=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "absent")


DAMAGES = {
    "sets": lambda s: s.pop("sets"),
    "mul": lambda s: s["sets"].pop("mul"),
    "logits": lambda s: s["sets"]["mul"].pop("logits"),
    "shorter": lambda s: s["sets"]["mul"]["exp_avgs"].pop(),
    "a tensor of wrong shape": lambda s: s["sets"]["add"].update(count=torch.zeros(2)),
    "or type": lambda s: s["sets"]["add"].update(generator=torch.zeros(2)),
    "shape": lambda s: s["sets"]["add"]["logits"][0].resize_(1, 2),
    "rng": lambda s: s.pop("rng"),
    "step, time or metrics": lambda s: s.update(step="3"),
    "its sets is None": lambda s: s.update(identity=7),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_inconsistent_checkpoints_change_nothing(tmp_path, message):
    path = tmp_path / "run.pt"
    learn(masked(), data(), steps=3, checkpoint=path)
    state = load_checkpoint(path)
    DAMAGES[message](state)
    save_checkpoint(path, state)
    model = masked()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        learn(model, data(), checkpoint=path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_a_checkpoint_executes_nothing(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path(tmp_path / "executed").touch, ())

    torch.save({"format": "modmask-learn-checkpoint", "step": Malicious()}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        learn(masked(), data(), checkpoint=tmp_path / "run.pt", resume=True)
    assert not (tmp_path / "executed").exists()


def test_state_that_cannot_be_stored_is_named_at_once(tmp_path):
    class Bad(Stateful):
        def state_dict(self):
            return {"history": [1, {2, 3}]}

    calls = []

    class Counting(Bad):
        def __call__(self, step, generator):
            calls.append(step)
            return super().__call__(step, generator)

    message = r"data\['control'\].state_dict\(\)\['history'\]\[1\]: .* got set"
    with pytest.raises(TypeError, match=message):
        learn(masked(), {"control": Counting()}, checkpoint=tmp_path / "run.pt")
    assert calls == []
    learn(masked(), {"control": Bad()})  # without a checkpoint it does not matter
