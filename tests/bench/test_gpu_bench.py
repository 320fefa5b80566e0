"""The command for the first GPU, rehearsed on the CPU: files, failures, and a process that dies."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from modmask_kernels import bench, ops
from modmask_kernels.bench import roofline
from modmask_kernels.bench.gpu import cases, checks, command, page, rows, small, worker
from modmask_kernels.bench.gpu.events import Device
from modmask_kernels.files import read_json
from modmask_kernels.ops import _gpu

CPU = Device(torch.device("cpu"))
LINEAR = cases.Linear(16, 24, 8, 4)


def by_label(results: dict[str, Any], suite: str) -> dict[str, dict[str, Any]]:
    return {row["label"]: row for row in results["rows"] if row["suite"] == suite}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("gpu")
    words = ["--gpu", "--device", "cpu", "--out", str(out)]
    words += ["--test-select", "test_special_logits or test_streams"]
    assert bench.main(words) == 0
    return out


class TestRehearsal:
    def test_every_part_ends_well(self, out: Path) -> None:
        results = read_json(out / "gpu.json")
        assert results["rehearsal"] is True
        assert results["tests"]["status"] == "passed"
        assert (results["tests"]["passed"], results["tests"]["failed"]) == (1, [])
        assert sum(results["tests"]["skipped"].values()) >= 1
        assert results["sanitizer"]["status"] == "passed"
        assert {row["suite"] for row in results["rows"]} == set(cases.SUITES)
        for row in results["rows"]:
            assert row["status"] == "measured", row
            assert row["absent"] == {}

    def test_numbers_of_a_row(self, out: Path) -> None:
        row = by_label(read_json(out / "gpu.json"), "linear")["32x24, 16, 4 samples, bfloat16"]
        assert set(row["seconds"]["eager"]) == {"plain", "fused", "naive"}
        assert set(row["parts"]) == {"forward", "dx", "dlogits"}
        assert row["peak_bytes"]["fused"] is None
        assert max(row["error_over_allowed"].values()) <= 1.0
        if "absent" not in row["prediction"]:
            assert {"plain", "fused"} <= set(rows.over_prediction(row))

    def test_the_page(self, out: Path) -> None:
        text = (out / "README.md").read_text(encoding="utf-8")
        assert text.startswith("# Rehearsal on a CPU")
        assert "Nothing here was measured on a GPU" in text
        for name in ("gpu-dark.svg", "gpu-light.svg"):
            assert name in text
            assert (out / name).is_file()
        assert f"modmask bench --gpu --device cpu --out {out}" in text
        assert not list(out.glob("*.jsonl"))

    def test_resume_keeps_rows_and_parts(self, out: Path) -> None:
        before = read_json(out / "gpu.json")
        short = {**before, "rows": before["rows"][:-1]}
        (out / "gpu.json").write_text(json.dumps(short), encoding="utf-8")
        words = ["--device", "cpu", "--out", str(out), "--resume"]
        assert command.main([*words, "--leave-out", "tests", "sanitizer"]) == 0
        after = read_json(out / "gpu.json")
        assert after["tests"] == before["tests"]
        assert [r for r in after["rows"] if r in before["rows"]] == before["rows"][:-1]
        assert len(after["rows"]) == len(before["rows"])

    def test_resume_refuses_another_device(self, out: Path, tmp_path: Path, capsys: Any) -> None:
        other = read_json(out / "gpu.json")
        other["machine"]["torch"] = "1.0"
        (tmp_path / "gpu.json").write_text(json.dumps(other), encoding="utf-8")
        assert command.main(["--device", "cpu", "--out", str(tmp_path), "--resume"]) == 2
        assert "another device" in capsys.readouterr().err


def test_without_a_gpu_nothing_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


class TestRow:
    def test_a_kernel_that_raises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def raises(*_: Any, **__: Any) -> None:
            raise RuntimeError("CUDA kernel masked_linear was not launched: no reason\nand a trace")

        monkeypatch.setattr(ops, "masked_linear", raises)
        row = rows.measure(LINEAR, CPU, rounds=1)
        assert row["status"] == "failed"
        assert row["reason"] == (
            "RuntimeError: CUDA kernel masked_linear was not launched: no reason"
        )
        found = {"rehearsal": True, "rows": [row]}
        assert "no reason" in str(page.tables(found))
        assert page.problems(found, ["bench"]) == ["bench: 1 of 1 rows failed"]

    def test_a_wrong_kernel_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = ops.masked_linear
        monkeypatch.setattr(ops, "masked_linear", lambda *a, **k: right(*a, **k) + 1.0)
        row = rows.measure(LINEAR, CPU, rounds=1)
        assert (row["status"], "seconds" in row) == ("wrong", False)

    def test_memory_that_is_not_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def too_much(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")

        monkeypatch.setattr(cases.baselines, "naive_masked_linear", too_much)
        row = rows.measure(LINEAR, CPU, rounds=1)
        assert row["status"] == "measured"
        assert row["absent"] == {"naive": "OutOfMemoryError: tried to allocate 80 GiB"}
        monkeypatch.setattr(cases.Linear, "prepare", too_much)
        assert rows.measure(LINEAR, CPU)["status"] == "out of memory"

    def test_a_lost_device_is_told_with_its_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def lost() -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(CPU, "synchronize", lost)
        with pytest.raises(rows.LostDeviceError) as caught:
            rows.measure(LINEAR, CPU, rounds=1)
        (row,) = caught.value.args
        assert (row["status"], row["label"]) == ("failed", LINEAR.label)
        assert "illegal memory access" in row["reason"]

    def test_shares_of_ceilings(self) -> None:
        def row(suite: str, dtype: str, work: cases.Work, seconds: float) -> dict[str, Any]:
            return {
                "suite": suite,
                "dtype": dtype,
                "status": "measured",
                "work": {"plain": vars(work), "fused": vars(work)},
                "seconds": {"eager": {"plain": {"median": seconds}, "fused": {"median": seconds}}},
            }

        ceilings = rows.ceilings_of(
            [
                row("ceilings", "float32", cases.Work(bytes=200.0), 2.0),
                row("ceilings", "bfloat16", cases.Work(operations=900.0), 3.0),
            ]
        )
        assert ceilings == {"memory": 100.0, "bfloat16": 300.0}
        found = row("linear", "bfloat16", cases.Work(50.0, 300.0), 4.0)
        assert math.isclose(rows.share_of_ceiling(found, "fused", ceilings) or 0.0, 0.25)
        found = row("linear", "tf32", cases.Work(50.0, 300.0), 4.0)
        assert rows.share_of_ceiling(found, "fused", ceilings) is None


class TestProcesses:
    """What becomes of rows whose process does not come to its end."""

    WANTED = (LINEAR, cases.Linear(8, 8, 8, 1), cases.PackBits(8))

    def supervised(self, tmp_path: Path, code: str, **options: Any) -> dict[str, str]:
        path = tmp_path / "rows.jsonl"
        script = tmp_path / "process.py"
        keys = [rows.key_of(case) for case in self.WANTED]
        script.write_text(
            "import json, os, sys, time\n"
            f"path, keys = {str(path)!r}, {keys!r}\n"
            "def say(entry):\n"
            "    with open(path, 'a') as file:\n"
            "        file.write(json.dumps(entry) + '\\n')\n"
            "def done(key):\n"
            "    suite, label = key.split(': ', 1)\n"
            "    say({'suite': suite, 'label': label, 'status': 'measured', 'reason': ''})\n"
            "there = open(path).read() if os.path.exists(path) else ''\n" + code,
            encoding="utf-8",
        )
        deadline = options.pop("deadline", time.time() + 100)
        words = [sys.executable, str(script)]
        worker.supervise(words, path, self.WANTED, deadline=deadline, **options)
        return {row["label"]: f"{row['status']} {row['reason']}" for row in worker.read(path)[0]}

    def test_a_process_that_dies(self, tmp_path: Path) -> None:
        found = self.supervised(
            tmp_path,
            "if not there:\n"
            "    done(keys[0]); say({'begin': keys[1]}); os._exit(11)\n"
            "say({'begin': keys[2]}); done(keys[2])\n",
        )
        assert list(found.values()) == [
            "measured ",
            "failed the process ended with status 11",
            "measured ",
        ]

    def test_a_process_that_hangs(self, tmp_path: Path) -> None:
        found = self.supervised(
            tmp_path,
            "if not there:\n"
            "    say({'begin': keys[0]}); time.sleep(60)\n"
            "done(keys[1]); done(keys[2])\n",
            patience=1.0,
        )
        assert found[LINEAR.label] == "failed the process did not answer for 1 seconds"

    def test_a_process_that_never_starts(self, tmp_path: Path) -> None:
        found = self.supervised(tmp_path, "sys.exit(1)\n")
        assert set(found.values()) == {"failed the process ended with status 1 before any row"}

    def test_time_that_is_up(self, tmp_path: Path) -> None:
        found = self.supervised(tmp_path, "", deadline=time.time() - 1)
        assert set(found.values()) == {"not reached the time was up"}


class TestCases:
    def test_names_are_unique_and_the_short_list_comes_first(self) -> None:
        for of in (cases.rehearsal(), cases.quick(), cases.full()):
            keys = [rows.key_of(case) for case in of]
            assert len(keys) == len(set(keys))
            assert {case.suite for case in of} == set(cases.SUITES)
        assert cases.full()[: len(cases.quick())] == cases.quick()

    def test_work_of_a_layer(self) -> None:
        """By hand: 7 words per weight for float32 and one set."""
        work = cases.Linear(8, 4, 2, 1, "tf32").work()
        assert work["fused"].bytes == 4 * (7 * 32 + 3 * 2 * (8 + 4))
        assert work["fused"].operations == 3 * 2 * 2 * 32

    def test_work_of_kept_masks(self) -> None:
        """By hand: bits are written once and read twice, logits read twice, dlogits written."""
        weights = 1024 * 2048
        work = cases.Linear(1024, 2048, 8, 4).work()
        assert work["plain"].bytes == 3 * 2 * (weights + 8 * (1024 + 2048))
        assert work["fused"].bytes == work["plain"].bytes + 3 * 4 * weights + 3 * 4 * weights / 8

    def test_work_of_top_k(self) -> None:
        work = cases.TopK(800).work()
        assert (work["fused"].bytes, work["packed"].bytes) == (4 * 4 * 800 + 800, 4 * 4 * 800 + 100)

    @pytest.mark.parametrize("size", [512, 4096])  # masks packed twice, and kept
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("batch", [8, 8192])
    def test_parts_of_a_prediction_are_all_of_it(self, size: int, dtype: str, batch: int) -> None:
        counts = rows.counts_of(90)
        layer = roofline.Layer(size, size, batch, 4, dtype)
        row = roofline.row_of(layer, _gpu.DEVICES[1], counts)
        seconds = {name: kernel["seconds"] for name, kernel in row["kernels"].items()}
        parts = rows.parts_of(seconds)
        assert math.isclose(sum(parts.values()), row["seconds"]["masked"])
        assert all(parts.values())

    def test_a_kernel_of_no_part(self) -> None:
        with pytest.raises(ValueError, match="kernels of no part of a step: masks of forward"):
            rows.parts_of({"forward": 1.0, "masks of forward": 2.0})

    def test_precision_is_put_back(self) -> None:
        before = torch.backends.cuda.matmul.fp32_precision
        with cases.precision_of("tf32"):
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.cuda.matmul.fp32_precision == before


class TestChecks:
    def test_failed_tests_run_again_alone(self, tmp_path: Path) -> None:
        folder = tmp_path / "tests" / "gpu"
        folder.mkdir(parents=True)
        (folder / "operations.py").touch()
        (folder / "test_it.py").write_text(
            "import pathlib, pytest\n"
            "class TestIt:\n"
            "    @pytest.mark.parametrize('n', [0, 1])\n"
            "    def test_once(self, n):\n"
            "        mark = pathlib.Path(__file__).with_name(f'mark{n}')\n"
            "        seen = mark.exists(); mark.touch()\n"
            "        assert seen and n, 'CUDA error'\n"
            "def test_skipped():\n"
            "    pytest.skip('needs 11 GB')\n",
            encoding="utf-8",
        )
        (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        assert checks.find_tests(folder) == folder
        found = checks.run_tests(folder, "cpu", tmp_path / "log", seconds=60)
        assert found["status"] == "failed"
        assert [f["alone"] for f in found["failed"]] == ["failed", "passed"]
        assert "CUDA error" in found["failed"][0]["message"]
        assert found["skipped"] == {"needs 11 GB": 1}
        assert page.problems({"tests": found}, ["tests"])

    def test_without_a_checkout(self, tmp_path: Path) -> None:
        assert checks.run_tests(None, "cpu", tmp_path / "log", seconds=1)["status"] == "absent"

    def test_the_tool_is_found_in_packages(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = tmp_path / "nvidia" / "cu13" / "bin" / "compute-sanitizer"
        program.parent.mkdir(parents=True)
        program.write_text(
            '#!/bin/sh\necho "========= ERROR SUMMARY: 2 errors"\ntest "$2" != racecheck\n',
            encoding="utf-8",
        )
        program.chmod(0o755)
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        assert checks.find_sanitizer({"CUDA_HOME": "/nowhere"}) == str(program)
        monkeypatch.setattr(checks, "find_sanitizer", lambda: str(program))
        found = checks.run_sanitizer("cuda", tmp_path / "log", seconds=60)
        assert found["status"] == "failed"
        assert {tool: f["status"] for tool, f in found["tools"].items()} == {
            "memcheck": "passed",
            "racecheck": "failed",
            "synccheck": "passed",
        }
        assert found["tools"]["memcheck"]["said"] == "ERROR SUMMARY: 2 errors"

    def test_every_way_is_run_by_every_tool(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One way that fails is told by its name, and the others are run nevertheless."""
        program = tmp_path / "compute-sanitizer"
        program.write_text(
            f'#!/bin/sh\necho "$2 $MODMASK_BACKEND $MODMASK_GPU_MASKS" >> {tmp_path}/ways\n'
            'echo "========= ERROR SUMMARY: 1 error"\ntest "$MODMASK_BACKEND" != triton\n',
            encoding="utf-8",
        )
        program.chmod(0o755)
        monkeypatch.setattr(checks, "find_sanitizer", lambda: str(program))
        monkeypatch.setattr(small, "absent", lambda way: None)
        found = checks.run_sanitizer("cuda", tmp_path / "log", seconds=60, tools=("memcheck",))
        lines = (tmp_path / "ways").read_text(encoding="utf-8").splitlines()
        assert lines == [f"memcheck {way.backend} {way.masks}" for way in small.WAYS]
        assert found["tools"]["memcheck"]["status"] == "failed"
        assert found["tools"]["memcheck"]["said"] == "triton, bits: ERROR SUMMARY: 1 error"
        monkeypatch.setattr(small, "absent", lambda way: "none here" if way.backend else None)
        found = checks.run_sanitizer("cuda", tmp_path / "log", seconds=60, tools=("memcheck",))
        assert found["status"] == "passed"
        assert set(found["absent"].values()) == {"none here"}
        assert "none here" in str(page.tables({"rehearsal": True, "sanitizer": found, "rows": []}))


