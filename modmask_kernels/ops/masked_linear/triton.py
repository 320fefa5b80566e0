"""`masked_linear` by Triton: products with tiles of a masked weight, and its gradients.

The mask meets the weight between memory and the matrix unit. The gradient of the logits is the
epilogue of dy^T x, a tile at a time: neither a mask nor the gradient of a masked weight is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    BITS,
    GUMBEL_SIGMOID,
    REGENERATE,
    UNFUSED,
    VARYING,
    Config,
    Masks,
    draw_tile,
    exp_minus_about,
    has_large_tiles,
    in_order,
    kept_tile,
    load,
    noise_of_quads,
    noise_of_sample,
    number_of,
    precision,
    slope_of,
    tile_of_program,
    upcast,
)


@triton.jit
def _masked_weight(
    weight_ptr,
    logits_ptr,
    words_ptr,
    o0,
    i0,
    outputs,
    inputs,
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
    SOURCE: tl.constexpr,
    QUADS: tl.constexpr,
    WORDS: tl.constexpr,
    NOISE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    HARD: tl.constexpr,
    UNIT_TAU: tl.constexpr,
    UPCAST: tl.constexpr,
    SPREAD: tl.constexpr = False,
    EVEN: tl.constexpr = False,
):
    """W * M of outputs o0.. and inputs i0.., zeros beyond the weight, in its dtype."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    within = row < outputs - o0
    inside = within & (column < inputs - i0)
    corner = o0.to(tl.int64) * inputs + i0
    offset = row * inputs + column
    weight = load(weight_ptr + corner + offset, inside, EVEN)
    if UPCAST:
        weight = weight.to(tl.float32)
    if SOURCE == BITS:
        first = corner + (element_offset.to(tl.int64) & 3)
        weight = kept_tile(
            weight, words_ptr, first, inputs, within, ROWS, COLUMNS, WORDS, SPREAD, EVEN
        )
    elif SOURCE == REGENERATE:
        logits = load(logits_ptr + corner + offset, inside, EVEN)
        kept, value, _ = draw_tile(
            logits,
            element_offset.to(tl.int64) + corner,
            inputs,
            sample,
            tensor_id,
            key,
            tau,
            low,
            high,
            least,
            most,
            ROWS,
            COLUMNS,
            QUADS,
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


@triton.jit
def _vector(
    ptr,
    first,
    count,
    ROWS: tl.constexpr,
):
    at = first + tl.arange(0, ROWS)[None, :]
    return tl.load(ptr + at, mask=at < count, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=VARYING)
def masked_product(
    a_ptr,
    weight_ptr,
    logits_ptr,
    words_ptr,
    bias_ptr,
    bias_logits_ptr,
    seed_ptr,
    result_ptr,
    rows,
    outputs,
    inputs,
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
    BIAS: tl.constexpr,
    MASKED_BIAS: tl.constexpr,
    SOURCE: tl.constexpr,
    QUADS: tl.constexpr,
    WORDS: tl.constexpr,
    SPREAD: tl.constexpr,
    EVEN: tl.constexpr,
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
    """y = x (W*M)^T + bias, or with BACKWARD dx = dy (W*M), of all groups.

    `a` is x [groups * rows, inputs] or dy [groups * rows, outputs]; a tile of M rows lies in one
    group.
    """
    groups = sets * per_set
    tiles = tl.cdiv(rows, M)
    if BACKWARD:
        columns = inputs
        depth = outputs
    else:
        columns = outputs
        depth = inputs
    band, column = tile_of_program(
        tl.program_id(0), groups * tiles, tl.cdiv(columns, N), M, N, TOGETHER
    )
    group = band // tiles
    m0 = (band - group * tiles) * M
    n0 = column * N
    set_ = group // per_set
    j = group - set_ * per_set
    sample = sample_offset.to(tl.int64) + j % samples
    key = tl.full((), 0, tl.int64)
    if NOISE:
        key = tl.load(seed_ptr + set_ * seed_stride + j // samples)
    logits_ptr += set_.to(tl.int64) * logits_stride
    words_ptr += group.to(tl.int64) * words_stride

    m = tl.arange(0, M)[:, None]
    k = tl.arange(0, K)[None, :]
    first = group.to(tl.int64) * rows + m0
    a_ptr += first * depth
    total = tl.zeros((M, N), dtype=tl.float32)
    for k0 in range(0, depth, K):
        a = load(a_ptr + k0 + (m * depth + k), (m < rows - m0) & (k < depth - k0), EVEN)
        if UPCAST:
            a = a.to(tl.float32)
        if BACKWARD:
            o0 = k0
            i0 = n0
        else:
            o0 = n0
            i0 = k0
        b = _masked_weight(
            weight_ptr,
            logits_ptr,
            words_ptr,
            o0,
            i0,
            outputs,
            inputs,
            element_offset,
            sample,
            tensor_id,
            key,
            tau,
            low,
            high,
            least,
            most,
            K if BACKWARD else N,
            N if BACKWARD else K,
            SOURCE,
            QUADS,
            WORDS,
            NOISE,
            ESTIMATOR,
            ANTITHETIC,
            HARD,
            UNIT_TAU,
            UPCAST,
            SPREAD,
            EVEN,
        )
        if BACKWARD:
            total = tl.dot(a, b, total, input_precision=PRECISION)
        else:
            total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)

    if BIAS:
        bias = _vector(bias_ptr, n0, columns, N)
        if MASKED_BIAS:
            bias_logits_ptr += set_.to(tl.int64) * bias_logits_stride
            kept, value, _ = draw_tile(
                _vector(bias_logits_ptr, n0, columns, N),
                n0.to(tl.int64),
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
                N,
                True,
                NOISE,
                ESTIMATOR,
                ANTITHETIC,
                UNIT_TAU,
            )
            bias = tl.where(kept, bias, 0.0) if HARD else bias * value
        total += bias
    n = tl.arange(0, N)[None, :]
    tl.store(
        result_ptr + first * columns + n0 + (m * columns + n),
        total.to(result_ptr.dtype.element_ty),
        mask=(m < rows - m0) & (n < columns - n0),
    )


@triton.jit(do_not_specialize=VARYING)
def weight_gradients(
    dy_ptr,
    x_ptr,
    weight_ptr,
    logits_ptr,
    seed_ptr,
    dlogits_ptr,
    dweight_ptr,
    rows,
    outputs,
    inputs,
    sets,
    draws,
    per_set,
    samples,
    logits_stride,
    seed_stride,
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
    QUADS: tl.constexpr,
    EVEN: tl.constexpr,
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

    D = dy^T x of a group. A program owns M outputs and N inputs, of one set, or with NEED_WEIGHT
    of all sets, and adds in the order of the groups.
    """
    GUMBEL: tl.constexpr = NOISE and ESTIMATOR == GUMBEL_SIGMOID
    QUICK: tl.constexpr = GUMBEL and UNIT_TAU and QUADS and not NEED_WEIGHT
    each = per_set // draws
    row, column = tile_of_program(
        tl.program_id(0), tl.cdiv(outputs, M), tl.cdiv(inputs, N), M, N, TOGETHER
    )
    o0 = row * M
    i0 = column * N
    o = tl.arange(0, M)[:, None]
    i = tl.arange(0, N)[None, :]
    inside = (o < outputs - o0) & (i < inputs - i0)
    corner = o0.to(tl.int64) * inputs + i0
    offset = o * inputs + i
    if NEED_WEIGHT:
        first_set = 0
        last_set = sets
        dweight = tl.zeros((M, N), dtype=tl.float32)
    else:
        first_set = tl.program_id(1)
        last_set = first_set + 1
    for set_ in range(first_set, last_set):
        at = (set_ + tl.full((), 0, tl.int64)) * logits_stride + corner
        logits = load(logits_ptr + at + offset, inside, EVEN)
        if QUICK:
            e = exp_minus_about(logits)
        dlogits = tl.zeros((M, N), dtype=tl.float32)
        for d in range(draws):
            key = tl.full((), 0, tl.int64)
            if NOISE:
                key = tl.load(seed_ptr + set_ * seed_stride + d)
            if QUICK:
                quad = (element_offset.to(tl.int64) + corner) >> 2
                quad = quad + (o * (inputs // 4) + tl.arange(0, N // 4)[None, :])
                s0, s1, s2, s3 = noise_of_quads(quad.to(tl.uint32), quad >> 32, tensor_id, key)
            for s in range(each):
                first = (set_ * per_set + d * each + s) * rows.to(tl.int64)
                product = tl.zeros((M, N), dtype=tl.float32)
                for r0 in range(0, rows, K):
                    r = tl.arange(0, K)[:, None]
                    there = r < rows - r0
                    dy = load(
                        dy_ptr + (first + r0) * outputs + o0 + (r * outputs + tl.trans(o)),
                        there & (tl.trans(o) < outputs - o0),
                        EVEN,
                    )
                    x = load(
                        x_ptr + (first + r0) * inputs + i0 + (r * inputs + i),
                        there & (i < inputs - i0),
                        EVEN,
                    )
                    if UPCAST:
                        dy = dy.to(tl.float32)
                        x = x.to(tl.float32)
                    product = tl.dot(tl.trans(dy), x, product, input_precision=PRECISION)
                sample = sample_offset.to(tl.int64) + s
                if QUICK:
                    w0, w1, w2, w3 = noise_of_sample(
                        s0, s1, s2, s3, number_of(sample, ANTITHETIC), tensor_id, key
                    )
                    words = in_order(w0, w1, w2, w3)
                    if ANTITHETIC:
                        words = words ^ (0 - (sample & 1)).to(tl.uint32)
                    dlogits = tl.fma(product, slope_of(e, words), dlogits)
                else:
                    kept, value, slope = draw_tile(
                        logits,
                        element_offset.to(tl.int64) + corner,
                        inputs,
                        sample,
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
                    if NEED_LOGITS:
                        dlogits += product * slope
                    if NEED_WEIGHT:
                        dweight += tl.where(kept, product, 0.0) if HARD else product * value
        if NEED_LOGITS:
            weight = load(weight_ptr + corner + offset, inside, EVEN)
            dlogits *= weight.to(tl.float32)
            # sets may share logits, never their gradient
            own = set_ * (outputs.to(tl.int64) * inputs)
            tl.store(dlogits_ptr + own + corner + offset, dlogits, mask=inside)
    if NEED_WEIGHT:
        tl.store(
            dweight_ptr + corner + offset,
            dweight.to(dweight_ptr.dtype.element_ty),
            mask=inside,
        )


@triton.jit(do_not_specialize=VARYING)
def bias_gradients(
    sums_ptr,
    bias_ptr,
    bias_logits_ptr,
    seed_ptr,
    dbias_ptr,
    dbias_logits_ptr,
    outputs,
    sets,
    per_set,
    samples,
    bias_logits_stride,
    seed_stride,
    sample_offset,
    bias_tensor_id,
    tau,
    low,
    high,
    least,
    most,
    NEED_LOGITS: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    NOISE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    HARD: tl.constexpr,
    UNIT_TAU: tl.constexpr,
    N: tl.constexpr,
):
    """The gradients of a masked bias from `sums` [groups, outputs], dy summed over its rows."""
    n0 = tl.program_id(0) * N
    n = tl.arange(0, N)[None, :]
    inside = n < outputs - n0
    bias = _vector(bias_ptr, n0, outputs, N)
    dbias = tl.zeros((1, N), dtype=tl.float32)
    for set_ in range(sets):
        logits = _vector(
            bias_logits_ptr + (set_ + tl.full((), 0, tl.int64)) * bias_logits_stride, n0, outputs, N
        )
        dlogits = tl.zeros((1, N), dtype=tl.float32)
        for j in range(per_set):
            sums_ptr_ = sums_ptr + (set_ * per_set + j) * outputs.to(tl.int64)
            sums = _vector(sums_ptr_, n0, outputs, N)
            key = tl.full((), 0, tl.int64)
            if NOISE:
                key = tl.load(seed_ptr + set_ * seed_stride + j // samples)
            kept, value, slope = draw_tile(
                logits,
                n0.to(tl.int64),
                0,
                sample_offset.to(tl.int64) + j % samples,
                bias_tensor_id,
                key,
                tau,
                low,
                high,
                least,
                most,
                1,
                N,
                True,
                NOISE,
                ESTIMATOR,
                ANTITHETIC,
                UNIT_TAU,
            )
            dlogits += sums * slope
            dbias += tl.where(kept, sums, 0.0) if HARD else sums * value
        if NEED_LOGITS:
            to = dbias_logits_ptr + set_ * outputs.to(tl.int64) + n0 + n
            tl.store(to, dlogits * bias, mask=inside)
    if NEED_BIAS:
        tl.store(dbias_ptr + n0 + n, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)


# Tiles by what they hold: many, some or few rows of a group. Regenerated masks keep logits beside
# weights in shared memory, and products without matrix units keep operands in registers.
_HALF = (Config(128, 128, 64, 8, 3, 128), Config(64, 128, 64, 4, 3), Config(16, 64, 128, 4, 3))
_HALF_REGENERATE = (Config(128, 64, 64, 8, 2), Config(64, 64, 64, 8, 2), Config(16, 64, 64, 4, 2))
_TF32 = (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 8, 3), Config(16, 64, 64, 4, 2))
_IEEE = (Config(64, 64, 32, 8, 2), Config(64, 64, 32, 8, 2), Config(16, 64, 32, 4, 2))


# rows of a group from which the product counts for more than the noise of its gradient
_MANY = 512


def _by_rows(table: tuple[Config, Config, Config], rows: int) -> Config:
    return table[0 if rows > 64 else 1 if rows > 16 else 2]


def product_config(dtype: torch.dtype, rows: int, regenerate: bool, tf32: bool = True) -> Config:
    """The tiles of `product` for groups of `rows`."""
    if dtype == torch.float32:
        return _by_rows(_TF32 if tf32 else _IEEE, rows)
    return _by_rows(_HALF_REGENERATE if regenerate else _HALF, rows)


def gradients_config(
    dtype: torch.dtype, rows: int, large: bool = False, tf32: bool = True
) -> Config:
    """The tiles of `gradients` for groups of `rows`.

    `large`: whether the device has the registers and matrix units of compute capability 9,
    and rows of the weight begin with a quad of noise.
    """
    depth = 64 if rows > 32 else 32 if rows > 16 else 16
    if dtype == torch.float32:
        return Config(64, 64, min(depth, 32), 8, 3) if tf32 else Config(64, 32, 32, 8, 2)
    # wide tiles keep the matrix units busy, narrow ones leave registers for a second program
    return (
        Config(64, 128, depth, 8, 3) if large and rows > _MANY else Config(64, 64, depth, 8, 3, 128)
    )


def rows_are_words(masks: Masks, inputs: int) -> bool:
    """Whether packed masks begin a word with every row of the weight: then they are spread."""
    return inputs % 32 == 0 and masks.skip == 0


def product(
    a: Tensor,
    weight: Tensor,
    masks: Masks,
    bias: Tensor | None = None,
    words: Tensor | None = None,
    *,
    backward: bool = False,
    spread: bool = False,
    tf32: bool = False,
    config: Config | None = None,
) -> Tensor:
    """x (W*M)^T + bias of every group, or with `backward` dy (W*M).

    Args:
        a: `[groups * rows, inputs]`, or `[groups * rows, outputs]` with `backward`; contiguous.
        weight: `[outputs, inputs]`, contiguous, dtype of `a`.
        masks: what is drawn; its bias is masked where it has logits of it.
        words: packed masks of all groups; without them masks are drawn anew tile by tile.
        spread: how `sample_mask.triton.pack` was told to pack them.
    """
    outputs, inputs = weight.shape
    groups = masks.sets * masks.per_set
    rows = a.shape[0] // groups
    columns = inputs if backward else outputs
    result = a.new_empty((a.shape[0], columns))
    if not result.numel():
        return result
    config = config or product_config(a.dtype, rows, words is None, tf32)
    tiles = groups * triton.cdiv(rows, config.m) * triton.cdiv(columns, config.n)
    masked_bias = bias is not None and masks.bias_logits is not None
    whole = rows_are_words(masks, inputs)
    masked_product[(tiles,)](
        a,
        weight,
        masks.logits,
        masks.logits if words is None else words,
        weight if bias is None else bias,
        masks.logits if masks.bias_logits is None else masks.bias_logits,
        result_ptr=result,
        rows=rows,
        outputs=outputs,
        inputs=inputs,
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
        MASKED_BIAS=masked_bias,
        SOURCE=(REGENERATE if words is None else BITS).value,
        QUADS=masks.quads(inputs),
        WORDS=whole,
        SPREAD=spread,
        EVEN=not (rows % config.m or columns % config.n or (weight.numel() // columns) % config.k),
        UPCAST=upcast(a.dtype),
        PRECISION=precision(a.dtype, tf32),
        TOGETHER=8,
        **config.launch(whole and has_large_tiles(a)),
    )
    return result


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    masks: Masks,
    *,
    need_weight: bool = False,
    need_logits: bool = True,
    tf32: bool = False,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dlogits [sets, outputs, inputs]), each where it is needed.

    Args:
        dy: `[groups * rows, outputs]`. x: `[groups * rows, inputs]`. Both contiguous.
        weight, masks: as in `product`.
    """
    outputs, inputs = weight.shape
    rows = x.shape[0] // (masks.sets * masks.per_set)
    dweight = torch.empty_like(weight) if need_weight else None
    dlogits = masks.logits.new_empty((masks.sets, outputs, inputs)) if need_logits else None
    if not weight.numel():
        return dweight, dlogits
    large = masks.quads(inputs) and not need_weight and has_large_tiles(x)
    if config is None:
        config = gradients_config(x.dtype, rows, large, tf32)
        if need_weight and x.dtype == torch.float32:
            config = config._replace(n=32)  # registers for two gradients
    tiles = triton.cdiv(outputs, config.m) * triton.cdiv(inputs, config.n)
    weight_gradients[(tiles, 1 if need_weight else masks.sets)](
        dy,
        x,
        weight,
        masks.logits,
        dlogits_ptr=masks.logits if dlogits is None else dlogits,
        dweight_ptr=weight if dweight is None else dweight,
        rows=rows,
        outputs=outputs,
        inputs=inputs,
        sets=masks.sets,
        draws=masks.draws,
        logits_stride=masks.logits.stride(0),
        element_offset=masks.element_offset,
        **masks.arguments(),
        **masks.surrogate(),
        NEED_LOGITS=need_logits,
        NEED_WEIGHT=need_weight,
        QUADS=masks.quads(inputs),
        EVEN=not (outputs % config.m or inputs % config.n or rows % config.k),
        UPCAST=upcast(x.dtype),
        PRECISION=precision(x.dtype, tf32),
        TOGETHER=8,
        **config.launch(large),
    )
    return dweight, dlogits


def masked_bias_gradients(
    dy: Tensor, bias: Tensor, masks: Masks, *, need_bias: bool = True, need_logits: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """(dbias, dbias_logits [sets, outputs]) of a masked bias, each where it is needed.

    Args:
        dy: the gradient summed over the rows of each group, `[groups, outputs]`, float32.
    """
    assert masks.bias_logits is not None
    (outputs,) = bias.shape
    dbias = torch.empty_like(bias) if need_bias else None
    dlogits = masks.bias_logits.new_empty((masks.sets, outputs)) if need_logits else None
    if not outputs:
        return dbias, dlogits
    block = 128
    bias_gradients[(triton.cdiv(outputs, block),)](
        dy,
        bias,
        masks.bias_logits,
        dbias_ptr=bias if dbias is None else dbias,
        dbias_logits_ptr=masks.bias_logits if dlogits is None else dlogits,
        outputs=outputs,
        sets=masks.sets,
        bias_logits_stride=masks.bias_logits.stride(0),
        **masks.arguments(bias=True),
        **masks.surrogate(),
        NEED_LOGITS=need_logits,
        NEED_BIAS=need_bias,
        N=block,
        num_warps=1,
        **UNFUSED,
    )
    return dbias, dlogits
