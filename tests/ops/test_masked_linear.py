"""`masked_linear` against its float64 reference, and what it promises about bits."""

import contextlib
import itertools
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from tolerance import check_close
from torch._dynamo.testing import CompileCounterWithBackend

from modmask_kernels import _native, ops
from modmask_kernels.ops.estimators import arguments
from modmask_kernels.ops.masked_linear import reference
from modmask_kernels.ops.sample_mask import reference as mask_reference

NAMES = ("x", "weight", "logits", "bias", "bias_logits")
HALVES = [torch.bfloat16, torch.float16]
GUMBEL = arguments("gumbel_sigmoid", False)
needs_kernels = pytest.mark.skipif(not _native.available(), reason="tests the compiled kernels")


@dataclass
class Case:
    """A call; `rows` are those of each group, `shape` more dimensions of x after the batch."""

    rows: int = 5
    inputs: int = 37
    outputs: int = 29
    sets: int = 2
    samples: int = 2
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = ()
    masked_bias: bool = True
    seeds: object = "each"  # one per set; "one"; None
    options: dict = field(default_factory=dict)

    def groups(self):
        return self.sets * (1 if self.seeds is None else self.samples)

    def tensors(self, seed=0):
        g = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0, dtype=self.dtype):
            return (torch.randn(shape, generator=g) * scale).to(dtype)

        out, inputs = self.outputs, self.inputs
        return {
            "x": normal(self.groups() * self.rows, *self.shape, inputs),
            "weight": normal(out, inputs, scale=1 / math.sqrt(max(inputs, 1))),
            "logits": normal(self.sets, out, inputs, scale=2.0, dtype=torch.float32),
            "bias": normal(out),
            "bias_logits": normal(self.sets, out, scale=2.0, dtype=torch.float32),
        }

    def draw(self):
        seed = {"each": torch.arange(self.sets) * 7 - 3, "one": torch.tensor(5), None: None}
        return {"seed": seed[self.seeds], "samples": self.samples, "tensor_id": 3, **self.options}


def apply(function, tensors, draw, dy=None, wanted=NAMES, dtype=None):
    """y and the gradients of the `wanted` tensors; `dtype` converts all tensors first."""
    leaves = {
        name: t if t is None else (t if dtype is None else t.to(dtype)).detach()
        for name, t in tensors.items()
    }
    wanted = [name for name in wanted if leaves[name] is not None]
    for name in wanted:
        leaves[name].requires_grad_()
    y = function(**leaves, **draw)
    if dy is None:
        return {"y": y.detach()}
    grads = torch.autograd.grad(y, [leaves[n] for n in wanted], dy.to(y.dtype), allow_unused=True)
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def complete(draw):
    return {"bias_tensor_id": draw["tensor_id"] + 1, **draw}


def gradient_of(y, seed=100):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, generator=g).to(y.dtype)


@contextlib.contextmanager
def one_thread():
    """The reference is made of small operations that threads only slow down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


REFERENCES = {}


def references(case, tensors, dy, wanted):
    """dy and the results of the reference, in the case's dtype and in float64."""
    draw = complete(case.draw())
    with one_thread():
        if dy is None:
            dy = gradient_of(apply(reference.masked_linear, tensors, draw)["y"])
        plain = apply(reference.masked_linear, tensors, draw, dy, wanted)
        exact = apply(reference.masked_linear, tensors, draw, dy, wanted, torch.float64)
    return dy, plain, exact


def check(case, tensors=None, dy=None, wanted=NAMES):
    """y and all gradients by the tolerance rule."""
    # every capability is compared with the same reference
    key = f"{case} {wanted}" if tensors is None and dy is None else None
    tensors = case.tensors() if tensors is None else tensors
    if not case.masked_bias:
        tensors = {**tensors, "bias_logits": None}
    if key not in REFERENCES:
        REFERENCES[key] = references(case, tensors, dy, wanted)
    dy, plain, exact = REFERENCES[key] if key else REFERENCES.pop(key)
    ours = apply(ops.masked_linear, tensors, case.draw(), dy, wanted)
    assert ours["y"].dtype == case.dtype
    check_close((name, ours[name], plain[name], exact[name]) for name in ours)
    return ours


def equal(a, b, names=None):
    for name in names or a:
        assert torch.equal(a[name], b[name]), name


