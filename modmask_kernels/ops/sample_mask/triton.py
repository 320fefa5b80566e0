"""Packed masks by Triton: all samples of a set at once, its logits read a single time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import UNFUSED, VARYING, Masks, draw_tile


@triton.jit(do_not_specialize=(*VARYING, "first_element", "set_stride", "sample_stride"))
def pack_masks(
    logits_ptr,
    seed_ptr,
    words_ptr,
    count,
    skip,
    logits_stride,
    seed_stride,
    set_stride,
    sample_stride,
    per_set,
    samples,
    sample_offset,
    first_element,
    tensor_id,
    tau,
    low,
    high,
    least,
    most,
    NOISE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Words of 32 bits; bit b of a mask is element first_element + b, whose logit is b - skip."""
    set_ = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * (ROWS * 32)
    bit = tl.arange(0, ROWS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    index = first + bit - skip
    inside = (index >= 0) & (index < count)
    logits_ptr += set_.to(tl.int64) * logits_stride + (first - skip)
    logits = tl.load(logits_ptr + bit, mask=inside, other=0.0)
    powers = (tl.full((1, 32), 1, tl.uint32)) << tl.arange(0, 32).to(tl.uint32)[None, :]
    words = words_ptr + set_.to(tl.int64) * set_stride + (first >> 5) + tl.arange(0, ROWS)
    for j in range(per_set):
        key = tl.full((), 0, tl.int64)
        if NOISE:
            key = tl.load(seed_ptr + set_ * seed_stride + j // samples)
        kept, _, _ = draw_tile(
            logits,
            first_element + first,
            32,
            sample_offset.to(tl.int64) + j % samples,
            tensor_id,
            key,
            tau,
            low,
            high,
            least,
            most,
            ROWS,
            32,
            True,
            NOISE,
            ESTIMATOR,
            ANTITHETIC,
            True,
            True,
        )
        word = tl.sum(tl.where(kept & inside, powers, 0), axis=1)
        tl.store(words + j * sample_stride, word.to(tl.int32, bitcast=True))


_ROWS = 128
# words after those of a mask, which tiles of a product read beyond its end
_SLACK = 16


def empty_words(masks: Masks, *, sets_first: bool = True) -> Tensor:
    """Where `pack` writes."""
    used = triton.cdiv(masks.skip + masks.logits[0].numel(), 32 * _ROWS) * _ROWS
    leading = (masks.sets, masks.per_set) if sets_first else (masks.per_set, masks.sets)
    return torch.empty((*leading, used + _SLACK), dtype=torch.int32, device=masks.logits.device)


def pack(masks: Masks, *, sets_first: bool = True) -> Tensor:
    """The hard masks of every group, one bit per weight, in words of 32 bits.

    Returns:
        int32 `[sets, per_set, words]`, or `[per_set, sets, words]`; bit b & 31 of word b >> 5 is
        weight b - `masks.skip`. Beyond the last weight there are at least 16 words of anything.
    """
    words = empty_words(masks, sets_first=sets_first)
    used = words.shape[-1] - _SLACK
    set_stride, sample_stride = words.stride()[:2] if sets_first else words.stride()[1::-1]
    if used:
        pack_masks[(used // _ROWS, masks.sets)](
            masks.logits,
            words_ptr=words,
            count=masks.logits[0].numel(),
            skip=masks.skip,
            logits_stride=masks.logits.stride(0),
            set_stride=set_stride,
            sample_stride=sample_stride,
            first_element=masks.element_offset - masks.skip,
            **masks.arguments(),
            ROWS=_ROWS,
            num_warps=4,
            **UNFUSED,
        )
    return words
