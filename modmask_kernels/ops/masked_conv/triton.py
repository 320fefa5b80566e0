"""`masked_conv` by Triton: convolutions as products with tiles of a masked weight (implicit GEMM).

A weight is `[outputs of a part, depth]`, a part being one of the `groups` of the convolution and
depth its channels and taps, as they lie in memory: tiles of masks are those of `masked_linear`.
Images come and go as `[batch, channels, height, width]`, contiguous. A tile has the outputs (or
channels) of a part as rows and pixels as columns, so that neighbouring lanes read and write
neighbouring pixels; patches exist only as tiles. Pixels are those of a stack: one image where its
pixels fill tiles, then stores, and loads of kernels 1x1, are vectors; else all images of a group.
The gradient of x is a convolution of dy by the transposed weight, whose tiles are gathered: bits
cost a load per weight there, noise a Philox per weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    BITS,
    REGENERATE,
    VARYING,
    Config,
    Masks,
    bits_tile,
    draw,
    draw_tile,
    noise_at,
    number_of,
    packed_tile,
    precision,
    tile_of_program,
    upcast,
)
from ..masked_linear.triton import _masked_weight, _vector


@triton.jit
def _pixels(
    n0,
    height,
    width,
    COUNT: tl.constexpr,
    PER_IMAGE: tl.constexpr,
):
    """Of the pixels n0.. of a stack: their first image, and [1, COUNT] image after that, row,
    column and number in their image."""
    n = tl.arange(0, COUNT)[None, :]
    if PER_IMAGE:
        first = n0 * 0
        image = n * 0
        number = n0 + n
    else:
        first = n0 // (height * width)
        number = n0 - first * (height * width) + n
        image = number // (height * width)
        number -= image * (height * width)
    row = number // width
    return first, image, row, number - row * width, number


@triton.jit
def _patches(
    x_ptr,
    k,
    inside,
    image,
    row,
    column,
    number,
    stride,
    height,
    width,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    FLAT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """x [k, pixels] at channel and tap k of the patches of pixels, zeros where not `inside`.

    Args:
        x_ptr: the first channel of the first image. stride: from image to image.
    """
    if FLAT:
        x = tl.load(x_ptr + (k * (height * width) + number), mask=inside, other=0.0)
    else:
        channel = k // (KH * KW)
        tap = k - channel * (KH * KW)
        down = (tap // KW) * dilation_h
        right = (tap % KW) * dilation_w
        top = row * SH - pad_h
        left = column * SW - pad_w
        of_pixel = image * stride + top * width + left
        of_tap = channel * (height * width) + down * width + right
        # one comparison tells what is negative too
        inside &= (top + down).to(tl.uint32) < height.to(tl.uint32)
        inside &= (left + right).to(tl.uint32) < width.to(tl.uint32)
        x = tl.load(x_ptr + (of_pixel + of_tap), mask=inside, other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _shadows(
    dy_ptr,
    k,
    inside,
    image,
    row,
    column,
    number,
    stride,
    height,
    width,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    FLAT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dy [k, pixels of x] at output k // taps, where tap k % taps of its patch is the pixel."""
    if FLAT:
        dy = tl.load(dy_ptr + (k * (height * width) + number), mask=inside, other=0.0)
    else:
        output = k // (KH * KW)
        tap = k - output * (KH * KW)
        down = (row + pad_h) - (tap // KW) * dilation_h
        right = (column + pad_w) - (tap % KW) * dilation_w
        p = down // SH
        q = right // SW
        inside &= (down >= 0) & (p < height) & (right >= 0) & (q < width)
        if SH > 1:
            inside &= down == p * SH
        if SW > 1:
            inside &= right == q * SW
        at = image * stride + output * (height * width) + (p * width + q)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0)
    return dy.to(tl.float32) if UPCAST else dy


