"""What only a CUDA device has: graphs, streams, memory beyond 2^31 elements."""

from __future__ import annotations

import copy

import operations
import pytest
import torch
from operations import CASES, assert_same
from ops.tolerance import check_close

import modmask_kernels as mm
from modmask_kernels import ops

pytestmark = pytest.mark.gpu


def step(tensors, seed):
    """Bits, values and a product, forward and backward."""
    logits = tensors["logits"]
    bits = ops.sample_mask_packed(logits, seed=seed, samples=operations.SAMPLES)
    values = ops.sample_mask(logits, seed=seed, samples=operations.SAMPLES)
    y = ops.masked_linear(*tensors.values(), seed=seed, samples=operations.SAMPLES)
    gradients = torch.autograd.grad(y.square().sum() + values.sum(), list(tensors.values()))
    return [bits, values.detach(), y.detach(), *gradients]


@pytest.fixture
def tensors(device):
    return operations.moved(CASES["linear-even"], device, torch.float32)


def record(function):
    """A graph of a function, and what it gives: filled anew by every replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = function()
    return graph, recorded


def test_graphs(tensors, device) -> None:
    """A recorded step with a new seed gives what the same step gives by itself."""
    seed = torch.arange(operations.SETS, device=device)
    graph, recorded = record(lambda: step(tensors, seed))
    for number in (40, 41):
        seed.fill_(number)
        graph.replay()
        found = [t.clone() for t in recorded]
        for ours, expected in zip(found, step(tensors, seed), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", CASES)
def test_graphs_of_every_operation(device, name: str) -> None:
    tensors = operations.moved(CASES[name], device, torch.float32)
    seed = torch.arange(operations.SETS, device=device)
    graph, recorded = record(lambda: operations.results(CASES[name], tensors, seed=seed))
    for number in (40, 41):
        seed.fill_(number)
        graph.replay()
        found = {key: t.clone() for key, t in recorded.items()}
        assert_same(name, found, operations.results(CASES[name], tensors, seed=seed))


def test_graphs_of_selections(device) -> None:
    scores = operations.random(5000).to(device, torch.float32)
    x, weight = (operations.random(*s).to(device, torch.float32) for s in ((9, 70), (33, 70)))
    bits = ops.sample_mask_packed(
        operations.random(4, 33, 70).to(device, torch.float32),
        seed=torch.arange(4, device=device),
    )[0]
    rows = torch.zeros(90, dtype=torch.int64, device=device)
    many = operations.random(90, 70).to(device, torch.float32)

    def select():
        few = ops.select_linear(x, weight, bits, rows[:9])
        return ops.top_k_mask(scores, 777), few, ops.select_linear(many, weight, bits, rows)

    graph, recorded = record(select)
    for number in (1, 3):
        scores.neg_()
        rows.fill_(number)
        graph.replay()
        found = [t.clone() for t in recorded]
        assert all(torch.equal(a, b) for a, b in zip(found, select(), strict=True))


def test_recurrent_weights_that_do_not_fit_the_chip(device) -> None:
    """Hidden size 1100: step by step, and said so."""
    layer = mm.MaskedLSTM.from_dense(torch.nn.LSTM(16, 1100).to(device), samples=2)
    layer.seed = torch.tensor([3], device=device)
    assert "step by step" in mm.explain(layer)
    x = operations.random(3, 8, 16).to(device, torch.float32)

    def run(layer, x):
        y, _ = layer(x)
        logits = layer.weight_hh_l0_logits
        return {"y": y.detach().cpu(), "d": torch.autograd.grad(y.sum(), logits)[0].cpu()}

    ours = run(layer, x)
    with operations.by_reference():
        plain = run(layer, x)
    exact = run(copy.deepcopy(layer).cpu().double(), x.cpu().double())
    check_close((key, ours[key], plain[key], exact[key].double()) for key in ours)


def test_streams(tensors, device) -> None:
    """Work is queued on the current stream: two at once do not meet."""
    seeds = [torch.arange(operations.SETS, device=device) + 10 * i for i in range(4)]
    expected = [step(tensors, seed) for seed in seeds]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in seeds]
    found = []
    for stream, seed in zip(streams, seeds, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            found.append(step(tensors, seed))
    torch.cuda.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_operands_of_another_stream(tensors, device) -> None:
    """Made on a side stream, used on the current one, and let go while that still works."""
    seed = torch.arange(operations.SETS, device=device)
    expected = step(tensors, seed)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(1_000_000)
        others = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
        seed_ = seed.clone()
    torch.cuda.current_stream().wait_stream(side)
    for t in (*others.values(), seed_):
        t.record_stream(torch.cuda.current_stream())
    torch.cuda._sleep(1_000_000)
    found = step(others, seed_)
    del others, seed_
    with torch.cuda.stream(side):  # what was let go must not be handed out yet
        for t in tensors.values():
            torch.full_like(t, torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_device(device, name: str) -> None:
    """The last device gives what the first gives, whichever is the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    expected = operations.results(CASES[name], operations.moved(CASES[name], device, torch.float32))
    found = operations.results(CASES[name], operations.moved(CASES[name], last, torch.float32))
    assert torch.cuda.current_device() == device.index
    assert all(t.device == last for t in found.values())
    assert_same(name, {key: t.to(device) for key, t in found.items()}, expected)


