"""Noise version 1 and the decision: known answers, accuracy and statistics."""

import math

import pytest
import torch
from noise_vectors import PHILOX_ZERO, VECTORS

from modmask_kernels import _native, ops
from modmask_kernels.ops.sample_mask import reference

N = 2**18
needs_kernels = pytest.mark.skipif(not _native.available(), reason="tests the compiled kernels")


def name_of(vector):
    return f"seed={vector.seed},element={vector.element_offset}"


@pytest.fixture(params=VECTORS, ids=name_of)
def vector(request):
    return request.param


def words_of(vector):
    return torch.tensor([int(word, 16) for word in vector.words.split()])


def ramp(count):
    return (torch.arange(count) % 13 - 6) / 2


def draw_of(vector):
    return {
        "seed": torch.tensor(vector.seed),
        "sample_offset": vector.sample,
        "tensor_id": vector.tensor_id,
        "element_offset": vector.element_offset,
    }


def uniforms(count, *, seed=0, **where):
    """The numbers u of a kernel: the soft mask of logit 0 is 1 - u."""
    logits = torch.zeros(count)
    return 1 - ops.sample_mask(logits, seed=torch.tensor(seed), hard=False, **where)[0].double()


def correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / (a.std() * b.std()))


# ---- known answers ----


def test_philox_of_random123():
    zero = torch.zeros(1, dtype=torch.int64)
    words = reference.philox((zero, zero, zero, zero), torch.tensor(0))
    assert tuple(int(word) for word in words) == PHILOX_ZERO
    assert torch.equal(words_of(VECTORS[0])[:4], torch.tensor(PHILOX_ZERO))


def test_words_of_the_reference(vector):
    words = reference.noise_words(
        24,
        seed=torch.tensor(vector.seed),
        sample=vector.sample,
        tensor_id=vector.tensor_id,
        element_offset=vector.element_offset,
    )
    assert torch.equal(words, words_of(vector) >> 9)


def test_words_of_the_kernels(vector, capability):
    # at logit 0 the soft mask is 1 - u, to one unit in the last place
    s = ops.sample_mask(torch.zeros(24), hard=False, **draw_of(vector))[0].double()
    u = (2 * (words_of(vector) >> 9) + 1).double() * 2.0**-24
    torch.testing.assert_close(s, 1 - u, rtol=0, atol=2.0**-24)


def test_decisions(vector, capability):
    mask = ops.sample_mask(ramp(24), **draw_of(vector))[0]
    assert "".join(str(int(m)) for m in mask) == vector.decisions


def test_packed_bits(vector, capability):
    packed = ops.sample_mask_packed(ramp(24), **draw_of(vector))[0]
    assert bytes(packed.tolist()).hex() == vector.packed
    shorter = ops.sample_mask_packed(ramp(24)[:11], **draw_of(vector))[0]
    low = int.from_bytes(bytes.fromhex(vector.packed), "little") & (2**11 - 1)
    assert int.from_bytes(bytes(shorter.tolist()), "little") == low


# ---- the decision ----


def test_exp_minus_is_accurate():
    logits = torch.linspace(-60, 60, 100_001)
    exact = torch.exp(-logits.double())
    relative = ((reference.exp_minus(logits).double() - exact) / exact).abs()
    # the product logit * log2(e) is rounded to float32: half a unit of |logit| * log2(e)
    allowed = 2.0**-23 * (1.0 + logits.double().abs())
    assert bool((relative <= allowed).all())


def test_exp_minus_saturates():
    largest = reference.exp_minus(torch.tensor(-math.inf))
    assert largest == 2.0**100
    assert reference.exp_minus(torch.tensor(math.inf)) == 2.0**-100
    assert reference.exp_minus(torch.tensor(math.nan)) == largest
    assert reference.exp_minus(torch.tensor(-1e30)) == largest


def test_decision_has_the_exact_probability():
    """Of the 2**23 numbers u, all but at most two that should be kept are, and no others."""
    logits = torch.linspace(-12, 12, 1001)
    boundary = torch.sigmoid(logits.double()) * 2.0**23  # u < sigmoid(l) holds for k below it
    around = torch.arange(-64, 65)
    k = (boundary.floor().long()[:, None] + around).clamp(0, 2**23 - 1)
    kept = reference.keep(logits[:, None].expand(k.shape), k)
    assert bool((kept[:, :-1] >= kept[:, 1:]).all()), "not monotone in u"
    assert bool(kept[k < boundary[:, None] - 2.5].all())
    assert not bool(kept[k > boundary[:, None] + 1.5].any())


