"""Packed masks by Triton: all samples of a set at once, its logits read a single time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._gpu_masks import WORDS_OF_PROGRAM, words_shape
from .._triton import (
    GUMBEL_SIGMOID,
    UNFUSED,
    VARYING,
    Masks,
    draw,
    exp_minus,
    noise_of_quads,
    noise_of_sample,
    number_of,
    push_removed,
)


@triton.jit
def _push(
    bits,
    words,
    value,
    sample,
    low,
    high,
    least,
    most,
    NOISE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    ANTITHETIC: tl.constexpr,
):
    """`bits`, shifted by two, and below whether weights are removed; `value` as in `pack_masks`."""
    if NOISE and ESTIMATOR == GUMBEL_SIGMOID:
        if ANTITHETIC:
            words = words ^ (0 - (sample & 1)).to(tl.uint32)
        bits = push_removed(bits, words, value)
    else:
        kept, _, _ = draw(
            value, words, sample, 1.0, low, high, least, most, NOISE, ESTIMATOR, ANTITHETIC, True
        )
        bits = (bits << 2) | (kept == 0).to(tl.uint32)
    return bits


@triton.jit
def _quad(turn, SPREAD: tl.constexpr):
    """The quad of a word whose bits are pushed in this turn."""
    if SPREAD:
        return turn // 4 + turn % 4 * 2
    return 7 - turn


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
    draws,
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
    WHOLE: tl.constexpr,
    SPREAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Words of 32 bits; bit b of a mask is element first_element + b, whose logit is b - skip.

    A thread makes whole words. It holds exp(-logit) of its 32 weights, or the logits where that is
    not all of the decision, and of its 8 quads what the noise of all samples has in common.
    WHOLE: first_element, skip and count are multiples of 32 * ROWS. SPREAD: bits lie as `place`
    says.
    """
    QUICK: tl.constexpr = NOISE and ESTIMATOR == GUMBEL_SIGMOID
    set_ = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * (ROWS * 32)
    row = tl.arange(0, ROWS)
    at = row[:, None] * 32 + tl.arange(0, 4)[None, :]
    logits_ptr += set_.to(tl.int64) * logits_stride + (first - skip)
    values = ()
    for turn in tl.static_range(8):
        of_quad = 4 * _quad(turn, SPREAD) + at
        if WHOLE:
            logits = tl.load(logits_ptr + of_quad)
        else:
            index = first + of_quad - skip
            inside = (index >= 0) & (index < count)
            logits = tl.load(logits_ptr + of_quad, mask=inside, other=float("-inf"))
        value = exp_minus(logits) if QUICK else logits
        even, odd = tl.split(tl.reshape(value, (ROWS, 2, 2)))
        v0, v2 = tl.split(even)
        v1, v3 = tl.split(odd)
        values = values + (v0, v1, v2, v3)  # type: ignore[assignment]  # noqa: RUF005
    words_ptr += set_.to(tl.int64) * set_stride + (first >> 5)
    quad = (first_element + first) >> 2
    each = per_set // draws
    for d in range(draws):
        key = tl.full((), 0, tl.int64)
        common = ()
        if NOISE:
            key = tl.load(seed_ptr + set_ * seed_stride + d)
            for turn in tl.static_range(8):
                lower = quad.to(tl.uint32) + (row.to(tl.uint32) * 8 + _quad(turn, SPREAD))
                upper = quad >> 32
                if not WHOLE:
                    upper = (quad + (row * 8 + _quad(turn, SPREAD))) >> 32
                common = common + noise_of_quads(lower, upper, tensor_id, key)
        for s in range(each):
            sample = sample_offset.to(tl.int64) + s
            b0 = tl.zeros((ROWS,), tl.uint32)
            b1 = tl.zeros((ROWS,), tl.uint32)
            b2 = tl.zeros((ROWS,), tl.uint32)
            b3 = tl.zeros((ROWS,), tl.uint32)
            for turn in tl.static_range(8):
                v0 = values[4 * turn]
                v1 = values[4 * turn + 1]
                v2 = values[4 * turn + 2]
                v3 = values[4 * turn + 3]
                if NOISE:
                    w0, w1, w2, w3 = noise_of_sample(
                        common[4 * turn],
                        common[4 * turn + 1],
                        common[4 * turn + 2],
                        common[4 * turn + 3],
                        number_of(sample, ANTITHETIC),
                        tensor_id,
                        key,
                    )
                else:
                    w0, w1, w2, w3 = v0, v1, v2, v3
                if SPREAD:
                    b0 = _push(
                        b0, w0, v0, sample, low, high, least, most, NOISE, ESTIMATOR, ANTITHETIC
                    )
                    b1 = _push(
                        b1, w1, v1, sample, low, high, least, most, NOISE, ESTIMATOR, ANTITHETIC
                    )
                    b2 = _push(
                        b2, w2, v2, sample, low, high, least, most, NOISE, ESTIMATOR, ANTITHETIC
                    )
                    b3 = _push(
                        b3, w3, v3, sample, low, high, least, most, NOISE, ESTIMATOR, ANTITHETIC
                    )
                else:
                    b1 = _push(
                        b1, w3, v3, sample, low, high, least, most, NOISE, ESTIMATOR, ANTITHETIC
                    )
                    b0 = _push(
                        b0, w2, v2, sample, low, high, least, most, NOISE, ESTIMATOR, ANTITHETIC
                    )
                    b1 = _push(
                        b1, w1, v1, sample, low, high, least, most, NOISE, ESTIMATOR, ANTITHETIC
                    )
                    b0 = _push(
                        b0, w0, v0, sample, low, high, least, most, NOISE, ESTIMATOR, ANTITHETIC
                    )
            removed = ((b0 << 17) | (b1 << 16) | (b2 << 1) | b3) if SPREAD else ((b1 << 1) | b0)
            to = words_ptr + (d * each + s) * sample_stride.to(tl.int64)
            tl.store(to + row, (removed ^ 0xFFFFFFFF).to(tl.int32, bitcast=True))