# ---- against the reference ----


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sets": 1},
        {"samples": 1},
        {"sets": 1, "samples": 1},
        {"sets": 3, "samples": 3},
        {"seeds": "one"},
        {"seeds": None},
        {"masked_bias": False},
        {"shape": (3,)},
        {"shape": (2, 3), "rows": 1},
        {"options": {"element_offset": 5}},
        {"options": {"sample_offset": 9}},
        {"options": {"tensor_id": 2**32 - 2, "bias_tensor_id": 17}},
        {"options": {"hard": False}},
        {"options": {"hard": False}, "seeds": None},
        {"options": {"hard": False, "tau": 0.6}},
        {"options": {"tau": 0.6}},
        {"options": {"tau": 3.0}, "seeds": None},
    ],
    ids=str,
)
def test_values_and_gradients(change, dtype, capability):
    check(replace(Case(dtype=dtype), **change))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33])
def test_rows(rows, capability):
    check(Case(rows=rows))


@pytest.mark.parametrize("outputs", [1, 5, 6, 7, 23, 24, 25, 48, 49, 65])
def test_outputs(outputs, capability):
    check(Case(outputs=outputs))


@pytest.mark.parametrize("inputs", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 127])
def test_inputs(inputs, capability):
    check(Case(inputs=inputs))


@pytest.mark.parametrize("inputs", [255, 256, 257, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_beyond_a_tile(inputs, dtype, capability):
    check(Case(inputs=inputs, dtype=dtype, rows=17))
    check(Case(inputs=inputs, dtype=dtype, rows=1, sets=1, samples=1))


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 1, 1), (40, 260, 130), (170, 66, 50), (700, 9, 26)]
)
def test_sizes(rows, inputs, outputs, capability):
    check(Case(rows=rows, inputs=inputs, outputs=outputs))


@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_alone(name, capability):
    case = Case()
    together = check(case)
    alone = check(case, wanted=[name])
    assert torch.equal(alone[name], together[name])
    assert torch.equal(alone["y"], together["y"])


@pytest.mark.parametrize("wanted", [("x", "logits"), ("weight", "bias"), ("x", "weight")], ids=str)
def test_some_gradients(wanted, capability):
    together = check(Case())
    some = check(Case(), wanted=wanted)
    equal(some, together)


@pytest.mark.parametrize("empty", ["rows", "inputs", "outputs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_zero_behaves_as_in_torch(empty, dtype, capability):
    case = replace(Case(dtype=dtype), **{empty: 0})
    results = check(case)
    if empty == "rows":
        assert all(not bool(results[name].any()) for name in NAMES)
    if empty == "inputs":
        tensors = {**case.tensors(), "bias_logits": None}
        y = ops.masked_linear(**tensors, **case.draw())
        assert torch.equal(y, F.linear(tensors["x"], tensors["weight"], tensors["bias"]))


def stretch(t, kind):
    """The values of `t` in another layout."""
    if kind == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "strided":
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), math.nan)
        wide[..., ::2] = t
        return wide[..., ::2]
    longer = torch.cat([t.new_full(t[:1].shape, math.nan), t])  # starts off the allocation
    return longer[1:]


@needs_kernels
@pytest.mark.parametrize("kind", ["transposed", "strided", "sliced"])
def test_layout_changes_nothing(kind, capability):
    case = Case()
    tensors, draw = case.tensors(), case.draw()
    dy = gradient_of(torch.empty(20, 29))
    expected = apply(ops.masked_linear, tensors, draw, dy)
    for name in ("x", "weight", "logits"):
        other = {**tensors, name: stretch(tensors[name], kind)}
        assert torch.equal(other[name], tensors[name])
        equal(apply(ops.masked_linear, other, draw, dy), expected)
    equal(apply(ops.masked_linear, tensors, draw, stretch(dy, kind)), expected)


@needs_kernels
def test_expanded_tensors(capability):
    case = Case()
    tensors, draw = case.tensors(), case.draw()
    expanded = {
        "x": tensors["x"][:1].expand(20, 37),
        "weight": tensors["weight"][:, :1].expand(29, 37),
        "logits": tensors["logits"][:1].expand(2, 29, 37),
        "bias": tensors["bias"][:1].expand(29),
        "bias_logits": tensors["bias_logits"][:, :1].expand(2, 29),
    }
    # the gradient of a sum is an expanded one
    dy = torch.ones(()).expand(20, 29)
    contiguous = {name: t.contiguous() for name, t in expanded.items()}
    equal(
        apply(ops.masked_linear, expanded, draw, dy),
        apply(ops.masked_linear, contiguous, draw, dy.contiguous()),
    )
    check(case, expanded, dy)


def test_a_single_set_needs_no_dimension(capability):
    case = Case(sets=1)
    tensors, draw = case.tensors(), case.draw()
    flat = {**tensors, "logits": tensors["logits"][0], "bias_logits": tensors["bias_logits"][0]}
    dy = gradient_of(torch.empty(10, 29))
    expected = apply(ops.masked_linear, tensors, draw, dy)
    results = apply(ops.masked_linear, flat, draw, dy)
    assert results["logits"].shape == (29, 37)
    assert results["bias_logits"].shape == (29,)
    for name, got in results.items():
        assert torch.equal(got.view(expected[name].shape), expected[name])


