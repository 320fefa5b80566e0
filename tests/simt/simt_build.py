"""Compiles the CUDA kernels with the host compiler into the Python module `simt_kernels`."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

SIMT = Path(__file__).parent
CSRC = SIMT.parents[1] / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = ("-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden")
SANITIZE = ("-O0", "-fsanitize=address", "-fno-omit-frame-pointer")


def build(folder: Path, *flags: str) -> Path:
    """Builds the module in `folder` and returns its path."""
    includes = [f"-I{p}" for p in (SIMT, CSRC, pybind11.get_include())]
    includes.append(f"-isystem{sysconfig.get_path('include')}")

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        # the bindings are slow to compile and hold nothing to check
        own = ("-O0",) if source.stem == "module" else flags
        _run(*COMPILER, *FLAGS, *own, *includes, "-c", str(source), "-o", str(target))
        return str(target)

    sources = sorted(SIMT.glob("*.cpp"), key=lambda p: p.stem != "module")  # the slowest first
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    result = folder / f"simt_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run(*COMPILER, "-shared", *flags, *objects, "-o", str(result))
    return result


def load(path: Path) -> ModuleType:
    """Imports the module that `build` made."""
    spec = importlib.util.spec_from_file_location("simt_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-6000:]}"
