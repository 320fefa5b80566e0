"""Masks by Triton have the bits of every other backend."""

import numpy as np
import pytest
import torch
from guards import within_walls
from noise_vectors import VECTORS

from modmask_kernels import ops
from modmask_kernels.ops import _triton, estimators
from modmask_kernels.ops.sample_mask.triton import pack

SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 16.7, -16.7, 1e30, -1e-30]


def masks(logits, seed, samples=1, sample_offset=0, tensor_id=0, element_offset=0, **options):
    estimator = options.get("estimator", "gumbel_sigmoid")
    drawn = estimators.arguments(estimator, options.get("antithetic", False))
    return _triton.Masks(
        logits, None, seed, tensor_id, 1, sample_offset, element_offset, samples, 1.0, True, *drawn
    )


def packed_by_triton(m):
    """As `sample_mask_packed` gives it: uint8 [samples, sets, bytes]."""

    def call(logits, seed):
        return pack(m._replace(logits=logits, seed=seed), sets_first=False)

    words = within_walls(call)(m.logits, m.seed)
    count = m.logits[0].numel()
    octets = words.numpy().view(np.uint8)
    bits = np.unpackbits(octets, axis=-1, bitorder="little")[..., m.skip : m.skip + count]
    return torch.from_numpy(np.packbits(bits, axis=-1, bitorder="little"))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v.seed}-{v.element_offset}")
def test_known_answers(vector):
    logits = torch.tensor([((i % 13) - 6) / 2 for i in range(24)])[None]
    m = masks(
        logits,
        torch.tensor(vector.seed),
        sample_offset=vector.sample,
        tensor_id=vector.tensor_id,
        element_offset=vector.element_offset,
    )
    assert packed_by_triton(m)[0, 0].numpy().tobytes().hex() == vector.packed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"samples": 3, "sample_offset": 5},
        {"samples": 4, "antithetic": True},
        {"samples": 3, "sample_offset": 3, "antithetic": True},
        {"element_offset": 3, "tensor_id": 7},
        {"element_offset": 2**34 - 2, "tensor_id": 2**32 - 1},
        {"sample_offset": 2**32 - 2, "samples": 2},
        {"estimator": estimators.hard_concrete(clamp=1e-2)},
        {"estimator": estimators.threshold(5e-3)},
        {"estimator": estimators.threshold(0.0, inclusive=True)},
        {"estimator": "sigmoid"},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 1030])
def test_the_bits_of_the_cpu(options, count):
    g = torch.Generator().manual_seed(count)
    logits = torch.randn(2, count, generator=g) * 3
    special = torch.tensor(SPECIAL)[:count]
    logits[1, : special.numel()] = special
    for seed in (torch.tensor([11, -12]), torch.tensor(5), None):
        expected = torch.stack(
            [
                ops.sample_mask_packed(
                    logits[s], seed=seed if seed is None or not seed.dim() else seed[s], **options
                )
                for s in range(2)
            ],
            dim=1,
        )
        got = packed_by_triton(masks(logits, seed, **options))
        # without noise all samples are the same
        assert torch.equal(got, expected[: got.shape[0]])


@pytest.mark.parametrize("count", [4096, 200])
def test_spread_words_are_the_same_bits(count):
    logits = torch.randn(2, count, generator=torch.Generator().manual_seed(0)) * 3
    m = masks(logits, torch.tensor([11, -12]), samples=2)
    used = count // 32
    natural, spread = (pack(m, spread=s)[..., :used].numpy() for s in (False, True))
    places = [31 - (c & 1 | c >> 2 & 6 | c << 1 & 8 | c << 3 & 16) for c in range(32)]
    assert sorted(places) == list(range(32))
    for weight, place in enumerate(places):
        np.testing.assert_array_equal(spread >> place & 1, natural >> weight & 1)


def test_words_far_in_a_parameter():
    """Whole programs at an offset whose quads need more than 32 bits."""
    logits = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    for offset in (2**34, 2**34 - 4096, 2**34 - 2048):
        options = {"seed": torch.tensor(7), "element_offset": offset, "samples": 2}
        got = packed_by_triton(masks(logits, **options))
        assert torch.equal(got[:, 0], ops.sample_mask_packed(logits[0], **options))


def test_rounding_towards_zero_decides():
    """What the assembly computes, where 2ue + 2u is near 2: the interpreter cannot run it."""
    rng = np.random.default_rng(0)
    k = rng.integers(0, 2**23, 200_000).astype(np.uint32)
    k[:4] = 0, 1, 2**23 - 2, 2**23 - 1
    u = ((2 * k.astype(np.int64) + 1) * 2.0**-24).astype(np.float32)
    near = (1 - u) / u * (1 + rng.integers(-4, 5, k.size) * 2.0**-24)
    for e in (near.astype(np.float32), np.float32(2.0) ** rng.integers(-101, 102, k.size)):
        kept = u * e < 1 - u
        shifted = (np.uint32(0x80) << 23) | (k << 9 >> 9)
        doubled = shifted.view(np.float32) + np.uint32(0xBFFFFFFF).view(np.float32)
        assert np.array_equal(doubled, 2 * u)
        exact = (doubled * e).astype(np.float64) + doubled
        rounded = exact.astype(np.float32)
        rounded = np.where(rounded > exact, np.nextafter(rounded, np.float32(0)), rounded)
        np.testing.assert_array_equal(rounded.view(np.uint32) >> 30, ~kept)


def test_a_hundred_thousand_decisions():
    g = torch.Generator().manual_seed(0)
    logits = torch.cat(
        [torch.randn(1, 90_000, generator=g) * 5, torch.linspace(-20, 20, 10_000)[None]], 1
    )
    got = packed_by_triton(masks(logits, torch.tensor(3)))
    assert torch.equal(got[:, 0], ops.sample_mask_packed(logits, seed=torch.tensor(3)))
