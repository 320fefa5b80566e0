"""The k largest over many tensors on the device: the bits of the CPU, ties included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mask_arguments import CUT, bytes_of, top_k_cuts

from modmask_kernels import ops
from modmask_kernels.ops import estimators


def scores_of(counts, kind, dtype=torch.float32):
    g = torch.Generator().manual_seed(sum(counts))
    t = torch.randn(sum(counts), generator=g)
    if kind == "ties":
        t = (t * 2).round() / 2
    elif kind == "equal":
        t = torch.zeros_like(t)
        t[::2] = -0.0
    elif kind == "wide":
        t = t * torch.exp2(torch.randint(-130, 120, t.shape, generator=g).float())
        t[:: max(1, len(t) // 3)] = float("inf")
        t[1 :: max(1, len(t) // 3)] = -float("inf")
    return t.to(dtype)


def run(simt, scores, counts, k, *, largest=True, packed=False, order=0, **more):
    size = sum(-(-c // 8) for c in counts) if packed else sum(counts)
    mask, nan = np.full(size, 0xAA, np.uint8), np.zeros(1, np.uint32)
    device = simt.Device(order)
    device.run(
        "top_k",
        dtype=str(scores.dtype).removeprefix("torch."),
        scores=bytes_of(scores),
        counts=np.array(counts, np.int64),
        mask=mask,
        k=k,
        largest=largest,
        packed=packed,
        nan=nan,
        **more,
    )
    return torch.from_numpy(mask), bool(nan[0]), device


COUNTS = [[1], [7], [8, 9], [2048], [2049, 0, 3], [0, 5000, 1, 0, 2047, 130, 0]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "wide"])
@pytest.mark.parametrize("largest", [True, False])
def test_bits_are_those_of_the_cpu(simt, counts, kind, largest):
    scores, total = scores_of(counts, kind), sum(counts)
    parts = list(scores.split(counts))
    for n, k in enumerate(sorted({0, 1, total // 3, total // 2, total - 1, total})):
        packed = n % 2 == 0
        expected = ops.top_k_mask(parts, k, largest=largest, packed=packed)
        mask, nan, _ = run(simt, scores, counts, k, largest=largest, packed=packed, order=n)
        assert not nan
        assert torch.equal(mask, torch.cat([m.view(torch.uint8) for m in expected]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(simt, dtype):
    counts = [3000, 5, 1111]
    scores = scores_of(counts, "normal", dtype)
    for k in (1, 500, 4000):
        expected = torch.cat(ops.top_k_mask(list(scores.split(counts)), k))
        assert torch.equal(run(simt, scores, counts, k)[0].bool(), expected)


@pytest.mark.parametrize("blocks", [1, 3, 7])
def test_more_units_than_blocks(simt, blocks):
    counts = [2048 * 5 + 5, 3, 2048 * 2]
    scores = scores_of(counts, "ties")
    for k in (2000, 9000):
        expected = torch.cat(ops.top_k_mask(list(scores.split(counts)), k))
        assert torch.equal(run(simt, scores, counts, k, blocks=blocks)[0].bool(), expected)


@pytest.mark.parametrize("where", [0, 2047, 2600])
def test_nan_is_found(simt, where):
    scores = scores_of([2600, 1], "normal")
    scores[where] = float("nan")
    assert run(simt, scores, [2600, 1], 5)[1]


@pytest.mark.parametrize("kind", ["normal", "ties", "equal"])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.4, 1.0])
def test_cut(simt, kind, fraction):
    scores = scores_of([4099], kind)
    cut = np.zeros(1, CUT)
    k = estimators.kept_count(fraction, 4099)
    run(simt, scores, [4099], k, cut=cut)
    value, ties = cut[0]["value"], cut[0]["ties"]
    place = torch.arange(4099)
    kept = (scores > float(value)) | ((scores == float(value)) & (place < int(ties)))
    assert torch.equal(kept, ops.top_k_mask(scores, k))
    if 0 < fraction < 1:
        expected = top_k_cuts(scores[None], estimators.top_k(fraction))[0]
        assert value == expected["value"]


def test_scores_are_read_five_times_at_most(simt):
    counts = [8192]
    scores = scores_of(counts, "ties")
    traffic = run(simt, scores, counts, 1000, packed=True)[2].traffic()
    assert traffic["scores"]["read_bytes"] == 5 * 4 * 8192
    assert traffic["scores"]["accesses"] == 5 * 8192 // 4  # 16 bytes at once
    assert traffic["mask"]["written_bytes"] == 8192 // 8