def test_threshold_ignores_samples(capability):
    case = Case(seeds=None)
    tensors = case.tensors()
    one = ops.masked_linear(**tensors, seed=None, samples=1)
    # a batch of 10 would not divide into 2 sets * 3 samples
    assert torch.equal(one, ops.masked_linear(**tensors, seed=None, samples=3))
    for s in range(2):
        kept, kept_bias = tensors["logits"][s] > 0, tensors["bias_logits"][s] > 0
        wanted = F.linear(
            tensors["x"][5 * s : 5 * s + 5], tensors["weight"] * kept, tensors["bias"] * kept_bias
        )
        torch.testing.assert_close(one[5 * s : 5 * s + 5], wanted)


def test_threshold_of_zero_and_nan(capability):
    logits = torch.tensor([[0.0, -0.0, 1e-45, -1e-45, math.nan, math.inf, -math.inf]])
    for dtype in (torch.float32, torch.float64):
        y = ops.masked_linear(torch.eye(7, dtype=dtype), torch.ones(1, 7, dtype=dtype), logits)
        assert y[:, 0].tolist() == [0, 0, 1, 0, 0, 1, 0], dtype


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_time_major(dtype, capability):
    """batch_dim=1 cuts the batch, never time."""
    case = Case(shape=(4,), dtype=dtype)
    tensors, draw = case.tensors(), case.draw()
    dy = gradient_of(torch.empty(20, 4, 29, dtype=dtype))
    expected = apply(ops.masked_linear, tensors, draw, dy)
    swapped = {**tensors, "x": tensors["x"].transpose(0, 1).contiguous()}
    for batch_dim in (1, -2):
        results = apply(
            ops.masked_linear, swapped, {**draw, "batch_dim": batch_dim}, dy.transpose(0, 1)
        )
        assert results["y"].shape == (4, 20, 29)
        for name, got in results.items():
            got = got.transpose(0, 1) if name in ("x", "y") else got
            assert torch.equal(got, expected[name]), name
    check(replace(case, options={"batch_dim": 1}), {**swapped})


def test_batch_in_the_middle(capability):
    case = Case()
    x = gradient_of(torch.empty(3, 20, 2, 37), 1)
    check(replace(case, options={"batch_dim": 1}), {**case.tensors(), "x": x})
    check(replace(case, options={"batch_dim": -3}), {**case.tensors(), "x": x})


# ---- bits ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 6, 17, 130])
def test_samples_at_once_are_samples_one_by_one(rows, dtype, capability):
    case = Case(rows=rows, sets=2, samples=4, inputs=300, dtype=dtype)
    tensors, draw = case.tensors(), case.draw()
    dy = gradient_of(torch.empty(8 * rows, 29, dtype=dtype))
    together = apply(ops.masked_linear, tensors, draw, dy)
    for s, k in itertools.product(range(2), range(4)):
        part = slice((4 * s + k) * rows, (4 * s + k + 1) * rows)
        alone = apply(
            ops.masked_linear,
            {
                **tensors,
                "x": tensors["x"][part],
                "logits": tensors["logits"][s],
                "bias_logits": tensors["bias_logits"][s],
            },
            {**draw, "samples": 1, "sample_offset": k, "seed": draw["seed"][s]},
            dy[part],
        )
        assert torch.equal(alone["y"], together["y"][part])
        assert torch.equal(alone["x"], together["x"][part])


def test_samples_at_once_in_a_time_major_batch(capability):
    case = Case(samples=3, sets=1, shape=(4,))
    tensors, draw = case.tensors(), {**case.draw(), "batch_dim": 1}
    x = tensors["x"].transpose(0, 1).contiguous()  # [time, batch, in]
    together = ops.masked_linear(**{**tensors, "x": x}, **draw)
    for k in range(3):
        part = slice(5 * k, 5 * k + 5)
        one = {**draw, "samples": 1, "sample_offset": k}
        alone = ops.masked_linear(**{**tensors, "x": x[:, part]}, **one)
        assert torch.equal(alone, together[:, part])


