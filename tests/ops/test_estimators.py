"""Every estimator on every operation: against the reference, and against its published formula."""

import math

import pytest
import torch
from tolerance import check_close

from modmask_kernels import _native, ops
from modmask_kernels.ops import estimators
from modmask_kernels.ops._masked_product import positional
from modmask_kernels.ops.masked_conv import reference as conv_reference
from modmask_kernels.ops.masked_linear import reference as linear_reference
from modmask_kernels.ops.masked_matmul import reference as matmul_reference
from modmask_kernels.ops.sample_mask import reference

needs_kernels = pytest.mark.skipif(not _native.available(), reason="tests the compiled kernels")

ESTIMATORS = {
    "gumbel_sigmoid": estimators.gumbel_sigmoid(),
    "hard_concrete": estimators.hard_concrete(),
    "hard_concrete, clamped": estimators.hard_concrete((-0.2, 1.3), clamp=1e-2),
    "sigmoid": estimators.sigmoid(),
    "threshold": estimators.threshold(0.25),
    "threshold, inclusive": estimators.threshold(0.25, inclusive=True),
    "top_k": estimators.top_k(0.3),
    "top_k of nothing": estimators.top_k(0.0),
    "top_k of all": estimators.top_k(1.0),
}
each_estimator = pytest.mark.parametrize("name", ESTIMATORS)
SEEDS = {"none": None, "one": torch.tensor(5), "per set": torch.tensor([5, -3])}


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def in_quarters(*shape):
    """Logits with many ties."""
    return (4 * normal(*shape, scale=2.0)).round() / 4


# ---- kernels against the reference ----


@needs_kernels
@each_estimator
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("antithetic", [False, True])
def test_masks_are_those_of_the_reference(name, seed, antithetic, capability):
    seed = SEEDS[seed]
    for logits in (normal(2, 5003, scale=3.0), in_quarters(2, 131), in_quarters(2, 7, 3)):
        options = {
            "seed": seed,
            "samples": 3,
            "tensor_id": 7,
            "sample_offset": 1,
            "estimator": ESTIMATORS[name],
            "antithetic": antithetic,
        }
        masks = ops.sample_mask(logits, **options)
        expected = reference.sample_mask(logits, **options)
        assert torch.equal(masks, expected)
        assert ((masks == 0) | (masks == 1)).all()
        packed = ops.sample_mask_packed(logits, **options)
        rows = masks.flatten(0, 0 if packed.dim() == 2 else 1)
        octets = torch.stack([ops.pack_bits(row > 0) for row in rows])
        assert torch.equal(packed.flatten(0, -2), octets)


@needs_kernels
@each_estimator
@pytest.mark.parametrize("tau", [1.0, 2 / 3, 0.005])
@pytest.mark.parametrize("seed", ["none", "per set"])
def test_values_and_gradients(name, tau, seed, capability):
    logits = normal(2, 4099, scale=2.0 * tau**0.5)
    for hard in (True, False):

        def run(call, dtype, hard=hard):
            leaf = logits.to(dtype).requires_grad_()
            values = call(
                leaf,
                seed=SEEDS[seed],
                samples=2,
                tau=tau,
                hard=hard,
                estimator=ESTIMATORS[name],
                antithetic=True,
            )
            dvalues = normal(*values.shape, seed=1).to(dtype)
            return values.detach(), torch.autograd.grad(values, leaf, dvalues)[0]

        ours = run(ops.sample_mask, torch.float32)
        plain, exact = (run(reference.sample_mask, t) for t in (torch.float32, torch.float64))
        check_close(zip(("values", "dlogits"), ours, plain, exact, strict=True))


OPERANDS = ("x", "weight", "logits", "bias", "bias_logits")


def check_product(call, plain, tensors, dtype, **options):
    def run(function, dtype_):
        leaves = [
            t.to(dtype_ if "logits" not in name or dtype_ == torch.float64 else torch.float32)
            .detach()
            .requires_grad_()
            for name, t in tensors.items()
        ]
        y = function(*leaves, **options)
        return y.detach(), *torch.autograd.grad(y, leaves, normal(*y.shape, seed=9).to(y.dtype))

    ours = run(call, dtype)
    check_close(
        zip(("y", *OPERANDS), ours, run(plain, dtype), run(plain, torch.float64), strict=True)
    )


