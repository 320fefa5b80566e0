"""`masked_conv2d` and `masked_conv1d` against their float64 reference, and what they promise."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import check_close
from torch._dynamo.testing import CompileCounterWithBackend

from modmask_kernels import _native, ops
from modmask_kernels.ops.estimators import arguments
from modmask_kernels.ops.masked_conv import reference

NAMES = ("x", "weight", "logits", "bias", "bias_logits")
GUMBEL = arguments("gumbel_sigmoid", False)
needs_kernels = pytest.mark.skipif(not _native.available(), reason="tests the compiled kernels")


def tensors_of(
    images=2, channels=5, outputs=7, size=(9, 10), kernel=(3, 3), sets=2, samples=2, **given_options
):
    """Operands and options of a call; `seeds` as in the case of masked_linear."""
    dtype = given_options.pop("dtype", torch.float32)
    seeds = given_options.pop("seeds", "each")
    masked_bias = given_options.pop("masked_bias", True)
    g = torch.Generator().manual_seed(images + channels + outputs)
    groups = given_options.get("groups", 1)
    parts = sets * (1 if seeds is None else samples)

    def normal(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    depth = channels * math.prod(kernel)
    tensors = {
        "x": normal(parts * images, channels * groups, *size),
        "weight": normal(outputs * groups, channels, *kernel, scale=depth**-0.5),
        "logits": normal(sets, outputs * groups, channels, *kernel, scale=2.0, dtype=torch.float32),
        "bias": normal(outputs * groups),
        "bias_logits": normal(sets, outputs * groups, scale=2.0, dtype=torch.float32)
        if masked_bias
        else None,
    }
    seed = {"each": torch.arange(sets) * 7 - 3, "one": torch.tensor(5), None: None}[seeds]
    return tensors, {"seed": seed, "samples": samples, "tensor_id": 3, **given_options}


def apply(function, tensors, options, dy=None, wanted=NAMES, dtype=None):
    leaves = {name: t if t is None or dtype is None else t.to(dtype) for name, t in tensors.items()}
    wanted = [name for name in wanted if leaves[name] is not None]
    leaves = {name: t if t is None else t.detach() for name, t in leaves.items()}
    for name in wanted:
        leaves[name].requires_grad_()
    y = function(**leaves, **options)
    if dy is None:
        return {"y": y.detach()}
    grads = torch.autograd.grad(y, [leaves[n] for n in wanted], dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def plainly(options):
    """The options as the reference takes them: two numbers each, padding on both sides."""
    options = {"bias_tensor_id": options["tensor_id"] + 1, **options}
    for name, default in (("stride", 1), ("dilation", 1), ("padding", 0)):
        value = options.get(name, default)
        options[name] = (value, value) if isinstance(value, int) else tuple(value)
    options["padding"] = tuple(n for n in options["padding"] for _ in range(2))
    return options


def random_like(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(100)).to(y.dtype)


def check(tensors, options, wanted=NAMES):
    """y and the gradients by the tolerance rule."""
    plain_options = plainly(options)
    y = reference.masked_conv2d(**tensors, **plain_options)
    dy = random_like(y)
    plain = apply(reference.masked_conv2d, tensors, plain_options, dy, wanted)
    exact = apply(reference.masked_conv2d, tensors, plain_options, dy, wanted, torch.float64)
    ours = apply(ops.masked_conv2d, tensors, options, dy, wanted)
    check_close((name, ours[name], plain[name], exact[name]) for name in ours)


# ---- against the reference ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sets": 1, "samples": 1},
        {"sets": 3, "samples": 3, "images": 1},
        {"seeds": "one"},
        {"seeds": None},
        {"masked_bias": False},
        {"padding": 1},
        {"padding": (2, 0)},
        {"stride": 2, "padding": (1, 2)},
        {"dilation": (2, 1), "padding": 2},
        {"groups": 3, "outputs": 2},
        {"groups": 5, "channels": 1, "outputs": 1, "padding": 1},
        {"kernel": (1, 1)},
        {"kernel": (5, 2), "padding": 1},
        {"hard": False},
        {"hard": False, "tau": 0.6},
        {"tau": 3.0, "seeds": None},
        {"element_offset": 5, "sample_offset": 9, "bias_tensor_id": 17},
    ],
    ids=str,
)
def test_values_and_gradients(change, dtype, capability):
    check(*tensors_of(dtype=dtype, **change))


@pytest.mark.parametrize(
    "change",
    [
        # rows of 16 and 32 pixels, and 4x4 images, are copied in vectors
        {"size": (16, 16), "padding": 1, "images": 3},
        {"size": (33, 32), "padding": 1, "channels": 3, "outputs": 17, "images": 1},
        {"size": (4, 4), "padding": 1, "images": 37, "channels": 40, "outputs": 33},
        {"size": (1, 1), "kernel": (1, 1), "images": 35},
        # several tiles of outputs, several of channels
        {"size": (5, 6), "outputs": 200, "channels": 45, "padding": 1},
        {"size": (3, 3), "outputs": 193, "channels": 90, "images": 1, "padding": 1},
        # more pixels than a block holds, in rows and in images
        {"size": (40, 41), "channels": 2, "outputs": 3, "images": 1},
        {"size": (14, 15), "channels": 2, "outputs": 3, "images": 9, "stride": (1, 2)},
        # rows and columns that no patch reaches
        {"size": (11, 12), "stride": 3},
        {"size": (9, 9), "stride": 4, "kernel": (1, 1)},
        # a kernel larger than the image
        {"size": (2, 3), "kernel": (4, 5), "padding": (2, 1)},
    ],
    ids=str,
)
def test_sizes(change, capability):
    check(*tensors_of(**change))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "change",
    [
        {"groups": 5, "outputs": 1, "padding": 1},
        {"groups": 3, "outputs": 4, "size": (17, 16), "padding": (0, 2)},
        {"groups": 2, "outputs": 3, "size": (9, 40), "dilation": (3, 2), "padding": 1},
        {"groups": 4, "outputs": 2, "kernel": (5, 1), "padding": (6, 3)},  # beyond the reach of dx
        {"groups": 2, "outputs": 1, "kernel": (2, 4), "size": (2, 70), "hard": False, "tau": 0.7},
        {"groups": 3, "outputs": 2, "kernel": (1, 1), "size": (1, 1), "seeds": None},
        {"groups": 1, "outputs": 4, "kernel": (11, 11), "size": (12, 13), "images": 3},
        {"groups": 2, "outputs": 1, "kernel": (12, 11), "size": (12, 13)},  # too large a kernel
        {"groups": 3, "outputs": 2, "stride": 2, "padding": 1, "size": (33, 32)},
        {"groups": 9, "outputs": 1, "stride": (1, 3), "dilation": (1, 2), "padding": 2},
        {"groups": 9, "outputs": 1, "stride": (4, 5), "size": (11, 12)},  # not all is reached
        {"groups": 2, "outputs": 5, "padding": 1},  # too many outputs
    ],
    ids=str,
)
def test_one_channel_per_group(change, dtype, capability):
    tensors = tensors_of(dtype=dtype, channels=1, **change)
    check(*tensors)
    for wanted in (("x",), ("logits",), ("weight", "bias")):
        check(*tensors, wanted)


@pytest.mark.parametrize("wanted", [("x",), ("logits",), ("weight", "bias"), ("x", "bias_logits")])
def test_some_gradients(wanted, capability):
    check(*tensors_of(padding=1), wanted)
    check(*tensors_of(padding=1, outputs=200, dtype=torch.bfloat16), wanted)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_options(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    kernel = (draw(1, 4), draw(1, 4))
    dilation = (draw(1, 3), draw(1, 3))
    padding = (draw(0, 3), draw(0, 3))
    least = [max(dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i], 1) for i in range(2)]
    tensors, options = tensors_of(
        images=draw(1, 3),
        channels=draw(2, 6),
        outputs=draw(4, 9),
        size=(least[0] + draw(0, 9), least[1] + draw(0, 20)),
        kernel=kernel,
        sets=draw(1, 2),
        samples=draw(1, 3),
        stride=(draw(1, 3), draw(1, 3)),
        dilation=dilation,
        padding=padding,
        groups=draw(1, 3),
        hard=data.draw(st.booleans()),
    )
    # the tolerance compares largest errors, which a handful of bias gradients do not tell
    check(tensors, options, ("x", "weight", "logits"))


@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
@pytest.mark.parametrize("stride", [1, 2])
def test_one_dimension_is_a_row_of_two(padding, stride, capability):
    if padding == "same":
        stride = 1
    tensors, options = tensors_of(size=(1, 30), kernel=(1, 4))
    options["dilation"] = 2
    padded = (0, padding) if isinstance(padding, int) else padding
    dy = random_like(
        ops.masked_conv2d(**tensors, **{**options, "stride": (1, stride), "padding": padded})
    )
    wide = apply(
        ops.masked_conv2d, tensors, {**options, "stride": (1, stride), "padding": padded}, dy
    )
    rows = {
        name: t.squeeze(-2) if name in ("x", "weight", "logits") else t
        for name, t in tensors.items()
    }
    flat = apply(
        ops.masked_conv1d, rows, {**options, "stride": stride, "padding": padding}, dy.squeeze(-2)
    )
    for name, t in flat.items():
        assert torch.equal(t, wide[name].reshape(t.shape)), name


def test_same_padding_is_that_of_torch(capability):
    tensors, options = tensors_of(sets=1, samples=1, kernel=(4, 3), masked_bias=False)
    keep = torch.full_like(tensors["logits"], 100.0)
    y = ops.masked_conv2d(**{**tensors, "logits": keep}, **options, padding="same", dilation=2)
    expected = F.conv2d(
        tensors["x"], tensors["weight"], tensors["bias"], padding="same", dilation=2
    )
    torch.testing.assert_close(y, expected)


def test_an_image_without_a_batch(capability):
    tensors, options = tensors_of(images=1, sets=1, samples=1)
    y = ops.masked_conv2d(**tensors, **options)
    single = ops.masked_conv2d(**{**tensors, "x": tensors["x"][0]}, **options)
    assert torch.equal(single, y[0])


def test_an_empty_batch(capability):
    tensors, options = tensors_of()
    tensors["x"] = tensors["x"][:0]
    result = apply(ops.masked_conv2d, tensors, options, torch.empty(0, 7, 7, 8))
    assert result["y"].shape == (0, 7, 7, 8)
    for name in NAMES:
        assert torch.equal(result[name], torch.zeros_like(tensors[name])), name


def test_layout_changes_nothing(capability):
    tensors, options = tensors_of(padding=1)
    dy = random_like(ops.masked_conv2d(**tensors, **options))
    first = apply(ops.masked_conv2d, tensors, options, dy)
    turned = {
        **tensors,
        "x": tensors["x"].to(memory_format=torch.channels_last),
        "weight": tensors["weight"].transpose(0, 3).contiguous().transpose(0, 3),
    }
    again = apply(ops.masked_conv2d, turned, options, dy.transpose(2, 3).contiguous().mT)
    assert all(torch.equal(first[name], again[name]) for name in first)


# ---- bits ----


@pytest.mark.parametrize("seeds", ["each", "one", None])
def test_the_product_sees_the_bits_of_sample_mask(seeds, capability):
    """Patches that are unit vectors show the masks of a weight of ones."""
    tensors, options = tensors_of(channels=3, outputs=29, seeds=seeds, sets=2, samples=2)
    groups = 2 if seeds is None else 4
    # one image per group; the pixels of a row are the values of a patch, one after the other
    x = torch.zeros(groups * 27, 3, 3, 3)
    for i in range(27):
        x.view(groups, 27, 27)[:, i, i] = 1.0
    y = ops.masked_conv2d(x, torch.ones(29, 3, 3, 3), tensors["logits"], **options)
    seen = y.view(groups, 27, 29).transpose(1, 2).reshape(groups, 29, 3, 3, 3)
    if seeds is None:
        masks = (tensors["logits"] > 0).float()
    else:
        seed = options["seed"].expand(2)
        masks = ops.sample_mask(tensors["logits"], **{**options, "seed": seed}).transpose(0, 1)
    assert torch.equal(seen, masks.reshape(seen.shape))


def test_samples_at_once_are_samples_one_by_one(capability):
    tensors, options = tensors_of(sets=1, samples=3, images=3, padding=1)
    dy = random_like(ops.masked_conv2d(**tensors, **options))
    together = apply(ops.masked_conv2d, tensors, options, dy, ("x",))
    for k in range(3):
        part = slice(3 * k, 3 * k + 3)
        alone = apply(
            ops.masked_conv2d,
            {**tensors, "x": tensors["x"][part]},
            {**options, "samples": 1, "sample_offset": k},
            dy[part],
            ("x",),
        )
        assert torch.equal(alone["y"], together["y"][part])
        assert torch.equal(alone["x"], together["x"][part])


def test_sets_at_once_are_sets_one_by_one(capability):
    tensors, options = tensors_of(sets=3, samples=2, padding=1, outputs=33)
    dy = random_like(ops.masked_conv2d(**tensors, **options))
    wanted = ("x", "logits", "bias_logits")
    together = apply(ops.masked_conv2d, tensors, options, dy, wanted)
    for s in range(3):
        part = slice(4 * s, 4 * s + 4)
        mine = {name: tensors[name][s : s + 1] for name in ("logits", "bias_logits")}
        alone = apply(
            ops.masked_conv2d,
            {**tensors, "x": tensors["x"][part], **mine},
            {**options, "seed": options["seed"][s : s + 1]},
            dy[part],
            wanted,
        )
        assert torch.equal(alone["y"], together["y"][part])
        assert torch.equal(alone["x"], together["x"][part])
        assert torch.equal(alone["logits"][0], together["logits"][s])
        assert torch.equal(alone["bias_logits"][0], together["bias_logits"][s])


@needs_kernels
@pytest.mark.parametrize(
    "change",
    [
        {"size": (16, 17), "channels": 33, "outputs": 40, "padding": 1},
        {"size": (4, 4), "channels": 70, "outputs": 210, "padding": 1, "images": 9},
        {"size": (30, 30), "channels": 4, "dtype": torch.bfloat16, "stride": 2, "groups": 2},
    ],
    ids=str,
)
def test_threads_and_runs_change_nothing(change, capability, threads):
    tensors, options = tensors_of(**change)
    dy = random_like(ops.masked_conv2d(**tensors, **options))
    for wanted in (NAMES, ("x", "logits"), ("logits",), ("weight",)):
        threads(1)
        first = apply(ops.masked_conv2d, tensors, options, dy, wanted)
        for n in (1, 2, 3, 4):
            threads(n)
            again = apply(ops.masked_conv2d, tensors, options, dy, wanted)
            assert all(torch.equal(first[name], again[name]) for name in first), n


# ---- PyTorch ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    tensors, options = tensors_of(dtype=dtype)
    arguments = [
        *(tensors[name].requires_grad_() for name in NAMES),
        options["seed"],
        [1, 2],
        [1, 1, 0, 2],
        [1, 1],
        1,
        3,
        4,
        0,
        0,
        2,
        1.0,
        True,
        *GUMBEL,
        [],
    ]
    torch.library.opcheck(torch.ops.modmask.masked_conv.default, arguments)


def test_gradcheck_through_the_soft_path():
    tensors, options = tensors_of(channels=2, outputs=3, size=(4, 5), images=1, padding=1)
    leaves = [tensors[name].double().requires_grad_() for name in NAMES]

    def soft(*operands):
        return ops.masked_conv2d(*operands, **options, hard=False)

    assert torch.autograd.gradcheck(soft, leaves)


def test_vmap_and_functional_transforms(capability):
    tensors, options = tensors_of(sets=1, samples=1, masked_bias=False, padding=1)
    seeds = torch.arange(3)
    options.pop("seed")

    def call(seed, logits):
        return ops.masked_conv2d(**{**tensors, "logits": logits}, **options, seed=seed)

    stacked = torch.vmap(call, (0, None))(seeds, tensors["logits"])
    for n in range(3):
        assert torch.equal(stacked[n], call(seeds[n], tensors["logits"]))
    grad = torch.func.grad(lambda logits: call(seeds[1], logits).square().sum())(tensors["logits"])
    leaf = tensors["logits"].clone().requires_grad_()
    call(seeds[1], leaf).square().sum().backward()
    assert torch.equal(grad, leaf.grad)


def test_compiles_without_breaks_or_recompiles():
    tensors, options = tensors_of(padding=1, images=4)
    counter = CompileCounterWithBackend("aot_eager")

    def call(x, logits):
        return ops.masked_conv2d(**{**tensors, "x": x, "logits": logits}, **options)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    counts = []
    for images in (4, 8, 12):
        x = tensors["x"][:images]
        torch._dynamo.mark_dynamic(x, 0)
        logits = tensors["logits"].clone().requires_grad_()
        compiled(x, logits).sum().backward()
        expected = tensors["logits"].clone().requires_grad_()
        call(x, expected).sum().backward()
        assert torch.equal(logits.grad, expected.grad)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], f"compiled anew for another batch: {counts}"


def test_autocast_never_lowers_the_logits():
    tensors, options = tensors_of(padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.masked_conv2d(**tensors, **options)
    low = {n: t.bfloat16() if n in ("x", "weight", "bias") else t for n, t in tensors.items()}
    assert torch.equal(y, ops.masked_conv2d(**low, **options))


def test_meta_device():
    tensors, options = tensors_of(padding=1, stride=2)
    meta = {name: t.to("meta") for name, t in tensors.items()}
    y = ops.masked_conv2d(**meta, **{**options, "seed": options["seed"].to("meta")})
    assert y.is_meta
    assert y.shape == ops.masked_conv2d(**tensors, **options).shape


def test_refuses_double_backward():
    tensors, options = tensors_of()
    logits = tensors["logits"].requires_grad_()
    y = ops.masked_conv2d(**tensors, **options)
    (grad,) = torch.autograd.grad(y.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


# ---- bad input ----

X, W, L = torch.zeros(12, 4, 5, 6), torch.zeros(6, 4, 3, 3), torch.zeros(2, 6, 4, 3, 3)
BAD = [
    ({"x": torch.zeros(12, 3, 5, 6)}, ValueError, r"x must have shape \[batch, 4, height, width\]"),
    ({"x": torch.zeros(12, 4)}, ValueError, r"x must have shape .*not \[12, 4\]"),
    (
        {"x": torch.zeros(3, 5, 6)},
        ValueError,
        r"x must have shape \[4, height, width\].*not \[3, 5, 6\]",
    ),
    ({"x": torch.zeros(4, 5, 6)}, ValueError, r"x \[4, 5, 6\] has no batch dimension.* = 4 groups"),
    ({"x": torch.zeros(12, 4, 2, 6)}, ValueError, r"x is smaller than the kernel: 2 .* needs 3"),
    ({"x": torch.zeros(10, 4, 5, 6)}, ValueError, r"batch of x, 10 .*2 sets \* 2 samples = 4"),
    ({"weight": torch.zeros(6, 4, 3)}, ValueError, r"weight must have shape \[out, in / groups"),
    ({"weight": torch.zeros(6, 4, 0, 3)}, ValueError, r"weight must not have a size of 0"),
    ({"logits": torch.zeros(6, 4, 9)}, ValueError, r"logits must have shape \[6, 4, 3, 3\]"),
    ({"logits": L.double()}, TypeError, r"logits must be float32, not torch\.float64"),
    ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \[6\], not \[5\]"),
    ({"bias_logits": torch.zeros(2, 6)}, ValueError, r"bias_logits came without a bias"),
    ({"groups": 0}, ValueError, r"groups must be at least 1, not 0"),
    ({"groups": 3}, ValueError, r"x must have shape \[batch, 12.*groups=3"),
    ({"stride": 0}, ValueError, r"stride must be at least 1, not 0"),
    ({"stride": (1, 2, 3)}, ValueError, r"stride must be one integer or 2, not \(1, 2, 3\)"),
    ({"dilation": -1}, ValueError, r"dilation must be at least 1, not -1"),
    ({"padding": -1}, ValueError, r"padding must be at least 0, not -1"),
    ({"padding": "full"}, ValueError, r"padding must be numbers, 'valid' or 'same', not 'full'"),
    ({"padding": "same", "stride": 2}, ValueError, r"padding='same' needs a stride of 1"),
    ({"weight": W.half()}, TypeError, r"weight must have the dtype of x"),
    ({"weight": W.to("meta")}, ValueError, r"weight is on meta, but x is on cpu"),
    ({"x": None}, TypeError, r"x must be a tensor, not NoneType"),
    ({"samples": 0}, ValueError, r"samples must be at least 1, not 0"),
    ({"tau": -1.0}, ValueError, r"tau must be positive and finite"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_bad_input(change, kind, message):
    arguments = {"x": X, "weight": W, "logits": L, "seed": torch.tensor(3), "samples": 2}
    ops.masked_conv2d(**arguments)
    with pytest.raises(kind, match=message):
        ops.masked_conv2d(**{**arguments, **change})
