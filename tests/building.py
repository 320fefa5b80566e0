"""Builds distributions of the checkout under test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
IN_SDIST = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CITATION.cff",
    "csrc",
    "modmask_kernels",
    "tests",
    "bench",
)


def run(
    *words: str, cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs Python."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def build(kind: str, source: Path, **options: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Calls the build backend as pip does without build isolation."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    return run("-c", code, cwd=source, **options)