@needs_kernels
@each_estimator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", ["none", "per set"])
def test_masked_linear(name, dtype, seed, capability):
    for rows, inputs, outputs in ((3, 70, 31), (33, 17, 5)):
        values = (
            normal(4 * rows, inputs),
            normal(outputs, inputs, seed=1) / inputs**0.5,
            in_quarters(2, outputs, inputs),
            normal(outputs, seed=2),
            in_quarters(2, outputs),
        )
        rounded = [v.to(dtype) for v in values]
        check_product(
            ops.masked_linear,
            linear_reference.masked_linear,
            dict(zip(OPERANDS, rounded, strict=True)),
            dtype,
            seed=SEEDS[seed],
            samples=2,
            tensor_id=3,
            bias_tensor_id=8,
            tau=2 / 3,
            hard=name != "sigmoid",
            estimator=ESTIMATORS[name],
            antithetic=True,
        )


@needs_kernels
@each_estimator
@pytest.mark.parametrize("seed", ["none", "per set"])
def test_masked_conv(name, seed, capability):
    values = (
        normal(8, 4, 7, 5),
        normal(6, 2, 3, 3, seed=1) / 4,
        in_quarters(2, 6, 2, 3, 3),
        normal(6, seed=2),
        in_quarters(2, 6),
    )
    options = {
        "seed": SEEDS[seed],
        "samples": 2,
        "tensor_id": 3,
        "bias_tensor_id": 4,
        "tau": 2 / 3,
        "hard": name != "hard_concrete",
        "estimator": ESTIMATORS[name],
        "antithetic": True,
    }

    def plain(*operands, padding, **rest):
        return conv_reference.masked_conv2d(*operands, padding=(padding,) * 4, **rest)

    tensors = dict(zip(OPERANDS, values, strict=True))
    check_product(ops.masked_conv2d, plain, tensors, torch.float32, padding=1, groups=2, **options)
    flat = {n: t[..., 1, :] if t.dim() > 2 else t for n, t in tensors.items()}
    y = ops.masked_conv1d(*flat.values(), groups=2, **options)
    wide = {n: t.unsqueeze(-2) if t.dim() > 2 else t for n, t in flat.items()}
    assert torch.equal(y, ops.masked_conv2d(*wide.values(), groups=2, **options)[..., 0, :])


@needs_kernels
@pytest.mark.parametrize("name", ["hard_concrete", "top_k", "threshold"])
def test_opcheck_and_compile(name):
    leaves = [normal(6, 5), normal(4, 5, seed=1), normal(4, 5, seed=2)]
    leaves = [t.requires_grad_() for t in leaves]
    seed = torch.tensor(3)
    draw = (1, 2, 0, 0, 2, 0.8, False, *estimators.arguments(name, True), [])
    operation = torch.ops.modmask.masked_linear.default
    torch.library.opcheck(operation, (*leaves, None, None, seed, *draw))
    torch.library.opcheck(
        torch.ops.modmask.sample_mask.default,
        (leaves[2], None, 2, 0.8, False, 1, 0, 0, *estimators.arguments(name, False), []),
    )

    def run(x):
        options = {"seed": seed, "samples": 2, "estimator": ESTIMATORS[name], "tau": 0.5}
        return ops.masked_linear(x, *leaves[1:], **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(leaves[0]), run(leaves[0]))
    logits = normal(3, 4, 5)
    seeds = torch.tensor([1, 2, 3])
    batched = torch.vmap(lambda a, s: ops.sample_mask(a, seed=s, estimator=name))(logits, seeds)
    one_by_one = [
        ops.sample_mask(a, seed=s, estimator=name) for a, s in zip(logits, seeds, strict=True)
    ]
    assert torch.equal(batched, torch.stack(one_by_one))


def test_the_defaults_change_nothing():
    logits, seed = normal(50, 7), torch.tensor(3)
    plain = ops.sample_mask(logits, seed=seed, samples=2)
    for estimator in ("gumbel_sigmoid", estimators.gumbel_sigmoid(), estimators.Estimator()):
        assert torch.equal(
            plain, ops.sample_mask(logits, seed=seed, samples=2, estimator=estimator)
        )
    adapted = positional(lambda *_, **options: options["estimator"])
    drawn = estimators.arguments("top_k", True)
    assert adapted(*[None] * 13, *drawn, []) == estimators.top_k()