@triton.jit
def _transposed_weight(
    weight_ptr,
    logits_ptr,
    words_ptr,
    c0,
    k0,
    first_output,
    inputs,
    depth,
    element_offset,
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
    TAPS: tl.constexpr,
    SOURCE: tl.constexpr,
    NOISE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    HARD: tl.constexpr,
    UNIT_TAU: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """W * M of channels c0.. as rows and (output, tap) k0.. as columns, zeros beyond."""
    c = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, COLUMNS)[None, :]
    o0 = k0 // TAPS
    k += k0 - o0 * TAPS
    inside = (c < inputs - c0) & (k < depth - o0 * TAPS)
    corner = (first_output + o0).to(tl.int64) * (inputs * TAPS) + c0 * TAPS
    offset = (k // TAPS) * (inputs * TAPS) + c * TAPS + k % TAPS
    weight = tl.load(weight_ptr + corner + offset, mask=inside, other=0.0)
    if UPCAST:
        weight = weight.to(tl.float32)
    if SOURCE == BITS:
        first = corner + (element_offset.to(tl.int64) & 3)
        bit = (first & 31).to(tl.int32) + offset
        word = tl.load(words_ptr + (first >> 5) + (bit >> 5), mask=inside, other=0)
        weight = tl.where(((word >> (bit & 31)) & 1) != 0, weight, 0.0)
    else:
        logits = tl.load(logits_ptr + corner + offset, mask=inside, other=0.0)
        words = logits
        if NOISE:
            element = (element_offset.to(tl.int64) + corner) + offset
            words = noise_at(element, number_of(sample, ANTITHETIC), tensor_id, key)
        kept, value, _ = draw(
            logits,
            words,
            sample,
            tau,
            low,
            high,
            least,
            most,
            NOISE,
            ESTIMATOR,
            ANTITHETIC,
            UNIT_TAU,
        )
        if HARD:
            weight = tl.where(kept, weight, 0.0)
        else:
            weight = (weight.to(tl.float32) * value).to(weight.dtype)
    return weight


# arguments that differ from batch to batch
_VARYING = (*VARYING, "images", "splits", "stacks")


@triton.jit(do_not_specialize=_VARYING)
def masked_convolution(
    a_ptr,
    weight_ptr,
    logits_ptr,
    words_ptr,
    bias_ptr,
    bias_logits_ptr,
    seed_ptr,
    result_ptr,
    stacks,
    images,
    parts,
    inputs,
    outputs,
    height,
    width,
    out_height,
    out_width,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    sets,
    per_set,
    samples,
    logits_stride,
    bias_logits_stride,
    seed_stride,
    words_stride,
    sample_offset,
    element_offset,
    tensor_id,
    bias_tensor_id,
    tau,
    low,
    high,
    least,
    most,
    BACKWARD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    FLAT: tl.constexpr,
    BIAS: tl.constexpr,
    MASKED_BIAS: tl.constexpr,
    SOURCE: tl.constexpr,
    QUADS: tl.constexpr,
    WORDS: tl.constexpr,
    NOISE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    HARD: tl.constexpr,
    UNIT_TAU: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """y = x * (W*M) + bias, or with BACKWARD dx from dy, of all groups.

    `a` is x or dy, `[groups * stacks * images, channels, height, width]`. `inputs` and `outputs`
    are those of a part.
    """
    TAPS: tl.constexpr = KH * KW
    if BACKWARD:
        rows = inputs
        depth = outputs * TAPS
        a_channels = outputs
        to_height = height
        to_width = width
        a_height = out_height
        a_width = out_width
    else:
        rows = outputs
        depth = inputs * TAPS
        a_channels = inputs
        to_height = out_height
        to_width = out_width
        a_height = height
        a_width = width
    pixels = images * (to_height * to_width)
    tiles = tl.cdiv(pixels, N)
    band, column = tile_of_program(
        tl.program_id(0), sets * per_set * parts * stacks * tiles, tl.cdiv(rows, M), N, M, TOGETHER
    )
    stack = band // tiles
    n0 = (band - stack * tiles) * N
    part = stack // stacks
    stack -= part * stacks
    group = part // parts
    part -= group * parts
    m0 = column * M
    set_ = group // per_set
    j = group - set_ * per_set
    sample = sample_offset.to(tl.int64) + j % samples
    key = tl.full((), 0, tl.int64)
    if NOISE:
        key = tl.load(seed_ptr + set_ * seed_stride + j // samples)
    logits_ptr += set_.to(tl.int64) * logits_stride
    words_ptr += group.to(tl.int64) * words_stride

    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    k = tl.arange(0, K)[:, None]
    there = n < pixels - n0
    first, image, row, column_, number = _pixels(n0, to_height, to_width, N, PER_IMAGE)
    first_image = (group.to(tl.int64) * stacks + stack) * images + first
    a_stride = parts * a_channels * (a_height * a_width)
    a_ptr += first_image * a_stride + part * a_channels * (a_height * a_width)
    total = tl.zeros((M, N), dtype=tl.float32)
    for k0 in range(0, depth, K):
        if BACKWARD and TAPS > 1:
            w = _transposed_weight(
                weight_ptr,
                logits_ptr,
                words_ptr,
                m0,
                k0,
                part * outputs,
                inputs,
                depth,
                element_offset,
                sample,
                tensor_id,
                key,
                tau,
                low,
                high,
                least,
                most,
                M,
                K,
                TAPS,
                SOURCE,
                NOISE,
                ESTIMATOR,
                ANTITHETIC,
                HARD,
                UNIT_TAU,
                UPCAST,
            )
        else:
            if BACKWARD:
                o0 = part * outputs + k0
                i0 = m0
            else:
                o0 = part * outputs + m0
                i0 = k0
            w = _masked_weight(
                weight_ptr,
                logits_ptr,
                words_ptr,
                o0,
                i0,
                (part + 1) * outputs,
                inputs * TAPS,
                element_offset,
                sample,
                tensor_id,
                key,
                tau,
                low,
                high,
                least,
                most,
                K if BACKWARD else M,
                M if BACKWARD else K,
                SOURCE,
                QUADS,
                WORDS,
                NOISE,
                ESTIMATOR,
                ANTITHETIC,
                HARD,
                UNIT_TAU,
                UPCAST,
            )
            if BACKWARD:
                w = tl.trans(w)
        if BACKWARD:
            a = _shadows(
                a_ptr,
                k0 + k,
                there & (k < depth - k0),
                image,
                row,
                column_,
                number,
                a_stride,
                a_height,
                a_width,
                pad_h,
                pad_w,
                dilation_h,
                dilation_w,
                KH,
                KW,
                SH,
                SW,
                FLAT,
                UPCAST,
            )
        else:
            a = _patches(
                a_ptr,
                k0 + k,
                there & (k < depth - k0),
                image,
                row,
                column_,
                number,
                a_stride,
                a_height,
                a_width,
                pad_h,
                pad_w,
                dilation_h,
                dilation_w,
                KH,
                KW,
                SH,
                SW,
                FLAT,
                UPCAST,
            )
        total = tl.dot(w, a, total, input_precision=PRECISION)

    row0 = part * rows + m0
    if BIAS:
        bias = _vector(bias_ptr, row0, (part + 1) * rows, M)
        if MASKED_BIAS:
            bias_logits_ptr += set_.to(tl.int64) * bias_logits_stride
            kept, value, _ = draw_tile(
                _vector(bias_logits_ptr, row0, (part + 1) * rows, M),
                row0.to(tl.int64),
                0,
                sample,
                bias_tensor_id,
                key,
                tau,
                low,
                high,
                least,
                most,
                1,
                M,
                False,
                NOISE,
                ESTIMATOR,
                ANTITHETIC,
                UNIT_TAU,
            )
            bias = tl.where(kept, bias, 0.0) if HARD else bias * value
        total += tl.trans(bias)
    area = to_height * to_width
    result_ptr += (first_image * (parts * rows) + row0) * area
    tl.store(
        result_ptr + (image * (parts * rows * area) + m * area + number),
        total.to(result_ptr.dtype.element_ty),
        mask=there & (m < rows - m0),
    )


@triton.jit(do_not_specialize=_VARYING)
def weight_gradients(
    dy_ptr,
    x_ptr,
    weight_ptr,
    logits_ptr,
    seed_ptr,
    dlogits_ptr,
    dweight_ptr,
    words_ptr,
    stacks,
    images,
    parts,
    inputs,
    outputs,
    height,
    width,
    out_height,
    out_width,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    sets,
    per_set,
    samples,
    splits,
    logits_stride,
    seed_stride,
    words_stride,
    sample_offset,
    element_offset,
    tensor_id,
    tau,
    low,
    high,
    least,
    most,
    NEED_LOGITS: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    FLAT: tl.constexpr,
    PACKED: tl.constexpr,
    PACK: tl.constexpr,
    QUADS: tl.constexpr,
    WORDS: tl.constexpr,
    NOISE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    HARD: tl.constexpr,
    UNIT_TAU: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """dlogits[set] = W * sum over samples of D * slope and dweight = sum over groups of D * M.

    D = dy times the patches, of a group. A program owns M outputs of a part and N of channels and
    taps, of one set, or with NEED_WEIGHT of all sets, and of a share of the samples and pixels:
    there are `splits` results to be added up.
    """
    depth = inputs * (KH * KW)
    columns = tl.cdiv(depth, N)
    rows = tl.cdiv(outputs, M)
    part = tl.program_id(0) // (rows * columns)
    row, column = tile_of_program(
        tl.program_id(0) - part * (rows * columns), rows, columns, M, N, TOGETHER
    )
    end = (part + 1) * outputs
    o0 = part * outputs + row * M
    i0 = column * N
    o = tl.arange(0, M)[:, None]
    i = tl.arange(0, N)[:, None]
    inside = (o < end - o0) & (tl.trans(i) < depth - i0)
    corner = o0.to(tl.int64) * depth + i0
    offset = o * depth + tl.trans(i)
    own = (parts * outputs).to(tl.int64) * depth

    area = out_height * out_width
    pixels = images * area
    blocks = tl.cdiv(pixels, K)
    split = tl.program_id(2)
    by_sample = tl.minimum(splits, per_set)
    by_block = splits // by_sample
    share = tl.cdiv(stacks * blocks, by_block)
    first_block = (split // by_sample) * share
    last_block = tl.minimum(first_block + share, stacks * blocks)
    r = tl.arange(0, K)[None, :]

    if NEED_WEIGHT:
        first_set = 0
        last_set = sets
        dweight = tl.zeros((M, N), dtype=tl.float32)
    else:
        first_set = tl.program_id(1)
        last_set = first_set + 1
    for set_ in range(first_set, last_set):
        if not PACKED:
            logits = tl.load(
                logits_ptr + (set_ + tl.full((), 0, tl.int64)) * logits_stride + corner + offset,
                mask=inside,
                other=0.0,
            )
        dlogits = tl.zeros((M, N), dtype=tl.float32)
        for j in range(split % by_sample, per_set, by_sample):
            first_image = (set_ * per_set + j + tl.full((), 0, tl.int64)) * stacks * images
            product = tl.zeros((M, N), dtype=tl.float32)
            for block in range(first_block, last_block):
                stack = block // blocks
                r0 = (block - stack * blocks) * K
                there = r < pixels - r0
                first, image, p, q, number = _pixels(r0, out_height, out_width, K, PER_IMAGE)
                at = first_image + stack * images + first
                dy = tl.load(
                    dy_ptr
                    + (at * (parts * outputs) + o0) * area
                    + (image * (parts * outputs * area) + o * area + number),
                    mask=there & (o < end - o0),
                    other=0.0,
                )
                if UPCAST:
                    dy = dy.to(tl.float32)
                x_stride = parts * inputs * (height * width)
                patches = _patches(
                    x_ptr + at * x_stride + part * inputs * (height * width),
                    i0 + i,
                    there & (i < depth - i0),
                    image,
                    p,
                    q,
                    number,
                    x_stride,
                    height,
                    width,
                    pad_h,
                    pad_w,
                    dilation_h,
                    dilation_w,
                    KH,
                    KW,
                    SH,
                    SW,
                    FLAT,
                    UPCAST,
                )
                product = tl.dot(dy, tl.trans(patches), product, input_precision=PRECISION)
            words = words_ptr + (set_ * per_set + j + tl.full((), 0, tl.int64)) * words_stride
            if PACKED:
                kept = bits_tile(
                    words,
                    corner,
                    depth,
                    o < end - o0,
                    M,
                    N,
                    WORDS,
                )
            else:
                key = tl.full((), 0, tl.int64)
                if NOISE:
                    key = tl.load(seed_ptr + set_ * seed_stride + j // samples)
                kept, value, slope = draw_tile(
                    logits,
                    element_offset.to(tl.int64) + corner,
                    depth,
                    sample_offset.to(tl.int64) + j % samples,
                    tensor_id,
                    key,
                    tau,
                    low,
                    high,
                    least,
                    most,
                    M,
                    N,
                    QUADS,
                    NOISE,
                    ESTIMATOR,
                    ANTITHETIC,
                    UNIT_TAU,
                )
            if PACK:
                w = tl.arange(0, N // 32)[None, :]
                there = (o < end - o0) & (w < (depth - i0) // 32) & (split < by_sample)
                to = words + (corner >> 5) + (o * (depth // 32) + w)
                tl.store(to, packed_tile(kept, M, N), mask=there)
            if NEED_LOGITS:
                dlogits += product * slope
            if NEED_WEIGHT:
                dweight += tl.where(kept, product, 0.0) if HARD else product * value
        if NEED_LOGITS:
            weight = tl.load(weight_ptr + corner + offset, mask=inside, other=0.0)
            dlogits *= weight.to(tl.float32)
            to = dlogits_ptr + (split * sets + set_) * own + corner
            tl.store(to + offset, dlogits, mask=inside)
    if NEED_WEIGHT:
        to = dweight_ptr + split * own + corner
        tl.store(to + offset, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)


class Geometry(NamedTuple):
    """The sizes of a convolution of one group of masks; options as the operation has them."""

    images: int
    parts: int
    inputs: int
    outputs: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    @property
    def depth(self) -> int:
        """Weights of an output."""
        return self.inputs * self.kernel[0] * self.kernel[1]

    @property
    def area(self) -> int:
        """Pixels of an image of x."""
        return self.size[0] * self.size[1]

    @property
    def out_area(self) -> int:
        """Pixels of an image of y."""
        return self.out_size[0] * self.out_size[1]

    @property
    def flat(self) -> bool:
        """Whether pixels of x and of y are the same."""
        return {*self.kernel, *self.stride} == {1} and not any(self.padding)

    def stacked(self, size: tuple[int, int], tile: int) -> tuple[int, int]:
        """(stacks, images of each): pixels of one stack share tiles of that many columns."""
        area = size[0] * size[1]
        wasted = triton.cdiv(area, tile) * tile - area
        return (self.images, 1) if 10 * wasted <= area else (1, self.images)

    def arguments(self, size: tuple[int, int], tile: int) -> dict[str, Any]:
        """Those of every kernel, of tiles of that many pixels of an image of this size."""
        stacks, images = self.stacked(size, tile)
        return {
            "stacks": stacks,
            "images": images,
            "parts": self.parts,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "height": self.size[0],
            "width": self.size[1],
            "out_height": self.out_size[0],
            "out_width": self.out_size[1],
            "pad_h": self.padding[0],
            "pad_w": self.padding[2],
            "dilation_h": self.dilation[0],
            "dilation_w": self.dilation[1],
            "KH": self.kernel[0],
            "KW": self.kernel[1],
            "SH": self.stride[0],
            "SW": self.stride[1],
            "PER_IMAGE": images == 1,
            "FLAT": images == 1 and self.flat,
        }


# Patches are loaded element by element, through registers: the more outputs (of dx channels) a tile
# has, the fewer instructions. The first of a pair is for more than 64 of them.
_HALF = (Config(128, 64, 32, 8, 2), Config(64, 64, 64, 8, 2))
_HALF_BACKWARD = (Config(128, 128, 32, 8, 2), _HALF[1])
_TF32 = (Config(128, 64, 32, 8, 2), Config(64, 64, 32, 8, 2))
_IEEE = Config(64, 32, 32, 8, 2)


def product_config(
    dtype: torch.dtype,
    rows: int,
    tf32: bool = True,
    backward: bool = False,
    regenerate: bool = False,
) -> Config:
    """The tiles of `product`: of `rows` rows of the masked weight, of pixels and depth."""
    few = 0 if rows > 64 else 1
    if dtype == torch.float32:
        # noise of a transposed weight leaves no registers
        return _TF32[1 if regenerate and backward else few] if tf32 else _IEEE
    return (_HALF_BACKWARD if backward else _HALF)[few]


def gradients_config(
    dtype: torch.dtype, outputs: int, tf32: bool = True, simple: bool = True, narrow: bool = False
) -> Config:
    """The tiles of `gradients`: outputs, channels and taps, pixels.

    Args:
        simple: for dlogits of hard masks at temperature 1 alone, with every row of the weight
            beginning with a quad of noise: that leaves registers.
        narrow: two gradients that need more registers than there are for `simple` tiles' half.
    """
    if dtype == torch.float32:
        config = _TF32[1] if tf32 else _IEEE
    else:
        config = Config(128, 32, 64, 8, 2) if simple and outputs > 64 else _HALF[1]
    return config._replace(n=32) if narrow else config


# programs that keep a device busy
PROGRAMS = 264


def splits(tiles: int, per_set: int, blocks: int) -> int:
    """Among how many programs the samples and blocks of pixels behind a tile are shared.

    A multiple of `per_set` or less; every one has at least 8 blocks. The results of all take no
    more memory than twice PROGRAMS tiles.
    """
    wanted = PROGRAMS // tiles
    if wanted <= per_set:
        return max(wanted, 1)
    return per_set * max(min(wanted // per_set, blocks // 8), 1)


def product(
    a: Tensor,
    weight: Tensor,
    masks: Masks,
    geometry: Geometry,
    bias: Tensor | None = None,
    words: Tensor | None = None,
    *,
    backward: bool = False,
    tf32: bool = False,
    config: Config | None = None,
) -> Tensor:
    """x * (W*M) + bias of every group, or with `backward` dx from dy.

    Args:
        a: x `[groups * images, channels, *size]` or dy `[groups * images, outputs, *out_size]`,
            contiguous.
        weight: `[outputs, inputs, *kernel]`, contiguous, dtype of `a`.
        masks, bias, words: as in `masked_linear`.
    """
    g = geometry
    rows, size = (g.inputs, g.size) if backward else (g.outputs, g.out_size)
    result = a.new_empty((a.shape[0], g.parts * rows, *size))
    if not result.numel():
        return result
    config = config or product_config(a.dtype, rows, tf32, backward, words is None)
    stacks, images = g.stacked(size, config.n)
    tiles = triton.cdiv(images * size[0] * size[1], config.n) * triton.cdiv(rows, config.m)
    inputs = g.inputs if backward else g.depth  # where rows of a tile are as in the weight
    masked_convolution[(masks.sets * masks.per_set * g.parts * stacks * tiles,)](
        a,
        weight,
        masks.logits,
        masks.logits if words is None else words,
        weight if bias is None else bias,
        masks.logits if masks.bias_logits is None else masks.bias_logits,
        result_ptr=result,
        **g.arguments(size, config.n),
        sets=masks.sets,
        logits_stride=masks.logits.stride(0),
        bias_logits_stride=0 if masks.bias_logits is None else masks.bias_logits.stride(0),
        words_stride=0 if words is None else words.stride(-2),
        element_offset=masks.element_offset,
        bias_tensor_id=masks.bias_tensor_id,
        **masks.arguments(),
        **masks.surrogate(),
        BACKWARD=backward,
        BIAS=bias is not None,
        MASKED_BIAS=bias is not None and masks.bias_logits is not None,
        SOURCE=(REGENERATE if words is None else BITS).value,
        QUADS=masks.quads(inputs),
        WORDS=inputs % 32 == 0 and masks.skip == 0,
        UPCAST=upcast(a.dtype),
        PRECISION=precision(a.dtype, tf32),
        TOGETHER=8,
        **config.launch(),
    )
    return result


def packs(masks: Masks, geometry: Geometry, need_weight: bool, need_logits: bool) -> bool:
    """Whether `gradients` can write the packed masks, for which it has noise."""
    whole = geometry.depth % 32 == 0 and masks.skip == 0
    return masks.hard and whole and need_logits and not need_weight and masks.logits.numel() > 0


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    masks: Masks,
    geometry: Geometry,
    *,
    need_weight: bool = False,
    need_logits: bool = True,
    words: Tensor | None = None,
    tf32: bool = False,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dlogits [sets, *weight.shape]), each where it is needed.

    Args:
        dy, x, weight, masks: as in `product`.
        words: packed masks, for dweight alone; logits and noise are not looked at then. For dlogits
            where to write the masks, which are drawn anyway; only if `packs(...)`.
    """
    g = geometry
    assert words is None or not need_logits or packs(masks, g, need_weight, need_logits)
    if not weight.numel():
        empty = masks.logits.new_empty((masks.sets, *weight.shape))
        return torch.empty_like(weight) if need_weight else None, empty if need_logits else None
    if config is None:
        quads = masks.quads(g.depth)
        simple = quads and masks.hard and masks.tau == 1.0 and not need_weight
        wide = quads and masks.tau == 1.0 and x.dtype != torch.float32
        narrow = need_weight and words is None and not wide
        config = gradients_config(x.dtype, g.outputs, tf32, simple, narrow)
    tiles = g.parts * triton.cdiv(g.outputs, config.m) * triton.cdiv(g.depth, config.n)
    stacks, images = g.stacked(g.out_size, config.k)
    blocks = stacks * triton.cdiv(images * g.out_area, config.k)
    count = splits(tiles * (1 if need_weight else masks.sets), masks.per_set, blocks)
    dweight = dlogits = None
    if need_weight:
        dtype = weight.dtype if count == 1 else torch.float32
        dweight = weight.new_empty((count, *weight.shape), dtype=dtype)
    if need_logits:
        dlogits = masks.logits.new_empty((count, masks.sets, *weight.shape))
    weight_gradients[(tiles, 1 if need_weight else masks.sets, count)](
        dy,
        x,
        weight,
        masks.logits,
        dlogits_ptr=masks.logits if dlogits is None else dlogits,
        dweight_ptr=weight if dweight is None else dweight,
        words_ptr=masks.logits if words is None else words,
        **g.arguments(g.out_size, config.k),
        sets=masks.sets,
        splits=count,
        logits_stride=masks.logits.stride(0),
        words_stride=0 if words is None else words.stride(-2),
        element_offset=masks.element_offset,
        **masks.arguments(),
        **masks.surrogate(),
        NEED_LOGITS=need_logits,
        NEED_WEIGHT=need_weight,
        PACKED=words is not None and not need_logits,
        PACK=words is not None and need_logits,
        QUADS=masks.quads(g.depth),
        WORDS=g.depth % 32 == 0 and masks.skip == 0,
        UPCAST=upcast(x.dtype),
        PRECISION=precision(x.dtype, tf32),
        TOGETHER=8,
        **config.launch(),
    )
    return (
        None if dweight is None else _added(dweight).to(weight.dtype),
        None if dlogits is None else _added(dlogits),
    )


def _added(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)
