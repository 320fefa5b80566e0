"""`sample_mask` and its packed form against the reference."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import check_close
from torch._dynamo.testing import CompileCounterWithBackend

from modmask_kernels import _native, ops
from modmask_kernels.ops.estimators import arguments
from modmask_kernels.ops.sample_mask import reference

COUNTS = [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 255, 257, 4095, 4096, 4097, 12_345]
OFFSETS = [0, 1, 2, 3, 4094, 2**34 - 2, 2**34, 2**40 + 1]
GUMBEL = arguments("gumbel_sigmoid", False)
needs_kernels = pytest.mark.skipif(not _native.available(), reason="tests the compiled kernels")


def draw(shape, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * spread


def both(logits, **options):
    return ops.sample_mask(logits, **options), reference.sample_mask(logits, **options)


# ---- bits ----


@pytest.mark.parametrize("count", COUNTS)
def test_hard_bits_are_those_of_the_reference(count, capability):
    ours, theirs = both(draw(count), seed=torch.tensor(12), samples=3, tensor_id=4, sample_offset=5)
    assert ours.dtype == torch.float32
    assert ours.shape == (3, count)
    assert torch.equal(ours, theirs)
    assert bool(((ours == 0) | (ours == 1)).all())


@pytest.mark.parametrize("offset", OFFSETS)
def test_element_offsets(offset, capability):
    options = {"seed": torch.tensor(-3), "samples": 2, "element_offset": offset}
    for count in (1, 30, 4099):
        ours, theirs = both(draw(count), **options)
        assert torch.equal(ours, theirs)
    # a shard sees the bits of the whole
    whole = ops.sample_mask(draw(4099), **options)
    options["element_offset"] = offset + 1234
    assert torch.equal(ops.sample_mask(draw(4099)[1234:], **options), whole[:, 1234:])


@pytest.mark.parametrize(
    "where",
    [
        {"tensor_id": 2**32 - 1},
        {"sample_offset": 2**32 - 3},
        {"sample_offset": 2**31},
        {"seed": torch.tensor(-(2**63))},
        {"seed": torch.tensor(2**63 - 1)},
    ],
    ids=str,
)
def test_extreme_counters(where, capability):
    ours, theirs = both(draw((3, 37)), **{"seed": torch.tensor(1), "samples": 3, **where})
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (2, 3, 4, 5), (3, 0, 2)])
def test_shapes(shape, capability):
    ours, theirs = both(draw(shape), seed=torch.tensor(1), samples=2)
    assert ours.shape == (2, *shape)
    assert torch.equal(ours, theirs)


def strided(kind):
    if kind == "transposed":
        return draw((65, 40)).t()
    if kind == "strided":
        return draw((40, 130))[:, ::2]
    if kind == "expanded":
        return draw((40, 1)).expand(40, 65)
    return draw((40, 3 * 65 + 1))[:, 66:131]


@pytest.mark.parametrize("kind", ["transposed", "strided", "expanded", "offset"])
def test_layout_changes_nothing(kind, capability):
    logits = strided(kind)
    assert not logits.is_contiguous()
    for hard in (True, False):
        options = {"seed": torch.tensor([3] * 40), "samples": 2, "hard": hard}
        ours = ops.sample_mask(logits, **options)
        assert torch.equal(ours, ops.sample_mask(logits.contiguous(), **options))
    gradients = []
    for given_logits in (logits, logits.contiguous()):
        leaf = given_logits.detach().requires_grad_()
        values = ops.sample_mask(leaf, seed=torch.tensor(9), samples=2)
        dvalues = draw((2, 65, 40), 5).transpose(1, 2)
        gradients.append(torch.autograd.grad(values, leaf, dvalues)[0])
    assert torch.equal(*gradients)


def test_seed_per_set(capability):
    logits, seeds = draw((3, 11, 13)), torch.tensor([5, -5, 2**40])
    ours, theirs = both(logits, seed=seeds, samples=4)
    assert ours.shape == (4, 3, 11, 13)
    assert torch.equal(ours, theirs)
    for s in range(3):  # the set never enters the noise
        alone = ops.sample_mask(logits[s], seed=seeds[s], samples=4)
        assert torch.equal(ours[:, s], alone)


def test_samples_are_a_window(capability):
    logits = draw(1000)
    many = ops.sample_mask(logits, seed=torch.tensor(2), samples=6)
    part = ops.sample_mask(logits, seed=torch.tensor(2), samples=2, sample_offset=3)
    assert torch.equal(part, many[3:5])
    assert not torch.equal(many[0], many[1])


@needs_kernels
@pytest.mark.parametrize("count", [1, 4097, 300_001])
def test_threads_change_nothing(count, capability, threads):
    logits, seeds = draw((2, count)), torch.tensor([1, 2])
    results = []
    for n in (1, 2, 4):
        threads(n)
        leaf = logits.clone().requires_grad_()
        soft = ops.sample_mask(leaf, seed=seeds, samples=2, hard=False, tau=0.7)
        (gradient,) = torch.autograd.grad(soft, leaf, torch.ones_like(soft))
        hard = ops.sample_mask(logits, seed=seeds, samples=2)
        packed = ops.sample_mask_packed(logits, seed=seeds, samples=2)
        results.append((soft.detach(), gradient, hard, packed))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_temperature_leaves_hard_values_alone(capability):
    logits = draw(5000)
    masks = [ops.sample_mask(logits, seed=torch.tensor(1), tau=tau) for tau in (0.1, 1.0, 4.0)]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[1], masks[2])


# ---- packed bits ----


@pytest.mark.parametrize("count", COUNTS)
def test_packed_is_the_packed_mask(count, capability):
    options = {"samples": 3, "tensor_id": 1, "sample_offset": 2, "element_offset": 3}
    logits = draw((2, count), count)
    for seed, leading in ((torch.tensor([8, 9]), (3, 2)), (torch.tensor(8), (3,))):
        given_logits = logits if seed.dim() else logits[0]
        mask = ops.sample_mask(given_logits, seed=seed, **options)
        packed = ops.sample_mask_packed(given_logits, seed=seed, **options)
        assert packed.dtype == torch.uint8
        assert packed.shape == (*leading, math.ceil(count / 8))
        rows = math.prod(leading)
        masks, octets = mask.reshape(rows, count), packed.reshape(rows, packed.shape[-1])
        for m, bits in zip(masks, octets, strict=True):
            assert torch.equal(bits, ops.pack_bits(m > 0))
            assert torch.equal(ops.unpack_bits(bits, (count,)), m > 0)


quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(bits=st.lists(st.booleans(), max_size=70))
def test_pack_bits_round_trip(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = ops.pack_bits(mask)
    expected = np.packbits(np.array(bits, dtype=bool), bitorder="little")
    assert packed.tolist() == expected.tolist()
    assert torch.equal(ops.unpack_bits(packed, mask.shape), mask)


@quick
@given(shape=st.lists(st.integers(0, 6), max_size=4), seed=st.integers(0, 100))
def test_pack_bits_of_any_shape(shape, seed):
    mask = draw(shape, seed) > 0
    assert torch.equal(ops.unpack_bits(ops.pack_bits(mask), shape), mask)
    assert torch.equal(ops.pack_bits(mask), ops.pack_bits(mask.int() * 256))


@quick
@given(
    count=st.integers(0, 200),
    samples=st.integers(1, 4),
    seed=st.integers(-(2**63), 2**63 - 1),
    sample_offset=st.integers(0, 2**32 - 1),
    tensor_id=st.integers(0, 2**32 - 1),
    element_offset=st.integers(0, 2**62),
)
def test_any_draw_is_that_of_the_reference(count, seed, **where):
    options = {"seed": torch.tensor(seed), **where}
    ours, theirs = both(draw(count, 1), **options)
    assert torch.equal(ours, theirs)
    packed = ops.sample_mask_packed(draw(count, 1), **options)
    for m, bits in zip(ours, packed, strict=True):
        assert torch.equal(bits, ops.pack_bits(m > 0))


def test_bits_of_something_else():
    octets = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(TypeError, match="packed must be a tensor, not str"):
        ops.unpack_bits("a", (8,))
    for shape in ("a", 8, (1.5,), None):
        with pytest.raises(TypeError, match=re.escape(f"a list of sizes, not {shape!r}")):
            ops.unpack_bits(octets, shape)
    with pytest.raises(TypeError, match="mask must be a tensor, not list"):
        ops.pack_bits([True])
    with pytest.raises(TypeError, match=r"bool or of integers, not torch\.float32: use mask > 0"):
        ops.pack_bits(torch.rand(8))


def test_unpack_bits_errors():
    with pytest.raises(TypeError, match=r"packed must be uint8, not torch\.int64"):
        ops.unpack_bits(torch.zeros(2, dtype=torch.int64), (9,))
    with pytest.raises(ValueError, match=r"packed must have shape \[2\] .* \[3, 3\], not \[3\]"):
        ops.unpack_bits(torch.zeros(3, dtype=torch.uint8), (3, 3))


# ---- soft values and gradients ----


@pytest.mark.parametrize("tau", [1.0, 0.3, 2.0 / 3.0, 5.0])
@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
def test_soft_values_and_gradients(tau, spread, capability):
    logits, seeds = draw((2, 4099), 3, spread), torch.tensor([1, 2])
    dvalues = draw((3, 2, 4099), 4, 1.0)
    results = []
    for hard in (True, False):
        options = {"seed": seeds, "samples": 3, "tau": tau, "hard": hard, "element_offset": 1}

        def run(function, dtype, options=options):
            leaf = logits.to(dtype).requires_grad_()
            values = function(leaf, **options)
            return values.detach(), torch.autograd.grad(values, leaf, dvalues.to(dtype))[0]

        ours = run(ops.sample_mask, torch.float32)
        plain = run(reference.sample_mask, torch.float32)
        exact = run(reference.sample_mask, torch.float64)
        results += [(f"values, hard={hard}", *t) for t in [(ours[0], plain[0], exact[0])]]
        results += [(f"dlogits, hard={hard}", *t) for t in [(ours[1], plain[1], exact[1])]]
    check_close(results)


def test_surrogate_is_the_derivative_of_the_soft_mask():
    logits = draw(50).double().requires_grad_()
    for tau in (0.5, 1.0, 2.0):
        options = {"seed": torch.tensor(3), "samples": 2, "tau": tau}
        torch.autograd.gradcheck(
            lambda x, options=options: ops.sample_mask(x, hard=False, **options), logits
        )
        soft = ops.sample_mask(logits, hard=False, **options)
        hard = ops.sample_mask(logits, **options)
        d = draw((2, 50), 1).double()
        (of_hard,) = torch.autograd.grad(hard, logits, d)
        torch.testing.assert_close(of_hard, (d * soft * (1 - soft) / tau).sum(0).detach())


def test_nan_removes_the_weight_in_the_reference_too():
    logits = torch.tensor([math.nan, math.inf, -math.inf, 0.5]).repeat(50)
    for dtype in (torch.float32, torch.float64):
        mask = reference.sample_mask(logits.to(dtype), seed=torch.tensor(3), samples=2)
        assert torch.equal(mask.float(), ops.sample_mask(logits, seed=torch.tensor(3), samples=2))


def test_float64_uses_the_same_bits():
    logits = draw(3000)
    single = ops.sample_mask(logits, seed=torch.tensor(6))
    double = ops.sample_mask(logits.double(), seed=torch.tensor(6))
    assert double.dtype == torch.float64
    assert torch.equal(single.double(), double)


# ---- the operation as PyTorch sees it ----

OPCHECK = [
    (draw((5, 7)), torch.tensor(1), 2),
    (draw((3, 9)), torch.tensor([1, 2, 3]), 2),
    (draw((7, 5)).t(), torch.tensor(1), 1),
    (draw(0), torch.tensor(1), 2),
]


@needs_kernels
@pytest.mark.parametrize("case", range(len(OPCHECK)))
def test_opcheck(case):
    logits, seed, samples = OPCHECK[case]
    namespace = torch.ops.modmask
    for hard in (True, False):
        leaf = logits.detach().requires_grad_()
        torch.library.opcheck(
            namespace.sample_mask.default, (leaf, seed, samples, 0.8, hard, 3, 0, 1, *GUMBEL, [])
        )
    torch.library.opcheck(
        namespace.sample_mask_packed.default, (logits, seed, samples, 3, 0, 1, *GUMBEL, [])
    )
    dvalues = draw((samples, *logits.shape))
    torch.library.opcheck(
        namespace.sample_mask_backward.default,
        (dvalues, logits, seed, samples, 0.8, 3, 0, 1, *GUMBEL, []),
    )


@needs_kernels
def test_vmap(capability):
    logits, seeds = draw((4, 6, 5)), torch.tensor([1, 2, 3, 4])

    def one(row, seed):
        return ops.sample_mask(row, seed=seed, samples=2, hard=False)

    batched = torch.vmap(one)(logits, seeds)
    assert torch.equal(
        batched, torch.stack([one(a, b) for a, b in zip(logits, seeds, strict=True)])
    )
    last = torch.vmap(one, in_dims=(2, None), out_dims=1)(logits, seeds[0])
    assert torch.equal(last[:, 3], one(logits[:, :, 3], seeds[0]))

    packed = torch.vmap(lambda row, seed: ops.sample_mask_packed(row, seed=seed))(logits, seeds)
    assert torch.equal(packed[1], ops.sample_mask_packed(logits[1], seed=seeds[1]))

    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    torch.vmap(one)(leaves[0], seeds).sum().backward()
    torch.stack([one(a, b) for a, b in zip(leaves[1], seeds, strict=True)]).sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)

    def total(row, seed):
        return one(row, seed).square().sum()

    transformed = torch.vmap(torch.func.grad(total))(logits, seeds)
    leaf = logits[2].clone().requires_grad_()
    total(leaf, seeds[2]).backward()
    assert torch.equal(transformed[2], leaf.grad)


def test_compile_dynamic():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def function(logits, seed):
        mask = ops.sample_mask(logits, seed=seed, samples=2, hard=False)
        return mask, ops.sample_mask_packed(logits, seed=seed, samples=2)

    seed, compiled = torch.tensor(4), []
    for count in (24, 57, 640):
        leaf = draw((count, 3)).requires_grad_()
        soft, packed = function(leaf, seed)
        (gradient,) = torch.autograd.grad(soft, leaf, torch.ones_like(soft))
        again = draw((count, 3)).requires_grad_()
        expected = ops.sample_mask(again, seed=seed, samples=2, hard=False)
        assert torch.equal(soft, expected)
        assert torch.equal(packed, ops.sample_mask_packed(again, seed=seed, samples=2))
        (wanted,) = torch.autograd.grad(expected, again, torch.ones_like(soft))
        assert torch.equal(gradient, wanted)
        compiled.append(counter.frame_count)
    assert compiled[0] == compiled[-1], "compiled anew for another shape"


def test_pure():
    logits, seed = draw(100), torch.tensor(3)
    kept = logits.clone()
    state = torch.get_rng_state()
    first = ops.sample_mask(logits, seed=seed, samples=2)
    assert torch.equal(first, ops.sample_mask(logits, seed=seed, samples=2))
    assert torch.equal(logits, kept)
    assert int(seed) == 3
    assert torch.equal(state, torch.get_rng_state())


@needs_kernels
def test_refuses_double_backward():
    leaf = draw(10).requires_grad_()
    soft = ops.sample_mask(leaf, seed=torch.tensor(1), hard=False)
    (gradient,) = torch.autograd.grad(soft.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


def test_meta_device():
    logits = torch.empty(3, 20, device="meta")
    seeds = torch.empty(3, dtype=torch.int64, device="meta")
    values = ops.sample_mask(logits, seed=seeds, samples=4)
    assert values.is_meta
    assert values.shape == (4, 3, 20)
    assert ops.sample_mask_packed(logits, seed=seeds, samples=4).shape == (4, 3, 3)


def test_autocast_leaves_the_logits_alone():
    logits, seed = draw(1000, 1, 0.1), torch.tensor(3)
    plain = ops.sample_mask(logits, seed=seed, hard=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ops.sample_mask(logits, seed=seed, hard=False)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)


# ---- bad input ----

SEED = torch.tensor(1)
BAD = [
    ({"logits": torch.zeros(3, dtype=torch.bfloat16)}, TypeError, r"logits .*float32.*bfloat16"),
    ({"logits": torch.zeros(3, dtype=torch.int64)}, TypeError, r"logits .*float32.*int64"),
    ({"seed": 5}, TypeError, r"seed must be an int64 tensor, not int"),
    ({"seed": torch.tensor(1.0)}, TypeError, r"seed must be int64, not torch\.float32"),
    ({"seed": torch.tensor(1, dtype=torch.int32)}, TypeError, r"seed must be int64.*int32"),
    ({"seed": torch.ones(2, 2, dtype=torch.int64)}, ValueError, r"seed .*shape.*\[2, 2\]"),
    ({"seed": torch.ones(2, dtype=torch.int64)}, ValueError, r"logits .*\[2, \.\.\.\].*\[3, 4\]"),
    ({"seed": torch.ones(0, dtype=torch.int64)}, ValueError, r"(logits|seed) "),
    ({"seed": torch.tensor(1, device="meta")}, ValueError, r"seed is on meta.*logits is on cpu"),
    ({"samples": 0}, ValueError, r"samples must be at least 1, not 0"),
    ({"samples": -2}, ValueError, r"samples must be at least 1, not -2"),
    ({"tau": 0.0}, ValueError, r"tau must be positive and finite, not 0\.0"),
    ({"tau": -1.0}, ValueError, r"tau must be positive and finite, not -1\.0"),
    ({"tau": math.nan}, ValueError, r"tau must be positive and finite, not nan"),
    ({"tau": math.inf}, ValueError, r"tau must be positive and finite, not inf"),
    ({"tensor_id": -1}, ValueError, r"tensor_id must be in \[0, 2\*\*32\), not -1"),
    ({"tensor_id": 2**32}, ValueError, r"tensor_id must be in \[0, 2\*\*32\), not 4294967296"),
    ({"sample_offset": -1}, ValueError, r"sample_offset must be in \[0, 2\*\*32\), not -1"),
    ({"element_offset": -4}, ValueError, r"element_offset must not be negative, not -4"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_input(change, kind, message):
    arguments = {"logits": torch.zeros(3, 4), "seed": SEED, **change}
    with pytest.raises(kind, match=message):
        ops.sample_mask(**arguments)
    if "tau" not in change:
        with pytest.raises(kind, match=message):
            ops.sample_mask_packed(**arguments)


# ---- n of every m ----

N_OF_M = [
    # (n, m), logits of one set
    ((2, 4), (5, 36)),
    ((1, 2), (3, 2)),
    ((3, 3), (2, 9)),
    ((3, 7), (4, 21, 3)),
    ((5, 9), (700, 18)),
    ((20, 36), (3, 72, 3, 2)),
    ((1, 3), (2, 3001 * 3)),
    ((2, 4), (0, 8)),
    ((2, 4), (3, 0, 2)),
]


@pytest.mark.parametrize("sets", [None, 2])
@pytest.mark.parametrize(("n_of_m", "shape"), N_OF_M, ids=str)
def test_n_of_m(n_of_m, shape, sets, capability):
    logits = draw(shape if sets is None else (sets, *shape))
    n, m = n_of_m
    for seed in (torch.tensor(3), None) if sets is None else (torch.tensor([3, -4]),):
        options = {
            "seed": seed,
            "samples": 3,
            "n_of_m": n_of_m,
            "element_offset": 6,
            "tensor_id": 2,
            "antithetic": True,
        }
        leaves = [logits.clone().requires_grad_() for _ in range(2)]
        ours = ops.sample_mask(leaves[0], **options, tau=0.7)
        theirs = reference.sample_mask(leaves[1], **options, tau=0.7)
        assert torch.equal(ours, theirs)
        groups = ours.movedim(1 + (sets is not None) + 1, -1).unflatten(-1, (-1, m)) if n else ours
        assert bool((groups.sum(-1) == n).all())
        dy = draw(ours.shape, seed=7)
        ours.backward(dy)
        theirs.backward(dy)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        packed = ops.sample_mask_packed(logits, **options)
        rows = ours.flatten(0, 0 if sets is None else 1)
        expected = [ops.pack_bits(row > 0) for row in rows]
        assert torch.equal(packed.flatten(0, -2), torch.stack(expected))


def test_n_of_m_of_doubles_and_wrong_input():
    logits = draw((3, 8))
    double = ops.sample_mask(logits.double(), seed=torch.tensor(1), n_of_m=(2, 4))
    assert torch.equal(double.float(), ops.sample_mask(logits, seed=torch.tensor(1), n_of_m=(2, 4)))
    for wrong, options, message in (
        (logits, {"n_of_m": (2, 3)}, r"n_of_m needs logits .* groups of 3, not \[3, 8\]"),
        (logits[0], {"n_of_m": (2, 4)}, r"n_of_m needs logits .* not \[8\]"),
        (logits, {"n_of_m": (5, 4)}, "0 < n <= m"),
        (logits, {"n_of_m": (2, 4), "hard": False}, "needs hard masks"),
        (logits, {"n_of_m": (2, 4), "estimator": "top_k"}, "needs the estimator 'gumbel_sigmoid'"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.sample_mask(wrong, seed=None, **options)
        if "hard" not in options:
            with pytest.raises(ValueError, match=message):
                ops.sample_mask_packed(wrong, seed=None, **options)
    with pytest.raises(ValueError, match=r"of one parameter, .* not \[8\]"):
        ops.sample_mask(logits, seed=torch.arange(3), n_of_m=(2, 4))


@needs_kernels
def test_n_of_m_opcheck():
    logits, seed = draw((2, 3, 8)).requires_grad_(), torch.tensor([1, 2])
    where = (3, 0, 1, *GUMBEL, [2, 4])
    namespace = torch.ops.modmask
    torch.library.opcheck(namespace.sample_mask.default, (logits, seed, 2, 0.8, True, *where))
    torch.library.opcheck(namespace.sample_mask_packed.default, (logits.detach(), seed, 2, *where))
