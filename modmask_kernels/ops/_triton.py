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
GUMBEL_SIGMOID = tl.constexpr(0)
HARD_CONCRETE = tl.constexpr(1)
THRESHOLD = tl.constexpr(3)

# whether PTX may stand in a kernel: neither the interpreter nor AMD's compiler takes it
PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)

PHILOX_ROUNDS = tl.constexpr(7)
ONE_MINUS_HALF_STEP = tl.constexpr(1.0 - 2.0**-24)
MINUS_LOG2_E = tl.constexpr(-1.44269504)
EXPONENT_LIMIT = tl.constexpr(100.0)
ROUND_TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def _wide_product(a, b: tl.constexpr):
    """Upper and lower half of a * b: by one instruction, where `tl.umulhi` and `*` are two.

    Beside logits of another layout the compiler then draws exp as often as that layout repeats
    them, so that it is for kernels which have one layout only.
    """
    both = a.to(tl.uint64) * b
    return (both >> 32).to(tl.uint32), both.to(tl.uint32)


@triton.jit
def _round_keys(key, ROUND: tl.constexpr):
    """The keys of a round of Philox; the first is 0."""
    k0 = key.to(tl.uint64).to(tl.uint32)
    k1 = (key.to(tl.uint64) >> 32).to(tl.uint32)
    k0 = tl.add(k0, (ROUND * 0x9E3779B9) & 0xFFFFFFFF, sanitize_overflow=False)
    k1 = tl.add(k1, (ROUND * 0xBB67AE85) & 0xFFFFFFFF, sanitize_overflow=False)
    return k0, k1


@triton.jit
def noise_of_quads(low, high, tensor_id, key):
    """What the noise of all samples of quads has in common: three of its products.

    The sample enters the second round, beside what is the same for all quads.

    Args:
        low: uint32, the lower half of their numbers. high: the upper half, also of all at once.
    """
    k0, k1 = _round_keys(key, 0)
    hi, s0 = _wide_product(low, 0xD2511F53)
    hi, s1 = _wide_product(hi ^ (high.to(tl.uint32) ^ k1), 0xCD9E8D57)
    k0, k1 = _round_keys(key, 1)
    _, of_tensor = _wide_product(tensor_id.to(tl.uint32), 0xCD9E8D57)
    s2, s3 = _wide_product(hi ^ (of_tensor ^ k0), 0xD2511F53)
    return s0, s1, s2, s3


@triton.jit
def noise_of_sample(s0, s1, s2, s3, sample, tensor_id, key):
    """The four words of `_philox` of a sample, from `noise_of_quads` of the same key."""
    k0, k1 = _round_keys(key, 0)
    of_tensor, _ = _wide_product(tensor_id.to(tl.uint32), 0xCD9E8D57)
    hi, lo = _wide_product(of_tensor ^ sample.to(tl.uint32) ^ k0, 0xD2511F53)
    k0, k1 = _round_keys(key, 1)
    c2 = s0 ^ (hi ^ k1)
    k0, k1 = _round_keys(key, 2)
    hi, c1 = _wide_product(c2, 0xCD9E8D57)
    c0 = hi ^ s1 ^ k0
    c2 = s2 ^ (lo ^ k1)
    c3 = s3
    for i in tl.static_range(3, PHILOX_ROUNDS):
        k0, k1 = _round_keys(key, i)
        hi0, lo0 = _wide_product(c0, 0xD2511F53)
        hi1, lo1 = _wide_product(c2, 0xCD9E8D57)
        c0 = hi1 ^ c1 ^ k0
        c1 = lo1
        c2 = hi0 ^ c3 ^ k1
        c3 = lo0
    return c0, c1, c2, c3


@triton.jit
def _philox(quad, sample, tensor_id, key):
    """Four words of noise."""
    c0 = quad.to(tl.uint32)
    c1 = sample.to(tl.uint32)
    c2 = tensor_id.to(tl.uint32)
    c3 = (quad >> 32).to(tl.uint32)
    return tl.philox(key, c0, c1, c2, c3, PHILOX_ROUNDS)


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
    return in_order(w0, w1, w2, w3)


@triton.jit
def in_order(w0, w1, w2, w3):
    """The words of quads [..., n] as those of elements [..., 4 * n]."""
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def uniform(words):
    """u = (2k+1) * 2**-24 of words whose upper 23 bits are k; every operation is exact."""
    return ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - ONE_MINUS_HALF_STEP


@triton.jit
def exp_minus(logits):
    """exp(-logit) as every backend rounds it; NaN gives the largest value."""
    t = logits * MINUS_LOG2_E
    t = tl.minimum(t, EXPONENT_LIMIT)  # of NaN the limit
    t = tl.maximum(t, -EXPONENT_LIMIT)
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
def exp_minus_about(logits):
    """exp(-logit) for surrogates, which need no bits: a few units in the last place from it."""
    t = logits * MINUS_LOG2_E
    t = tl.minimum(t, EXPONENT_LIMIT)  # of NaN the limit
    if PTX:
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [t], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        e = tl.exp2(t)
    return e


