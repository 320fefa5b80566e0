"""`select_linear` on CUDA tensors: the CUDA kernel for few rows, else the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ... import _native
from .. import _library
from .._masked_product import FUSED_DTYPES

_library.define_on_cuda(
    "select_linear_cuda(Tensor x, Tensor weight, Tensor masks, Tensor row_sets, Tensor? bias, "
    "Tensor? bias_masks) -> Tensor"
)

# the kernel reads the weight once for every eight rows; a product per set reads it once per set
MOST_ROWS = 64


def unserved(x: Tensor) -> str | None:
    """Why the CUDA kernel does not serve an input like `x`, or None."""
    if x.dtype not in FUSED_DTYPES:
        return f"no CUDA kernel for {x.dtype}"
    if x.dim() != 2 or x.shape[0] > MOST_ROWS:
        return f"no CUDA kernel for more than {MOST_ROWS} rows"
    return _native.cuda_unserved(x.device)


def serve(reference: Callable[..., Tensor]) -> None:
    """Serve `modmask::select_linear` on CUDA tensors by the kernel, or `reference`."""

    def choose(
        x: Tensor,
        weight: Tensor,
        masks: Tensor,
        row_sets: Tensor,
        bias: Tensor | None,
        bias_masks: Tensor | None,
    ) -> Tensor:
        if unserved(x) is not None:
            return reference(x, weight, masks, row_sets, bias, bias_masks)
        # a graph that is being recorded cannot wait for the answer
        if x.shape[0] and not torch.cuda.is_current_stream_capturing():
            least, most = torch.stack(torch.aminmax(row_sets)).tolist()
            if least < 0 or most >= masks.shape[0]:
                raise RuntimeError(
                    f"row_sets must be at least 0 and below {masks.shape[0]}, the number of sets, "
                    f"but has {least if least < 0 else most}"
                )
        y: Tensor = torch.ops.modmask.select_linear_cuda(
            x, weight, masks, row_sets, bias, bias_masks
        )
        return y

    _library.implement("select_linear", "CUDA", choose)