# the last: the gradient of both sets goes past the caches, that of one does not
@pytest.mark.parametrize(
    "shape", [(6, 40, 30), (1, 300, 25), (33, 513, 49), (3, 1040, 260)], ids=str
)
@pytest.mark.parametrize("hard", [True, False])
def test_sets_at_once_are_sets_one_by_one(shape, hard, capability):
    rows, inputs, outputs = shape
    case = Case(rows=rows, inputs=inputs, outputs=outputs, sets=3, options={"hard": hard})
    tensors, draw = case.tensors(), case.draw()
    dy = gradient_of(torch.empty(6 * rows, outputs))
    wanted = ("x", "logits", "bias_logits")
    together = apply(ops.masked_linear, tensors, draw, dy, wanted)
    for s in range(3):
        part = slice(s * 2 * rows, (s + 1) * 2 * rows)
        mine = {name: tensors[name][s : s + 1] for name in ("logits", "bias_logits")}
        alone = apply(
            ops.masked_linear,
            {**tensors, "x": tensors["x"][part], **mine},
            {**draw, "seed": draw["seed"][s : s + 1]},
            dy[part],
            wanted,
        )
        assert torch.equal(alone["y"], together["y"][part])
        assert torch.equal(alone["x"], together["x"][part])
        assert torch.equal(alone["logits"][0], together["logits"][s])
        assert torch.equal(alone["bias_logits"][0], together["bias_logits"][s])


@pytest.mark.parametrize(("outputs", "inputs"), [(30, 41), (25, 257), (1, 600)])
@pytest.mark.parametrize("seeds", ["each", "one", None])
def test_the_product_sees_the_bits_of_sample_mask(outputs, inputs, seeds, capability):
    case = Case(inputs=inputs, outputs=outputs, samples=2, seeds=seeds)
    tensors = case.tensors()
    draw = {**case.draw(), "element_offset": 7, "sample_offset": 3}
    x = torch.eye(inputs).repeat(case.groups(), 1)
    ones = torch.ones(outputs, inputs)
    y = ops.masked_linear(x, ones, tensors["logits"], **draw)
    seen = y.view(case.groups(), inputs, outputs).transpose(1, 2)
    if seeds is None:
        masks = (tensors["logits"] > 0).float()
    else:
        seed = draw["seed"].expand(2)
        masks = ops.sample_mask(tensors["logits"], **{**draw, "seed": seed}).transpose(0, 1)
    assert torch.equal(seen, masks.reshape(seen.shape))
    # a zero x leaves the masked bias
    zeros = torch.zeros(case.groups(), inputs)
    y = ops.masked_linear(
        zeros, ones, tensors["logits"], torch.ones(outputs), tensors["bias_logits"], **draw
    )
    if seeds is None:
        masks = (tensors["bias_logits"] > 0).float()
    else:
        draw = {**draw, "tensor_id": 4, "element_offset": 0, "seed": seed}
        masks = ops.sample_mask(tensors["bias_logits"], **draw).transpose(0, 1)
    assert torch.equal(y, masks.reshape(y.shape))


@needs_kernels
def test_masks_do_not_depend_on_the_capability():
    x, ones = torch.eye(300), torch.ones(70, 300)
    logits = Case(inputs=300, outputs=70, sets=1).tensors()["logits"]
    before, seen = _native.capability(), []
    for name in _native.capabilities():
        _native.set_capability(name)
        y = ops.masked_linear(x, ones, logits, seed=torch.tensor(3))
        seen.append(y)
    _native.set_capability(before)
    assert all(torch.equal(seen[0], other) for other in seen)


@needs_kernels
@pytest.mark.parametrize(
    "case",
    [
        Case(rows=32, inputs=300, outputs=200, sets=1, samples=4),
        Case(rows=8, inputs=257, outputs=123, sets=3, samples=2),
        Case(rows=1, inputs=1025, outputs=129, sets=1, samples=1),
        Case(rows=64, inputs=40, outputs=500, dtype=torch.bfloat16),
        Case(rows=9, inputs=513, outputs=48, seeds=None, options={"tau": 0.5}),
    ],
    ids=lambda c: f"{c.rows}x{c.inputs}x{c.outputs}",
)
def test_threads_and_runs_change_nothing(case, capability, threads):
    tensors, draw = case.tensors(), case.draw()
    dy = gradient_of(torch.empty(case.groups() * case.rows, case.outputs, dtype=case.dtype))
    for wanted in (NAMES, ("x", "logits"), ("logits",), ("weight",)):
        threads(1)
        first = apply(ops.masked_linear, tensors, draw, dy, wanted)
        equal(apply(ops.masked_linear, tensors, draw, dy, wanted), first)
        for n in (2, 3, 4):
            threads(n)
            equal(apply(ops.masked_linear, tensors, draw, dy, wanted), first)


