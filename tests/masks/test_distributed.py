"""Data-parallel and sharded learning: two processes on gloo against one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modmask_kernels as mm
from modmask_kernels.masks.checkpoint import load_checkpoint

PROBE = Path(__file__).with_name("distributed_probe.py")
PACKAGE = str(Path(mm.__file__).parents[1])


def run(folder, *processes):
    """Exit codes and errors of processes side by side, each given by the probe's arguments."""
    path = os.pathsep.join(p for p in (PACKAGE, os.environ.get("PYTHONPATH")) if p)
    started = [
        subprocess.Popen(
            [sys.executable, str(PROBE), str(rank), str(world), str(folder), *part],
            cwd=PACKAGE,
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, world, *part in processes
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
        return [(p.returncode, e) for p, e in zip(started, errors, strict=True)]
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """What one process and the two of a job learned."""
    folder = tmp_path_factory.mktemp("job")
    for code, errors in run(folder, (0, 1), (0, 2), (1, 2)):
        assert code == 0, errors[-3000:]
    loaded = {n: torch.load(folder / f"{n}.pt") for n in ("1-0", "2-0", "2-1")}
    return loaded["1-0"], loaded["2-0"], loaded["2-1"], folder


def flat(logits):
    values = logits.values() if isinstance(logits, dict) else logits
    return torch.cat([t.flatten() if isinstance(t, torch.Tensor) else flat(t) for t in values])


@pytest.mark.parametrize("kind", ["learn", "learn ddp", "learn fsdp"])
def test_a_job_learns_what_one_process_learns(jobs, kind):
    one, first, second, _ = jobs
    expected, got = one["learn"], first[kind]
    assert torch.allclose(flat(got["logits"]), flat(expected["logits"]), atol=2e-4)
    assert bool((flat(expected["logits"]) != 0.3).all())
    for rows in zip(got["metrics"], expected["metrics"], strict=True):
        for key in ("loss", "grad_norm"):
            assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4)
    # all processes have the same bits, so the same masks in evaluation
    assert torch.equal(flat(got["logits"]), flat(second[kind]["logits"]))
    for name, masks in got["masks"].items():
        assert all(torch.equal(mask, second[kind]["masks"][name][n]) for n, mask in masks.items())
    assert got["hash"] == second[kind]["hash"] == expected["hash"]
    assert got["metrics"] == second[kind]["metrics"]


def test_wrapped_models_learn_the_same_bits(jobs):
    _, first, _, _ = jobs
    for kind in ("learn ddp", "learn fsdp"):
        assert torch.equal(flat(first[kind]["logits"]), flat(first["learn"]["logits"]))


@pytest.mark.parametrize("kind", ["loop ddp", "loop fsdp"])
def test_loops_of_ones_own(jobs, kind):
    """Gradients by DDP, or by FSDP2 with the logits in shards too."""
    one, first, second, _ = jobs
    expected = flat(one["loop"]["logits"])
    assert torch.allclose(flat(first[kind]["logits"]), expected, atol=1e-4)
    assert torch.equal(flat(first[kind]["logits"]), flat(second[kind]["logits"]))
    assert not torch.allclose(expected, torch.full_like(expected, 0.3), atol=1e-2)


def test_the_first_process_writes_the_checkpoint(jobs):
    *_, folder = jobs
    state = load_checkpoint(folder / "learn.checkpoint")
    assert state["step"] == 6
    assert state["identity"]["processes"] == 2
    assert load_checkpoint(folder / "fsdp.checkpoint")["step"] == 6


def test_a_killed_job_resumes_to_the_same_bits(jobs):
    _, *unbroken, folder = jobs
    (first, errors), (killed, _) = run(folder, (0, 2, "broken"), (1, 2, "broken"))
    assert killed == -signal.SIGKILL
    assert first != 0, "a process learned on without the other"
    assert "gloo" in errors.lower()
    assert load_checkpoint(folder / "broken.checkpoint")["step"] == 3
    for code, errors in run(folder, (0, 2, "resumed"), (1, 2, "resumed")):
        assert code == 0, errors[-3000:]
    assert load_checkpoint(folder / "broken.checkpoint")["step"] == 6
    for rank, whole in enumerate(unbroken):
        resumed = torch.load(folder / f"resumed-{rank}.pt")["learn"]
        assert torch.equal(flat(resumed["logits"]), flat(whole["learn"]["logits"]))
        assert resumed["metrics"] == whole["learn"]["metrics"]
        for name, masks in whole["learn"]["masks"].items():
            assert all(torch.equal(mask, resumed["masks"][name][n]) for n, mask in masks.items())


def test_wrong_jobs_are_refused_by_all(jobs):
    _, *processes, _ = jobs
    for results in processes:
        assert "are sharded; keep them whole with fully_shard" in results["sharded logits"]
        assert "union_clip: expected one process" in results["union clip"]
        for step in (0, 2):
            found = results[f"sizes of step {step}"]
            assert f"got [4] on rank 0, [8] on rank 1 at step {step}" in found
    first, second = (results["alone"]["logits"] for results in processes)
    assert float((second - first).min()) > 0.5
    model = mm.mask_model(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="data_parallel: expected an initialised process group"):
        mm.learn_masks(model, print, {"0": print}, 1, data_parallel=True)
