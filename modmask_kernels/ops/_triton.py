"""Masks as Triton device functions: noise, decision, surrogate and packed bits, tile by tile.

They are csrc/common in Triton's words; kernels that call them are compiled with
`enable_fp_fusion=False`, since the decision is made of separately rounded products and sums.
A tile is `rows` x `columns` elements of a parameter whose rows are `stride` apart. Where its first
element is comes as int64; inside a tile 32 bits do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gpu_masks import Masks as Masks
from ._gpu_masks import contiguous_sets as contiguous_sets

# where a product takes its masks from
DENSE = tl.constexpr(0)
BITS = tl.constexpr(1)
REGENERATE = tl.constexpr(2)

# `ops.estimators.NAMES`
HARD_CONCRETE = tl.constexpr(1)
THRESHOLD = tl.constexpr(3)

PHILOX_ROUNDS = tl.constexpr(7)
ONE_MINUS_HALF_STEP = tl.constexpr(1.0 - 2.0**-24)
MINUS_LOG2_E = tl.constexpr(-1.44269504)
EXPONENT_LIMIT = tl.constexpr(100.0)
ROUND_TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def _philox(quad, sample, tensor_id, key):
    return tl.philox(
        key,
        quad.to(tl.uint32),
        sample.to(tl.uint32),
        tensor_id.to(tl.uint32),
        (quad >> 32).to(tl.uint32),
        PHILOX_ROUNDS,
    )


@triton.jit
def noise_tile(
    first,
    stride,
    sample,
    tensor_id,
    key,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUADS: tl.constexpr,
):
    """The noise words of a tile, uint32, one Philox for every four.

    Without QUADS, where rows begin amid a quad, each four weights take theirs from two.
    """
    row = tl.arange(0, ROWS)[:, None]
    four = tl.arange(0, COLUMNS // 4)[None, :]
    if QUADS:
        quad = (first >> 2) + (row * (stride // 4) + four)
        w0, w1, w2, w3 = _philox(quad, sample, tensor_id, key)
    else:
        start = first + row * stride
        quad = (start >> 2) + four
        w0, w1, w2, w3 = _philox(quad, sample, tensor_id, key)
        w4, w5, w6, _ = _philox(quad + 1, sample, tensor_id, key)
        two = (start & 2) != 0
        w0 = tl.where(two, w2, w0)
        w1 = tl.where(two, w3, w1)
        w2 = tl.where(two, w4, w2)
        w3 = tl.where(two, w5, w3)
        w4 = tl.where(two, w6, w4)
        one = (start & 1) != 0
        w0 = tl.where(one, w1, w0)
        w1 = tl.where(one, w2, w1)
        w2 = tl.where(one, w3, w2)
        w3 = tl.where(one, w4, w3)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def uniform(words):
    """u = (2k+1) * 2**-24 of words whose upper 23 bits are k; every operation is exact."""
    return ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - ONE_MINUS_HALF_STEP


@triton.jit
def exp_minus(logits):
    """exp(-logit) as every backend rounds it; NaN gives the largest value."""
    t = logits * MINUS_LOG2_E
    t = tl.where(t < EXPONENT_LIMIT, t, EXPONENT_LIMIT)
    t = tl.where(t > -EXPONENT_LIMIT, t, -EXPONENT_LIMIT)
    shifted = t + ROUND_TO_INTEGER
    f = t - (shifted - ROUND_TO_INTEGER)
    p = f * 0.00015353362 + 0.0013398875
    p = p * f + 0.009618437
    p = p * f + 0.055503324
    p = p * f + 0.24022648
    p = p * f + 0.6931472
    p = p * f + 1.0
    # p is near 1, its exponent far from the ends
    bits = p.to(tl.uint32, bitcast=True) + (shifted.to(tl.uint32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _surrogate(logits, u, rest, ue, tau, UNIT_TAU: tl.constexpr):
    if UNIT_TAU:
        inverse = 1.0 / (ue + rest)
        value = rest * inverse
        slope = value * (ue * inverse)
    else:
        scaled = (logits + tl.log(rest / u)) / tau
        small = tl.exp(-tl.abs(scaled))
        inverse = 1.0 / (1.0 + small)
        value = tl.where(scaled < 0, small, 1.0) * inverse
        slope = small * inverse * inverse / tau
    return value, slope


@triton.jit
def number_of(sample, ANTITHETIC: tl.constexpr):
    """The sample whose noise a sample has."""
    if ANTITHETIC:
        return sample >> 1
    return sample


@triton.jit
def noise_at(element, sample, tensor_id, key):
    """The noise words of elements wherever they are, uint32, a Philox for each."""
    w0, w1, w2, w3 = _philox(element >> 2, sample, tensor_id, key)
    two = (element & 2) != 0
    one = (element & 1) != 0
    return tl.where(two, tl.where(one, w3, w2), tl.where(one, w1, w0))


@triton.jit
def draw(
    logits,
    words,
    sample,
    tau,
    low,
    high,
    least,
    most,
    NOISE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    UNIT_TAU: tl.constexpr,
):
    """(kept, soft value, its slope) of logits; what a caller ignores costs nothing.

    Args:
        words: with NOISE, the noise of every logit, of the sample `number_of` says.
    """
    if ESTIMATOR == THRESHOLD:
        kept = (logits > low) | ((logits == low) & (high != 0))
        value = kept.to(tl.float32)
        slope = tl.full(logits.shape, 1.0, tl.float32)
    else:
        if NOISE:
            if ANTITHETIC:  # 1 - u of a word is u of its complement
                words = words ^ (0 - (sample & 1)).to(tl.uint32)
            u = uniform(words)
            if ESTIMATOR == HARD_CONCRETE:
                u = tl.minimum(tl.maximum(u, least), most)
            rest = 1.0 - u
            ue = u * exp_minus(logits)
            kept = ue < rest
        else:
            u = tl.full(logits.shape, 0.5, tl.float32)
            rest = u
            ue = u * exp_minus(logits)
            kept = logits > 0
        value, slope = _surrogate(logits, u, rest, ue, tau, UNIT_TAU)
        if ESTIMATOR == HARD_CONCRETE:
            value = value * (high - low) + low
            slope = tl.where((value >= 0) & (value <= 1), slope * (high - low), 0.0)
            value = tl.minimum(tl.maximum(value, 0.0), 1.0)
    return kept, value, slope


@triton.jit
def draw_tile(
    logits,
    first,
    stride,
    sample,
    tensor_id,
    key,
    tau,
    low,
    high,
    least,
    most,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUADS: tl.constexpr,
    NOISE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    UNIT_TAU: tl.constexpr,
):
    """`draw` of a tile of logits that lie as in their parameter."""
    words = logits
    if NOISE:
        words = noise_tile(
            first, stride, number_of(sample, ANTITHETIC), tensor_id, key, ROWS, COLUMNS, QUADS
        )
    return draw(
        logits, words, sample, tau, low, high, least, most, NOISE, ESTIMATOR, ANTITHETIC, UNIT_TAU
    )


@triton.jit
def bits_tile(
    words_ptr,
    first,
    stride,
    inside,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A tile of packed bits as booleans; bit `first` is its corner.

    Args:
        inside: [ROWS, 1], which rows exist. Words up to COLUMNS bits beyond the last must exist.
        WHOLE: whether every row of the tile begins with a word.
    """
    at = (first & 31).to(tl.int32) + tl.arange(0, ROWS)[:, None] * stride
    at = at + 32 * tl.arange(0, COLUMNS // 32)[None, :]
    words = words_ptr + (first >> 5) + (at >> 5)
    word = tl.load(words, mask=inside, other=0).to(tl.uint32, bitcast=True)
    if not WHOLE:
        above = tl.load(words + 1, mask=inside, other=0).to(tl.uint32, bitcast=True)
        both = (above.to(tl.uint64) << 32) | word
        word = (both >> (at & 31).to(tl.uint64)).to(tl.uint32)
    bits = (word[:, :, None] >> tl.arange(0, 32).to(tl.uint32)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLUMNS)) != 0