def test_pure(capability):
    case = Case()
    tensors, draw = case.tensors(), case.draw()
    kept = {name: t.clone() for name, t in tensors.items()}
    dy = gradient_of(torch.empty(20, 29))
    kept_dy, kept_seed = dy.clone(), draw["seed"].clone()
    state = torch.get_rng_state()
    first = apply(ops.masked_linear, tensors, draw, dy)
    torch.rand(3)
    equal(apply(ops.masked_linear, tensors, draw, dy), first)
    torch.set_rng_state(state)
    equal(tensors, kept)
    assert torch.equal(dy, kept_dy)
    assert torch.equal(draw["seed"], kept_seed)
    apply(ops.masked_linear, tensors, draw, dy)
    assert torch.equal(torch.get_rng_state(), state)


# ---- exact statements ----


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_gradient_of_the_logits_is_the_formula(tau, capability):
    """dL/dl = sum over samples of w * dL/dw' * s (1 - s) / tau."""
    case = Case(sets=1, samples=3, options={"tau": tau}, masked_bias=False)
    tensors, draw = {**case.tensors(), "bias_logits": None}, case.draw()
    dy = gradient_of(torch.empty(15, 29))
    ours = apply(ops.masked_linear, tensors, draw, dy, ["logits"])["logits"]

    def formula(dtype):
        weight, x, logits = (tensors[n].to(dtype) for n in ("weight", "x", "logits"))
        total = torch.zeros_like(weight)
        for k in range(3):
            part = slice(5 * k, 5 * k + 5)
            words = mask_reference.noise_words(
                weight.numel(), seed=draw["seed"][0], sample=k, tensor_id=3
            ).view(weight.shape)
            s = mask_reference.soft(logits[0], words, tau)
            d_masked = dy[part].to(dtype).t() @ x[part]
            total += weight * d_masked * s * (1 - s) / tau
        return total[None]

    check_close([("dlogits", ours, formula(torch.float32), formula(torch.float64))])


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_keep_or_remove_everything(hard, dtype, capability):
    case = Case(sets=1, samples=2, dtype=dtype)
    t = case.tensors()
    saturated = 60.0 if not hard else 20.0
    on, off = torch.full((29, 37), saturated), torch.full((29, 37), -saturated)
    draw = {"seed": torch.tensor(2), "samples": 2, "hard": hard}
    y = ops.masked_linear(t["x"], t["weight"], on, t["bias"], **draw)
    plain = F.linear(t["x"], t["weight"], t["bias"])
    exact = F.linear(t["x"].double(), t["weight"].double(), t["bias"].double())
    check_close([("y", y, plain, exact)])
    y = ops.masked_linear(t["x"], t["weight"], off, t["bias"], **draw)
    assert torch.equal(y, t["bias"].expand(y.shape))
    y = ops.masked_linear(t["x"], t["weight"], off, t["bias"], off[:, 0], **draw)
    if hard:
        assert not bool(y.any())


def test_gradcheck_through_the_soft_path():
    case = Case(rows=2, inputs=4, outputs=3)
    tensors = {n: t.double().requires_grad_() for n, t in case.tensors().items()}
    for extra in ({}, {"tau": 0.6}):
        draw = {**case.draw(), "hard": False, **extra}

        def soft(*given_tensors, draw=draw):
            return ops.masked_linear(*given_tensors, **draw)

        assert torch.autograd.gradcheck(soft, tuple(tensors.values()))
    threshold = {**draw, "seed": None}
    x = tensors["x"][:4].detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *t: ops.masked_linear(*t, **threshold), (x, *list(tensors.values())[1:])
    )


def test_float64_uses_the_same_masks():
    case = Case()
    tensors, draw = case.tensors(), case.draw()
    x = torch.eye(37).repeat(4, 1)
    single = ops.masked_linear(x, torch.ones(29, 37), tensors["logits"], **draw)
    for logits in (tensors["logits"], tensors["logits"].double()):
        double = ops.masked_linear(x.double(), torch.ones(29, 37).double(), logits, **draw)
        assert double.dtype == torch.float64
        assert torch.equal(double, single.double())


# ---- the operation as PyTorch sees it ----


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_never_lowers_the_logits(dtype):
    case = Case(inputs=200, outputs=200)  # enough weights for rounded logits to show
    tensors, draw = case.tensors(), case.draw()
    low = {n: t if "logits" in n else t.to(dtype) for n, t in tensors.items()}
    expected = ops.masked_linear(**low, **draw)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    with torch.autocast("cpu", dtype=dtype):
        y = ops.masked_linear(**leaves, **draw)
        mixed = ops.masked_linear(**{**tensors, "x": low["x"]}, **draw)
    assert y.dtype == dtype
    assert torch.equal(y, expected)  # logits in `dtype` would have flipped some masks
    assert torch.equal(mixed, expected)
    lowered = {**low, "logits": tensors["logits"].to(dtype).float()}
    assert not torch.equal(ops.masked_linear(**lowered, **draw), expected)
    y.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())


