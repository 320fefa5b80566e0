"""What only a CUDA device has: graphs, streams, cuDNN, memory beyond 2^31 elements."""

from __future__ import annotations

import operations
import pytest
import torch
from operations import CASES
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


def test_graphs(tensors, device) -> None:
    """A recorded step with a new seed gives what the same step gives by itself."""
    seed = torch.arange(operations.SETS, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(tensors, seed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step(tensors, seed)
    for number in (40, 41):
        seed.fill_(number)
        graph.replay()
        found = [t.clone() for t in recorded]
        for ours, expected in zip(found, step(tensors, seed), strict=True):
            assert torch.equal(ours, expected)


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


def test_nothing_waits(tensors, device) -> None:
    seed = torch.arange(operations.SETS, device=device)
    step(tensors, seed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(tensors, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrent_layers_without_masks_equal_cudnn(device, cell: str) -> None:
    torch.manual_seed(0)
    plain = (torch.nn.LSTM if cell == "lstm" else torch.nn.GRU)(24, 40).to(device)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    weights = [getattr(plain, name).detach().requires_grad_() for name in names]
    kept = [torch.full_like(w, 100.0) for w in weights[:2]]
    x = operations.random(6, 8, 24).to(device, torch.float32)
    operation = ops.masked_lstm if cell == "lstm" else ops.masked_gru
    y, _ = operation(x, *weights[:2], *kept, *weights[2:])
    exact = plain.double()(x.double())[0]
    theirs = plain.float()(x)[0]
    check_close([("y", y.detach(), theirs.detach(), exact.detach())])


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


def test_learning(device) -> None:
    """A network on the device learns its masks."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    mm.mask_model(model.to(device), samples=4)
    x = operations.random(64, 16).to(device, torch.float32)
    target = torch.zeros(64, dtype=torch.long, device=device)
    result = mm.learn_masks(
        model,
        lambda output, batch: torch.nn.functional.cross_entropy(output, batch[1]),
        lambda step, generator: (x, target),
        steps=20,
        lr=0.05,
    )
    assert 0.0 < result.masks["0"].density() < 1.0