# ---- formulas ----


def uniform(shape, sample, clamp=0.0):
    words = reference.noise_words(math.prod(shape), seed=torch.tensor(5), sample=sample)
    return ((2 * words.view(shape) + 1).double() * 2.0**-24).clamp(clamp, 1 - clamp)


@pytest.mark.parametrize("clamp", [0.0, 1e-4])
def test_hard_concrete_is_that_of_louizos(clamp):
    """Equations 10 and 11 of the paper, with the noise mirrored, which is as likely."""
    logits = normal(40, 50, scale=3.0).double().requires_grad_()
    gamma, zeta, beta = -0.1, 1.1, 2 / 3
    u = uniform(logits.shape, 0, clamp)
    s = torch.sigmoid(((1 - u).log() - u.log() + logits) / beta)
    z = (s * (zeta - gamma) + gamma).clamp(0, 1)
    estimator = estimators.hard_concrete((gamma, zeta), clamp=clamp)
    drawn = ops.sample_mask(
        logits, seed=torch.tensor(5), tau=beta, hard=False, estimator=estimator
    )[0]
    torch.testing.assert_close(drawn, z, rtol=1e-12, atol=1e-12)
    for some in (z == 0, z == 1, (z > 0) & (z < 1)):
        assert some.any()
    (expected,) = torch.autograd.grad(z.sum(), logits)
    (got,) = torch.autograd.grad(drawn.sum(), logits)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    # the value without noise, and how often a draw is not zero
    test_time = ops.sample_mask(logits, seed=None, hard=False, estimator=estimator)[0]
    expected = (torch.sigmoid(logits) * (zeta - gamma) + gamma).clamp(0, 1)
    torch.testing.assert_close(test_time, expected, rtol=1e-12, atol=1e-12)
    many = ops.sample_mask(
        torch.full((200_000,), 0.3), seed=torch.tensor(1), tau=beta, hard=False, estimator=estimator
    )
    nonzero = torch.sigmoid(torch.tensor(0.3 - beta * math.log(-gamma / zeta)))
    assert abs(float((many > 0).float().mean()) - float(nonzero)) < 4e-3


def test_continuous_sparsification_is_a_plain_sigmoid():
    logits = normal(300).double().requires_grad_()
    for beta in (1.0, 7.0, 200.0):
        mask = ops.sample_mask(logits, seed=None, tau=1 / beta, hard=False, estimator="sigmoid")[0]
        torch.testing.assert_close(mask, torch.sigmoid(beta * logits))
        (got,) = torch.autograd.grad(mask.sum(), logits)
        torch.testing.assert_close(got, (beta * mask * (1 - mask)).detach())
    final = ops.sample_mask(logits, seed=None, tau=0.01, estimator="sigmoid")[0]
    assert torch.equal(final > 0, logits > 0)


def test_piggyback():
    logits = torch.tensor([0.0, 4e-3, 5e-3, 6e-3, 1.0, math.nan], requires_grad=True)
    mask = ops.sample_mask(logits, seed=None, estimator=estimators.threshold(5e-3))[0]
    assert mask.tolist() == [0, 0, 0, 1, 1, 0]
    with_ties = estimators.threshold(5e-3, inclusive=True)
    assert ops.sample_mask(logits, seed=None, estimator=with_ties)[0].sum() == 3
    (gradient,) = torch.autograd.grad(mask, logits, torch.arange(6.0))
    assert gradient.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("count", [0, 1, 10, 1001])
def test_edge_popup_keeps_as_many_as_the_published_code(fraction, count):
    scores = normal(2, count).requires_grad_()
    seeds = torch.tensor([0, 0])
    estimator = estimators.top_k(fraction)
    mask = ops.sample_mask(scores, seed=seeds, estimator=estimator)[0]
    for row, kept in zip(scores.detach(), mask.detach(), strict=True):
        # hidden-networks: sort, then zero the first int((1 - k) * n)
        order = row.argsort()
        expected = torch.ones(count)
        expected[order[: int((1 - fraction) * count)]] = 0
        assert torch.equal(kept, expected)
    dmask = normal(2, count, seed=1)
    (gradient,) = torch.autograd.grad(mask, scores, dmask)
    assert torch.equal(gradient, dmask)


