"""Compiles the kernel sources on their own, without torch.

`lanes16` is the AVX-512 source with its intrinsics switched off: GCC's vector extensions then lower
the 16 lanes to what the machine has, so that the layout is tested where AVX-512 is absent.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from modmask_kernels import _native

CSRC = Path(__file__).parents[2] / "csrc"
NATIVE = Path(__file__).parent / "native"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fPIC", "-Wno-psabi", "-pthread"]


def lanes16_source() -> str:
    """The AVX-512 source as `lanes16`, without its target and intrinsics."""
    text = (CSRC / "cpu" / "kernels_avx512.cpp").read_text(encoding="utf-8")
    for pattern, replacement, at_least in [
        (r"#if defined\(__clang__\)\n.*?#endif\n", "", 2),
        (r"#if defined\(__x86_64__\)\n", "#if 1\n", 1),
        (r"#include <immintrin.h>\n", "", 1),
        (r"#define MODMASK_AVX512\b[^\n]*\n", "", 1),
        (r"kKernelsAvx512", "kKernelsLanes16", 1),
        (r"\bavx512\b", "lanes16", 1),
    ]:
        text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
        assert count >= at_least, f"{pattern} not found in the AVX-512 source"
    declaration = "namespace modmask {\nextern const Kernels kKernelsLanes16;\n}\n"
    return text.replace("namespace modmask {\n", declaration + "namespace modmask {\n", 1)


def capabilities() -> list[str]:
    """What this machine runs, by the names of the sources."""
    return [n for n in ("plain", "avx2", "avx512") if n == "plain" or n in _native.capabilities()]


def compile_kernels(
    folder: Path, names: list[str], more: list[str], *flags: str, link: tuple[str, ...] = ()
) -> Path:
    """Compiles the kernels `names` and the sources `more` of tests/ops/native into one file."""
    units: list[tuple[Path, list[str]]] = [(NATIVE / f"{name}.cpp", []) for name in more]
    for name in names:
        if name == "lanes16":
            lanes16 = folder / "lanes16.cpp"
            lanes16.write_text(lanes16_source(), encoding="utf-8")
            units.append((lanes16, ["-mavx2"] if "avx2" in capabilities() else []))
        else:
            units.append((CSRC / "cpu" / f"kernels_{name}.cpp", []))
    tables = " ".join(f"TABLE({name.capitalize()})" for name in names)

    def build(unit: tuple[Path, list[str]]) -> str:
        source, own = unit
        target = folder / f"{source.stem}.o"
        run(
            *(*COMPILER, *FLAGS, *flags, *own, f"-I{CSRC}", f"-I{CSRC / 'cpu'}"),
            *(f"-DMODMASK_TEST_TABLES={tables}", "-c", str(source), "-o", str(target)),
        )
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(build, units))
    result = folder / "kernels"
    run(*COMPILER, *flags, *link, "-pthread", *objects, "-o", str(result))
    return result


def run(*command: str) -> None:
    """Runs a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-4000:]}"


class Draw(ctypes.Structure):
    _fields_ = (
        ("seeds", ctypes.c_void_p),
        ("sets", ctypes.c_int64),
        ("samples", ctypes.c_int64),
        ("sample_offset", ctypes.c_int64),
        ("element_offset", ctypes.c_int64),
        ("tensor_id", ctypes.c_int64),
        ("tau", ctypes.c_float),
        ("hard", ctypes.c_int32),
        ("estimator", ctypes.c_int32),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("clamp", ctypes.c_float),
        ("antithetic", ctypes.c_int32),
    )


class Linear(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("bias_logits", ctypes.c_void_p),
    )


class Gradients(ctypes.Structure):
    _fields_ = (
        ("dy", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("bias_logits", ctypes.c_void_p),
    )


def load(path: Path) -> ctypes.CDLL:
    """The bridge with its argument types."""
    library = ctypes.CDLL(str(path))
    draw, pointer, i64 = ctypes.POINTER(Draw), ctypes.c_void_p, ctypes.c_int64
    start = [ctypes.c_int, ctypes.c_int, draw]
    library.table_name.restype = ctypes.c_char_p
    for name, more in {
        "linear_forward": [ctypes.POINTER(Linear), pointer],
        "linear_backward": [ctypes.POINTER(Linear), ctypes.POINTER(Gradients)],
        "sample_values": [pointer, i64, pointer],
        "sample_bits": [pointer, i64, pointer],
        "sample_backward": [pointer, pointer, i64, pointer],
    }.items():
        getattr(library, name).argtypes = [*start, *more]
        getattr(library, name).restype = None
    return library
