"""`top_k_mask` on CUDA tensors: the CUDA kernels where they serve, else the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ... import _native
from .. import _library
from .._masked_product import FUSED_DTYPES

Select = Callable[[Sequence[Tensor], int, bool, bool], list[Tensor]]

# the last tensor is one word, which is not 0 if a score is NaN
_library.define_on_cuda(
    "top_k_mask_cuda(Tensor[] scores, int k, bool largest, bool packed) -> Tensor[]"
)


def serve(reference: Select) -> None:
    """Serve `modmask::top_k_mask` on CUDA tensors by the kernels, or `reference`."""

    def choose(scores: Sequence[Tensor], k: int, largest: bool, packed: bool) -> list[Tensor]:
        first = scores[0]
        if first.dtype not in FUSED_DTYPES or _native.cuda_unserved(first.device) is not None:
            return reference(scores, k, largest, packed)
        found: list[Tensor] = torch.ops.modmask.top_k_mask_cuda(scores, k, largest, packed)
        *masks, nan = found
        # a graph that is being recorded cannot wait for the answer
        if not torch.cuda.is_current_stream_capturing() and bool(nan):
            raise RuntimeError("scores must not hold NaN")
        return masks

    _library.implement("top_k_mask", "CUDA", choose)
