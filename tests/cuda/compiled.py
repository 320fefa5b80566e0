"""What lies in the compiled CUDA library: kernels, their resources and their instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton


class Resources(NamedTuple):
    """Of one kernel for one architecture; bytes, except for the registers of a thread."""

    registers: int
    stack: int
    shared: int  # static; what the launch asks for comes on top
    local: int


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr[-4000:]}"
    return done.stdout


def cuobjdump(*words: str) -> str:
    """The tool that comes with Triton, which PyTorch brings."""
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return run(str(bundled), *words)


def architectures(library: Path) -> set[str]:
    """Those of the machine code."""
    return set(re.findall(r"\.(sm_\w+)\.cubin", cuobjdump("--list-elf", str(library))))


def ptx(library: Path) -> set[str]:
    """The architectures of the PTX."""
    return set(re.findall(r"\.(sm_\w+)\.ptx", cuobjdump("--list-ptx", str(library))))


def _demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    assert tool is not None, "c++filt comes with the compiler's binutils"
    return run(tool, "--no-params", *names).splitlines() if names else []


def _by_kernel(text: str, start: str) -> Iterator[tuple[str, str, str]]:
    """(architecture, kernel, its part of the text) in the order of the text."""
    found = []
    for part in re.split(r"^arch = ", text, flags=re.M)[1:]:
        architecture = part.split(maxsplit=1)[0]
        for piece in re.split(start, part)[1:]:
            mangled, body = re.split(r"[:\s]", piece, maxsplit=1)
            found.append((architecture, mangled, body))
    names = _demangled([mangled for _, mangled, _ in found])
    for (architecture, _, body), name in zip(found, names, strict=True):
        short = name.removeprefix("void ").replace("modmask::cuda::", "").replace("modmask::", "")
        yield architecture, short, body


def resources(library: Path) -> dict[tuple[str, str], Resources]:
    """By kernel, with its template arguments, and architecture."""
    text = cuobjdump("-res-usage", str(library))
    result = {}
    for architecture, kernel, body in _by_kernel(text, r"\bFunction "):
        values = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", body.splitlines()[1]))
        result[kernel, architecture] = Resources(
            *(int(values[name]) for name in ("REG", "STACK", "SHARED", "LOCAL"))
        )
    return result


def instructions(library: Path) -> dict[tuple[str, str], list[str]]:
    """The names of the machine instructions, by kernel and architecture."""
    text = cuobjdump("-sass", str(library))
    pattern = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
    return {
        (kernel, architecture): pattern.findall(body)
        for architecture, kernel, body in _by_kernel(text, r"\bFunction : ")
    }
