"""All operations on a CUDA device: the bits of the CPU, twice the error of PyTorch at most."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import operations
import pytest
import torch
from operations import CASES, GROUPS, SAMPLES, SETS, assert_same, by_reference
from ops.tolerance import check_close, error

import modmask_kernels as mm
from modmask_kernels import _native, ops
from modmask_kernels.bench.gpu.cases import precision_of
from modmask_kernels.ops import _gpu
from modmask_kernels.ops.masked_linear import gpu as linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ESTIMATORS = ("gumbel_sigmoid", "hard_concrete", "sigmoid", "threshold", "top_k")


@pytest.mark.gpu
def test_the_cuda_kernels_run() -> None:
    """Without them the reference would pass all other tests, unseen."""
    assert _native.cuda_problem(0) is None


class TestBits:
    @pytest.mark.parametrize("count", [1, 7, 8, 9, 4095, 4096, 100_003])
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_masks(self, device: torch.device, estimator: str, count: int) -> None:
        logits = operations.random(3, count).float() * 3
        for more in ({}, {"antithetic": True, "samples": 4, "sample_offset": 3, "tensor_id": 9}):
            draw = {"estimator": estimator, "samples": 3, **more}
            for seed in (torch.tensor(7), torch.arange(3)):
                here = ops.sample_mask(logits, seed=seed, **draw)
                packed = ops.sample_mask_packed(logits, seed=seed, **draw)
                there = {"seed": seed.to(device), **draw}
                assert torch.equal(ops.sample_mask(logits.to(device), **there).cpu(), here)
                assert torch.equal(ops.sample_mask_packed(logits.to(device), **there).cpu(), packed)

    @pytest.mark.parametrize("offset", [1, 2, 3, 4094, 2**34 - 2, 2**40 + 1])
    def test_element_offsets(self, device: torch.device, offset: int) -> None:
        logits = operations.random(5001).float()
        draw = {"samples": 2, "element_offset": offset}
        here = ops.sample_mask_packed(logits, seed=torch.tensor(-3), **draw)
        seed = torch.tensor(-3, device=device)
        assert torch.equal(ops.sample_mask_packed(logits.to(device), seed=seed, **draw).cpu(), here)

    @pytest.mark.parametrize("n_of_m", [(2, 4), (1, 3), (7, 16)])
    def test_n_of_m(self, device: torch.device, n_of_m: tuple[int, int]) -> None:
        logits = operations.random(5, 48, 3).float()
        for seed in (None, torch.tensor(2)):
            there = None if seed is None else seed.to(device)
            here = ops.sample_mask_packed(logits, seed=seed, n_of_m=n_of_m)
            found = ops.sample_mask_packed(logits.to(device), seed=there, n_of_m=n_of_m)
            assert torch.equal(found.cpu(), here)

    def test_special_logits(self, device: torch.device) -> None:
        special = torch.tensor([0.0, -0.0, 1e-45, 16.6, -16.7, 80.0, 1e30, -1e30])
        logits = torch.cat([special, torch.tensor([torch.nan, torch.inf, -torch.inf])]).repeat(999)
        for draw in ({"samples": 5}, {"samples": 2, "estimator": "hard_concrete"}):
            here = ops.sample_mask_packed(logits, seed=torch.tensor(1), **draw)
            seed = torch.tensor(1, device=device)
            assert torch.equal(
                ops.sample_mask_packed(logits.to(device), seed=seed, **draw).cpu(), here
            )

    @pytest.mark.parametrize("count", [0, 1, 8, 17, 70_001])
    def test_packing(self, device: torch.device, count: int) -> None:
        mask = operations.random(count + 3) > 0
        for start in (0, 3):  # not on 16 bytes
            part = mask[start : start + count]
            packed = ops.pack_bits(part)
            there = mask.to(device)[start : start + count]
            assert torch.equal(ops.pack_bits(there).cpu(), packed)
            assert torch.equal(ops.unpack_bits(packed.to(device), part.shape).cpu(), part)

    @pytest.mark.parametrize("k", [0, 1, 777, 3003])
    def test_top_k(self, device: torch.device, k: int) -> None:
        scores = [operations.random(1001), operations.random(2002).round(decimals=1)]
        for dtype in DTYPES:
            here = ops.top_k_mask([s.to(dtype) for s in scores], k)
            there = ops.top_k_mask([s.to(device, dtype) for s in scores], k)
            assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "draw",
    [{}, {"hard": False, "tau": 0.7}, {"estimator": "hard_concrete"}, {"antithetic": True}],
    ids=str,
)
def test_products(device: torch.device, name: str, draw: dict, dtype: torch.dtype) -> None:
    case = CASES[name]
    tensors = operations.moved(case, device, dtype)
    ours = operations.results(case, tensors, **draw)
    with by_reference():
        plain = operations.results(case, tensors, **draw)
    exact = operations.exact(case, tensors, **draw)
    check_close((key, ours[key].cpu(), plain[key].cpu(), exact[key]) for key in ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name",
    ["linear-one-row", "linear-even", "conv2d-groups", "conv2d-tiles", "transposed2d-groups"],
)
@pytest.mark.parametrize("draw", [{"estimator": "top_k"}, {"n_of_m": (2, 4)}, {}], ids=str)
def test_masks_packed_before_a_product(
    device: torch.device, name: str, draw: dict, dtype: torch.dtype
) -> None:
    """Those that rank weights, and one logit for blocks of them."""
    if "n_of_m" in draw and "transposed" in name:
        draw = {"estimator": ops.estimators.top_k(0.3)}  # such weights have no n of m
    case = CASES[name]
    if not draw:
        blocks = case.tensors["logits"][:, ::2, ::4].clone()
        case = case._replace(tensors={**case.tensors, "logits": blocks})
    tensors = operations.moved(case, device, dtype)
    ours = operations.results(case, tensors, **draw)
    with by_reference():
        plain = operations.results(case, tensors, **draw)
    exact = operations.exact(case, tensors, **draw)
    check_close((key, ours[key].cpu(), plain[key].cpu(), exact[key]) for key in ours)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[_gpu.Way]:
    """How products of linear layers are computed on a GPU, one after the other."""
    found: list[_gpu.Way] = []
    product = linear._product

    def record(way: _gpu.Way, *rest, **options) -> torch.Tensor:
        found.append(way)
        return product(way, *rest, **options)

    monkeypatch.setattr(linear, "_product", record)
    monkeypatch.setattr(_gpu, "SAVES", True)
    return found


PRECISIONS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
}


def truncated(t: torch.Tensor) -> torch.Tensor:
    """float32 as matrix units read it: TF32 has ten bits of mantissa."""
    return (t.detach().cpu().view(torch.int32) & -(2**13)).view(torch.float32)


@pytest.mark.parametrize("rows", [1, 16, 64, 600])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "tf32"])
def test_large_layers(
    device: torch.device, precision: str, rows: int, ways: list[_gpu.Way]
) -> None:
    """Of 2^20 weights: packed masks of the forward pass are kept where x needs a gradient."""
    samples, size = 4, 1024
    if device.type == "cpu":
        size, rows = 64, min(rows, 70)
    x = operations.random(SETS * samples * rows, size)
    case = operations.product(ops.masked_linear, x, operations.random(size, size))
    tensors = operations.moved(case, device, PRECISIONS[precision])
    exact = operations.exact(case, tensors, samples=samples)
    with precision_of(precision):
        ours = operations.results(case, tensors, samples=samples)
        saved = ways.copy()
        ways.clear()
        with by_reference():
            plain = operations.results(case, tensors, samples=samples)
        tensors["x"].requires_grad_(False)
        without_dx = operations.results(case, tensors, samples=samples)
    if device.type == "cuda":
        assert saved == [linear._SAVED] * 2  # y and dx
        assert len(ways) == 1
        assert ways[0] is not linear._SAVED
    if precision == "tf32":
        # a library may multiply few rows in float32 nevertheless: what TF32 allows counts
        read = {n: truncated(t) if n in ("x", "weight") else t for n, t in tensors.items()}
        read = {n: t.detach().requires_grad_() for n, t in read.items()}
        rounded = operations.exact(case, read, samples=samples)
        for key, value in plain.items():
            least = rounded[key].to(value)
            plain[key] = max((value, least), key=lambda t, e=exact[key]: error(t.cpu(), e))
    for found in (ours, without_dx):
        check_close((key, t.cpu(), plain[key].cpu(), exact[key]) for key, t in found.items())
    assert exact.keys() - without_dx.keys() == {"dx"}


# how, and in which precisions: products in float32 keep no masks
WAYS = [
    pytest.param((kind, source), precision, id=f"{kind}-{source}-{precision}")
    for kind, source in [*itertools.product(_gpu.KINDS, _gpu.SOURCES), ("triton", "saved")]
    for precision in ("bfloat16", "tf32", "float32")
    if (kind, precision) != ("cuda", "tf32") and (source, precision) != ("saved", "float32")
]


@pytest.fixture
def forced_way(
    request: pytest.FixtureRequest, device: torch.device, ways: list[_gpu.Way], monkeypatch
) -> Iterator[None]:
    """Products of linear layers by these kernels, with masks from there; else the test fails."""
    kind, source = request.param
    choose = linear.choose

    def forced(p, device, masks, special, kinds):
        assert kind in kinds
        return choose(p, device, masks, special, (kind,), source)

    monkeypatch.setattr(linear, "choose", forced)
    monkeypatch.setattr(linear, "LEAST_SAVED", 0 if source == "saved" else 2**62)
    yield
    if device.type == "cuda":
        expected = linear._SAVED[:2] if source == "saved" else (kind, source)
        assert ways
        assert all(w[:2] == expected for w in ways)
        assert all((w is linear._SAVED) == (source == "saved") for w in ways)


@pytest.mark.parametrize(
    ("shape", "draw"),
    [
        ((160, 96), {}),
        ((160, 96), {"antithetic": True, "sample_offset": 3}),
        ((29, 37), {"antithetic": True, "element_offset": 2**33 + 4}),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize(("forced_way", "precision"), WAYS, indirect=["forced_way"])
@pytest.mark.usefixtures("forced_way")
def test_products_with_units_give_the_mask(
    device: torch.device, precision: str, rows: int, shape: tuple[int, int], draw: dict
) -> None:
    """Rows of the identity as x, and as the gradient from above: the masked weight, bit for bit."""
    outputs, inputs = shape
    generator = torch.Generator().manual_seed(1)
    # of few bits, which no product rounds
    weight = torch.randint(1, 128, shape, generator=generator).float()
    bias = torch.randint(1, 128, (outputs,), generator=generator).float()
    logits, bias_logits = (operations.random(SETS, *s).float() for s in (shape, shape[:1]))
    seed = torch.arange(SETS)
    draw = {"samples": SAMPLES, **draw}
    of_weight, of_bias = (
        ops.sample_mask(t, seed=seed, tensor_id=i, **{**draw, "element_offset": offset})
        .transpose(0, 1)
        .flatten(0, 1)
        for t, i, offset in ((logits, 0, draw.get("element_offset", 0)), (bias_logits, 1, 0))
    )

    dtype = PRECISIONS[precision]
    operands = [
        weight.to(device, dtype).requires_grad_(),
        logits.to(device),
        bias.to(device, dtype),
        bias_logits.to(device),
    ]
    seed = seed.to(device)
    # the last of them are zeros: x gives the bias alone
    units = torch.eye(2 * max(shape) + rows)
    found_y, found_dx = [], []
    with precision_of(precision):
        for start in range(0, max(shape) + 1, rows):
            part = units[start : start + rows].to(device, dtype)
            x = part[:, :inputs].repeat(GROUPS, 1).requires_grad_()
            y = ops.masked_linear(x, *operands, seed=seed, **draw)
            (dx,) = torch.autograd.grad(y, x, part[:, :outputs].repeat(GROUPS, 1))
            found_y.append(y.detach().unflatten(0, (GROUPS, rows)))
            found_dx.append(dx.unflatten(0, (GROUPS, rows)))
        ones = torch.zeros(GROUPS, rows, max(shape), device=device, dtype=dtype)
        ones[:, -1] = 1
        x = ones[..., :inputs].flatten(0, 1).requires_grad_()
        y = ops.masked_linear(x, *operands, seed=seed, **draw)
        (dweight,) = torch.autograd.grad(y, operands[0], ones[..., :outputs].flatten(0, 1))
    found_y, found_dx = (torch.cat(t, 1).cpu().float() for t in (found_y, found_dx))
    masked, masked_bias = weight * of_weight, (bias * of_bias).unsqueeze(1)
    assert torch.equal(found_y[:, :inputs], masked.transpose(1, 2) + masked_bias)
    assert torch.equal(found_y[:, inputs : inputs + 1], masked_bias)
    assert torch.equal(found_dx[:, :outputs], masked)
    assert torch.equal(dweight.cpu().float(), of_weight.sum(0))


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("hard", [True, False])
def test_sampled_values(device: torch.device, hard: bool, tau: float) -> None:
    logits = operations.random(2, 3001).float()
    upstream = operations.random(3, 2, 3001)

    def run(given: torch.Tensor, seed: torch.Tensor) -> dict[str, torch.Tensor]:
        leaf = given.detach().requires_grad_()
        values = ops.sample_mask(leaf, seed=seed, samples=3, hard=hard, tau=tau)
        (d,) = torch.autograd.grad(values, leaf, upstream.to(values))
        return {"values": values.detach().cpu(), "dlogits": d.cpu()}

    seed = torch.arange(2)
    ours = run(logits.to(device), seed.to(device))
    exact = run(logits.double(), seed)
    with by_reference():
        plain = run(logits.to(device), seed.to(device))
    check_close((key, ours[key], plain[key], exact[key]) for key in ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrent_layers_step_by_step(device: torch.device, cell: str, dtype: torch.dtype) -> None:
    """More groups than a device has multiprocessors: no one launch has the whole loop."""
    gates, operation = (4, ops.masked_lstm) if cell == "lstm" else (3, ops.masked_gru)
    samples = 128
    case = operations.recurrent(operation, gates, 6, 7, batch=operations.SETS * samples)
    tensors = operations.moved(case, device, dtype)
    ours = operations.results(case, tensors, samples=samples)
    with by_reference():
        plain = operations.results(case, tensors, samples=samples)
    exact = operations.exact(case, tensors, samples=samples)
    check_close((key, ours[key].cpu(), plain[key].cpu(), exact[key]) for key in ours)


NORMS = {
    "layer": (lambda: torch.nn.LayerNorm(37), (24, 5, 37)),
    "batch": (lambda: torch.nn.BatchNorm2d(6), (12, 6, 7, 5)),
    "group": (lambda: torch.nn.GroupNorm(2, 6), (12, 6, 70)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_masked_normalisations(device: torch.device, name: str, dtype: torch.dtype) -> None:
    make, shape = NORMS[name]
    module = make()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    layer = mm.nn.MaskedAny.from_dense(module, sets=2, samples=2, mask_bias=True).train()
    layer.seed = torch.tensor([5, 6])
    x, upstream = (operations.random(*shape, seed=n).to(dtype) for n in (1, 2))

    def run(there: torch.device, wide: torch.dtype) -> dict[str, torch.Tensor]:
        moved = copy.deepcopy(layer).to(there, wide)
        leaf = x.to(there, wide).requires_grad_()
        names = ["x", "weight_logits", "bias_logits"]
        leaves = [leaf, *(getattr(moved, n) for n in names[1:])]
        y = moved(leaf)
        found = torch.autograd.grad(y, leaves, upstream.to(y))
        return {"y": y.detach().cpu()} | {n: d.cpu() for n, d in zip(names, found, strict=True)}

    ours, exact = run(device, dtype), run(torch.device("cpu"), torch.float64)
    with by_reference():
        plain = run(device, dtype)
    check_close((key, ours[key], plain[key], exact[key].double()) for key in ours)


SELECTIONS = {
    "few rows": ((9, 70), (33, 70), ops.select_linear),
    "many rows": ((200, 70), (33, 70), ops.select_linear),
    "positions": ((9, 30, 70), (33, 70), ops.select_linear),
    "conv1d": ((9, 4, 40), (5, 4, 3), ops.select_conv1d),
    "conv2d": ((9, 4, 9, 8), (70, 4, 3, 3), ops.select_conv2d),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SELECTIONS)
def test_selections(device: torch.device, name: str, dtype: torch.dtype) -> None:
    x_shape, weight_shape, operation = SELECTIONS[name]
    x, weight = operations.random(*x_shape), operations.random(*weight_shape)
    bias = operations.random(weight_shape[0])
    logits = operations.random(4, *weight_shape).float()
    masks = ops.sample_mask_packed(logits, seed=torch.arange(4))[0]
    rows = torch.arange(x_shape[0]) * 7 % 4
    given = [t.to(dtype) for t in (x, weight, bias)]

    def run(x, weight, bias):
        there = x.device
        return operation(x, weight, masks.to(there), rows.to(there), bias).cpu()

    ours = run(*(t.to(device) for t in given))
    exact = run(*(t.double() for t in given))
    with by_reference():
        plain = run(*(t.to(device) for t in given))
    check_close([("y", ours, plain, exact)])


@pytest.mark.parametrize("name", CASES)
def test_equal_runs_give_equal_bits(device: torch.device, name: str) -> None:
    tensors = operations.moved(CASES[name], device, torch.float32)
    first, second = (operations.results(CASES[name], tensors) for _ in range(2))
    assert_same(name, first, second)