def peak(function) -> int:
    """Bytes beyond those that are there, results included."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_the_size_of_the_weight_but_bits(device, dtype, samples: int) -> None:
    width, batch = 2048, 64
    weight = operations.random(width, width).to(device, dtype)
    x = operations.random(batch, width).to(device, dtype).requires_grad_()
    logits = torch.zeros(width, width, device=device, requires_grad=True)
    seed = torch.tensor(3, device=device)

    def step():
        y = ops.masked_linear(x, weight, logits, seed=seed, samples=samples)
        torch.autograd.grad(y, (x, logits), y.detach())

    bits = samples * width * width // 8
    rows = 6 * batch * width * dtype.itemsize  # y, dy, dx, and some to spare
    assert peak(step) <= 4 * width * width + bits + rows + 2**20
    draw = {"seed": seed, "samples": samples}
    assert peak(lambda: ops.sample_mask_packed(logits, **draw)) <= bits + 2**20


def test_no_masked_weight_for_selected_masks(device) -> None:
    """Every row has a set of its own, every image too."""
    width, rows = 1024, 128
    row_sets = torch.arange(rows, device=device)
    masks = torch.full((rows, width * width // 8), 0x5A, dtype=torch.uint8, device=device)
    weight, x = (operations.random(n, width).to(device, torch.float32) for n in (width, rows))
    results = 4 * rows * width
    select = ops.select_linear
    assert peak(lambda: select(x, weight, masks, row_sets)) <= results + 2**20
    images, kernel = x.view(rows, 16, 8, 8), weight.view(width, 16, 8, 8)
    convolve = ops.select_conv2d
    assert peak(lambda: convolve(images, kernel, masks, row_sets)) <= results + 2**20


def test_nothing_waits(tensors, device) -> None:
    seed = torch.arange(operations.SETS, device=device)
    step(tensors, seed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(tensors, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_two_to_the_31_elements(device) -> None:
    count = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 5 * count:
        pytest.skip("needs 11 GB of device memory")
    logits = torch.zeros(count, device=device)
    draw = {"seed": torch.tensor(5, device=device)}
    packed = ops.sample_mask_packed(logits, **draw)[0]
    for start in (0, 2**31 - 4096, count - 4099):
        part = ops.sample_mask_packed(
            logits[start : start + 4096].cpu(), seed=torch.tensor(5), element_offset=start
        )[0]
        if start % 8 == 0:
            assert torch.equal(packed[start // 8 : start // 8 + 512].cpu(), part)


def test_a_product_of_more_than_two_to_the_31_elements(device) -> None:
    rows, outputs = 2**21 + 8, 1032
    if torch.cuda.mem_get_info()[0] < 6 * rows * outputs:
        pytest.skip("needs 13 GB of device memory")
    x = operations.random(64, 16).to(device, torch.bfloat16).repeat(rows // 64 + 1, 1)[:rows]
    weight = operations.random(outputs, 16).to(device, torch.bfloat16)
    logits = operations.random(outputs, 16).to(device, torch.float32)
    draw = {"seed": torch.tensor(5, device=device)}
    y = ops.masked_linear(x, weight, logits, **draw)
    for start in (0, rows - 64):
        part = ops.masked_linear(x[start : start + 64], weight, logits, **draw)
        torch.testing.assert_close(y[start : start + 64], part)
