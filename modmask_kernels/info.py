"""What is installed here and which backends run: `modmask info`."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import __version__, _native
from .ops import _gpu


def lines() -> list[tuple[str, str]]:
    """Pairs of a name and what is known of it."""
    pairs = [
        ("modmask_kernels", __version__),
        ("torch", f"{torch.__version__} (built for CUDA {torch.version.cuda or 'no'})"),
        ("Python", platform.python_version()),
        ("platform", f"{platform.system()} {platform.machine()}"),
        ("threads", str(torch.get_num_threads())),
    ]
    if _native.available():
        unused = "" if _native.enabled() else f", unused: MODMASK_BACKEND={_native.FORCED_BACKEND}"
        pairs.append(("CPU kernels", f"loaded, capability {_native.capability()}{unused}"))
        pairs.append(("CPU capabilities", ", ".join(_native.capabilities())))
    else:
        pairs.append(("CPU kernels", _native.LOAD_ERROR or "absent"))
    pairs.append(("CUDA kernels", _cuda()))
    pairs.extend((f"cuda:{index}", text) for index, text in enumerate(_cuda_devices()))
    pairs.append(("Triton kernels", _triton()))
    pairs.append(("reference", "always there, plain PyTorch on any device"))
    pairs.append(("MODMASK_BACKEND", _native.FORCED_BACKEND or "not set"))
    wanted = _native.WANTED_CAPABILITY
    ignored = wanted and wanted not in _native.capabilities()
    text = f"{wanted}, ignored: it is not among the capabilities here" if ignored else wanted
    pairs.append(("MODMASK_CPU_CAPABILITY", text or "not set"))
    pairs.append(("MODMASK_GPU_MASKS", _gpu.FORCED_SOURCE or "not set"))
    return pairs


def _cuda() -> str:
    error = _native.cuda_load_error()
    if error is not None:
        return error
    device = "" if torch.cuda.is_available() else "; there is no CUDA device here"
    return f"loaded, built with CUDA {_native.cuda_toolkit()}{device}"


def _triton() -> str:
    reason = _gpu.absent()
    return f"Triton {importlib.metadata.version('triton')}" if reason is None else reason


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    texts = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        problem = _native.cuda_problem(index) or "the CUDA kernels run"
        texts.append(f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}: {problem}")
    return texts


def main() -> None:
    """Print versions, the CPU capability in use and the backends, with reasons for absent ones."""
    pairs = lines()
    width = max(len(name) for name, _ in pairs)
    for name, text in pairs:
        print(f"{name:<{width}}  {text}")


if __name__ == "__main__":
    main()
