"""`masked_matmul`, `masked_conv_transpose1d` and `2d` against their float64 references."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import check_close
from torch._dynamo.testing import CompileCounterWithBackend

from modmask_kernels import _native, ops
from modmask_kernels.ops.estimators import arguments as arguments_of
from modmask_kernels.ops.masked_conv_transpose import reference as conv_reference
from modmask_kernels.ops.masked_matmul import reference as matmul_reference

NAMES = ("x", "weight", "logits", "bias", "bias_logits")
OPTIONS = ("stride", "padding", "output_padding", "groups", "dilation")
FUNCTIONS = {
    "matmul": (ops.masked_matmul, "masked_matmul", ()),
    "conv": (
        ops.masked_conv_transpose2d,
        "masked_conv_transpose",
        ([2, 1], [1, 0, 0, 2], [1, 2], 1),
    ),
}
needs_kernels = pytest.mark.skipif(not _native.available(), reason="tests the compiled kernels")


def operands(x_shape, weight_shape, outputs, sets=2, samples=2, seeds="each", **options):
    dtype, masked_bias = options.pop("dtype", torch.float32), options.pop("masked_bias", True)
    g = torch.Generator().manual_seed(sum(x_shape))

    def normal(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    depth = math.prod(weight_shape) // max(weight_shape[1], 1)
    parts = sets * (1 if seeds is None else samples)
    tensors = {
        "x": normal(x_shape[0] * parts, *x_shape[1:]),
        "weight": normal(*weight_shape, scale=max(depth, 1) ** -0.5),
        "logits": normal(sets, *weight_shape, scale=2.0, dtype=torch.float32),
        "bias": normal(outputs),
        "bias_logits": normal(sets, outputs, scale=2.0, dtype=torch.float32)
        if masked_bias
        else None,
    }
    seed = {"each": torch.arange(sets) * 7 - 3, "one": torch.tensor(5), None: None}[seeds]
    return tensors, {"seed": seed, "samples": samples, "tensor_id": 3, **options}


def matmul_case(x=(3, 7, 11), outputs=13, **options):
    return operands(x, (x[-1], outputs), outputs, **options)


def conv_case(x=(2, 6, 5, 7), outputs=4, kernel=(3, 2), **options):
    groups = options.get("groups", 1)
    return operands(x, (x[1], outputs, *kernel), outputs * groups, **options)


CASES = {"matmul": matmul_case, "conv": conv_case}


def plainly(name, tensors, options):
    """The reference with the options in its own form, as a function of the operands."""
    draw = {"sample_offset": 0, "element_offset": 0, "tau": 1.0, "hard": True}
    options = {"bias_tensor_id": options["tensor_id"] + 1, **draw, **options}
    if name == "matmul":
        return lambda **t: matmul_reference.masked_matmul(**t, **options)

    def two(key, default):
        value = options.pop(key, default)
        return (value, value) if isinstance(value, int) else tuple(value)

    shape = {key: two(key, default) for key, default in zip(OPTIONS, (1, 0, 0, 1, 1), strict=True)}
    shape["groups"] = shape["groups"][0]

    def call(**t):
        def product(part, weight, bias):
            return F.conv_transpose2d(part, weight, bias, *(shape[key] for key in OPTIONS))

        return conv_reference.product_per_group(product, *(t[n] for n in NAMES), **options)

    return call


def apply(function, tensors, dy=None, wanted=NAMES, dtype=None):
    leaves = {n: t if t is None else t.detach().to(dtype or t.dtype) for n, t in tensors.items()}
    wanted = [n for n in wanted if leaves[n] is not None]
    for n in wanted:
        leaves[n] = leaves[n].clone().requires_grad_()
    y = function(**leaves)
    if dy is None:
        return {"y": y.detach()}
    grads = torch.autograd.grad(y, [leaves[n] for n in wanted], dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def random_like(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(100)).to(y.dtype)


def check(name, tensors, options, wanted=NAMES):
    """y and the gradients by the tolerance rule."""
    reference = plainly(name, tensors, options)
    dy = random_like(reference(**tensors))
    plain = apply(reference, tensors, dy, wanted)
    exact = apply(reference, tensors, dy, wanted, torch.float64)
    ours = apply(lambda **t: FUNCTIONS[name][0](**t, **options), tensors, dy, wanted)
    check_close((n, ours[n], plain[n], exact[n]) for n in ours)


DRAWS = [
    {},
    {"sets": 1, "samples": 1},
    {"sets": 3, "samples": 3},
    {"seeds": "one"},
    {"seeds": None},
    {"masked_bias": False},
    {"hard": False, "tau": 0.6},
    {"element_offset": 5, "sample_offset": 9, "bias_tensor_id": 17},
]
SHAPES = [
    ("matmul", {"x": (1, 5), "outputs": 1}),
    ("matmul", {"x": (70, 130), "outputs": 200}),
    ("matmul", {"x": (2, 3, 2, 33), "outputs": 65}),
    ("conv", {"stride": 2}),
    ("conv", {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2)}),
    ("conv", {"stride": 2, "padding": 2, "output_padding": 1, "dilation": 2}),
    ("conv", {"dilation": (3, 2), "output_padding": (2, 1)}),
    ("conv", {"groups": 3, "outputs": 2, "padding": 1}),
    ("conv", {"groups": 6, "outputs": 1}),
    ("conv", {"kernel": (1, 1), "stride": 3}),
    ("conv", {"x": (1, 40, 8, 8), "outputs": 33, "kernel": (4, 4), "stride": 2, "padding": 1}),
    ("conv", {"x": (9, 3, 1, 1), "outputs": 70, "kernel": (4, 4)}),
]


# the kernels are those of masked_linear and masked_conv, tested with every capability there
@pytest.mark.parametrize("change", DRAWS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients(name, change):
    check(name, *CASES[name](**change))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_lower_precision(name, dtype, capability):
    check(name, *CASES[name](dtype=dtype))


@pytest.mark.parametrize(("name", "change"), SHAPES, ids=str)
def test_shapes_and_options(name, change):
    check(name, *CASES[name](**change))


@pytest.mark.parametrize("wanted", [("x",), ("logits",), ("weight", "bias"), ("x", "bias_logits")])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_some_gradients(name, wanted):
    check(name, *CASES[name](), wanted)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_options_of_the_convolution(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    pairs = {key: (draw(1, 3), draw(1, 3)) for key in ("stride", "dilation")}
    kernel, size = (draw(1, 4), draw(1, 4)), (draw(1, 6), draw(1, 9))
    most = [max(pairs["stride"][i], pairs["dilation"][i]) - 1 for i in range(2)]
    added = (draw(0, most[0]), draw(0, most[1]))
    padding = tuple(
        draw(
            0,
            ((size[i] - 1) * pairs["stride"][i] + pairs["dilation"][i] * (kernel[i] - 1) + added[i])
            // 2,
        )
        for i in range(2)
    )
    groups = draw(1, 3)
    tensors, options = conv_case(
        x=(draw(1, 3), draw(2, 4) * groups, *size),
        outputs=draw(2, 5),
        kernel=kernel,
        sets=draw(1, 2),
        samples=draw(1, 3),
        padding=padding,
        output_padding=added,
        groups=groups,
        hard=data.draw(st.booleans()),
        **pairs,
    )
    check("conv", tensors, options, ("x", "weight", "logits"))


def test_one_dimension_is_a_row_of_two(capability):
    tensors, options = conv_case(x=(2, 6, 1, 9), kernel=(1, 4))
    wide = {"stride": (1, 3), "padding": (0, 1), "output_padding": (0, 2), "dilation": (1, 2)}
    dy = random_like(ops.masked_conv_transpose2d(**tensors, **options, **wide))
    expected = apply(lambda **t: ops.masked_conv_transpose2d(**t, **options, **wide), tensors, dy)
    flat = {n: t.squeeze(-2) if n in ("x", "weight", "logits") else t for n, t in tensors.items()}
    narrow = {key: value[1] for key, value in wide.items()}
    got = apply(
        lambda **t: ops.masked_conv_transpose1d(**t, **options, **narrow), flat, dy.squeeze(-2)
    )
    for n, t in got.items():
        torch.testing.assert_close(t, expected[n].reshape(t.shape), rtol=1e-5, atol=1e-5)
    single = ops.masked_conv_transpose1d(
        **{**flat, "x": flat["x"][0], "logits": flat["logits"][0], "bias_logits": None},
        **{**options, "seed": None},
        **narrow,
    )
    assert single.shape == got["y"].shape[1:]


@pytest.mark.parametrize("seeds", ["each", None])
def test_the_products_see_the_bits_of_sample_mask(seeds, capability):
    tensors, options = matmul_case(x=(9, 9), outputs=29, seeds=seeds)
    logits = tensors["logits"]
    groups = 2 if seeds is None else 4
    y = ops.masked_matmul(torch.eye(9).repeat(groups, 1), torch.ones(9, 29), logits, **options)
    masks = (logits > 0).float()[None] if seeds is None else ops.sample_mask(logits, **options)
    masks = masks.transpose(0, 1)
    assert torch.equal(y.view(groups, 9, 29), masks.reshape(groups, 9, 29))
    pixels = torch.eye(9).repeat(groups, 1)[..., None, None]
    y = ops.masked_conv_transpose2d(
        pixels, torch.ones(9, 29, 1, 1), logits[..., None, None], **options
    )
    assert torch.equal(y.view(groups, 9, 29), masks.reshape(groups, 9, 29))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_empty_batches_and_layouts(name, capability):
    function, _, _ = FUNCTIONS[name]
    tensors, options = CASES[name]()
    empty = {**tensors, "x": tensors["x"][:0]}
    y = function(**empty, **options)
    result = apply(lambda **t: function(**t, **options), empty, y.detach())
    assert result["y"].shape[1:] == function(**tensors, **options).shape[1:]
    for n in NAMES:
        assert torch.equal(result[n], torch.zeros_like(empty[n])), n
    dy = random_like(function(**tensors, **options))
    first = apply(lambda **t: function(**t, **options), tensors, dy)
    turned = {
        n: t.movedim(1, -1).contiguous().movedim(-1, 1) if n in ("x", "weight") else t
        for n, t in tensors.items()
    }
    again = apply(lambda **t: function(**t, **options), turned, dy.mT.contiguous().mT)
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_no_inputs_and_no_outputs():
    for x, outputs in (((2, 0), 3), ((2, 4), 0)):
        tensors, options = matmul_case(x=x, outputs=outputs)
        reference = plainly("matmul", tensors, options)
        torch.testing.assert_close(ops.masked_matmul(**tensors, **options), reference(**tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["plain", "masked bias", "threshold"])
@pytest.mark.parametrize("small", ["row", "column", "one", "blocks"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_logits_of_blocks(name, small, case, dtype):
    """Rows and columns scale the result and the input of a plain product, others go by group."""
    shape = (
        {"x": (3, 7, 12), "outputs": 14}
        if name == "matmul"
        else {"groups": 2, "stride": (2, 1), "padding": (1, 0)}
    )
    seeds = None if case == "threshold" else "each"
    tensors, options = CASES[name](
        masked_bias=case == "masked bias", seeds=seeds, dtype=dtype, **shape
    )
    sizes = {"row": (1, None), "column": (None, 1), "one": (1, 1), "blocks": (None, None)}[small]
    logits = tensors["logits"][:, : sizes[0], : sizes[1]]
    if name == "conv":
        logits = logits[..., :1, :1]
    elif small == "blocks":
        logits = logits[:, :4, :7]
    tensors["logits"] = logits.contiguous()
    options |= {"element_offset": 3, "sample_offset": 2, "tau": 0.7}
    check(name, tensors, options)


def test_time_major_batches():
    tensors, options = matmul_case()
    y = ops.masked_matmul(**tensors, **options)
    moved = {**tensors, "x": tensors["x"].transpose(0, 1)}
    assert torch.equal(ops.masked_matmul(**moved, **options, batch_dim=1).transpose(0, 1), y)


@needs_kernels
@pytest.mark.parametrize("name", FUNCTIONS)
def test_threads_change_nothing(name, capability, threads):
    tensors, options = CASES[name](
        **({"x": (65, 130), "outputs": 77} if name == "matmul" else {"stride": 2, "outputs": 40})
    )
    call = lambda **t: FUNCTIONS[name][0](**t, **options)  # noqa: E731
    dy = random_like(call(**tensors))
    threads(1)
    first = apply(call, tensors, dy)
    for n in (2, 3):
        threads(n)
        again = apply(call, tensors, dy)
        assert all(torch.equal(first[key], again[key]) for key in first), n


@pytest.mark.parametrize("name", FUNCTIONS)
def test_opcheck(name):
    tensors, options = CASES[name]()
    _, operation, extra = FUNCTIONS[name]
    draw = (3, 4, 0, 0, 2, 1.0, True, *arguments_of("gumbel_sigmoid", False), [])
    arguments = [tensors[n].requires_grad_() for n in NAMES]
    torch.library.opcheck(
        getattr(torch.ops.modmask, operation).default,
        [*arguments, options["seed"], *extra, *draw],
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_and_compile(name):
    function, _, _ = FUNCTIONS[name]
    tensors, options = CASES[name](sets=1, samples=2, masked_bias=False)
    options.pop("seed")

    def call(seed, logits, x=tensors["x"]):
        return function(**{**tensors, "logits": logits, "x": x}, **options, seed=seed)

    seeds = torch.arange(3)
    stacked = torch.vmap(call, (0, None))(seeds, tensors["logits"])
    for n in range(3):
        assert torch.equal(stacked[n], call(seeds[n], tensors["logits"]))
    grad = torch.func.grad(lambda logits: call(seeds[1], logits).square().sum())(tensors["logits"])
    leaf = tensors["logits"].clone().requires_grad_()
    call(seeds[1], leaf).square().sum().backward()
    assert torch.equal(grad, leaf.grad)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    counts = []
    for rows in (4, 6):
        x = tensors["x"].repeat(3, *[1] * (tensors["x"].dim() - 1))[:rows]
        torch._dynamo.mark_dynamic(x, 0)
        leaf = tensors["logits"].clone().requires_grad_()
        compiled(seeds[1], leaf, x).sum().backward()
        expected = tensors["logits"].clone().requires_grad_()
        call(seeds[1], expected, x).sum().backward()
        assert torch.equal(leaf.grad, expected.grad)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_meta_and_second_derivatives(name):
    function, _, _ = FUNCTIONS[name]
    tensors, options = CASES[name]()
    y = function(**tensors, **options)
    with torch.autocast("cpu", torch.bfloat16):
        low = function(**tensors, **options)
    cast = {n: t.bfloat16() if n in ("x", "weight", "bias") else t for n, t in tensors.items()}
    assert torch.equal(low, function(**cast, **options))
    meta = {n: t.to("meta") for n, t in tensors.items()}
    found = function(**meta, **{**options, "seed": options["seed"].to("meta")})
    assert found.is_meta
    assert found.shape == y.shape
    logits = tensors["logits"].requires_grad_()
    y = function(**tensors, **options)
    (grad,) = torch.autograd.grad(y.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64_is_the_reference(name):
    small = (
        {"x": (1, 2, 2, 1), "outputs": 1, "kernel": (2, 1)}
        if name == "conv"
        else {"x": (1, 3), "outputs": 2}
    )
    tensors, options = CASES[name](dtype=torch.float64, hard=False, **small)

    def call(*leaves):
        return FUNCTIONS[name][0](*leaves, **options)

    reference = plainly(name, tensors, options)
    torch.testing.assert_close(call(*tensors.values()), reference(**tensors))
    assert torch.autograd.gradcheck(call, [t.double().requires_grad_() for t in tensors.values()])


X, W = torch.zeros(12, 4), torch.zeros(4, 6)
IMAGES, KERNEL = torch.zeros(12, 4, 3, 3), torch.zeros(4, 3, 2, 2)
BAD = [
    ("matmul", {"x": torch.zeros(12, 6)}, ValueError, r"x must have shape \[batch, ..., 4\]"),
    ("matmul", {"x": torch.zeros(4)}, ValueError, r"x must have shape"),
    ("matmul", {"x": torch.zeros(10, 4)}, ValueError, r"2 sets \* 2 samples = 4"),
    ("matmul", {"weight": W[0]}, ValueError, r"weight must have shape \[in, out\]"),
    ("matmul", {"logits": W.T}, ValueError, r"logits must have shape \[4, 6\]"),
    ("matmul", {"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[6\]"),
    ("matmul", {"batch_dim": 1}, ValueError, r"batch_dim must be a dimension of x"),
    ("matmul", {"weight": W.half()}, TypeError, r"weight must have the dtype of x"),
    ("matmul", {"x": None}, TypeError, r"x must be a tensor, not NoneType"),
    ("matmul", {"samples": 0}, ValueError, r"samples must be at least 1"),
    ("conv", {"x": IMAGES[:, :3]}, ValueError, r"x must have shape \[batch, 4, height, width\]"),
    ("conv", {"x": IMAGES[0, 1:]}, ValueError, r"x must have shape \[4, height.*not \[3, 3, 3\]"),
    ("conv", {"x": IMAGES[0]}, ValueError, r"x \[4, 3, 3\] has no batch dimension"),
    ("conv", {"x": IMAGES[:10]}, ValueError, r"2 sets \* 2 samples = 4"),
    ("conv", {"weight": KERNEL[0]}, ValueError, r"weight must have shape \[in, out / groups"),
    ("conv", {"groups": 3}, ValueError, r"groups must divide the 4 input channels"),
    ("conv", {"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[3\]"),
    ("conv", {"stride": 0}, ValueError, r"stride must be at least 1"),
    ("conv", {"padding": "same"}, ValueError, r"padding must be one integer or 2"),
    ("conv", {"padding": 2}, ValueError, r"padding 2 leaves no output"),
    ("conv", {"output_padding": 1}, ValueError, r"output_padding must be smaller than stride or"),
]


@pytest.mark.parametrize(("name", "change", "kind", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(name, change, kind, message):
    x, weight = (X, W) if name == "matmul" else (IMAGES, KERNEL)
    arguments = {
        "x": x,
        "weight": weight,
        "logits": torch.zeros(2, *weight.shape),
        "seed": torch.tensor(3),
        "samples": 2,
    }
    FUNCTIONS[name][0](**arguments)
    with pytest.raises(kind, match=message):
        FUNCTIONS[name][0](**{**arguments, **change})