def test_extreme_logits(capability):
    values = torch.tensor([math.inf, 200.0, 17.0, -17.0, -200.0, -math.inf, math.nan])
    logits = values.repeat_interleave(4096)
    mask = ops.sample_mask(logits, seed=torch.tensor(5), samples=4)
    for row, kept in zip(mask.view(4, 7, 4096).unbind(1), [1, 1, 1, 0, 0, 0, 0], strict=True):
        assert bool((row == kept).all())
    packed = ops.sample_mask_packed(logits, seed=torch.tensor(5), samples=4)
    assert all(
        torch.equal(ops.pack_bits(m), bits) for m, bits in zip(mask > 0, packed, strict=True)
    )


def test_noise_is_symmetric_and_inside_the_unit_interval():
    k = torch.cat([torch.arange(4096), torch.arange(2**23 - 4096, 2**23)])
    u = (2 * k + 1).to(torch.float32) * 2.0**-24
    assert 0 < float(u.min()) < float(u.max()) < 1
    # 1 - u is exact, and the u of the complementary word
    assert torch.equal(1 - u, ((2 * (2**23 - 1 - k) + 1).to(torch.float32) * 2.0**-24))
    zero = torch.zeros(len(k))
    assert torch.equal(reference.keep(zero, k), ~reference.keep(zero, 2**23 - 1 - k))


# ---- statistics of the generator ----


@pytest.mark.parametrize("logit", [-3.0, 0.0, 2.0])
def test_keep_rate(logit, capability):
    count = 2**20
    mask = ops.sample_mask(torch.full((count,), logit), seed=torch.tensor(11))
    p = 1 / (1 + math.exp(-logit))
    assert abs(float(mask.double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / count)


@pytest.mark.parametrize("where", [{}, {"seed": -9}, {"tensor_id": 3}, {"sample_offset": 1}])
def test_uniformity(where):
    u = uniforms(2**20, **where)
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    bins = 256
    seen = torch.histc(u, bins, 0.0, 1.0)
    chi2 = float(((seen - 2**20 / bins) ** 2).sum() / (2**20 / bins))
    assert abs(chi2 - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))
    assert abs(float(u.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / 2**20)


def test_every_bit_is_fair():
    words = reference.noise_words(N, seed=torch.tensor(3), sample=0)
    for bit in range(23):
        ones = int((words >> bit & 1).sum())
        assert abs(ones - N / 2) < 4.5 * math.sqrt(N / 4), f"bit {bit}"


BASE = {"seed": 7, "tensor_id": 2, "sample_offset": 4}


@pytest.mark.parametrize(
    "other",
    [
        {"sample_offset": 5},
        {"sample_offset": 6},
        {"tensor_id": 3},
        {"tensor_id": 4, "sample_offset": 2},  # the two counter words exchanged
        {"seed": 8},
        {"seed": 6},
        {"seed": -7},
        {"seed": 7 + 2**32},
        {"element_offset": 4 * 2**32},
        {"element_offset": N},
    ],
    ids=str,
)
def test_streams_are_independent(other):
    a, b = uniforms(N, **BASE), uniforms(N, **{**BASE, **other})
    limit = 5 / math.sqrt(N)
    assert abs(correlation(a, b)) < limit
    assert abs(correlation((a - 0.5) ** 2, (b - 0.5) ** 2)) < limit


def test_neighbours_are_independent():
    u = uniforms(N, **BASE)
    for lag in (1, 2, 3, 4, 5, 8, 16, 64, 1024):
        assert abs(correlation(u[:-lag], u[lag:])) < 5 / math.sqrt(N - lag), lag


def test_pairs_fill_the_square():
    cells = (uniforms(N, **BASE) * 32).long().view(-1, 2)
    seen = torch.bincount(cells[:, 0] * 32 + cells[:, 1], minlength=1024).double()
    expected = N / 2 / 1024
    chi2 = float(((seen - expected) ** 2).sum() / expected)
    assert abs(chi2 - 1023) < 5 * math.sqrt(2 * 1023)


@needs_kernels
def test_elements_are_numbered_from_the_offset(capability):
    u = uniforms(4096, **BASE)
    for offset in (1, 2, 3, 4, 5, 1001):
        assert torch.equal(uniforms(4096 - offset, element_offset=offset, **BASE), u[offset:])
