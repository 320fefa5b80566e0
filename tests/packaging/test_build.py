"""The source distribution, the wheel built from it, and the package without its compiled part."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch
from building import IN_SDIST, ROOT, build, run

import modmask_kernels

PACKAGE = Path(modmask_kernels.__file__).parent


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def library(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"modmask_kernels/{name}.abi3.so")


class TestSourceDistribution:
    def test_has_every_source(self, unpacked: Path) -> None:
        for name in IN_SDIST:
            assert (unpacked / name).exists(), name
            if (ROOT / name).is_file():
                assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes(), name
        for kind in ("csrc", "modmask_kernels", "tests"):
            expected = {
                path.relative_to(ROOT)
                for path in (ROOT / kind).rglob("*")
                if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".html", ".typed")
            }
            missing = {path for path in expected if not (unpacked / path).exists()}
            assert not missing
            changed = {
                p for p in expected if (unpacked / p).read_bytes() != (ROOT / p).read_bytes()
            }
            assert not changed

    def test_has_nothing_compiled(self, unpacked: Path) -> None:
        assert not [path for path in unpacked.rglob("*") if path.suffix in (".so", ".pyc", ".o")]


class TestWheel:
    def test_serves_every_python_from_3_10(self, wheel: Path) -> None:
        assert re.fullmatch(
            rf"modmask_kernels-{re.escape(modmask_kernels.__version__)}-cp310-abi3-\w+\.whl",
            wheel.name,
        )
        libraries = {name for name in names(wheel) if name.endswith(".so")}
        assert libraries == {"modmask_kernels/_C.abi3.so", "modmask_kernels/_cuda.abi3.so"}

    def test_has_the_package_and_nothing_else(self, wheel: Path) -> None:
        top = {name.split("/")[0] for name in names(wheel)}
        information = f"modmask_kernels-{modmask_kernels.__version__}.dist-info"
        assert top == {"modmask_kernels", information}
        assert not [
            name for name in names(wheel) if re.search(r"(^|/)tests?[_/]|\.(cpp|cuh?|h)$", name)
        ]
        for needed in ("modmask_kernels/py.typed", f"{information}/licenses/LICENSE"):
            assert needed in names(wheel)

    def test_has_every_module_and_template(self, wheel: Path) -> None:
        expected = {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / "modmask_kernels").rglob("*")
            if path.suffix in (".py", ".html")
        }
        assert expected <= set(names(wheel))

    def test_needs_neither_cuda_nor_unstable_symbols_of_libtorch(self, wheel: Path) -> None:
        compiled = library(wheel, "_C")
        for name in (b"libcuda", b"libtorch_cuda", b"libc10_cuda", b"libtorch_python"):
            assert name not in compiled
        # mangled names of at:: and c10::, which change from release to release
        assert not re.findall(rb"\0_ZN(?:K)?(?:2at|3c10)\w+\0", compiled)

    def test_says_what_it_needs(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
            metadata = Parser().parsestr(archive.read(name).decode("utf-8"))
        needed = {
            re.split(r"[ <>=!~;]", requirement)[0]
            for requirement in metadata.get_all("Requires-Dist", [])
            if "extra ==" not in requirement
        }
        assert needed == {"torch", "safetensors", "tqdm", "numpy"}
        assert metadata["Version"] == modmask_kernels.__version__
        assert metadata["License-Expression"] == "MIT"
        assert {"report", "study", "bench", "test", "dev"} <= set(
            metadata.get_all("Provides-Extra")
        )

    def test_runs_its_kernels_when_unpacked_anywhere(self, wheel: Path, tmp_path: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path)
        code = (
            "import torch, modmask_kernels as mm; "
            "from modmask_kernels import _native; "
            "assert _native.available(), _native.LOAD_ERROR; "
            "y = mm.ops.masked_linear(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4, 3), "
            "seed=torch.tensor(1)); print(tuple(y.shape), mm.__file__)"
        )
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = run("-c", code, cwd=tmp_path, environment=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"(2, 4) {tmp_path / 'modmask_kernels' / '__init__.py'}"


def test_without_a_compiler_the_build_says_what_to_install(checkout: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")}
    environment["PATH"] = str(tmp_path)
    done = build("wheel", checkout, environment=environment)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "no C++17 compiler" in last
    assert "apt-get install g++" in last


class TestWithoutTheCompiledPart:
    @pytest.fixture
    def bare(self, tmp_path: Path) -> Path:
        shutil.copytree(
            PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
        return tmp_path

    def run(self, bare: Path, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(bare)}
        environment.pop("MODMASK_BACKEND", None)
        return run(*words, cwd=bare, environment=environment)

    def test_the_reference_serves(self, bare: Path) -> None:
        code = (
            "import torch, modmask_kernels as mm; "
            "x = torch.ones(4, 3, requires_grad=True); logits = torch.zeros(5, 3); "
            "draw = {'seed': torch.tensor(3), 'samples': 2}; "
            "mm.ops.masked_linear(x, torch.ones(5, 3), logits, **draw).sum().backward(); "
            "print(mm.ops.sample_mask_packed(logits, **draw).tolist())"
        )
        done = self.run(bare, "-c", code)
        assert done.returncode == 0, done.stderr
        # the bits are those of the compiled part
        bits = modmask_kernels.ops.sample_mask_packed(
            torch.zeros(5, 3), seed=torch.tensor(3), samples=2
        )
        assert done.stdout.strip() == str(bits.tolist())

    def test_info_tells_why(self, bare: Path) -> None:
        done = self.run(bare, "-m", "modmask_kernels", "info")
        assert done.returncode == 0, done.stderr
        told = dict(line.split("  ", 1) for line in done.stdout.splitlines())
        assert told["CPU kernels"].strip().startswith("not built")
        assert told["CUDA kernels"].strip().startswith("not built")

    def test_info_tells_why_a_broken_one_does_not_load(self, bare: Path) -> None:
        (bare / "modmask_kernels" / "_C.abi3.so").write_bytes(b"not a shared library")
        done = self.run(bare, "-m", "modmask_kernels", "info")
        assert done.returncode == 0, done.stderr
        assert "not loaded" in done.stdout

    def test_forcing_the_compiled_part_fails_with_the_reason(self, bare: Path) -> None:
        code = (
            "import os; os.environ['MODMASK_BACKEND'] = 'cpu'; "
            "import torch, modmask_kernels as mm; "
            "mm.ops.masked_linear(torch.ones(1, 2), torch.ones(2, 2), torch.ones(2, 2))"
        )
        done = self.run(bare, "-c", code)
        assert done.returncode != 0
        assert "MODMASK_BACKEND=cpu" in done.stderr.splitlines()[-1]
        assert "not built" in done.stderr.splitlines()[-1]