@triton.jit
def _reciprocal(x):
    """1 / x of normal numbers, where one unit in the last place does not matter."""
    if PTX:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = 1.0 / x
    return y


@triton.jit
def _surrogate(logits, u, rest, ue, tau, UNIT_TAU: tl.constexpr):
    if UNIT_TAU:
        inverse = _reciprocal(ue + rest)
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
        number = number_of(sample, ANTITHETIC)
        words = noise_tile(first, stride, number, tensor_id, key, ROWS, COLUMNS, QUADS)
    return draw(
        logits, words, sample, tau, low, high, least, most, NOISE, ESTIMATOR, ANTITHETIC, UNIT_TAU
    )


@triton.jit
def slope_of(e, words):
    """The slope of the soft mask at tau 1, from `exp_minus_about` of the logits and their noise."""
    if PTX:  # an exponent is shifted in with k
        one_and_k = tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, 0x7F, 9;", "=r,r", [words], tl.float32, is_pure=True, pack=1
        )
        u = one_and_k - ONE_MINUS_HALF_STEP
    else:
        u = uniform(words)
    rest = 1.0 - u
    value = rest * _reciprocal(tl.fma(u, e, rest))
    return tl.fma(-value, value, value)


# Two more bits of `$1`: 0, and whether a weight with noise `$2` and exp(-logit) `$3` is removed.
# Of u * e < 1 - u both sides and u are doubled: rounded towards zero, 2ue + 2u is below 2 exactly
# where the sum is, and so has no bit 30.
PUSH_REMOVED = tl.constexpr("""{ .reg .b32 m; .reg .f32 u, v;
shf.r.wrap.b32 m, $2, 0x80, 9;
mov.b32 u, m;
add.rn.f32 u, u, 0fBFFFFFFF;
mul.rn.f32 v, u, $3;
add.rz.f32 v, v, u;
mov.b32 m, v;
shf.l.wrap.b32 $0, m, $1, 2; }""")


