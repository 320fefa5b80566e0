"""Loads the compiled kernels; a failure is kept, to be told by `explain` and `modmask info`.

Those of the CPU are loaded with the package. Those in CUDA C++ are a library of their own, which a
PyTorch without CUDA cannot load; it is loaded when a CUDA tensor first needs it.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch


def _hidden_package(name: str) -> Path | None:
    """The installed package with the library `name`, where a folder of sources hides it."""
    here = Path(__file__).parent
    for entry in sys.path:
        package = Path(entry or ".").resolve() / here.name
        if package != here and any(package.glob(f"{name}.*")):
            return package
    return None


def _load(name: str, absent: str) -> tuple[ModuleType | None, str | None]:
    """The compiled module, or why there is none; `absent` says what is wrong without a file."""
    try:
        return importlib.import_module(f"{__package__}.{name}"), None
    except ModuleNotFoundError:
        hidden = _hidden_package(name)
        if hidden is None:
            return None, f"not built: {absent}"
        return None, (
            f"not built in the source folder {Path(__file__).parent}, which hides the package "
            f"installed in {hidden}: start Python in another folder"
        )
    except (ImportError, OSError) as error:
        return None, f"not loaded: {error}"


LOAD_ERROR: str | None
"""Why the compiled kernels for the CPU are absent, or None."""

_module, LOAD_ERROR = _load(
    "_C", "the package was installed or is run without its compiled extension"
)


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


@functools.cache
def _load_cuda() -> tuple[ModuleType | None, str | None]:
    module, error = _load("_cuda", "no nvcc was found when the package was installed")
    if module is None and torch.version.cuda is None:
        error = f"{error} (this PyTorch is built without CUDA)"
    return module, error


def cuda_load_error() -> str | None:
    """Why the library of CUDA kernels is absent, or None; the first call loads it."""
    return _load_cuda()[1]


def cuda_toolkit() -> str | None:
    """The version of the toolkit that compiled the CUDA kernels, or None without them."""
    module, _ = _load_cuda()
    if module is None:
        return None
    version = module.toolkit_version()
    return f"{version // 1000}.{version % 1000 // 10}"


@functools.cache
def cuda_problem(index: int) -> str | None:
    """Why the CUDA kernels do not run on the CUDA device `index`, or None where they do."""
    module, error = _load_cuda()
    if module is None:
        return f"the CUDA kernels are {error}"
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    with torch.cuda.device(index):
        problem = module.problem()
    if problem is None:
        return None
    return f"the CUDA kernels do not run on {torch.cuda.get_device_name(index)}: {problem}"


def rnn_fits(device: torch.device, *sizes: int) -> bool:
    """Whether the time loop (cell, steps, rows, groups, hidden) runs in one launch on a device."""
    module, _ = _load_cuda()
    if module is None:
        return False
    with torch.cuda.device(device):
        return bool(module.rnn_fits(*sizes))


def refuse(error: Exception) -> NoReturn:
    """Raise it; the command line has one line for it."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    started_as_module = name == "-m" and any(w.startswith("modmask_kernels") for w in sys.orig_argv)
    if name == "modmask" or started_as_module:
        print(f"modmask: {error}", file=sys.stderr)
        raise SystemExit(2)
    raise error


BACKENDS = ("cpu", "cuda", "triton", "reference")
CAPABILITIES = ("avx512", "avx2", "plain")


def _forced_by_environment() -> str | None:
    value = os.environ.get("MODMASK_BACKEND", "")
    if value and value not in BACKENDS:
        expected = ", ".join(BACKENDS)
        refuse(ValueError(f"MODMASK_BACKEND must be one of {expected}, not {value!r}"))
    if value == "cpu" and not available():
        refuse(RuntimeError(f"MODMASK_BACKEND=cpu, but the compiled kernels are {LOAD_ERROR}"))
    if value == "cuda" and cuda_load_error() is not None:
        error = cuda_load_error()
        refuse(RuntimeError(f"MODMASK_BACKEND=cuda, but the CUDA kernels are {error}"))
    return value or None


FORCED_BACKEND: str | None = _forced_by_environment()
"""The backend that MODMASK_BACKEND asked for when the package was imported, or None."""

WANTED_CAPABILITY: str | None = os.environ.get("MODMASK_CPU_CAPABILITY") or None
"""The value of MODMASK_CPU_CAPABILITY; one that this CPU does not support is ignored."""
if WANTED_CAPABILITY not in (None, *CAPABILITIES):
    refuse(
        ValueError(
            f"MODMASK_CPU_CAPABILITY must be one of {', '.join(CAPABILITIES)}, "
            f"not {WANTED_CAPABILITY!r}"
        )
    )
if not available() and FORCED_BACKEND is None:
    warnings.warn(
        f"modmask_kernels computes with its slow reference, since the compiled kernels are "
        f"{LOAD_ERROR} (MODMASK_BACKEND=reference asks for that without a warning)",
        RuntimeWarning,
        stacklevel=2,
    )


def enabled() -> bool:
    """Whether the compiled CPU kernels are loaded and not ruled out by MODMASK_BACKEND."""
    return available() and FORCED_BACKEND != "reference"


def cuda_loaded() -> bool:
    """Whether the CUDA kernels load and are not ruled out by MODMASK_BACKEND.

    Compilers take the answer as it is and do not trace how a library is loaded.
    """
    return FORCED_BACKEND in (None, "cuda") and cuda_load_error() is None


# as torch.compiler.assume_constant_result, which would import the compiler, three seconds
cuda_loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cuda_unserved(device: torch.device) -> str | None:
    """Why the CUDA kernels do not serve tensors of a CUDA device, or None where they do."""
    if FORCED_BACKEND not in (None, "cuda"):
        return f"MODMASK_BACKEND={FORCED_BACKEND}"
    return cuda_problem(torch.cuda.current_device() if device.index is None else device.index)