TESTS = Path(__file__).parents[1]


def budgets(file: str) -> list[Any]:
    """The keys of BUDGETS in a file of tests, which may need a compiler to be imported."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    (found,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BUDGETS"
    )
    assert isinstance(found, ast.Dict)
    return [ast.literal_eval(key) for key in found.keys if key is not None]


def launched_by(backend: str, masks: str) -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("launched_kernels.py")), backend],
        env={**os.environ, "MODMASK_BACKEND": "", "MODMASK_GPU_MASKS": masks},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def launched() -> dict[str, list[str]]:
    """By kernel, the cases for compute-sanitizer that launch it, with the way that does."""
    found: dict[str, list[str]] = {}
    for way in small.WAYS:
        for kernel, names in launched_by(*way).items():
            found.setdefault(kernel, []).extend(names)
    return found


def test_without_kernels_the_reference_serves_with_gradients() -> None:
    """Within an operation, which the dispatcher runs below autograd."""
    assert set(launched_by("none", "")) == {"none"}


class TestSmallCases:
    """The cases for compute-sanitizer reach every kernel, from every source of masks."""

    def test_every_cuda_kernel(self, launched: dict[str, list[str]]) -> None:
        assert set(budgets("cuda/test_kernels.py")) <= set(launched)

    def test_every_triton_kernel(self, launched: dict[str, list[str]]) -> None:
        kernels = {f"triton {name}" for name, _ in budgets("triton/test_budgets.py")}
        assert kernels <= set(launched)

    def test_every_source_of_masks(self, launched: dict[str, list[str]]) -> None:
        wanted = {
            f"triton {kernel} {source}"
            for kernel in ("forward", "dx", "conv_forward", "conv_dx")
            for source in ("bits", "noise", "soft")
        }
        wanted |= {
            f"masked_linear_{kernel} {source}"
            for kernel in ("forward", "dx")
            for source in ("packed", "noise", "soft")
        }
        wanted |= {"triton forward SPREAD", "triton dx SPREAD", "triton pack SPREAD"}
        wanted |= {f"triton conv_gradients {what}" for what in ("PACK", "PACKED", "NEED_WEIGHT")}
        wanted |= {
            f"masked_linear_gradients {mode}{more}"
            for mode in ("plain", "general")
            for more in ("", ", dweight")
        }
        wanted |= {
            f"rnn_{kernel} {cell}"
            for kernel in ("forward", "backward", "cell_forward", "cell_backward")
            for cell in ("lstm", "gru")
        }
        wanted |= {"selected_product conv", "selected_product linear"}
        wanted |= {"group_affine_backward inner", "group_affine_backward channels"}
        assert not wanted - set(launched)

    def test_every_case_launches_a_kernel(self, launched: dict[str, list[str]]) -> None:
        assert "none" not in launched

    def test_masks_that_are_kept_serve_both_passes(self, launched: dict[str, list[str]]) -> None:
        name = "masked_linear, bfloat16, masks kept (as chosen)"
        for kernel in ("triton pack SPREAD", "triton forward SPREAD", "triton dx SPREAD"):
            assert name in launched[kernel]


def test_what_is_committed_was_measured_on_a_gpu() -> None:
    for path in (Path(__file__).parents[2] / "docs").rglob("gpu.json"):
        results = read_json(path)
        assert results["rehearsal"] is False, path
        assert results["machine"]["gpu"] is not None, path
