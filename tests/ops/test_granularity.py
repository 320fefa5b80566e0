"""Logits smaller than the weight, and n:m masks: products against the reference and its formula."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import check_close

from modmask_kernels import _native, ops
from modmask_kernels.ops import _blocks, estimators
from modmask_kernels.ops.masked_conv import reference as conv_reference
from modmask_kernels.ops.masked_linear import reference as linear_reference
from modmask_kernels.ops.sample_mask import reference as mask_reference

needs_kernels = pytest.mark.skipif(not _native.available(), reason="tests the compiled kernels")
GUMBEL = estimators.arguments("gumbel_sigmoid", False)
NAMES = ("y", "x", "weight", "logits", "bias", "bias_logits")
SETS, SAMPLES = 2, 3
# [out, in] = [24, 36]
LINEAR = [(24, 1), (6, 1), (1, 36), (1, 9), (1, 1), (24, 9), (12, 36), (6, 9), (2, 3)]
# [out, in / groups, height, width] = [12, 6, 3, 2]
CONV = [
    (12, 1, 1, 1),
    (4, 1, 1, 1),
    (1, 6, 1, 1),
    (1, 2, 1, 1),
    (12, 6, 1, 1),
    (4, 3, 1, 1),
    (12, 6, 3, 1),
    (12, 1, 3, 2),
    (1, 1, 3, 2),
    (3, 2, 1, 2),
]
SEEDS = {"each": torch.tensor([3, -4]), "one": torch.tensor(5), "none": None}


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def linear_operands(small, dtype=torch.float32, rows=5, groups=SETS * SAMPLES):
    return {
        "x": normal(groups * rows, 36, seed=1, dtype=dtype),
        "weight": normal(24, 36, seed=2, dtype=dtype) / 6,
        "logits": 2 * normal(SETS, *small, seed=3),
        "bias": normal(24, seed=4, dtype=dtype),
        "bias_logits": 2 * normal(SETS, 24, seed=5),
    }


def conv_operands(small, dtype=torch.float32, images=2, groups=SETS * SAMPLES):
    return {
        "x": normal(groups * images, 12, 6, 5, seed=1, dtype=dtype),
        "weight": normal(12, 6, 3, 2, seed=2, dtype=dtype) / 6,
        "logits": 2 * normal(SETS, *small, seed=3),
        "bias": normal(12, seed=4, dtype=dtype),
        "bias_logits": 2 * normal(SETS, 12, seed=5),
    }


CONV_OPTIONS = {"groups": 2, "stride": (1, 2), "dilation": (2, 1)}


def draw(seed, **options):
    return {"seed": SEEDS[seed], "samples": SAMPLES, "tensor_id": 3, "bias_tensor_id": 4, **options}


def results(function, operands, dy=None, dtype=None, **options):
    """y and the gradients of all operands, by name."""
    leaves = {
        name: (t if dtype is None else t.to(dtype)).detach().requires_grad_()
        for name, t in operands.items()
    }
    y = function(**leaves, **options)
    if dy is None:
        return y
    grads = torch.autograd.grad(y, leaves.values(), dy.to(y.dtype))
    return dict(zip(NAMES, (y.detach(), *grads), strict=True))


def check(ours, reference, operands, options, reference_options):
    dy = normal(*ours(**operands, **options).shape, seed=6, dtype=operands["x"].dtype)
    got = results(ours, operands, dy, **options)
    plain = results(reference, operands, dy, **reference_options)
    exact = results(reference, operands, dy, torch.float64, **reference_options)
    check_close((name, got[name], plain[name], exact[name]) for name in NAMES)
    return got


@pytest.mark.parametrize("small", LINEAR)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("hard", [True, False])
def test_linear(small, seed, hard):
    groups = SETS * (1 if seed == "none" else SAMPLES)
    options = draw(seed, hard=hard, tau=0.7, element_offset=5, sample_offset=2)
    operands = linear_operands(small, groups=groups, rows=4)
    check(ops.masked_linear, linear_reference.masked_linear, operands, options, options)


@pytest.mark.parametrize("small", CONV)
@pytest.mark.parametrize("seed", ["each", "none"])
@pytest.mark.parametrize("hard", [True, False])
def test_conv(small, seed, hard):
    groups = SETS * (1 if seed == "none" else SAMPLES)
    options = draw(seed, hard=hard, tau=0.7, element_offset=5, **CONV_OPTIONS)
    operands = conv_operands(small, groups=groups)
    check(
        ops.masked_conv2d,
        conv_reference.masked_conv2d,
        operands,
        {**options, "padding": (2, 1)},
        {**options, "padding": (2, 2, 1, 1)},
    )


@pytest.mark.parametrize("small", LINEAR)
def test_the_reference_is_its_formula(small):
    operands = linear_operands(small, torch.float64)
    y = linear_reference.masked_linear(**operands, **draw("each"))
    kept = {
        name: mask_reference.sample_mask(
            operands[name], seed=SEEDS["each"], samples=SAMPLES, tensor_id=number
        ).double()
        for name, number in (("logits", 3), ("bias_logits", 4))
    }
    wide = kept["logits"].repeat_interleave(24 // small[0], -2)
    wide = wide.repeat_interleave(36 // small[1], -1)
    parts = operands["x"].chunk(SETS * SAMPLES)
    expected = [
        F.linear(
            parts[s * SAMPLES + k],
            operands["weight"] * wide[k, s],
            operands["bias"] * kept["bias_logits"][k, s],
        )
        for s in range(SETS)
        for k in range(SAMPLES)
    ]
    assert torch.equal(y, torch.cat(expected))


def test_conv1d():
    x, weight = normal(6, 4, 9), normal(6, 4, 3)
    for small in [(6, 1, 1), (1, 4, 1), (6, 4, 1), (3, 2, 3)]:
        logits = normal(*small, seed=1)
        kept = _blocks.expand_blocks(
            ops.sample_mask(logits, seed=torch.tensor(1), samples=3, tensor_id=0),
            (3, *weight.shape),
        )
        y = ops.masked_conv1d(x, weight, logits, seed=torch.tensor(1), samples=3, padding=1)
        parts = [
            F.conv1d(part, weight * m, padding=1) for part, m in zip(x.chunk(3), kept, strict=True)
        ]
        torch.testing.assert_close(y, torch.cat(parts))


# ---- many tiles, every capability ----

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REFERENCES = {}


def check_kernel(key, ours, reference, operands, options, reference_options):
    """`check` against a reference that all capabilities share."""
    dy = normal(*ours(**operands, **options).shape, seed=6, dtype=operands["x"].dtype)
    if key not in REFERENCES:
        plain = results(reference, operands, dy, **reference_options)
        exact = results(reference, operands, dy, torch.float64, **reference_options)
        REFERENCES[key] = plain, exact
    plain, exact = REFERENCES[key]
    got = results(ours, operands, dy, **options)
    check_close((name, got[name], plain[name], exact[name]) for name in NAMES)


def large_linear(small, dtype=torch.float32):
    return {
        "x": normal(SETS * SAMPLES * 7, 600, seed=1, dtype=dtype),
        "weight": normal(120, 600, seed=2, dtype=dtype) / 24,
        "logits": 2 * normal(SETS, *small, seed=3),
        "bias": normal(120, seed=4, dtype=dtype),
        "bias_logits": 2 * normal(SETS, 120, seed=5),
    }


def large_conv(small, dtype=torch.float32):
    return {
        "x": normal(SETS * SAMPLES * 2, 48, 6, 7, seed=1, dtype=dtype),
        "weight": normal(20, 24, 3, 3, seed=2, dtype=dtype) / 15,
        "logits": 2 * normal(SETS, *small, seed=3),
        "bias": normal(20, seed=4, dtype=dtype),
        "bias_logits": 2 * normal(SETS, 20, seed=5),
    }


LARGE_LINEAR = [
    ((120, 1), None),
    ((1, 600), None),
    ((60, 300), None),
    ((3, 4), None),
    ((120, 20), None),
    ((8, 600), None),
    ((120, 600), (2, 4)),
    ((120, 600), (7, 25)),
    ((120, 600), (1, 600)),
]
LARGE_CONV = [
    ((20, 1, 1, 1), None),
    ((1, 24, 1, 1), None),
    ((20, 24, 1, 1), None),
    ((5, 6, 1, 1), None),
    ((20, 1, 3, 3), None),
    ((10, 24, 3, 1), None),
    ((20, 24, 3, 3), (1, 4)),
    ((20, 24, 3, 3), (7, 12)),
]


@needs_kernels
@pytest.mark.parametrize(("small", "n_of_m"), LARGE_LINEAR)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_many_tiles(capability, small, n_of_m, dtype):
    options = draw("each", n_of_m=n_of_m, tau=0.7)
    key = ("linear", small, n_of_m, dtype)
    reference = linear_reference.masked_linear
    check_kernel(key, ops.masked_linear, reference, large_linear(small, dtype), options, options)


@needs_kernels
@pytest.mark.parametrize(("small", "n_of_m"), LARGE_CONV)
@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_of_many_tiles(capability, small, n_of_m, dtype):
    options = draw("each", n_of_m=n_of_m, tau=0.7, groups=2)
    check_kernel(
        ("conv", small, n_of_m, dtype),
        ops.masked_conv2d,
        conv_reference.masked_conv2d,
        large_conv(small, dtype),
        {**options, "padding": 1},
        {**options, "padding": (1, 1, 1, 1)},
    )


ESTIMATORS = [
    (estimators.hard_concrete(), False),
    (estimators.hard_concrete(clamp=0.1), True),
    (estimators.sigmoid(), False),
    (estimators.threshold(0.3), True),
    (estimators.top_k(0.4), True),
]


@needs_kernels
@pytest.mark.parametrize(("estimator", "hard"), ESTIMATORS, ids=str)
@pytest.mark.parametrize("small", [(3, 4), (120, 20)])
def test_linear_with_estimators(capability, small, estimator, hard):
    whole = {"element_offset": 0, "tau": 0.7, "hard": hard, "antithetic": True}
    options = {**draw("each"), **whole, "estimator": estimator}
    key = ("linear", small, estimator, hard)
    reference = linear_reference.masked_linear
    check_kernel(key, ops.masked_linear, reference, large_linear(small), options, options)


@needs_kernels
@pytest.mark.parametrize(("estimator", "hard"), ESTIMATORS, ids=str)
def test_conv_with_estimators(capability, estimator, hard):
    whole = {"element_offset": 0, "tau": 0.7, "hard": hard, "antithetic": True}
    options = {**draw("each"), **whole, "estimator": estimator, "groups": 2}
    check_kernel(
        ("conv", estimator, hard),
        ops.masked_conv2d,
        conv_reference.masked_conv2d,
        large_conv((5, 6, 1, 1)),
        {**options, "padding": 1},
        {**options, "padding": (1, 1, 1, 1)},
    )


@needs_kernels
def test_antithetic_n_of_m(capability):
    options = draw("each", n_of_m=(2, 4), tau=0.7, antithetic=True)
    reference = linear_reference.masked_linear
    operands = large_linear((120, 600))
    check_kernel("antithetic", ops.masked_linear, reference, operands, options, options)


@needs_kernels
def test_kernels_refuse_n_of_m_with_other_estimators():
    operands = linear_operands((24, 36)).values()
    drawn = (SEEDS["each"], 3, 4, 0, 0, SAMPLES, 0.9, True)
    other = estimators.arguments("hard_concrete", False)
    with pytest.raises(RuntimeError, match="n_of_m needs the estimator gumbel_sigmoid"):
        torch.ops.modmask.masked_linear(*operands, *drawn, *other, [2, 4])


@needs_kernels
@pytest.mark.parametrize("wanted", [NAMES[1:], ("logits",)])
@pytest.mark.parametrize("small", [(60, 300), (3, 4), (120, 20), (8, 600)])
def test_bits_do_not_depend_on_the_threads(small, wanted, threads):
    first = {}
    for count in (1, 2, 3):
        threads(count)
        operands = {
            name: t.requires_grad_(name in wanted) for name, t in large_linear(small).items()
        }
        y = ops.masked_linear(**operands, **draw("each"))
        y.sin().sum().backward()
        got = {"y": y.detach(), **{name: operands[name].grad for name in wanted}}
        for name, value in got.items():
            assert torch.equal(first.setdefault(name, value), value), (name, count)


@needs_kernels
@pytest.mark.parametrize("small", [(20, 24, 1, 1), (5, 6, 1, 1), (20, 1, 3, 3)])
def test_bits_of_convolutions_do_not_depend_on_the_threads(small, threads):
    first = {}
    for count in (1, 2, 3):
        threads(count)
        operands = large_conv(small)
        dy = normal(SETS * SAMPLES * 2, 20, 6, 7, seed=6)
        got = results(ops.masked_conv2d, operands, dy, padding=1, groups=2, **draw("each"))
        for name, value in got.items():
            assert torch.equal(first.setdefault(name, value), value), (name, count)


@needs_kernels
@pytest.mark.parametrize("n_of_m", [(2, 4), (3, 7), (1, 35)])
@pytest.mark.parametrize("seed", [None, torch.tensor(9)])
def test_masks_are_the_same_bits_on_every_capability(capability, n_of_m, seed):
    logits = 20 * normal(6, 140)
    logits[1] = 0.5
    logits[2, ::3] = float("nan")
    logits[3] = 1e4
    logits[4, ::2] = -float("inf")
    masks = masks_of(logits, n_of_m, seed, samples=1 if seed is None else 3)
    for k, mask in enumerate(masks):
        expected = mask_reference.mask_of_sample(logits, seed=seed, sample=k, n_of_m=n_of_m)
        assert torch.equal(mask, expected)


# ---- n:m ----


@pytest.mark.parametrize("n_of_m", [(2, 4), (1, 2), (3, 3), (1, 6), (5, 9), (7, 12), (20, 36)])
@pytest.mark.parametrize("seed", ["each", "one", "none"])
def test_n_of_m(n_of_m, seed):
    groups = SETS * (1 if seed == "none" else SAMPLES)
    operands = linear_operands((24, 36), groups=groups)
    options = draw(seed, n_of_m=n_of_m, tau=0.7, element_offset=2, sample_offset=1)
    check(ops.masked_linear, linear_reference.masked_linear, operands, options, options)


@pytest.mark.parametrize("n_of_m", [(2, 3), (1, 2), (4, 6)])
@pytest.mark.parametrize("seed", ["each", "none"])
def test_n_of_m_of_channels(n_of_m, seed):
    groups = SETS * (1 if seed == "none" else SAMPLES)
    operands = conv_operands((12, 6, 3, 2), groups=groups)
    options = draw(seed, n_of_m=n_of_m, **CONV_OPTIONS)
    check(
        ops.masked_conv2d,
        conv_reference.masked_conv2d,
        operands,
        {**options, "padding": 2},
        {**options, "padding": (2, 2, 2, 2)},
    )


def masks_of(logits, n_of_m, seed=None, samples=1, dtype=torch.float32):
    """The masks of a linear layer, [groups, out, in], read off its products."""
    out, inputs = logits.shape[-2:]
    weight = torch.ones(out, inputs, dtype=dtype)
    x = torch.eye(inputs, dtype=dtype).repeat(samples, 1)
    y = ops.masked_linear(x, weight, logits, seed=seed, samples=samples, n_of_m=n_of_m)
    return y.view(samples, inputs, out).transpose(1, 2)


@pytest.mark.parametrize("n_of_m", [(2, 4), (3, 8), (4, 5)])
def test_n_of_every_m_are_kept(n_of_m):
    n, m = n_of_m
    masks = masks_of(normal(7, 40), n_of_m, torch.tensor(2), samples=5)
    assert masks.unique().tolist() == [0, 1]
    assert (masks.view(5, 7, 40 // m, m).sum(-1) == n).all()
    logits = normal(7, 40)
    mask = masks_of(logits, n_of_m)[0].view(7, -1, m)
    kept = torch.zeros(7, 40 // m, m)
    kept.scatter_(-1, logits.view(7, -1, m).topk(n, dim=-1).indices, 1)
    assert torch.equal(mask, kept)


def test_the_first_of_equal_logits_is_kept():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [[1.0, 1, 1, 1], [0, 2, 0, 0], [nan, -inf, nan, 5], [-inf, inf, nan, inf]]
    )
    kept = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 0, 1]])
    assert torch.equal(masks_of(logits, (2, 4))[0], kept)


def test_likely_weights_are_kept_more_often():
    logits = torch.tensor([[2.0, 0.0, 0.0, -2.0]])
    often = masks_of(logits, (2, 4), torch.tensor(0), samples=500).mean(0)[0]
    assert often[0] > 0.75
    assert often[3] < 0.25
    assert abs(often[1] - often[2]) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_of_m": (3, 2)}, r"n_of_m must be \(n, m\) with 0 < n <= m, not \(3, 2\)"),
        ({"n_of_m": (0, 2)}, r"0 < n <= m"),
        ({"n_of_m": (1, 5)}, r"n_of_m: the 36 inputs of weight \[24, 36\] do not divide into .* 5"),
        ({"n_of_m": (1.0, 2)}, r"n_of_m must be two integers"),
        ({"n_of_m": (2,)}, r"n_of_m must be two integers"),
        ({"n_of_m": ()}, r"n_of_m must be two integers"),
        ({"n_of_m": (True, 4)}, r"n_of_m must be two integers"),
        ({"n_of_m": (2, 4), "hard": False}, r"n_of_m needs hard masks"),
        ({"n_of_m": (2, 4), "logits": normal(2, 24, 1)}, r"n_of_m needs logits like weight"),
        (
            {"logits": normal(2, 24, 5)},
            r"logits must have shape .* or divide it in every dimension",
        ),
        ({"logits": normal(2, 48, 36)}, r"logits must have shape .* not \[2, 48, 36\]"),
        ({"logits": normal(2, 0, 36)}, r"logits must have shape"),
    ],
)
def test_errors(change, message):
    operands = {**linear_operands((24, 36)), "bias": None, "bias_logits": None}
    with pytest.raises(ValueError, match=message):
        ops.masked_linear(**{**operands, **draw("one"), **change})


def test_empty():
    for small in [(24, 1), (1, 36), (6, 9)]:
        operands = linear_operands(small, rows=0)
        dy = torch.empty(0, 24)
        got = results(ops.masked_linear, operands, dy, **draw("each"))
        assert got["y"].shape == (0, 24)
        assert not any(got[name].any() for name in ("weight", "logits", "bias", "bias_logits"))


@pytest.mark.parametrize("shape", [(24, 0), (0, 36), (0, 0)])
@pytest.mark.parametrize("seed", SEEDS)
def test_n_of_m_of_no_weights(shape, seed):
    operands = {
        "x": normal(2 * SETS * SAMPLES, shape[1]),
        "weight": normal(*shape),
        "logits": normal(SETS, *shape),
        "bias": normal(shape[0]),
        "bias_logits": normal(SETS, shape[0]),
    }
    y = results(ops.masked_linear, operands, n_of_m=(2, 4), **draw(seed))
    got = results(ops.masked_linear, operands, torch.ones_like(y), n_of_m=(2, 4), **draw(seed))
    assert got["y"].shape == (len(operands["x"]), shape[0])
    assert got["logits"].shape == (SETS, *shape)


@pytest.mark.parametrize(
    ("shape", "small"),
    [
        ((24, 0), (24, 1)),
        ((24, 0), (1, 1)),
        ((24, 0), (6, 3)),
        ((0, 36), (1, 9)),
        ((0, 36), (3, 4)),
    ],
)
def test_logits_of_no_weights(shape, small):
    operands = {"x": normal(6, shape[1]), "weight": normal(*shape), "logits": normal(SETS, *small)}
    leaves = {name: t.requires_grad_() for name, t in operands.items()}
    y = ops.masked_linear(**leaves, **draw("each"))
    y.sum().backward()
    assert y.shape == (6, shape[0])
    for t in (y, *(leaf.grad for leaf in leaves.values())):
        assert not t.any()


# ---- under transforms ----


@pytest.mark.parametrize("small", [(24, 1), (1, 9), (6, 9)])
def test_vmap_over_seeds(small):
    operands = linear_operands(small)
    seeds = torch.arange(3)

    def one(seed):
        return ops.masked_linear(**operands, seed=seed, samples=SAMPLES)

    together = torch.vmap(one)(seeds)
    torch.testing.assert_close(together, torch.stack([one(seed) for seed in seeds]))


@pytest.mark.parametrize("small", [(24, 1), (1, 9), (6, 9)])
def test_compiled(small):
    operands = linear_operands(small)

    def call(operands, seed):
        return ops.masked_linear(**operands, seed=seed, samples=SAMPLES)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    dy = normal(SETS * SAMPLES * 5, 24, seed=6)
    plain = results(lambda **t: call(t, SEEDS["each"]), operands, dy)
    traced = results(lambda **t: compiled(t, SEEDS["each"]), operands, dy)
    for name in NAMES:
        torch.testing.assert_close(traced[name], plain[name])


@needs_kernels
@pytest.mark.parametrize(("small", "n_of_m"), [((6, 9), []), ((24, 36), [2, 4])])
def test_opcheck(small, n_of_m):
    operands = [t.requires_grad_() for t in linear_operands(small).values()]
    arguments = (SEEDS["each"], 3, 4, 0, 1, SAMPLES, 0.9, True, *GUMBEL, n_of_m)
    torch.library.opcheck(torch.ops.modmask.masked_linear.default, (*operands, *arguments))
    operands = [t.requires_grad_() for t in conv_operands((4, 3, 1, 1)).values()]
    options = ([1, 1], [0] * 4, [1, 1], 2)
    arguments = (SEEDS["each"], *options, 3, 4, 0, 1, SAMPLES, 0.9, True, *GUMBEL, [])
    torch.library.opcheck(torch.ops.modmask.masked_conv.default, (*operands, *arguments))


@pytest.mark.parametrize("small", [(24, 1), (1, 9), (6, 9)])
def test_autocast_and_meta(small):
    operands = linear_operands(small)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.masked_linear(**operands, **draw("each"))
    assert y.dtype == torch.bfloat16
    half = {n: t if "logits" in n else t.bfloat16() for n, t in operands.items()}
    assert torch.equal(y, ops.masked_linear(**half, **draw("each")))
    meta = {name: t.to("meta") for name, t in operands.items()}
    y = ops.masked_linear(**meta, seed=SEEDS["each"].to("meta"), samples=SAMPLES)
    assert y.is_meta
    assert y.shape == (SETS * SAMPLES * 5, 24)


@pytest.mark.parametrize("small", [(24, 1), (1, 9)])
def test_a_scaled_product_saves_no_mask_of_weight_size(small):
    operands = linear_operands(small)
    sizes = []

    def note(t):
        if not any(t.data_ptr() == o.data_ptr() for o in operands.values()):
            sizes.append(t.numel())
        return t

    leaves = {n: t.requires_grad_() for n, t in operands.items()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        ops.masked_linear(**leaves, **draw("each"))
    assert max(sizes) < operands["weight"].numel() + operands["x"].numel()
