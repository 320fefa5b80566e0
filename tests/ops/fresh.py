"""Python in a fresh process that imports the package under test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import modmask_kernels

PACKAGE_FOLDER = str(Path(modmask_kernels.__file__).parents[1])


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS`; MODMASK_* variables are only those given."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MODMASK_")}
    path = os.pathsep.join(p for p in (PACKAGE_FOLDER, inherited.get("PYTHONPATH")) if p)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=PACKAGE_FOLDER,  # `-c` looks there first, and a checkout need not be built
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