@triton.jit
def push_removed(bits, words, e):
    """`bits`, shifted by two, and below whether weights are removed, by Gumbel noise."""
    if PTX:
        bits = tl.inline_asm_elementwise(
            PUSH_REMOVED, "=r,r,r,r", [bits, words, e], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        u = uniform(words)
        bits = (bits << 2) | (u * e >= 1.0 - u).to(tl.uint32)
    return bits


@triton.jit
def load(ptr, inside, EVEN: tl.constexpr):
    """What is inside, else 0; with EVEN all is."""
    return tl.load(ptr) if EVEN else tl.load(ptr, mask=inside, other=0)


@triton.jit
def _words_tile(
    words_ptr,
    first,
    stride,
    inside,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr = False,
):
    at = (first & 31).to(tl.int32) + tl.arange(0, ROWS)[:, None] * stride
    at = at + 32 * tl.arange(0, COLUMNS // 32)[None, :]
    words = words_ptr + (first >> 5) + (at >> 5)
    word = load(words, inside, EVEN).to(tl.uint32, bitcast=True)
    if not WHOLE:
        above = tl.load(words + 1, mask=inside, other=0).to(tl.uint32, bitcast=True)
        both = (above.to(tl.uint64) << 32) | word
        word = (both >> (at & 31).to(tl.uint64)).to(tl.uint32)
    return word


@triton.jit
def bits_tile(
    words_ptr,
    first,
    stride,
    inside,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    SPREAD: tl.constexpr = False,
):
    """A tile of packed bits as booleans; bit `first` is its corner.

    Args:
        inside: [ROWS, 1], which rows exist. Words up to COLUMNS bits beyond the last must exist.
        WHOLE: whether every row of the tile begins with a word.
        SPREAD: whether the bits of a word lie as `place` says; only if WHOLE.
    """
    word = _words_tile(words_ptr, first, stride, inside, ROWS, COLUMNS, WHOLE)
    bit = tl.arange(0, 32)
    if SPREAD:
        bit = place(bit)
    bits = (word[:, :, None] >> bit.to(tl.uint32)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLUMNS)) != 0


@triton.jit
def place(weight):
    """The bit of a word that says of one of its 32 weights whether it is kept, where they are
    spread: those of a quad shifted to the top are the signs of bytes 3 and 1, and, by one bit more,
    of the same bytes."""
    return 31 - ((weight & 1) | (weight >> 2 & 6) | (weight << 1 & 8) | (weight << 3 & 16))


# A weight remains where the top bit of its word is set: `prmt` with the upper bit of a selector's
# digit fills a byte with the sign of byte 3 (of the first word, digit B, or of the second, F).
KEEP_PAIR = tl.constexpr("{ .reg .b32 mask; prmt.b32 mask, $2, $3, 0xFFBB; and.b32 $0, $1, mask; }")
KEEP_ONE = tl.constexpr("{ .reg .b32 mask; prmt.b32 mask, $2, $2, 0xBBBB; and.b32 $0, $1, mask; }")

# The same of the quads of spread words, whose weights 0, 1, 2 and 3 have the signs of bytes 3 and 1
# of a word and of the word shifted by one. The word comes with the power of two that shifts it to
# its quad: the unit of products has nothing else to do.
KEEP_QUAD_OF_PAIRS = tl.constexpr("""{ .reg .b32 even, odd, mask;
mul.lo.u32 even, $4, $8;
shl.b32 odd, even, 1;
prmt.b32 mask, even, odd, 0xFFBB;
and.b32 $0, $2, mask;
prmt.b32 mask, even, odd, 0xDD99;
and.b32 $1, $3, mask; }""")
KEEP_QUAD = tl.constexpr("""{ .reg .b32 even, odd, mask;
mul.lo.u32 even, $8, $12;
shl.b32 odd, even, 1;
prmt.b32 mask, even, even, 0xBBBB;
and.b32 $0, $4, mask;
prmt.b32 mask, odd, odd, 0xBBBB;
and.b32 $1, $5, mask;
prmt.b32 mask, even, even, 0x9999;
and.b32 $2, $6, mask;
prmt.b32 mask, odd, odd, 0x9999;
and.b32 $3, $7, mask; }""")


@triton.jit
def _kept_of_quads(weight, word, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    quad = tl.arange(0, 8)
    power = (1 << ((quad & 6) | (quad << 3 & 8)))[None, None, :, None]
    word = tl.broadcast_to(word[:, :, None, None], (ROWS, COLUMNS // 32, 8, 4))
    power = tl.broadcast_to(power, (ROWS, COLUMNS // 32, 8, 4))
    word = tl.reshape(word, (ROWS, COLUMNS)).to(tl.int32, bitcast=True)
    power = tl.reshape(power, (ROWS, COLUMNS))
    if weight.dtype.primitive_bitwidth == 16:
        kept = tl.inline_asm_elementwise(
            KEEP_QUAD_OF_PAIRS,
            "=r,=r,r,r,r,r,r,r,r,r,r,r",
            [weight.to(tl.int16, bitcast=True), word, power],
            dtype=tl.int16,
            is_pure=True,
            pack=4,
        ).to(weight.dtype, bitcast=True)
    else:
        kept = tl.inline_asm_elementwise(
            KEEP_QUAD,
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r",
            [weight.to(tl.int32, bitcast=True), word, power],
            dtype=tl.int32,
            is_pure=True,
            pack=4,
        ).to(weight.dtype, bitcast=True)
    return kept


@triton.jit
def kept_tile(
    weight,
    words_ptr,
    first,
    stride,
    inside,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    SPREAD: tl.constexpr = False,
    EVEN: tl.constexpr = False,
):
    """A tile of weights where their packed bits are set, else 0; arguments as for `bits_tile`.

    EVEN: whether all rows exist.
    """
    if PTX and SPREAD:
        word = _words_tile(words_ptr, first, stride, inside, ROWS, COLUMNS, WHOLE, EVEN)
        kept = _kept_of_quads(weight, word, ROWS, COLUMNS)
    elif PTX:
        word = _words_tile(words_ptr, first, stride, inside, ROWS, COLUMNS, WHOLE)
        octet = word[:, :, None] << (24 - 8 * tl.arange(0, 4)).to(tl.uint32)[None, None, :]
        top = octet[:, :, :, None] << (7 - tl.arange(0, 8)).to(tl.uint32)[None, None, None, :]
        top = tl.reshape(top, (ROWS, COLUMNS)).to(tl.int32, bitcast=True)
        if weight.dtype.primitive_bitwidth == 16:
            kept = tl.inline_asm_elementwise(
                KEEP_PAIR,
                "=r,r,r,r",
                [weight.to(tl.int16, bitcast=True), top],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            ).to(weight.dtype, bitcast=True)
        else:
            kept = tl.inline_asm_elementwise(
                KEEP_ONE,
                "=r,r,r",
                [weight.to(tl.int32, bitcast=True), top],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            ).to(weight.dtype, bitcast=True)
    else:
        bits = bits_tile(words_ptr, first, stride, inside, ROWS, COLUMNS, WHOLE, SPREAD)
        kept = tl.where(bits, weight, 0.0)
    return kept


@triton.jit
def packed_tile(kept, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of booleans as words [ROWS, COLUMNS // 32] of 32 bits."""
    powers = tl.full((1, 1, 32), 1, tl.uint32) << tl.arange(0, 32).to(tl.uint32)[None, None, :]
    bits = tl.reshape(kept, (ROWS, COLUMNS // 32, 32))
    return tl.sum(tl.where(bits, powers, 0), axis=2).to(tl.int32, bitcast=True)


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
    """A tile of the result, M x N, the depth of a step, K, and how it is computed.

    registers: most of a thread where `has_large_tiles`, so that a processor holds two programs; 0
    for what the compiler wants.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    registers: int = 0

    def launch(self, limited: bool = False) -> dict[str, Any]:
        """As arguments of a kernel of this package; `limited`: in registers."""
        return {
            "M": self.m,
            "N": self.n,
            "K": self.k,
            "num_warps": self.warps,
            "num_stages": self.stages,
            **({"maxnreg": self.registers} if limited and self.registers else {}),
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
