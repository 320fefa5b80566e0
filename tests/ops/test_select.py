"""`select_linear` and `select_conv2d` against their float64 reference, and what they promise."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import check_close
from torch._dynamo.testing import CompileCounterWithBackend

from modmask_kernels import _native, ops
from modmask_kernels.ops.select import reference

needs_kernels = pytest.mark.skipif(not _native.available(), reason="tests the compiled kernels")


def bits(sets, count, g):
    """Packed random masks [sets, ceil(count / 8)]."""
    return torch.stack([ops.pack_bits(torch.rand(count, generator=g) < 0.6) for _ in range(sets)])


def linear_tensors(
    batch=11, inputs=37, outputs=29, sets=3, shape=(), dtype=torch.float32, masked_bias=True
):
    g = torch.Generator().manual_seed(batch + inputs + outputs)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    return {
        "x": normal(batch, *shape, inputs),
        "weight": normal(outputs, inputs, scale=max(inputs, 1) ** -0.5),
        "masks": bits(sets, outputs * inputs, g),
        "row_sets": torch.randint(sets, (batch,), generator=g),
        "bias": normal(outputs),
        "bias_masks": bits(sets, outputs, g) if masked_bias else None,
    }


def conv_tensors(
    batch=7, channels=5, outputs=7, size=(9, 10), kernel=(3, 3), sets=3, **given_options
):
    dtype = given_options.pop("dtype", torch.float32)
    groups = given_options.get("groups", 1)
    g = torch.Generator().manual_seed(batch + channels + outputs)
    count = outputs * groups * channels * math.prod(kernel)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    depth = channels * math.prod(kernel)
    tensors = {
        "x": normal(batch, channels * groups, *size),
        "weight": normal(outputs * groups, channels, *kernel, scale=depth**-0.5),
        "masks": bits(sets, count, g),
        "row_sets": torch.randint(sets, (batch,), generator=g),
        "bias": normal(outputs * groups),
        "bias_masks": bits(sets, outputs * groups, g),
    }
    return tensors, given_options


def double(tensors):
    return {
        n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()
    }


def check_linear(tensors):
    ours = ops.select_linear(**tensors)
    plain = reference.select_linear(**tensors)
    exact = reference.select_linear(**double(tensors))
    check_close([("y", ours, plain, exact)])


def check_conv(tensors, options):
    plainly = dict(options)
    for name, default in (("stride", 1), ("dilation", 1), ("padding", 0)):
        value = options.get(name, default)
        plainly[name] = (value, value) if isinstance(value, int) else tuple(value)
    plainly["padding"] = tuple(n for n in plainly["padding"] for _ in range(2))
    ours = ops.select_conv2d(**tensors, **options)
    plain = reference.select_conv2d(**tensors, **plainly)
    exact = reference.select_conv2d(**double(tensors), **plainly)
    check_close([("y", ours, plain, exact)])


# ---- against the reference ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sets": 1},
        {"sets": 40},
        {"masked_bias": False},
        {"shape": (3,)},
        {"shape": (2, 5), "batch": 30},
        {"inputs": 1},
        {"inputs": 300, "outputs": 50},
        {"inputs": 2500, "outputs": 9, "batch": 3},
        {"outputs": 1},
        {"batch": 1},
        {"batch": 700, "sets": 2, "inputs": 33},
        {"batch": 60, "sets": 5, "inputs": 64, "outputs": 64},
    ],
    ids=str,
)
def test_linear(change, dtype, capability):
    check_linear(linear_tensors(dtype=dtype, **change))


@pytest.mark.parametrize("count", range(1, 36))
def test_numbers_of_rows_of_one_set(count, capability):
    tensors = linear_tensors(batch=count + 3, inputs=40)
    tensors["row_sets"][:] = 1
    tensors["row_sets"][[0, -1]] = torch.tensor([2, 0])
    check_linear(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sets": 1},
        {"padding": 1},
        {"padding": (2, 0)},
        {"stride": 2, "padding": (1, 2)},
        {"dilation": (2, 1), "padding": 2},
        {"groups": 3, "outputs": 2},
        {"kernel": (1, 1)},
        {"kernel": (5, 2), "padding": 1},
        {"size": (4, 4), "padding": 1, "batch": 37, "channels": 40, "outputs": 33},
        {"size": (5, 6), "outputs": 200, "channels": 45, "padding": 1, "batch": 3},
        {"size": (3, 3), "outputs": 193, "channels": 90, "batch": 2, "padding": 1},
        {"size": (40, 41), "channels": 2, "outputs": 3, "batch": 3},
        {"size": (2, 2), "kernel": (1, 1), "batch": 600, "sets": 2},
    ],
    ids=str,
)
def test_conv(change, dtype, capability):
    check_conv(*conv_tensors(dtype=dtype, **change))


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(0, 40),
    inputs=st.integers(0, 70),
    outputs=st.integers(0, 60),
    sets=st.integers(1, 9),
    data=st.data(),
)
def test_any_sizes(batch, inputs, outputs, sets, data, capability):
    tensors = linear_tensors(batch, inputs, outputs, sets)
    chosen = data.draw(st.lists(st.integers(0, sets - 1), min_size=batch, max_size=batch))
    tensors["row_sets"] = torch.tensor(chosen, dtype=torch.int64)
    check_linear(tensors)


@pytest.mark.parametrize("empty", ["batch", "inputs", "outputs"])
def test_size_zero(empty, capability):
    tensors = linear_tensors(**{empty: 0})
    assert ops.select_linear(**tensors).shape == (
        tensors["x"].shape[0],
        tensors["weight"].shape[0],
    )
    check_linear(tensors)


def test_empty_batch_of_images(capability):
    tensors, options = conv_tensors(batch=0, padding=1)
    assert ops.select_conv2d(**tensors, **options).shape == (0, 7, 9, 10)


def test_empty_middle_dimension(capability):
    tensors = linear_tensors(shape=(0,))
    assert ops.select_linear(**tensors).shape == (11, 0, 29)


def test_rows_are_those_of_masked_layers_one_by_one(capability):
    tensors = linear_tensors()
    y = ops.select_linear(**tensors)
    for r, s in enumerate(tensors["row_sets"].tolist()):
        alone = {**tensors, "x": tensors["x"][r : r + 1], "row_sets": torch.tensor([s])}
        mask = ops.unpack_bits(tensors["masks"][s], tensors["weight"].shape)
        bias = tensors["bias"] * ops.unpack_bits(tensors["bias_masks"][s], (29,))
        expected = F.linear(alone["x"].double(), (tensors["weight"] * mask).double(), bias.double())
        assert torch.allclose(y[r : r + 1].double(), expected, atol=1e-5)
        assert torch.allclose(ops.select_linear(**alone), y[r : r + 1], atol=1e-5)


def test_removed_weights_do_not_matter(capability):
    """Not even where they are not finite."""
    for batch in (2, 40):
        tensors = linear_tensors(batch=batch, sets=1)
        kept = ops.unpack_bits(tensors["masks"][0], tensors["weight"].shape)
        expected = ops.select_linear(**tensors)
        tensors["weight"] = torch.where(kept, tensors["weight"], torch.inf)
        if _native.available():
            assert torch.equal(ops.select_linear(**tensors), expected)


def test_layout_changes_nothing(capability):
    tensors = linear_tensors()
    y = ops.select_linear(**tensors)
    spread = {
        n: torch.stack([t, torch.zeros_like(t)], -1)[..., 0] if t is not None else None
        for n, t in tensors.items()
    }
    assert not spread["x"].is_contiguous()
    assert torch.equal(ops.select_linear(**spread), y)
    tensors, options = conv_tensors(padding=1)
    y = ops.select_conv2d(**tensors, **options)
    last = {
        n: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t
        for n, t in tensors.items()
    }
    assert torch.equal(ops.select_conv2d(**last, **options), y)


def test_threads_change_nothing(capability, threads):
    linear = linear_tensors(batch=200, inputs=300, outputs=70, sets=9)
    conv, options = conv_tensors(batch=30, channels=16, outputs=40, padding=1)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append((ops.select_linear(**linear), ops.select_conv2d(**conv, **options)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_time_major(capability):
    tensors = linear_tensors(shape=(4,))
    y = ops.select_linear(**tensors)
    major = {**tensors, "x": tensors["x"].transpose(0, 1)}
    assert torch.equal(ops.select_linear(**major, batch_dim=1), y.transpose(0, 1))


def test_conv1d_is_conv2d_in_one_dimension(capability):
    tensors, _ = conv_tensors(size=(1, 12), kernel=(1, 3))
    flat = {**tensors, "x": tensors["x"].squeeze(2), "weight": tensors["weight"].squeeze(2)}
    y = ops.select_conv1d(**flat, stride=2, padding=1, dilation=2)
    expected = ops.select_conv2d(**tensors, stride=(1, 2), padding=(0, 1), dilation=(1, 2))
    assert torch.equal(y, expected.squeeze(2))


def test_paddings_as_words(capability):
    tensors, _ = conv_tensors()
    assert torch.equal(
        ops.select_conv2d(**tensors, padding="same"), ops.select_conv2d(**tensors, padding=1)
    )
    assert torch.equal(ops.select_conv2d(**tensors, padding="valid"), ops.select_conv2d(**tensors))


def test_float64_runs_on_the_reference():
    tensors = double(linear_tensors())
    y = ops.select_linear(**tensors)
    assert y.dtype == torch.float64
    assert torch.equal(y, reference.select_linear(**tensors))


# ---- behaviour in PyTorch ----


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    namespace = torch.ops.modmask
    tensors = linear_tensors(batch=5, inputs=9, outputs=4, dtype=dtype)
    skip_autograd = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        namespace.select_linear.default, tuple(tensors.values()), test_utils=skip_autograd
    )
    tensors, _ = conv_tensors(batch=3, dtype=dtype)
    options = ([1, 1], [1, 1, 0, 0], [1, 1], 1)
    torch.library.opcheck(
        namespace.select_conv.default, (*tensors.values(), *options), test_utils=skip_autograd
    )


@needs_kernels
def test_gradients_are_refused():
    tensors = linear_tensors()
    tensors["x"].requires_grad_()
    y = ops.select_linear(**tensors)
    with pytest.raises(RuntimeError, match="selection by row is for inference"):
        y.sum().backward()
    with torch.no_grad():
        assert not ops.select_linear(**tensors).requires_grad


@needs_kernels
def test_vmap():
    tensors = linear_tensors()
    xs = torch.randn(4, *tensors["x"].shape)
    stacked = torch.vmap(lambda x: ops.select_linear(**{**tensors, "x": x}))(xs)
    for x, y in zip(xs, stacked, strict=True):
        assert torch.equal(ops.select_linear(**{**tensors, "x": x}), y)


@needs_kernels
def test_compiles_without_breaks_or_recompiles():
    tensors, conv = linear_tensors(batch=40), conv_tensors(batch=40, padding=1)
    counter = CompileCounterWithBackend("aot_eager")

    def both(x, image, sets):
        y = ops.select_linear(**{**tensors, "x": x, "row_sets": sets})
        return y * 2, ops.select_conv2d(**{**conv[0], "x": image, "row_sets": sets}, **conv[1])

    compiled = torch.compile(both, fullgraph=True, backend=counter)
    counts = []
    for batch in (5, 9, 40):
        operands = [tensors["x"][:batch], conv[0]["x"][:batch], tensors["row_sets"][:batch]]
        for operand in operands:
            torch._dynamo.mark_dynamic(operand, 0)
        results = zip(compiled(*operands), both(*operands), strict=True)
        assert all(torch.equal(a, b) for a, b in results)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], f"compiled anew for another batch: {counts}"


def test_autocast():
    tensors = linear_tensors()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.select_linear(**tensors)
    low = {n: t.bfloat16() if n in ("x", "weight", "bias") else t for n, t in tensors.items()}
    assert torch.equal(y, ops.select_linear(**low))


def test_meta_device():
    meta = {n: t.to("meta") for n, t in linear_tensors().items()}
    y = ops.select_linear(**meta)
    assert y.is_meta
    assert y.shape == (11, 29)


# ---- bad input ----

X, W, M = torch.zeros(6, 5), torch.zeros(3, 5), torch.zeros(2, 2, dtype=torch.uint8)
BAD = [
    ({"x": torch.zeros(6, 4)}, ValueError, r"x must have shape \[batch, \.\.\., 5\].*not \[6, 4\]"),
    ({"x": torch.zeros(5)}, ValueError, r"x must have shape \[batch, \.\.\., 5\]"),
    ({"x": None}, TypeError, r"x must be a tensor, not NoneType"),
    ({"x": torch.zeros(6, 5, dtype=torch.int64)}, TypeError, r"x must be float32"),
    ({"weight": torch.zeros(3, 5, 1)}, ValueError, r"weight must have shape \[out, in\]"),
    ({"weight": W.half()}, TypeError, r"weight must have the dtype of x"),
    ({"weight": W.to("meta")}, ValueError, r"weight is on meta, but x is on cpu"),
    ({"masks": M.bool()}, TypeError, r"masks must be uint8, packed as by pack_bits"),
    ({"masks": M[:, :1]}, ValueError, r"masks must have shape \[sets, 2\], 8 of 15 elements"),
    ({"masks": M[0]}, ValueError, r"masks must have shape \[sets, 2\]"),
    (
        {"row_sets": torch.zeros(5, dtype=torch.int64)},
        ValueError,
        r"row_sets must have shape \[6\]",
    ),
    ({"row_sets": torch.zeros(6)}, TypeError, r"row_sets must be int64"),
    ({"row_sets": torch.tensor([0, 1, 2, 0, 0, 0])}, ValueError, r"below 2, .*not 2"),
    ({"row_sets": torch.tensor([0, 1, -1, 0, 0, 0])}, ValueError, r"at least 0 .*not -1"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[3\], not \[4\]"),
    ({"bias_masks": M[:, :1]}, ValueError, r"bias_masks came without a bias"),
    (
        {"bias": torch.zeros(3), "bias_masks": M[:1, :1]},
        ValueError,
        r"bias_masks must have 2 sets like masks, not 1",
    ),
    ({"batch_dim": 1}, ValueError, r"batch_dim must be a dimension of x"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_bad_input(change, kind, message):
    sets = torch.zeros(6, dtype=torch.int64)
    arguments = {"x": X, "weight": W, "masks": M, "row_sets": sets}
    ops.select_linear(**arguments)
    with pytest.raises(kind, match=message):
        ops.select_linear(**{**arguments, **change})


@needs_kernels
def test_the_kernels_check_set_numbers_themselves():
    tensors = linear_tensors()
    tensors["row_sets"][4] = 3
    with pytest.raises(RuntimeError, match="row 4 has 3"):
        torch.ops.modmask.select_linear(*tensors.values())
