"""What the CUDA library asks of others, and the package beside a library that does not load."""

from __future__ import annotations

import os
import re
import subprocess
import zipfile
from pathlib import Path

import compiled
import pytest
import torch
from building import run

LIBTORCH = Path(torch.__file__).parent / "lib"


def undefined(library: Path) -> set[str]:
    """Symbols that others must have, without their versions."""
    lines = compiled.run("nm", "-D", "--undefined-only", str(library)).splitlines()
    return {line.split()[-1] for line in lines if line.split()[0] == "U"}


def exported(library: Path) -> set[str]:
    lines = compiled.run("nm", "-D", "--defined-only", str(library)).splitlines()
    return {line.split()[-1] for line in lines}


class TestSymbols:
    def test_from_libtorch_only_the_stable_interface(self, library: Path) -> None:
        symbols = undefined(library)
        assert not [s for s in symbols if re.search(r"(2at|3c10|5torch)", s)]  # mangled names
        asked = {s for s in symbols if re.match(r"(aoti_)?torch_", s)}
        offered = exported(LIBTORCH / "libtorch_cpu.so")
        # what the CUDA half of PyTorch has, and a PyTorch without CUDA lacks
        assert asked - offered == {"aoti_torch_get_current_cuda_stream"}

    def test_nothing_of_cuda_and_little_else(self, library: Path) -> None:
        """The CUDA runtime is inside, and the driver is opened by name when first needed."""
        needed = re.findall(r"NEEDED.*\[(.*)\]", compiled.run("readelf", "-d", str(library)))
        assert needed[0] == "libtorch.so"
        allowed = r"libtorch|libstdc\+\+|libm|libgcc_s|libc|libdl|librt|libpthread|ld-linux-.*"
        assert all(re.fullmatch(rf"({allowed})\.so(\.\d+)?", name) for name in needed), needed
        assert not [s for s in undefined(library) if s.startswith(("cuda", "cu", "__cuda"))]

    def test_the_cuda_runtime_inside_is_hidden(self, library: Path) -> None:
        assert {s for s in exported(library) if not s.startswith("_Z")} == {"PyInit__cuda"}

    def test_from_python_only_the_limited_interface(self, library: Path) -> None:
        asked = {s for s in undefined(library) if s.startswith(("Py", "_Py"))}
        assert asked <= {
            *("PyArg_ParseTuple", "PyBool_FromLong", "PyLong_FromLong", "PyModule_Create2"),
            *("PyUnicode_FromString", "_Py_NoneStruct"),
        }


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


SIGNATURES = """
import importlib, sys, torch, modmask_kernels

def by_schema(name):
    schema = getattr(torch.ops.modmask, name).default._schema
    taken, given = (", ".join(str(v.type) for v in vs) for vs in (schema.arguments, schema.returns))
    return f"{name}({taken}) -> ({given})"

library, = sys.argv[1:]
compiled = importlib.import_module(f"modmask_kernels.{library}").signatures().splitlines()
names = [line.split("(")[0] for line in compiled]
assert compiled == [by_schema(name) for name in names]

def registered(key):
    found = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name.removeprefix("modmask::") for name in found if name.startswith("modmask::")}

key = "CPU" if library == "_C" else "CUDA"
assert set(names) <= registered(key) and len(set(names)) == len(names) > 8
defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("modmask::")}
missing = {name.removeprefix("modmask::").split(".")[0] for name in defined} - registered("CUDA")
assert library == "_C" or not missing, missing
"""


class TestLoading:
    def run(self, folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MODMASK_")}
        return run(
            *words, cwd=folder, environment={**environment, "PYTHONPATH": str(folder), **more}
        )

    def told(self, folder: Path, name: str) -> str:
        done = self.run(folder, "-m", "modmask_kernels", "info")
        assert done.returncode == 0, done.stderr
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(name))
        return line.removeprefix(name).strip()

    def test_loads_where_pytorch_has_cuda(self, installed: Path) -> None:
        assert re.match(r"loaded, built with CUDA \d+\.\d", self.told(installed, "CUDA kernels"))

    @pytest.mark.parametrize("library", ["_C", "_cuda"])
    def test_kernels_fit_their_schemas(self, installed: Path, library: str) -> None:
        """Types as compiled beside the schema's: a call, on a device, would be first to tell."""
        done = self.run(installed, "-c", SIGNATURES, library)
        assert done.returncode == 0, done.stderr

    def test_is_not_loaded_before_it_is_needed(self, installed: Path) -> None:
        code = (
            "import sys, torch, modmask_kernels as mm; logits = torch.zeros(3, 3); "
            "mm.ops.sample_mask_packed(logits, seed=torch.tensor(1)); mm.explain(logits); "
            "assert 'modmask_kernels._C' in sys.modules; "
            "assert 'modmask_kernels._cuda' not in sys.modules"
        )
        done = self.run(installed, "-c", code)
        assert done.returncode == 0, done.stderr

    def test_loading_is_not_traced(self, installed: Path) -> None:
        code = (
            "import torch; from modmask_kernels import _native; "
            "f = lambda x: x + _native.cuda_loaded(); "
            "print(torch.compile(f, fullgraph=True, backend='eager')(torch.zeros(1)).item())"
        )
        done = self.run(installed, "-c", code)
        assert done.stdout.strip() == "1.0", done.stderr

    def test_a_load_error_is_kept_and_the_rest_works(self, installed: Path, tmp_path: Path) -> None:
        """As with a PyTorch without CUDA, which lacks a symbol."""
        for file in (installed / "modmask_kernels").rglob("*"):
            target = tmp_path / file.relative_to(installed)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.is_file() and file.name != "_cuda.abi3.so":
                target.symlink_to(file)
        (tmp_path / "modmask_kernels/_cuda.abi3.so").write_bytes(b"not a shared library")
        assert "not loaded" in self.told(tmp_path, "CUDA kernels")
        assert "loaded" in self.told(tmp_path, "CPU kernels")
        code = (
            "import torch, modmask_kernels as mm; "
            "print(mm.ops.sample_mask(torch.zeros(64), seed=torch.tensor(1)).sum().item())"
        )
        there, here = (self.run(folder, "-c", code) for folder in (installed, tmp_path))
        assert here.returncode == 0, here.stderr
        assert here.stdout == there.stdout
        forced = self.run(tmp_path, "-c", "import modmask_kernels", MODMASK_BACKEND="cuda")
        assert "MODMASK_BACKEND=cuda, but the CUDA kernels are not loaded: " in forced.stderr