def test_top_k_keeps_the_first_of_equal_scores():
    scores = torch.tensor([1.0, 0.0, -0.0, 0.0, 2.0, 0.0])
    for keep, expected in (
        (1, [0, 0, 0, 0, 1, 0]),
        (3, [1, 1, 0, 0, 1, 0]),
        (4, [1, 1, 1, 0, 1, 0]),
        (6, [1] * 6),
    ):
        estimator = estimators.top_k(keep / 6)
        assert estimators.kept_count(keep / 6, 6) == keep
        mask = ops.sample_mask(scores, seed=None, estimator=estimator)[0]
        assert mask.tolist() == expected
        assert torch.equal(mask > 0, ops.top_k_mask(scores, keep))
    infinite = torch.tensor([math.inf, -math.inf, math.inf, -math.inf])
    for fraction, expected in ((0.25, [1, 0, 0, 0]), (0.75, [1, 1, 1, 0])):
        mask = ops.sample_mask(infinite, seed=None, estimator=estimators.top_k(fraction))[0]
        assert mask.tolist() == expected


@pytest.mark.parametrize("kernel", [(), (3, 2)], ids=str)
def test_top_k_knows_weight_and_bias_of_one_number_apart(kernel):
    product = ops.masked_conv2d if kernel else ops.masked_linear
    x, weight = normal(4, 5, *[4 for _ in kernel]), normal(6, 5, *kernel, seed=1)
    logits, bias, bias_logits = normal(6, 5, *kernel, seed=2), normal(6, seed=3), normal(6) + 9.0
    options = {"estimator": "top_k", "tensor_id": 2}
    found = [
        product(x, weight, logits, bias, bias_logits, bias_tensor_id=number, **options)
        for number in (2, 3)
    ]
    assert torch.equal(*found)


def test_antithetic_samples_are_pairs():
    logits = torch.zeros(10_001)
    options = {"seed": torch.tensor(3), "hard": False}
    drawn = ops.sample_mask(logits, samples=6, antithetic=True, **options)
    assert torch.allclose(drawn[0::2] + drawn[1::2], torch.ones(3, 10_001), atol=1e-6)
    # pair j has the noise of the plain sample j
    plain = ops.sample_mask(logits, samples=3, **options)
    assert torch.equal(drawn[0::2], plain)
    later = ops.sample_mask(logits, samples=3, sample_offset=3, antithetic=True, **options)
    assert torch.equal(later, drawn[3:])
    # each alone has the distribution of a plain sample
    logits = normal(200_000, scale=2.0)
    masks = ops.sample_mask(logits, seed=torch.tensor(4), samples=2, antithetic=True)
    for mask in masks:
        excess = mask - torch.sigmoid(logits)
        assert abs(float(excess.mean())) < 4 * float(excess.std()) / 200_000**0.5


