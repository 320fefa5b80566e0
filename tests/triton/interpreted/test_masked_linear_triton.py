"""`masked_linear` through the Triton kernels in Triton's interpreter, and what chooses for them."""

from dataclasses import replace

import pytest
import torch
from guards import within_walls
from test_masked_linear import NAMES, Case, apply, check, gradient_of

from modmask_kernels import _native, ops
from modmask_kernels.ops import _gpu, estimators
from modmask_kernels.ops.masked_linear import gpu, product

pytestmark = pytest.mark.usefixtures("on_triton")
SMALL = Case(rows=3, inputs=37, outputs=19)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def force(monkeypatch, source):
    """Have masks taken from `source`; the list of where they were."""
    choose, taken = _gpu.choose_way, []

    def forced(p, device, kinds, sources, _):
        way = choose(p, device, kinds, sources, source)
        taken.append(way.source)
        return way

    monkeypatch.setattr(_gpu, "choose_way", forced)
    return taken


@pytest.fixture(params=_gpu.SOURCES)
def source(request, monkeypatch):
    taken = force(monkeypatch, request.param)
    yield request.param
    assert set(taken) == {request.param}


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, source):
    check(replace(SMALL, dtype=dtype, inputs=40))


@pytest.mark.parametrize(
    "change",
    [
        {"sets": 1, "samples": 3},
        {"sets": 3, "samples": 1},
        {"seeds": "one"},
        {"seeds": None},
        {"masked_bias": False},
        {"shape": (2,), "rows": 1},
        {"options": {"element_offset": 6}},
        {"options": {"element_offset": 2**33 + 4}, "inputs": 36},
        {"options": {"sample_offset": 3, "antithetic": True}},
        {"options": {"tensor_id": 2**32 - 2, "bias_tensor_id": 17}},
        {"options": {"tau": 0.6}},
    ],
    ids=str,
)
def test_options(change, source):
    check(replace(SMALL, **change))


@pytest.mark.parametrize(
    "options",
    [
        {"hard": False},
        {"hard": False, "tau": 0.6, "antithetic": True},
        {"hard": False, "estimator": estimators.hard_concrete(), "tau": 2 / 3},
        {"hard": False, "estimator": estimators.hard_concrete(clamp=0.05)},
        {"estimator": estimators.hard_concrete()},
        {"estimator": estimators.sigmoid(), "hard": False},
        {"estimator": estimators.threshold(0.1)},
    ],
    ids=str,
)
def test_soft_masks_and_estimators(options):
    check(replace(SMALL, options=options, sets=1))


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 1, 1), (17, 64, 33), (64, 5, 64), (2, 63, 1), (1, 3, 40), (33, 31, 32), (64, 64, 32)],
)
def test_sizes(rows, inputs, outputs, source):
    check(Case(rows=rows, inputs=inputs, outputs=outputs, sets=1, samples=2))


@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_alone(name):
    together = check(SMALL)
    assert torch.equal(check(SMALL, wanted=[name])[name], together[name])


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_sizes_of_zero(rows, inputs, outputs):
    check(Case(rows=rows, inputs=inputs, outputs=outputs))


@pytest.mark.parametrize("inputs", [37, 40, 64])
def test_the_masks_of_the_cpu(inputs, source):
    """With ones for weights and a unit matrix for x, y is the mask."""
    case = replace(SMALL, inputs=inputs, masked_bias=False, options={"element_offset": 4})
    tensors = case.tensors()
    tensors.update(
        x=torch.eye(inputs).repeat(case.groups(), 1),
        weight=torch.ones_like(tensors["weight"]),
        bias=None,
        bias_logits=None,
    )
    y = ops.masked_linear(**tensors, **case.draw()).view(case.sets, case.samples, inputs, -1)
    drawn = ops.sample_mask(tensors["logits"], **case.draw())
    assert torch.equal(y.transpose(2, 3).transpose(0, 1), drawn)


def test_sets_that_share_logits():
    """Of logits expanded over sets, which are read where they lie."""
    case = replace(SMALL, sets=2)
    tensors = case.tensors()
    for name in ("logits", "bias_logits"):
        tensors[name] = tensors[name][:1].expand(2, *tensors[name].shape[1:])
    check(case, tensors=tensors)


def test_several_seeds_of_a_set():
    """vmap over seeds: draws of a set."""
    case = replace(SMALL, sets=1, samples=2)
    t = case.tensors()
    seeds = torch.tensor([3, 4])
    arguments = (t["x"], t["weight"], t["logits"], t["bias"], t["bias_logits"])

    def of(seed):
        return ops.masked_linear(*arguments, seed=seed, samples=2)

    assert torch.equal(torch.vmap(of)(seeds), torch.stack([of(s) for s in seeds]))


def test_several_seeds_of_several_sets():
    case = replace(SMALL, sets=2)
    tensors = case.tensors()
    seeds = torch.tensor([[3, 4], [5, 6], [7, 8]])

    def of(seed):
        return ops.masked_linear(*tensors.values(), seed=seed, samples=case.samples)

    each = torch.stack([of(seed) for seed in seeds])
    assert torch.equal(torch.vmap(of)(seeds), each)
    assert torch.equal(torch.vmap(of, in_dims=1)(seeds.t().contiguous()), each)


