"""Noise version 1, the mask decision and its surrogate, in plain PyTorch.

This is the oracle of every kernel. The integer arithmetic and the decision are exact and must be
matched bit for bit; the surrogate is evaluated in float32, or in float64 for float64 logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._blocks import n_largest
from ..estimators import GUMBEL_SIGMOID, Estimator, kept_count

PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 7  # the least that passes the published batteries (Salmon et al. 2011, table 2)

# 2**f on [-1/2, 1/2], highest degree first; relative error 2e-9, evaluated as multiply, then add.
EXP2_COEFFICIENTS = (
    0.00015353362,
    0.0013398875,
    0.009618437,
    0.055503324,
    0.24022648,
    0.6931472,
    1.0,
)
MINUS_LOG2_E = -1.44269504
EXPONENT_LIMIT = 100.0  # |logit| <= 69.3; the decision saturates at 16.7
ROUND_TO_INTEGER = 12582912.0  # 1.5 * 2**23: adding it rounds a float32 to an integer

_LOW32 = 0xFFFFFFFF


def _mul_hi_lo(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low half of the 64-bit product, with words held in int64."""
    low = multiplier * (word & 0xFFFF)
    high = multiplier * (word >> 16)
    return (high + (low >> 16)) >> 16, (multiplier * word) & _LOW32


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor, rounds: int = PHILOX_ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 (Salmon et al., SC 2011) on 32-bit words held in int64 tensors.

    Args:
        counter: four broadcastable int64 tensors, each in [0, 2**32).
        key: int64 tensor; all 64 bits are the key, the low word first.
        rounds: number of rounds.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _LOW32, (key >> 32) & _LOW32
    for _ in range(rounds):
        hi0, lo0 = _mul_hi_lo(PHILOX_M[0], c0)
        hi1, lo1 = _mul_hi_lo(PHILOX_M[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + PHILOX_W[0]) & _LOW32, (k1 + PHILOX_W[1]) & _LOW32
    return c0, c1, c2, c3


def noise_words(
    count: int, *, seed: Tensor, sample: int, tensor_id: int = 0, element_offset: int = 0
) -> Tensor:
    """The 23-bit integers k of `count` consecutive elements; u = (2k+1) * 2**-24.

    Args:
        count: number of elements, in row-major order.
        seed: int64 scalar tensor, the key.
        sample: index of the sample, the second counter word.
        tensor_id: position of the parameter in its model, the third counter word.
        element_offset: row-major index of the first element.

    Returns:
        int64 tensor of shape [count] on the device of `seed`.
    """
    device = seed.device
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    first, last = element_offset >> 2, (element_offset + count - 1) >> 2
    quad = torch.arange(first, last + 1, dtype=torch.int64, device=device)
    words = philox(
        (
            quad & _LOW32,
            torch.full_like(quad, sample & _LOW32),
            torch.full_like(quad, tensor_id & _LOW32),
            quad >> 32,
        ),
        seed,
    )
    flat = torch.stack(words, dim=1).reshape(-1)
    skip = element_offset - 4 * first
    return flat[skip : skip + count] >> 9


def exp_minus(logits: Tensor) -> Tensor:
    """exp(-logit) as every backend rounds it: float32 multiplications and additions only.

    NaN gives the largest value, so that a NaN logit removes its weight.
    """
    # 0-dim float32 tensors keep each product and each sum a separate, correctly rounded operation
    t = logits.to(torch.float32) * MINUS_LOG2_E
    limit = torch.full_like(t, EXPONENT_LIMIT)
    t = torch.where(t < limit, t, limit)
    t = torch.where(t > -limit, t, -limit)
    n = (t + ROUND_TO_INTEGER) - ROUND_TO_INTEGER
    f = t - n
    p = torch.full_like(f, EXP2_COEFFICIENTS[0])
    for c in EXP2_COEFFICIENTS[1:]:
        p = p * f
        p = p + c
    scale = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return p * scale


def keep(logits: Tensor, words: Tensor, clamp: float = 0.0) -> Tensor:
    """The decision u < sigmoid(logit), written as u * exp(-logit) < 1 - u in float32.

    Args:
        logits: any floating dtype, rounded to float32 first.
        words: int64 noise words k of the same shape.
        clamp: u is clamped to [clamp, 1 - clamp].

    Returns:
        bool tensor, bit-identical on every backend.
    """
    u = ((2 * words + 1).to(torch.float32) * 2.0**-24).clamp(clamp, 1.0 - clamp)
    return u * exp_minus(logits) < 1.0 - u


def odds(logits: Tensor, words: Tensor) -> Tensor:
    """exp(logit + log((1-u)/u)), by which n:m masks rank: float32, equal on every backend."""
    u = (2 * words + 1).to(torch.float32)
    return (2.0**24 - u) / (u * exp_minus(logits))


def soft(logits: Tensor, words: Tensor, tau: float = 1.0, clamp: float = 0.0) -> Tensor:
    """s = sigmoid((logit + log((1-u)/u)) / tau), differentiable, in the dtype of the logits."""
    u = ((2 * words + 1).to(logits.dtype) * 2.0**-24).clamp(clamp, 1.0 - clamp)
    return torch.sigmoid((logits + (torch.log1p(-u) - torch.log(u))) / tau)


def mask_of_sample(
    logits: Tensor,
    *,
    seed: Tensor | None,
    sample: int = 0,
    tensor_id: int = 0,
    element_offset: int = 0,
    tau: float = 1.0,
    hard: bool = True,
    n_of_m: tuple[int, int] | None = None,
    estimator: Estimator = GUMBEL_SIGMOID,
    antithetic: bool = False,
) -> Tensor:
    """One mask of one set, differentiable with respect to `logits` (straight-through if hard).

    `seed=None` is the mask without noise: logit > 0, its surrogate that of u = 1/2. `n_of_m` keeps
    the n largest of every m consecutive logits along dimension 1, noise included.
    """
    if estimator.name in ("threshold", "top_k"):
        return _straight_through(threshold(logits.detach(), None, estimator), logits)
    if seed is None or not estimator.draws:
        s = torch.sigmoid(logits / tau)
        kept = threshold(logits.detach(), n_of_m)
    else:
        words = noise_words(
            logits.numel(),
            seed=seed,
            sample=sample >> 1 if antithetic else sample,
            tensor_id=tensor_id,
            element_offset=element_offset,
        ).view(logits.shape)
        if antithetic and sample & 1:
            words = 2**23 - 1 - words  # 1 - u
        s = soft(logits, words, tau, estimator.clamp)
        kept = (
            keep(logits.detach(), words, estimator.clamp)
            if n_of_m is None
            else n_largest(odds(logits.detach(), words), *n_of_m)
        )
    if estimator.name == "hard_concrete":
        s = (s * (estimator.high - estimator.low) + estimator.low).clamp(0.0, 1.0)
    return _straight_through(kept, s) if hard else s


def _straight_through(kept: Tensor, s: Tensor) -> Tensor:
    """Exactly 0 or 1, even where s is NaN, with the gradient of s."""
    return kept.to(s.dtype) + (s - s.detach()).nan_to_num()


def threshold(
    logits: Tensor,
    n_of_m: tuple[int, int] | None = None,
    estimator: Estimator = GUMBEL_SIGMOID,
) -> Tensor:
    """The final mask of one set of one tensor, as bool: what is kept without noise.

    That is logit > 0, or the n largest of every m, or what the estimator says instead.
    """
    if n_of_m is not None:
        return n_largest(logits.to(torch.float32), *n_of_m)
    if estimator.name == "threshold":
        rounded = logits.to(torch.float32)
        return rounded >= estimator.low if estimator.high else rounded > estimator.low
    if estimator.name == "top_k":
        from ..top_k_mask import top_k_mask  # which packs bits with what stands here

        count = kept_count(estimator.low, logits.numel())
        return top_k_mask(logits.to(torch.float32), count)
    return logits > 0


def sample_mask(
    logits: Tensor,
    *,
    seed: Tensor | None,
    samples: int = 1,
    tau: float = 1.0,
    hard: bool = True,
    tensor_id: int = 0,
    sample_offset: int = 0,
    element_offset: int = 0,
    n_of_m: tuple[int, int] | None = None,
    estimator: Estimator = GUMBEL_SIGMOID,
    antithetic: bool = False,
) -> Tensor:
    """`samples` masks of every set: [samples, *logits.shape]."""

    def one_set(set_logits: Tensor, set_seed: Tensor | None) -> Tensor:
        drawn = [
            mask_of_sample(
                set_logits,
                seed=set_seed,
                sample=sample_offset + k,
                tensor_id=tensor_id,
                element_offset=element_offset,
                tau=tau,
                hard=hard,
                n_of_m=n_of_m,
                estimator=estimator,
                antithetic=antithetic,
            )
            for k in range(1 if set_seed is None else samples)
        ]
        return torch.stack(drawn) if drawn else set_logits.new_empty((0, *set_logits.shape))

    if seed is None or seed.dim() == 0:
        return one_set(logits, seed)
    per_set = [
        torch.cat([one_set(row, key) for key in keys.reshape(-1)])
        for row, keys in zip(logits.unbind(0), seed.unbind(0), strict=True)
    ]
    return torch.stack(per_set, dim=1)