# ---- wrong input ----


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: estimators.hard_concrete((0.1, 1.1)), r"stretch: expected .* contains \[0, 1\]"),
        (lambda: estimators.hard_concrete((-math.inf, 2.0)), r"stretch: expected"),
        (lambda: estimators.hard_concrete(clamp=0.5), r"clamp: expected a number in \[0, 1/2\)"),
        (lambda: estimators.threshold(math.nan), "value: expected a finite number, got nan"),
        (lambda: estimators.top_k(1.5), r"fraction: expected a number in \[0, 1\], got 1.5"),
        (lambda: estimators.top_k("a"), r"fraction: expected a number in \[0, 1\], got 'a'"),
        (lambda: estimators.threshold([1]), r"value: expected a finite number, got \[1\]"),
        (lambda: estimators.hard_concrete(0.1), r"stretch: expected two numbers .*got 0.1"),
        (lambda: estimators.resolve("gumbel"), "estimator: expected one of .*, got 'gumbel'"),
        (
            lambda: ops.sample_mask(torch.zeros(4), seed=None, estimator="top_k", element_offset=2),
            "element_offset must be 0 for top_k",
        ),
        (
            lambda: ops.masked_linear(
                torch.zeros(1, 2),
                torch.zeros(3, 2),
                torch.zeros(3, 2),
                estimator="top_k",
                element_offset=2,
            ),
            "element_offset must be 0 for top_k",
        ),
    ],
)
def test_wrong_input(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_an_estimator_is_a_name_or_an_estimator():
    with pytest.raises(TypeError, match="estimator: expected a name or an Estimator, got int"):
        ops.sample_mask(torch.zeros(4), seed=None, estimator=3)


def test_top_k_refuses_nan():
    logits = torch.tensor([1.0, math.nan])
    for run in (
        lambda: ops.sample_mask(logits, seed=None, estimator="top_k"),
        lambda: ops.sample_mask(logits.double(), seed=None, estimator="top_k"),
    ):
        with pytest.raises((RuntimeError, ValueError), match="must not hold NaN"):
            run()


def test_repr():
    assert [str(e) for e in ESTIMATORS.values()][:4] == [
        "gumbel_sigmoid",
        "hard_concrete(low=-0.1, high=1.1, clamp=0)",
        "hard_concrete(low=-0.2, high=1.3, clamp=0.01)",
        "sigmoid",
    ]
    assert str(estimators.threshold(5e-3)) == "threshold(value=0.005)"
    assert str(estimators.top_k(0.3)) == "top_k(fraction=0.3)"


@each_estimator
@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (1, 3), (1, 1)])
@pytest.mark.parametrize("seed", ["none", "per set"])
def test_logits_of_blocks(name, shape, seed):
    x, weight, logits = normal(8, 6), normal(8, 6, seed=1), in_quarters(2, *shape)
    options = {"seed": SEEDS[seed], "samples": 2, "estimator": ESTIMATORS[name], "hard": True}
    y = ops.masked_linear(x, weight, logits, antithetic=True, **options)
    seeds = torch.tensor([0, 0]) if seed == "none" else SEEDS[seed]
    if seed == "none":
        masks = torch.cat(
            [ops.sample_mask(row, **{**options, "seed": None}) for row in logits]
        ).unsqueeze(0)
    else:
        masks = ops.sample_mask(logits, antithetic=True, **{**options, "seed": seeds})
    whole = masks.repeat_interleave(8 // shape[0], 2).repeat_interleave(6 // shape[1], 3)
    groups = whole.transpose(0, 1).flatten(0, 1)
    parts = [part @ (weight * m).T for part, m in zip(x.chunk(len(groups)), groups, strict=True)]
    torch.testing.assert_close(y, torch.cat(parts))


def test_n_of_m_is_for_the_default_estimator():
    with pytest.raises(ValueError, match="n_of_m needs the estimator 'gumbel_sigmoid'"):
        ops.masked_linear(
            torch.zeros(1, 4),
            torch.zeros(3, 4),
            torch.zeros(3, 4),
            n_of_m=(2, 4),
            estimator="top_k",
        )


@needs_kernels
@each_estimator
@pytest.mark.parametrize("seed", ["none", "per set"])
def test_transposed_products(name, seed, capability):
    options = {
        "seed": SEEDS[seed],
        "samples": 2,
        "tensor_id": 3,
        "tau": 2 / 3,
        "hard": name != "hard_concrete",
        "estimator": ESTIMATORS[name],
        "antithetic": True,
    }
    tensors = (
        normal(8, 17),
        normal(17, 9, seed=1) / 4,
        in_quarters(2, 17, 9),
        normal(9, seed=2),
        in_quarters(2, 9),
    )
    check_product(
        ops.masked_matmul,
        lambda *operands, **rest: matmul_reference.masked_matmul(
            *operands, bias_tensor_id=4, sample_offset=0, element_offset=0, **rest
        ),
        dict(zip(OPERANDS, tensors, strict=True)),
        torch.float32,
        **options,
    )
    x, weight, logits = normal(8, 4, 3, 5), normal(4, 6, 3, 3, seed=1), in_quarters(2, 4, 6, 3, 3)
    y = ops.masked_conv_transpose2d(x, weight, logits, stride=2, **options)
    exact = ops.masked_conv_transpose2d(
        x.double(), weight.double(), logits.double(), stride=2, **options
    )
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
