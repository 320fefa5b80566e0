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


def test_a_hundred_thousand_decisions():
    g = torch.Generator().manual_seed(0)
    logits = torch.cat(
        [torch.randn(1, 90_000, generator=g) * 5, torch.linspace(-20, 20, 10_000)[None]], 1
    )
    got = packed_by_triton(masks(logits, torch.tensor(3)))
    assert torch.equal(got[:, 0], ops.sample_mask_packed(logits, seed=torch.tensor(3)))