def empty_words(masks: Masks, *, sets_first: bool = True) -> Tensor:
    """Where `pack` writes."""
    bits = masks.skip + masks.logits[0].numel()
    sets, per_set, words = words_shape(masks.sets, masks.per_set, bits)
    shape = (sets, per_set, words) if sets_first else (per_set, sets, words)
    return torch.empty(shape, dtype=torch.int32, device=masks.logits.device)


def pack(masks: Masks, *, sets_first: bool = True, spread: bool = False) -> Tensor:
    """The hard masks of every group, one bit per weight, in words of 32 bits.

    Args:
        spread: whether bit `place(b & 31)`, not b & 31, of word b >> 5 is weight b.

    Returns:
        int32 `[sets, per_set, words]`, or `[per_set, sets, words]`; bit b & 31 of word b >> 5 is
        weight b - `masks.skip`. Beyond the last weight there are at least 16 words of anything.
    """
    words = empty_words(masks, sets_first=sets_first)
    programs = words.shape[-1] // WORDS_OF_PROGRAM
    set_stride, sample_stride = words.stride()[:2] if sets_first else words.stride()[1::-1]
    count, tile = masks.logits[0].numel(), 32 * WORDS_OF_PROGRAM
    if programs:
        pack_masks[(programs, masks.sets)](
            masks.logits,
            words_ptr=words,
            count=count,
            skip=masks.skip,
            logits_stride=masks.logits.stride(0),
            set_stride=set_stride,
            sample_stride=sample_stride,
            draws=masks.draws,
            first_element=masks.element_offset - masks.skip,
            **masks.arguments(),
            WHOLE=masks.element_offset % tile == 0 and count % tile == 0,
            SPREAD=spread,
            ROWS=WORDS_OF_PROGRAM,
            num_warps=4,
            **UNFUSED,
        )
    return words