@triton.jit
def tile_of_program(
    pid,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Tile (row, column) of rows x columns tiles; bands of TOGETHER rows share the cache."""
    band = pid // (TOGETHER * columns)
    height = tl.minimum(rows - band * TOGETHER, TOGETHER)
    within = pid - band * (TOGETHER * columns)
    return band * TOGETHER + within % height, within // height


# arguments that differ from layer to layer, for which kernels are not compiled anew
VARYING = (
    "bias_tensor_id",
    "element_offset",
    "per_set",
    "rows",
    "sample_offset",
    "samples",
    "sets",
    "tensor_id",
)


class Config(NamedTuple):
    """A tile of the result, M x N, the depth of a step, K, and how it is computed."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def launch(self) -> dict[str, Any]:
        """As arguments of a kernel of this package."""
        return {
            "M": self.m,
            "N": self.n,
            "K": self.k,
            "num_warps": self.warps,
            "num_stages": self.stages,
            **UNFUSED,
        }


UNFUSED = {"enable_fp_fusion": False}


def upcast(dtype: torch.dtype) -> bool:
    """Whether kernels compute in float32 throughout: Triton's interpreter has no bfloat16."""
    return bool(triton.knobs.runtime.interpret) and dtype == torch.bfloat16


def precision(dtype: torch.dtype, tf32: bool) -> str:
    """The `input_precision` of products."""
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


def has_large_tiles(x: Tensor) -> bool:
    """Whether x lies on a device of compute capability 9, whose matrix units work alone."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9