def test_autocast_leaves_float64_alone():
    tensors = {n: t.double() for n, t in Case().tensors().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.masked_linear(**tensors, **Case().draw()).dtype == torch.float64


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("case", "bias"),
    [
        (Case(rows=2, inputs=5, outputs=3), "masked"),
        (Case(rows=1, inputs=9, outputs=2, seeds=None, sets=1), "plain"),
        (Case(rows=2, inputs=3, outputs=4, seeds="one", shape=(2,)), None),
    ],
    ids=["masked bias", "bias", "no bias"],
)
def test_opcheck(case, bias, dtype):
    tensors = replace(case, dtype=dtype).tensors()
    tensors["bias"] = tensors["bias"] if bias else None
    tensors["bias_logits"] = tensors["bias_logits"] if bias == "masked" else None
    draw = (case.draw()["seed"], 3, 4, 0, 1, 1 if case.seeds is None else case.samples, 0.9)
    namespace = torch.ops.modmask
    for hard in (True, False):
        leaves = [t if t is None else t.clone().requires_grad_() for t in tensors.values()]
        torch.library.opcheck(namespace.masked_linear.default, (*leaves, *draw, hard, *GUMBEL, []))
    dy = gradient_of(torch.empty(*tensors["x"].shape[:-1], case.outputs, dtype=dtype))
    needs = [t is not None for t in tensors.values()]
    for wanted in (needs, [False, False, True, False, False]):
        torch.library.opcheck(
            namespace.masked_linear_backward.default,
            (dy, *tensors.values(), *draw, True, *GUMBEL, [], *wanted),
        )


@needs_kernels
def test_vmap(capability):
    case = Case(sets=1, samples=2)
    tensors, draw = case.tensors(), case.draw()
    many = Case(sets=4).tensors()["logits"]
    seeds = torch.tensor([4, 3, 2, 1])

    def with_logits(logits, seed):
        return ops.masked_linear(
            tensors["x"], tensors["weight"], logits, tensors["bias"], seed=seed, samples=2
        )

    leaves = [many.clone().requires_grad_() for _ in range(2)]
    batched = torch.vmap(with_logits)(leaves[0], seeds)
    looped = torch.stack([with_logits(a, b) for a, b in zip(leaves[1], seeds, strict=True)])
    assert torch.equal(batched, looped)
    dy = gradient_of(looped)
    batched.backward(dy)
    looped.backward(dy)
    assert torch.equal(leaves[0].grad, leaves[1].grad)

    def with_x(x):
        return ops.masked_linear(**{**tensors, "x": x}, **draw)

    xs = gradient_of(torch.empty(10, 3, 37))
    batched = torch.vmap(with_x, in_dims=1, out_dims=2)(xs)
    assert batched.shape == (10, 29, 3)
    for i in range(3):
        assert torch.equal(batched[..., i], with_x(xs[:, i]))


@needs_kernels
def test_functional_transforms():
    case = Case(sets=1, samples=1, rows=1)
    tensors, draw = case.tensors(), case.draw()
    xs = gradient_of(torch.empty(4, 1, tensors["x"].shape[-1]))

    def loss(logits, x):
        y = ops.masked_linear(**{**tensors, "logits": logits, "x": x}, **draw)
        return y.square().sum()

    expected = []
    for x in xs:
        leaf = tensors["logits"].clone().requires_grad_()
        loss(leaf, x).backward()
        expected.append(leaf.grad)
    assert torch.equal(torch.func.grad(loss)(tensors["logits"], xs[0]), expected[0])
    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(tensors["logits"], xs)
    assert torch.equal(each, torch.stack(expected))

    def slope(logits):
        return torch.func.grad(loss)(logits, xs[0]).sum()

    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(slope)(tensors["logits"])


@needs_kernels
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_breaks_or_recompiles(backend):
    counter = CompileCounterWithBackend(backend)
    case = Case(rows=4)
    tensors, draw = case.tensors(), case.draw()

    def layer(x, weight, logits, bias, bias_logits, seed):
        y = ops.masked_linear(x.relu(), weight, logits, bias, bias_logits, **{**draw, "seed": seed})
        return y * 2

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    counts = []
    for rows in (4, 6, 9, 40):
        x = gradient_of(torch.empty(4 * rows, 37), rows)
        torch._dynamo.mark_dynamic(x, 0)
        results = []
        for function in (compiled, layer):
            leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
            leaves["x"] = x
            y = function(**leaves, seed=draw["seed"])
            others = [leaves[n] for n in NAMES[1:]]
            grads = torch.autograd.grad(y, others, torch.ones_like(y))
            results.append((y.detach(), *grads))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], f"compiled anew for another batch: {counts}"


