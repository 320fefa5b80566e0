"""Loads the compiled kernels; a failure is kept, to be told by `explain` and `modmask info`."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

LOAD_ERROR: str | None = None
"""Why the compiled kernels are absent, or None."""

_module: ModuleType | None = None


def _load() -> None:
    global _module, LOAD_ERROR
    try:
        _module = importlib.import_module("modmask_kernels._C")
    except ModuleNotFoundError:
        LOAD_ERROR = "not built: the package was installed or is run without its compiled extension"
    except (ImportError, OSError) as error:
        LOAD_ERROR = f"does not load: {error}"


_load()


def available() -> bool:
    """Whether the compiled CPU kernels are loaded."""
    return _module is not None


def capability() -> str | None:
    """The CPU capability in use (`avx512`, `avx2` or `plain`), or None without the kernels."""
    return None if _module is None else str(_module.capability())


def capabilities() -> list[str]:
    """The capabilities that were compiled and that this CPU supports, best first."""
    return [] if _module is None else list(_module.capabilities())


def set_capability(name: str) -> None:
    """Use another capability of `capabilities()`, for tests and comparisons.

    Raises:
        RuntimeError: without the compiled kernels.
        ValueError: for a capability that this CPU does not support.
    """
    if _module is None:
        raise RuntimeError(f"the compiled kernels are absent ({LOAD_ERROR})")
    _module.set_capability(name)


BACKENDS = ("cpu", "reference")


def _forced_by_environment() -> str | None:
    value = os.environ.get("MODMASK_BACKEND", "")
    if value and value not in BACKENDS:
        raise ValueError(f"MODMASK_BACKEND must be one of {', '.join(BACKENDS)}, not {value!r}")
    if value == "cpu" and not available():
        raise RuntimeError(f"MODMASK_BACKEND=cpu, but the compiled kernels are {LOAD_ERROR}")
    return value or None


FORCED_BACKEND: str | None = _forced_by_environment()
"""The backend that MODMASK_BACKEND asked for when the package was imported, or None."""


def enabled() -> bool:
    """Whether the compiled kernels are loaded and not ruled out by MODMASK_BACKEND."""
    return available() and FORCED_BACKEND != "reference"
