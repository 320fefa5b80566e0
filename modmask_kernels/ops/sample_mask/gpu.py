"""`sample_mask` on CUDA tensors: the CUDA kernels where they serve, else the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .. import _library


def unserved(logits: Tensor) -> str | None:
    """Why the CUDA kernels do not serve logits like these, or None."""
    if logits.dtype != torch.float32:
        return f"no CUDA kernel for logits of {logits.dtype}"
    return _native.cuda_unserved(logits.device)


def serve(schema: str, reference: Callable[..., Tensor]) -> None:
    """Serve `modmask::<schema>` on CUDA tensors by the kernel, or the reference."""
    name, arguments = schema.split("(", 1)
    _library.define_on_cuda(f"{name}_cuda({arguments}")
    kernel = getattr(torch.ops.modmask, f"{name}_cuda").default
    at = 1 if name.endswith("_backward") else 0

    def choose(*given: Any) -> Tensor:
        result: Tensor = (reference if unserved(given[at]) else kernel)(*given)
        return result

    _library.implement(name, "CUDA", choose)
