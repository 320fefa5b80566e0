"""Loads the compiled kernels; a failure is kept, to be told by `explain` and `modmask info`."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

LOAD_ERROR: str | None = None
"""Why the compiled kernels are absent, or None."""

_module: ModuleType | None = None


def _hidden_package() -> Path | None:
    """The installed package with its extension, where a folder of sources hides it."""
    here = Path(__file__).parent
    for entry in sys.path:
        package = Path(entry or ".").resolve() / here.name
        if package != here and any(package.glob("_C.*")):
            return package
    return None


def _load() -> None:
    global _module, LOAD_ERROR
    try:
        _module = importlib.import_module("modmask_kernels._C")
    except ModuleNotFoundError:
        LOAD_ERROR = "not built: the package was installed or is run without its compiled extension"
        hidden = _hidden_package()
        if hidden is not None:
            LOAD_ERROR = (
                f"not built in the source folder {Path(__file__).parent}, which hides the package "
                f"installed in {hidden}: start Python in another folder"
            )
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
CAPABILITIES = ("avx512", "avx2", "plain")


def _forced_by_environment() -> str | None:
    value = os.environ.get("MODMASK_BACKEND", "")
    if value and value not in BACKENDS:
        raise ValueError(f"MODMASK_BACKEND must be one of {', '.join(BACKENDS)}, not {value!r}")
    if value == "cpu" and not available():
        raise RuntimeError(f"MODMASK_BACKEND=cpu, but the compiled kernels are {LOAD_ERROR}")
    return value or None


FORCED_BACKEND: str | None = _forced_by_environment()
"""The backend that MODMASK_BACKEND asked for when the package was imported, or None."""

WANTED_CAPABILITY: str | None = os.environ.get("MODMASK_CPU_CAPABILITY") or None
"""The value of MODMASK_CPU_CAPABILITY; one that this CPU does not support is ignored."""
if WANTED_CAPABILITY not in (None, *CAPABILITIES):
    raise ValueError(
        f"MODMASK_CPU_CAPABILITY must be one of {', '.join(CAPABILITIES)}, "
        f"not {WANTED_CAPABILITY!r}"
    )
if not available() and FORCED_BACKEND is None:
    warnings.warn(
        f"modmask_kernels computes with its slow reference, since the compiled kernels are "
        f"{LOAD_ERROR} (MODMASK_BACKEND=reference asks for that without a warning)",
        RuntimeWarning,
        stacklevel=2,
    )


def enabled() -> bool:
    """Whether the compiled kernels are loaded and not ruled out by MODMASK_BACKEND."""
    return available() and FORCED_BACKEND != "reference"