def test_tensors_that_are_not_contiguous():
    case = replace(SMALL, shape=(2,), rows=2)
    tensors = case.tensors()
    dy = gradient_of(apply(ops.masked_linear, tensors, case.draw())["y"])
    expected = apply(ops.masked_linear, tensors, case.draw(), dy)
    tensors = {n: t.transpose(-1, 0).contiguous().transpose(-1, 0) for n, t in tensors.items()}
    tensors["bias"] = tensors["bias"].repeat_interleave(2)[::2]
    found = apply(ops.masked_linear, tensors, case.draw(), dy)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_what_is_not_served(monkeypatch):
    monkeypatch.setattr(_native, "cuda_loaded", lambda: False)
    case = replace(SMALL)
    t = case.tensors()
    draw = (0, 1, 0, 0, 2, 1.0, True)
    operands = (t["x"], t["weight"], t["logits"], None, None, torch.tensor(0))
    plain = estimators.arguments("gumbel_sigmoid", False)
    assert gpu.unserved(*operands, *draw, *plain, []) is None
    assert "n_of_m" in gpu.unserved(*operands, *draw, *plain, [2, 4])
    top_k = estimators.arguments("top_k", False)
    assert "top_k" in gpu.unserved(*operands, *draw, *top_k, [])
    wide = (t["x"].double(), *operands[1:])
    assert "float64" in gpu.unserved(*wide, *draw, *plain, [])
    small = (*operands[:2], t["logits"][:, :1], *operands[3:])
    assert "smaller" in gpu.unserved(*small, *draw, *plain, [])
    # the reference serves then
    y = gpu.forward(*operands, *draw, *plain, [1, 1])
    assert torch.equal(y, product.reference(*operands, *draw, *plain, [1, 1]))


def arguments_of(case):
    """Of the operation, by position; every tensor but the seed needs a gradient."""
    t = case.tensors()
    seed = case.draw()["seed"]
    tensors = [t[name].requires_grad_() for name in ("x", "weight", "logits")]
    biases = [None if t[n] is None else t[n].requires_grad_() for n in ("bias", "bias_logits")]
    given = {"samples": case.samples, "sample_offset": 0, "antithetic": False, **case.options}
    drawn = estimators.arguments("gumbel_sigmoid", given["antithetic"])
    draw = (0, 1, given["sample_offset"], 0, given["samples"], 1.0, True, *drawn, [])
    return (*tensors, *biases, seed, *draw)


@pytest.fixture
def saving():
    library = torch.library.Library("modmask", "IMPL")
    for name, function in (
        ("masked_linear_saving", gpu.forward_saving),
        ("masked_linear_saving_backward", gpu.backward_saving),
    ):
        library.impl(name, within_walls(function), "CPU")
    yield product.saving
    library._destroy()


SAVED = [
    replace(SMALL, inputs=64),
    replace(SMALL, inputs=64, options={"antithetic": True, "sample_offset": 3}),
    replace(SMALL, inputs=40, seeds="one"),
    replace(SMALL, inputs=64, outputs=32, rows=64, sets=1, samples=1),
    replace(SMALL, inputs=64, seeds=None, masked_bias=False),
]


@pytest.mark.parametrize("case", SAVED, ids=str)
def test_masks_that_the_forward_pass_keeps(case, saving, monkeypatch):
    """The same result and gradients, bit by bit; the backward packs nothing."""
    taken = force(monkeypatch, "bits")
    arguments = arguments_of(case)
    leaves = [t for t in arguments[:5] if t is not None]
    y = product(*arguments)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(y, leaves, dy)
    assert set(taken) == {"bits"}
    kept = saving(*arguments)
    assert torch.equal(kept, y)
    packed = []
    monkeypatch.setattr(gpu, "_packed", lambda *_: packed.append(1))
    for _ in range(2):  # a graph may be walked twice
        found = torch.autograd.grad(kept, leaves, dy, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not packed


def test_the_saving_operation_is_registered(saving):
    arguments = arguments_of(SAVED[0])
    torch.library.opcheck(torch.ops.modmask.masked_linear_saving.default, arguments)
    words = torch.ops.modmask.masked_linear_saving(*arguments)[1]
    assert words.shape == gpu.words_of(*arguments)

    def of(x):
        return saving(x, *arguments[1:]).square().sum()

    def gradient(function):
        (dx,) = torch.autograd.grad(function(arguments[0]), arguments[0])
        return dx

    compiled = torch.compile(of, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradient(compiled), gradient(of))
    (dx,) = torch.autograd.grad(of(arguments[0]), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()
    each = torch.vmap(lambda seed: product._traced_saving(*arguments[:5], seed, *arguments[6:])[0])
    seeds = torch.stack([arguments[5], arguments[5] + 1])
    one = [saving(*arguments[:5], seed, *arguments[6:]) for seed in seeds]
    assert torch.equal(each(seeds), torch.stack(one))


def test_which_masks_are_kept(monkeypatch):
    large = torch.empty(1024, 1024, dtype=torch.bfloat16, device="meta")
    x, logits = large[:8].requires_grad_(), torch.empty(1024, 1024, device="meta")
    seed = torch.empty((), dtype=torch.int64)
    plain = estimators.arguments("gumbel_sigmoid", False)

    def saves(x=x, weight=large, logits=logits, offset=0, hard=True, n_of_m=()):
        draw = (0, 1, 0, offset, 4, 1.0, hard, *plain, list(n_of_m))
        return gpu.saves(x, weight, logits, None, None, seed, *draw)

    assert saves()
    assert torch.compile(saves, fullgraph=True, backend="eager")()
    assert saves(offset=4)
    assert not saves(offset=5)
    assert not saves(hard=False)
    assert not saves(n_of_m=(2, 4))
    assert not saves(x=x.detach())
    assert not saves(weight=large[:1000], logits=logits[:1000])
    single = large.float()
    assert not saves(x=single[:8].requires_grad_(), weight=single)
    monkeypatch.setattr(_gpu, "SAVES", False)
    assert not saves()
