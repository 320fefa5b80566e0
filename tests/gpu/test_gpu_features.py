"""What users do beside calls: compilers, autocast, odd layouts, mistakes, learning."""

from __future__ import annotations

import operations
import pytest
import torch
from operations import CASES, GROUPS, SAMPLES, SETS, assert_same
from ops.tolerance import check_close

import modmask_kernels as mm
from modmask_kernels import ops


@pytest.mark.parametrize("name", CASES)
def test_compile(device: torch.device, name: str) -> None:
    case = CASES[name]
    tensors = operations.moved(case, device, torch.float32)
    torch._dynamo.reset()
    # the compiler's own C++ takes long and is no concern of these tests
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(case.call, fullgraph=True, backend=backend)
    found = operations.results(case._replace(call=compiled), tensors)
    assert_same(name, found, operations.results(case, tensors))


@pytest.mark.parametrize("name", CASES)
def test_autocast(device: torch.device, name: str) -> None:
    """Products go low, logits and their gradients do not."""
    tensors = operations.moved(CASES[name], device, torch.float32)
    low = {
        n: t if "logits" in n else t.detach().bfloat16().requires_grad_()
        for n, t in tensors.items()
    }
    expected = operations.results(CASES[name], low)
    with torch.autocast(device.type, torch.bfloat16):
        found = operations.results(CASES[name], tensors)
    assert found["output 0"].dtype == torch.bfloat16
    for key, value in expected.items():
        if "logits" in key:
            assert found[key].dtype == torch.float32
        torch.testing.assert_close(found[key].to(value.dtype), value, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_tensors_with_gaps(device: torch.device, name: str, dtype: torch.dtype) -> None:
    """Every operand a view of every second element, backwards in memory."""
    tensors = operations.moved(CASES[name], device, dtype)

    def spread(t: torch.Tensor) -> torch.Tensor:
        wide = t.detach().new_full([2 * n for n in reversed(t.shape)], torch.nan)
        view = wide[tuple(slice(1, None, 2) for _ in t.shape)].permute(*reversed(range(t.dim())))
        view.copy_(t.detach())
        return view.requires_grad_()

    found = operations.results(CASES[name], {n: spread(t) for n, t in tensors.items()})
    assert_same(name, found, operations.results(CASES[name], tensors))


@pytest.mark.parametrize("name", ["linear", "conv2d", "lstm"])
def test_no_rows(device: torch.device, name: str) -> None:
    tensors = operations.moved(CASES[name], device, torch.float32)
    dim = 1 if name == "lstm" else 0
    tensors["x"] = tensors["x"].detach().narrow(dim, 0, 0).requires_grad_()
    found = operations.results(CASES[name], tensors)
    assert found["output 0"].shape[dim] == 0
    for key, gradient in found.items():
        assert not gradient.any(), key


def test_no_inputs_or_outputs(device: torch.device) -> None:
    seed = torch.tensor(1, device=device)
    for inputs, outputs in ((0, 5), (5, 0)):
        x = torch.ones(4, inputs, device=device)
        weight = torch.ones(outputs, inputs, device=device)
        logits = torch.zeros_like(weight).requires_grad_()
        bias = torch.full((outputs,), 2.0, device=device)
        y = ops.masked_linear(x, weight, logits, bias, seed=seed, samples=2)
        assert torch.equal(y, bias.expand(4, -1))
        assert torch.autograd.grad(y.sum(), logits)[0].shape == weight.shape


@pytest.mark.parametrize("name", CASES)
def test_operands_elsewhere_are_named(device: torch.device, name: str) -> None:
    other = torch.device("meta") if device.type == "cpu" else torch.device("cpu")
    tensors = operations.moved(CASES[name], device, torch.float32)
    for key in tensors:
        if key == "x" or "bias" in key:
            continue
        mixed = {**tensors, key: tensors[key].detach().to(other)}
        with pytest.raises(ValueError, match=rf"{key} is on {other}"):
            operations.results(CASES[name], mixed)
    seed = torch.zeros(SETS, dtype=torch.int64, device=other)
    with pytest.raises(ValueError, match=f"seed is on {other}"):
        operations.results(CASES[name], tensors, seed=seed)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrent_layers_without_masks_equal_those_of_pytorch(device, cell: str) -> None:
    """Those of cuDNN on a GPU: outputs, states and gradients, with all weights kept."""
    torch.manual_seed(0)
    plain = (torch.nn.LSTM if cell == "lstm" else torch.nn.GRU)(24, 40).to(device)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    x = operations.random(6, 8, 24).to(device)
    upstream = operations.random(6, 8, 40).to(device)
    operation = ops.masked_lstm if cell == "lstm" else ops.masked_gru

    def results(call, given, weights):
        y, states = call(given, weights)
        states = states if isinstance(states, tuple) else (states,)
        leaves = (given, *weights)
        found = torch.autograd.grad(y, leaves, upstream.to(y.dtype))
        values = dict(zip(("x", *names), found, strict=True))
        states = {f"state {i}": s.detach().reshape(8, 40) for i, s in enumerate(states)}
        return values | states | {"y": y.detach()}

    def of_layer(dtype):
        plain.to(dtype)
        weights = [getattr(plain, name) for name in names]
        return results(lambda x, _: plain(x), x.to(dtype).requires_grad_(), weights)

    def masked(given, weights):
        kept = [torch.full_like(w, 100.0) for w in weights[:2]]
        return operation(given, *weights[:2], *kept, *weights[2:])

    weights = [getattr(plain, name).detach().requires_grad_() for name in names]
    ours = results(masked, x.float().requires_grad_(), weights)
    theirs, exact = of_layer(torch.float32), of_layer(torch.float64)
    check_close((key, ours[key], theirs[key], exact[key]) for key in ours)


def test_explain(device: torch.device) -> None:
    """What serves a layer is said, and on a GPU it is no reference."""
    layer = mm.MaskedLinear.from_dense(torch.nn.Linear(64, 64).to(device), samples=SAMPLES)
    said = mm.explain(layer)
    assert ("triton" if device.type == "cuda" else "cpu") in said


class StopError(RuntimeError):
    pass


def learned(device: torch.device, stop_at: int = -1, **options) -> mm.MaskSet:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    mm.mask_model(model.to(device), samples=4, init=0.1)

    def data(step: int, generator: torch.Generator):
        if step == stop_at:
            raise StopError
        x = torch.randn(64, 16, generator=generator)
        return x.to(device), (x[:, 0] > 0).long().to(device)

    def loss(output, batch):
        return torch.nn.functional.cross_entropy(output, batch[1])

    result = mm.learn_masks(model, loss, data, steps=20, lr=0.05, progress=False, **options)
    return result.masks["0"]


def test_learning_resumes_to_the_same_bits(device: torch.device, tmp_path) -> None:
    whole = learned(device)
    assert 0.0 < whole.density() < 1.0
    options = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 5}
    with pytest.raises(StopError):
        learned(device, stop_at=13, **options)
    resumed = learned(device, resume=True, **options)
    assert resumed == whole
    assert all(torch.equal(resumed.logits[n], whole.logits[n]) for n in whole)


def test_groups_see_the_masks_of_their_number(device: torch.device) -> None:
    """Sets and samples at once give what one call for each gives."""
    tensors = operations.moved(CASES["linear-even"], device, torch.float32)
    seeds = torch.arange(SETS, device=device) + 5
    whole = ops.masked_linear(*tensors.values(), seed=seeds, samples=SAMPLES)
    parts = tensors["x"].chunk(GROUPS)
    for group, part in enumerate(parts):
        set_, sample = divmod(group, SAMPLES)
        one = {**tensors, "x": part}
        one |= {n: tensors[n][set_] for n in ("logits", "bias_logits")}
        y = ops.masked_linear(*one.values(), seed=seeds[set_], sample_offset=sample)
        torch.testing.assert_close(whole.chunk(GROUPS)[group], y, rtol=1e-5, atol=1e-4)
