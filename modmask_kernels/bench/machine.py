"""What a result depends on: processor, threads, versions. No dates, no host names."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

from ..experiments.run import environment


def processor_family() -> str:
    """Family and model number, which tell generations of one brand name apart; "" if unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = {}
    for line in text.split("\n\n", 1)[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    if "cpu family" not in fields:
        return ""
    return f"family {fields['cpu family']} model {fields.get('model', '?')}"


def version_of(package: str) -> str | None:
    """Installed version of a package, None if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Everything that a reader needs to judge whether two results may be compared."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        **environment(),
        "processor_family": processor_family(),
        "cores": cores,
        "neurosurgeon": version_of("neurosurgeon"),
    }


def headline(machine: dict[str, Any]) -> str:
    """`describe()` in one line."""
    family = f" ({machine['processor_family']})" if machine["processor_family"] else ""
    return (
        f"{machine['processor']}{family}, {machine['system']}, {machine['cores']} cores, "
        f"{machine['threads']} threads; modmask_kernels {machine['modmask_kernels']} "
        f"({machine['kernels']}), torch {machine['torch']} ({machine['capability']}), "
        f"Python {machine['python']}"
    )