def test_meta_device():
    case = Case(shape=(3,))
    tensors = {n: t.to("meta").requires_grad_() for n, t in case.tensors().items()}
    y = ops.masked_linear(**tensors, **{**case.draw(), "seed": case.draw()["seed"].to("meta")})
    assert y.is_meta
    assert y.shape == (20, 3, 29)
    y.sum().backward()
    assert all(t.grad.shape == t.shape and t.grad.is_meta for t in tensors.values())


@needs_kernels
def test_refuses_double_backward():
    case = Case()
    leaves = {n: t.requires_grad_() for n, t in case.tensors().items()}
    y = ops.masked_linear(**leaves, **case.draw())
    (dx,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_backward_twice_over_a_kept_graph():
    case = Case()
    leaves = {n: t.requires_grad_() for n, t in case.tensors().items()}
    y = ops.masked_linear(**leaves, **case.draw()).sum()
    first = torch.autograd.grad(y, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_kernels
def test_changed_tensors_are_noticed():
    case = Case()
    leaves = {n: t.requires_grad_() for n, t in case.tensors().items()}
    y = ops.masked_linear(**leaves, **case.draw()).sum()
    with torch.no_grad():
        leaves["logits"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_checkpointing_recomputes_the_same_masks():
    case = Case()
    draw = case.draw()
    results = []
    for checkpointed in (True, False):
        leaves = {n: t.requires_grad_() for n, t in case.tensors().items()}

        def run(*tensors):
            return ops.masked_linear(*tensors, **draw).relu()

        y = (
            torch.utils.checkpoint.checkpoint(run, *leaves.values(), use_reentrant=False)
            if checkpointed
            else run(*leaves.values())
        )
        results.append((y, *torch.autograd.grad(y.sum(), list(leaves.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- bad input ----

X, W, L = torch.zeros(12, 4), torch.zeros(3, 4), torch.zeros(2, 3, 4)
B, BL = torch.zeros(3), torch.zeros(2, 3)
SEED = torch.tensor(1)
BAD = [
    ({"x": torch.zeros(12, 5)}, ValueError, r"x must have shape \[\.\.\., 4\].*not \[12, 5\]"),
    ({"x": torch.zeros(4)}, ValueError, r"x must have a batch dimension"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \[\.\.\., 4\].*not \[\]"),
    ({"weight": torch.zeros(3)}, ValueError, r"weight must have shape \[out, in\], not \[3\]"),
    ({"weight": torch.zeros(1, 3, 4)}, ValueError, r"weight must have shape \[out, in\]"),
    ({"logits": torch.tensor(0.0)}, ValueError, r"logits must have shape.*\[3, 4\].*not \[\]"),
    ({"logits": torch.zeros(3)}, ValueError, r"logits must have shape.*\[3, 4\].*not \[3\]"),
    ({"logits": torch.zeros(2, 4, 3)}, ValueError, r"logits must have shape.*not \[2, 4, 3\]"),
    ({"logits": torch.zeros(0, 3, 4)}, ValueError, r"logits must have shape.*not \[0, 3, 4\]"),
    ({"logits": torch.zeros(1, 2, 3, 4)}, ValueError, r"logits must have shape"),
    ({"logits": torch.zeros(4, 3)}, ValueError, r"logits must have shape.*not \[4, 3\]"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[3\], not \[4\]"),
    ({"bias": torch.zeros(1, 3)}, ValueError, r"bias must have shape \[3\], not \[1, 3\]"),
    ({"bias": None}, ValueError, r"bias_logits came without a bias"),
    ({"bias_logits": torch.zeros(2, 4)}, ValueError, r"bias_logits .*\[2, 3\], not \[2, 4\]"),
    ({"bias_logits": torch.zeros(3, 3)}, ValueError, r"bias_logits .*\[2, 3\], not \[3, 3\]"),
    ({"bias_logits": torch.zeros(3)}, ValueError, r"bias_logits .*\[2, 3\], not \[3\]"),
    (
        {"x": torch.zeros(10, 4), "samples": 3},
        ValueError,
        r"batch of x, 10 .*\[10, 4\].* 2 sets \* 3 samples = 6 equal groups",
    ),
    (
        {"x": torch.zeros(7, 4), "seed": None, "samples": 3},
        ValueError,
        r"batch of x, 7 .* 2 sets \* 1 samples = 2 equal groups",
    ),
    (
        {"x": torch.zeros(12, 5, 4), "batch_dim": 1},
        ValueError,
        r"batch of x, 5 \(dimension 1 of \[12, 5, 4\]\)",
    ),
    ({"batch_dim": 1}, ValueError, r"batch_dim must be a dimension of x \[12, 4\].*not 1"),
    ({"batch_dim": -1}, ValueError, r"batch_dim must be .*other than the last, not -1"),
    ({"batch_dim": 5}, ValueError, r"batch_dim must be .*not 5"),
    ({"batch_dim": -3}, ValueError, r"batch_dim must be .*not -3"),
    (
        {"weight": W.bfloat16()},
        TypeError,
        r"weight must have the dtype of x.*float32, not .*bfloat",
    ),
    ({"bias": B.double()}, TypeError, r"bias must have the dtype of x.*float32, not .*float64"),
    ({"x": X.half()}, TypeError, r"weight must have the dtype of x, torch\.float16"),
    ({"x": X.long(), "weight": W.long(), "bias": B.long()}, TypeError, r"x must be .*int64"),
    ({"logits": L.bfloat16()}, TypeError, r"logits must be float32, not torch\.bfloat16"),
    ({"logits": L.double()}, TypeError, r"logits must be float32, not torch\.float64"),
    ({"logits": L.long()}, TypeError, r"logits must be float32, not torch\.int64"),
    ({"bias_logits": BL.half()}, TypeError, r"bias_logits must be float32, not torch\.float16"),
    ({"weight": W.to("meta")}, ValueError, r"weight is on meta, but x is on cpu"),
    ({"logits": L.to("meta")}, ValueError, r"logits is on meta, but x is on cpu"),
    ({"bias": B.to("meta")}, ValueError, r"bias is on meta, but x is on cpu"),
    ({"bias_logits": BL.to("meta")}, ValueError, r"bias_logits is on meta, but x is on cpu"),
    ({"seed": SEED.to("meta")}, ValueError, r"seed is on meta, but x is on cpu"),
    ({"x": X.numpy()}, TypeError, r"x must be a tensor, not ndarray"),
    ({"weight": None}, TypeError, r"weight must be a tensor, not NoneType"),
    ({"logits": [1.0]}, TypeError, r"logits must be a tensor, not list"),
    ({"seed": 7}, TypeError, r"seed must be an int64 tensor, not int: use torch\.tensor\(seed\)"),
    ({"seed": "a"}, TypeError, r"seed must be an int64 tensor, not str$"),
    ({"seed": 1.5}, TypeError, r"seed must be an int64 tensor, not float$"),
    ({"seed": torch.tensor(1.0)}, TypeError, r"seed must be int64, not torch\.float32"),
    ({"seed": torch.ones(3, dtype=torch.int64)}, ValueError, r"seed .*\[2\].*not \[3\]"),
    ({"seed": torch.ones(2, 1, dtype=torch.int64)}, ValueError, r"seed .*\[2\].*not \[2, 1\]"),
    ({"bias": 1.0}, TypeError, r"bias must be a tensor, not float"),
    ({"bias_logits": [0.0]}, TypeError, r"bias_logits must be a tensor, not list"),
    ({"samples": 1.5}, TypeError, r"samples must be an integer, not 1\.5"),
    ({"samples": 0}, ValueError, r"samples must be at least 1, not 0"),
    ({"tau": 0.0}, ValueError, r"tau must be positive and finite, not 0\.0"),
    ({"tau": math.nan}, ValueError, r"tau must be positive and finite, not nan"),
    ({"tau": math.inf}, ValueError, r"tau must be positive and finite, not inf"),
    ({"tensor_id": -1}, ValueError, r"tensor_id must be in \[0, 2\*\*32\), not -1"),
    ({"tensor_id": 2**32}, ValueError, r"tensor_id must be in"),
    ({"bias_tensor_id": -5}, ValueError, r"bias_tensor_id must be in \[0, 2\*\*32\), not -5"),
    ({"sample_offset": 2**32}, ValueError, r"sample_offset must be in"),
    ({"element_offset": -1}, ValueError, r"element_offset must not be negative, not -1"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_bad_input(change, kind, message):
    arguments = {"x": X, "weight": W, "logits": L, "bias": B, "bias_logits": BL, "seed": SEED}
    kept = {k: v for k, v in arguments.items() if k not in change}
    ops.masked_linear(**arguments)
    with pytest.raises(kind, match=message):
        ops.masked_linear(**kept, **change)


def test_explain():
    from modmask_kernels.ops.masked_linear import explain

    backend, why = explain(torch.zeros(1))
    if _native.available():
        assert backend == "cpu"
        assert str(_native.capability()) in why
    else:
        assert backend == "reference"
        assert "absent" in why
    assert explain(torch.zeros(1, dtype=torch.float64))[0] == "reference"
