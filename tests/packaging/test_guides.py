"""The code on the pages for users runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import modmask_kernels as mm
from modmask_kernels import analysis

DOCS = Path(__file__).parents[2] / "docs"
PACKAGE = str(Path(mm.__file__).parents[1])


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(p for p in (PACKAGE, os.environ.get("PYTHONPATH")) if p)
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*started: subprocess.Popen[str]) -> list[str]:
    """What they print; all must succeed."""
    said = []
    try:
        for process in started:
            output, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
            said.append(output)
    finally:
        for process in started:
            process.kill()
    return said


def test_using_masks(tmp_path: Path) -> None:
    (said,) = finish(start(tmp_path, "-c", "\n".join(blocks("using-masks.md", "python"))))
    found = re.search(r"mask 'left': first question (\d+)%, second (\d+)%", said)
    assert found is not None
    own, other = int(found[1]), int(found[2])
    assert own > 85  # the mask serves its own question, the other one less
    assert other < own
    assert "of the control remain" in said
    assert "Interval(value=" in said
    for name in ("only-left.safetensors", "ablation.json", "left.pt"):
        assert (tmp_path / name).exists()


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, mm.MaskSet]]:
    """What the commands of the page print and learn, each in a folder of its own."""
    (script,) = blocks("distributed.md", "python")
    started, folders = [], []
    (commands,) = blocks("distributed.md", "bash")
    for command in commands.splitlines():
        program, *words = command.split()
        folder = tmp_path_factory.mktemp("job")
        (folder / "learn_job.py").write_text(script, encoding="utf-8")
        launcher = ["-m", "torch.distributed.run"] if program == "torchrun" else []
        started.append(start(folder, *launcher, *words))
        folders.append((words[-2], folder / words[-1]))
    said = finish(*started)
    return {
        kind: (text, mm.MaskSet.load(path))
        for text, (kind, path) in zip(said, folders, strict=True)
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_jobs_learn_what_one_process_learns(
    learned: dict[str, tuple[str, mm.MaskSet]], kind: str
) -> None:
    (alone, expected), (together, masks) = learned["one"], learned[kind]
    assert alone.startswith("1 processes")
    assert together.startswith("2 processes")
    assert float(together.split()[-1]) == pytest.approx(float(alone.split()[-1]), rel=1e-2)
    assert analysis.stability(masks, expected) > 0.99  # rounding may move a logit near 0
    assert masks.metadata["weight_hash"] == expected.metadata["weight_hash"]


def test_granularity(tmp_path: Path) -> None:
    (said,) = finish(start(tmp_path, "-c", "\n".join(blocks("granularity.md", "python"))))
    assert said.splitlines() == ["torch.Size([1, 8, 1, 1, 1])", "torch.Size([1, 12, 1])"]
