"""What a result depends on: processor, threads, versions. No dates, no host names."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import modmask_kernels

from .. import _native


def processor_name() -> str:
    """The processor as the operating system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def processor_family() -> str:
    """Family and model number, which tell generations of one brand name apart; "" if unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
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


def describe() -> dict[str, object]:
    """Everything that a reader needs to judge whether two results may be compared."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor_name(),
        "processor_family": processor_family(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "modmask_kernels": modmask_kernels.__version__,
        "kernels": _native.capability() or "reference only",
        "neurosurgeon": version_of("neurosurgeon"),
    }


def headline(machine: dict[str, object]) -> str:
    """`describe()` in one line."""
    return (
        f"{machine['processor']} ({machine['processor_family'] or machine['architecture']}), "
        f"{machine['cores']} cores, {machine['threads']} threads; "
        f"modmask_kernels {machine['modmask_kernels']} ({machine['kernels']}), "
        f"torch {machine['torch']} ({machine['cpu_capability']}), Python {machine['python']}"
    )
