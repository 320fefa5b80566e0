"""The masks of one operation in the words of GPU kernels, Triton's and those in CUDA C++."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library, estimators

_library.define_on_cuda(
    "mask_words_cuda(Tensor logits, Tensor? seed, int[] shape, int samples, int tensor_id, "
    f"SymInt sample_offset, SymInt element_offset, {estimators.SCHEMA}, int[] n_of_m) -> Tensor"
)


class Masks(NamedTuple):
    """The masks of one operation as its schema says them, in the words of the kernels.

    `logits` and `bias_logits` are [sets, ...], contiguous within a set.
    """

    logits: Tensor
    bias_logits: Tensor | None
    seed: Tensor | None
    tensor_id: int
    bias_tensor_id: int
    sample_offset: int
    element_offset: int
    samples: int
    tau: float
    hard: bool
    code: int
    low: float
    high: float
    clamp: float
    antithetic: bool

    @property
    def sets(self) -> int:
        """How many."""
        return self.logits.shape[0]

    @property
    def per_set(self) -> int:
        """Groups of a set: its seeds times the samples of each."""
        if self.seed is None:
            return 1
        return self.samples * (self.seed.shape[1] if self.seed.dim() == 2 else 1)

    @property
    def noise(self) -> bool:
        """Whether masks are random."""
        of = estimators.of_arguments(self.code, self.low, self.high, self.clamp)
        return self.seed is not None and of.draws

    @property
    def skip(self) -> int:
        """Packed masks begin with the quad of the first weight, that many bits before it."""
        return self.element_offset & 3

    def quads(self, inputs: int) -> bool:
        """Whether every row of a weight begins with a quad of noise."""
        return inputs % 4 == 0 and self.skip == 0

    def arguments(self, bias: bool = False) -> dict[str, Any]:
        """Those of every kernel that draws masks, of the weight or of the bias."""
        ids = {"bias_tensor_id": self.bias_tensor_id} if bias else {"tensor_id": self.tensor_id}
        return {
            **ids,
            "seed_ptr": self.logits if self.seed is None else self.seed,
            "seed_stride": 0 if self.seed is None or not self.seed.dim() else self.seed.stride(0),
            "per_set": self.per_set,
            "samples": self.samples,
            "sample_offset": self.sample_offset,
            "tau": self.tau,
            "low": self.low,
            "high": self.high,
            "least": self.clamp,
            "most": 1.0 - self.clamp,
            "NOISE": self.noise,
            "ESTIMATOR": self.code,
            "ANTITHETIC": self.antithetic,
        }

    def surrogate(self) -> dict[str, Any]:
        """Arguments of kernels that know soft masks or their slope."""
        return {"HARD": self.hard, "UNIT_TAU": self.tau == 1.0}


def contiguous_sets(logits: Tensor, dims: int) -> Tensor:
    """Logits of a parameter of `dims` as [sets, ...], copied only where a set has gaps."""
    logits = logits if logits.dim() == dims + 1 else logits.unsqueeze(0)
    return logits if logits[0].is_contiguous() else logits.contiguous()


def mask_words(masks: Masks, shape: torch.Size, n_of_m: list[int]) -> Tensor:
    """Hard masks of a weight, packed by the CUDA library, of every estimator and granularity.

    Args:
        masks: whose logits are `[sets, *shape]`, or divide that in every dimension.
        n_of_m: n and m, or nothing.

    Returns:
        int32 `[sets, per_set, words]`; bit b & 31 of word b >> 5 is weight b. Beyond the last
        weight there are at least 16 words of anything.
    """
    words: Tensor = torch.ops.modmask.mask_words_cuda(
        masks.logits,
        masks.seed,
        list(shape),
        masks.samples,
        masks.tensor_id,
        masks.sample_offset,
        masks.element_offset,
        masks.code,
        masks.low,
        masks.high,
        masks.clamp,
        masks.antithetic,
        n_of_m,
    )
    return words
