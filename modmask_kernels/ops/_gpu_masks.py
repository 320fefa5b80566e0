"""The masks of one operation in the words of GPU kernels, Triton's and those in CUDA C++."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library, estimators
from .sample_mask import sample_mask

_library.define_on_cuda(
    "mask_words_cuda(Tensor logits, Tensor? seed, int[] shape, int samples, int tensor_id, "
    f"SymInt sample_offset, SymInt element_offset, {estimators.SCHEMA}, int[] n_of_m) -> Tensor"
)


class Masks(NamedTuple):
    """The masks of one operation as its schema says them, in the words of the kernels.

    `logits` and `bias_logits` are [sets, ...], like a seed [sets, draws] contiguous within a set.
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
    def draws(self) -> int:
        """Seeds of a set."""
        return self.seed.shape[1] if self.seed is not None and self.seed.dim() == 2 else 1

    @property
    def per_set(self) -> int:
        """Groups of a set: its seeds times the samples of each."""
        return 1 if self.seed is None else self.samples * self.draws

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


# weights that a program of Triton packs, in rows of a word
WORDS_OF_PROGRAM = 128
# words after those of a mask, which tiles of a product read beyond its end
_SLACK = 16


def words_shape(sets: int, per_set: int, bits: int) -> tuple[int, int, int]:
    """The shape of packed masks of so many bits, whole programs and some words more."""
    return sets, per_set, -(-bits // (32 * WORDS_OF_PROGRAM)) * WORDS_OF_PROGRAM + _SLACK


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


# estimators without soft masks
DECIDED = ("threshold", "top_k")


def masks_of(
    logits: Tensor,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    dims: int,
    draw: tuple[Any, ...],
) -> Masks:
    """The masks of a weight of `dims` in the words of the kernels; `draw` from `tensor_id` on."""
    masks = Masks(
        contiguous_sets(logits, dims),
        None if bias_logits is None else contiguous_sets(bias_logits, 1),
        seed if seed is None or seed.dim() < 2 else seed.contiguous(),
        *draw[:-1],
    )
    decided = estimators.NAMES[masks.code] in DECIDED
    return masks._replace(hard=True) if decided else masks


def packed_only(weight: Tensor, logits: Tensor, draw: tuple[Any, ...]) -> str | None:
    """What of these masks only the CUDA library draws, as bits, or None."""
    *_, code, _, _, _, _, n_of_m = draw
    if n_of_m:
        return "n_of_m"
    if estimators.NAMES[code] == "top_k":
        return "the estimator top_k"
    if logits.shape[-weight.dim() :] != weight.shape:
        return "logits smaller than the weight"
    return None


def decided_bias(masks: Masks) -> Masks:
    """Masks of a bias by top_k as those of a threshold, which Triton knows: logits 1 and -1."""
    if estimators.NAMES[masks.code] != "top_k":
        return masks
    logits = masks.bias_logits
    if logits is not None:
        rule = estimators.of_arguments(masks.code, masks.low, masks.high, masks.clamp)
        kept = [sample_mask(row, seed=None, estimator=rule) for row in logits]
        logits = 2.0 * torch.cat(kept) - 1.0
    return masks._replace(bias_logits=logits, code=_THRESHOLD, low=0.0, high=0.0)


_THRESHOLD = estimators.NAMES.index("threshold")


def block_gradients(
    masks: Masks, weight: Tensor, of_group: Callable[[int, Masks], Tensor]
) -> Tensor:
    """The gradient of logits that are fewer than the weights, group by group.

    Without a tensor of more than one weight: the gradient of a mask, times the weight, is summed by
    blocks before the next group begins.

    Args:
        of_group: dlogits of a group, were every logit of the weight kept with a slope of 1, as the
            masks say that it is given; it may not look at their logits.
    """
    small = masks.logits.shape[1:]
    blocks = [part for n, size in zip(small, weight.shape, strict=True) for part in (n, size // n)]
    plain = masks._replace(
        logits=weight.new_empty((1, *weight.shape), dtype=torch.float32),
        bias_logits=None,
        seed=None,
        element_offset=0,
        code=_THRESHOLD,
    )
    seeds = masks.seed
    if seeds is not None:
        seeds = seeds.expand(masks.sets) if seeds.dim() == 0 else seeds
        seeds = seeds.reshape(masks.sets, -1)
    dlogits = masks.logits.new_zeros(masks.logits.shape)
    for g in range(masks.sets * masks.per_set):
        of_mask = of_group(g, plain).view(blocks).sum(tuple(range(1, len(blocks), 2)))
        set_, j = divmod(g, masks.per_set)
        draw, sample = divmod(j, masks.samples)
        of_set: Tensor = torch.ops.modmask.sample_mask_backward(
            of_mask.unsqueeze(0),
            masks.logits[set_],
            None if seeds is None else seeds[set_, draw],
            *(1, masks.tau, masks.tensor_id, masks.sample_offset + sample, masks.element_offset),
            *(masks.code, masks.low, masks.high, masks.clamp, masks.antithetic, []),
        )
        dlogits[set_] += of_set
    return dlogits
