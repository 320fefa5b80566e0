"""The time loop of masked LSTM and GRU layers as one CUDA kernel, on the CPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from ops.recurrent import WHOLE, check_whole
from ops.tolerance import check_close

from modmask_kernels import _native, ops
from modmask_kernels.ops import _gpu, _library, estimators
from modmask_kernels.ops import masked_rnn as masked_rnn_module
from modmask_kernels.ops.masked_rnn import gpu
from modmask_kernels.ops.masked_rnn.reference import CELLS, GATES, masked_rnn

GRADIENTS = 4  # per unit, sequence and step
SAVED = 5


@dataclass(frozen=True)
class Case:
    cell: str
    steps: int
    rows: int
    hidden: int
    sets: int = 1
    samples: int = 1
    masked: bool = True
    states: bool = True
    bias: bool = False
    lengths: bool = False
    reverse: bool = False
    multiprocessors: int = 8
    most_shared: int = 98304

    @property
    def groups(self) -> int:
        return self.sets * self.samples


CASES = [
    Case("lstm", 3, 5, 9),
    Case("gru", 3, 5, 9),
    Case("lstm", 4, 3, 16, sets=2, samples=2, bias=True),
    Case("gru", 4, 3, 16, sets=2, samples=2, bias=True),
    Case("lstm", 5, 4, 7, lengths=True, bias=True),
    Case("gru", 5, 4, 7, lengths=True, bias=True),
    Case("lstm", 5, 4, 7, lengths=True, reverse=True, samples=2),
    Case("gru", 5, 4, 7, lengths=True, reverse=True, samples=2),
    Case("lstm", 2, 1, 1, states=False),
    Case("gru", 1, 1, 1, states=False, masked=False),
    Case("lstm", 0, 2, 5),
    Case("gru", 0, 2, 5),
    # one block for all units; many sequences, a few at a time
    Case("lstm", 2, 19, 6, multiprocessors=1, most_shared=2600),
    Case("gru", 2, 70, 6, multiprocessors=2, most_shared=8000),
]


class Inputs:
    """Everything in float32; what the kernel multiplies is `weight` times `masks`."""

    def __init__(self, c: Case):
        g = torch.Generator().manual_seed(7)
        gates, batch = GATES[c.cell], c.rows * c.groups

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g)

        self.gates = random(c.steps, batch, gates * c.hidden)
        self.weight = random(gates * c.hidden, c.hidden) / c.hidden**0.5
        self.logits = random(c.sets, gates * c.hidden, c.hidden) + (0.0 if c.masked else 100.0)
        self.seeds = torch.arange(c.sets) + 11
        self.h0 = random(batch, c.hidden) if c.states else None
        self.c0 = random(batch, c.hidden) if c.states and c.cell == "lstm" else None
        self.bias = random(gates * c.hidden) if c.bias else None
        self.lengths = torch.arange(batch) % (c.steps + 1) if c.lengths else None
        self.dy, self.dh_n = random(c.steps, batch, c.hidden), random(batch, c.hidden)
        self.dc_n = random(batch, c.hidden)


def by_reference(c: Case, i: Inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Results and gradients; the input's part of the gates goes through an identity."""

    def leaf(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.to(dtype).requires_grad_()

    width = GATES[c.cell] * c.hidden
    gates, h0, c0, bias = map(leaf, (i.gates, i.h0, i.c0, i.bias))
    assert gates is not None
    y, h_n, c_n = masked_rnn(
        *(gates, h0, c0, torch.eye(width, dtype=dtype), i.weight.to(dtype)),
        *(torch.full((c.sets, width, width), 100.0), i.logits, None, bias, None, None),
        *(i.seeds, i.lengths, CELLS.index(c.cell), c.reverse, (0, 5, 2, 3), 0),
        *(c.samples, 1.0, True),
    )
    outputs = {"y": (y, i.dy), "h_n": (h_n, i.dh_n)}
    if c.cell == "lstm":
        outputs["c_n"] = (c_n, i.dc_n)
    leaves = {"dgates": gates, "dh0": h0, "dc0": c0, "dbias": bias}
    leaves = {name: t for name, t in leaves.items() if t is not None}
    of_leaves = [(t, d.to(dtype)) for t, d in outputs.values() if t.requires_grad]
    found = torch.autograd.grad(
        [t for t, _ in of_leaves],
        list(leaves.values()),
        [d for _, d in of_leaves],
        allow_unused=True,
        materialize_grads=True,
    )
    return {name: t.detach() for name, (t, _) in outputs.items()} | dict(
        zip(leaves, found, strict=True)
    )


def steps_forward(device, arguments):
    """What `rnn_forward` computes, step by step."""
    c = {**arguments, "started": arguments["h0"] is not None}
    for state, first in (("h_n", "h0"), ("c_n", "c0")):
        if c.get(state) is not None:
            c[state][:] = 0.0 if c[first] is None else c[first]
    device.run("rnn_steps_forward", **c)


def steps_backward(device, arguments):
    c = dict(arguments)
    for state, last in (("dh0", "dh_n"), ("dc0", "dc_n")):
        if c.get(state) is not None:
            c[state][:] = 0.0 if c[last] is None else c[last]
    batch, hidden = c["dh0"].shape
    if c["cell"] == "gru":
        c["recurrent"] = np.full((batch, 3 * hidden), np.nan, np.float32)
    device.run("rnn_steps_backward", **c)


def run(simt, c: Case, i: Inputs, seed: int = 0, by: str = "launch") -> dict[str, torch.Tensor]:
    device = simt.Device(seed)
    batch = c.rows * c.groups

    def empty(*shape: int) -> torch.Tensor:
        return torch.full(shape, np.nan)

    def numpy(t: torch.Tensor | None) -> np.ndarray | None:
        return None if t is None else t.numpy()

    bits = ops.sample_mask_packed(i.logits, seed=i.seeds, samples=c.samples, tensor_id=5)
    sizes = {
        "cell": c.cell,
        "steps": c.steps,
        "rows": c.rows,
        "groups": c.groups,
        "hidden": c.hidden,
        "multiprocessors": c.multiprocessors,
        "most_shared": c.most_shared,
    }
    mask = {
        "weight": i.weight.numpy(),
        "bits": bits.numpy() if c.masked or by == "steps" else None,
        "set_stride": bits.shape[2],
        "sample_stride": bits.shape[1] * bits.shape[2],
        "samples": c.samples,
    }
    common = sizes | mask | {"lengths": numpy(i.lengths), "reverse": c.reverse}
    lstm = c.cell == "lstm"
    results = {"y": empty(c.steps, batch, c.hidden), "h_n": empty(batch, c.hidden)}
    if lstm:
        results["c_n"] = empty(batch, c.hidden)
    saved = empty(c.steps, batch, SAVED, c.hidden)
    bias = None if i.bias is None else i.bias.expand(c.groups, -1).contiguous()
    arguments = {
        **common,
        "gates": i.gates.numpy(),
        "hidden_bias": numpy(bias),
        "h0": numpy(i.h0),
        "c0": numpy(i.c0),
        "h": empty(2, batch, c.hidden).numpy(),
        "saved": saved.numpy(),
        "arrivals": np.zeros(1, np.uint32),
        **{name: t.numpy() for name, t in results.items()},
    }
    if by == "steps":
        steps_forward(device, arguments)
    else:
        device.run("rnn_forward", **arguments)
    dgates = empty(c.steps, batch, GRADIENTS, c.hidden)
    gradients = {"dh0": empty(batch, c.hidden)} | ({"dc0": empty(batch, c.hidden)} if lstm else {})
    arguments = {
        **common,
        "saved": saved.numpy(),
        "dy": i.dy.numpy(),
        "dh_n": i.dh_n.numpy(),
        "dc_n": i.dc_n.numpy() if lstm else None,
        "dgates": dgates.numpy(),
        "arrivals": np.zeros(1, np.uint32),
        **{name: t.numpy() for name, t in gradients.items()},
    }
    if by == "steps":
        steps_backward(device, arguments)
    else:
        device.run("rnn_backward", **arguments)
    recurrent = dgates[:, :, : GATES[c.cell]]
    extra = {"dbias": recurrent.flatten(2).sum((0, 1))} if i.bias is not None else {}
    kept = gradients if i.h0 is not None else {}
    of_input = dgates if lstm else dgates[:, :, [0, 1, 3]]
    return results | {"dgates": of_input.flatten(2)} | kept | extra


@pytest.mark.parametrize("by", ["launch", "steps"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(simt, case, by):
    inputs = Inputs(case)
    ours = run(simt, case, inputs, by=by)
    plain = by_reference(case, inputs, torch.float32)
    exact = by_reference(case, inputs, torch.float64)
    assert ours.keys() == plain.keys()
    check_close((name, ours[name], plain[name], exact[name]) for name in ours)


@pytest.mark.parametrize("by", ["launch", "steps"])
def test_the_order_of_threads_changes_nothing(simt, by):
    case = Case("lstm", 3, 5, 9, samples=2)
    inputs = Inputs(case)
    first, second = (run(simt, case, inputs, seed, by) for seed in (1, 2))
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


@pytest.fixture(params=["launch", "steps"])
def loops_on_simt(simt, request):
    """The operations of the time loop, for CPU tensors."""
    by_steps = request.param == "steps"

    def sizes(weight, bits, cell, steps, batch, groups):
        return {
            "weight": weight.contiguous().numpy(),
            "bits": bits.numpy(),
            "set_stride": bits.shape[2],
            "sample_stride": bits.shape[1] * bits.shape[2],
            "samples": bits.shape[0],
            "cell": CELLS[cell],
            "steps": steps,
            "rows": batch // groups,
            "groups": groups,
            "hidden": weight.shape[1],
            "multiprocessors": 8,
            "most_shared": 98304,
            "arrivals": np.zeros(1, np.uint32),
        }

    def given(**tensors):
        return {n: None if t is None else t.contiguous().numpy() for n, t in tensors.items()}

    def loop(gates, weight, bits, bias, h0, c0, lengths, cell, reverse, groups, samples):
        steps, batch, _ = gates.shape
        hidden = weight.shape[1]
        results = (
            gates.new_empty(steps, batch, hidden),
            gates.new_empty(batch, hidden),
            gates.new_empty(batch if CELLS[cell] == "lstm" else 0, hidden),
            gates.new_empty(steps, batch, SAVED, hidden),
        )
        arguments = {
            **sizes(weight, bits, cell, steps, batch, groups),
            **given(gates=gates, hidden_bias=bias, h0=h0, c0=c0, lengths=lengths),
            **given(**dict(zip(("y", "h_n", "c_n", "saved"), results, strict=True))),
            "h": np.zeros((2, batch, hidden), np.float32),
            "reverse": reverse,
        }
        if by_steps:
            steps_forward(simt.Device(), arguments)
        else:
            simt.Device().run("rnn_forward", **arguments)
        return results

    def loop_backward(saved, weight, bits, dy, dh_n, dc_n, lengths, cell, reverse, groups, samples):
        steps, batch, _, hidden = saved.shape
        results = (
            saved.new_empty(steps, batch, GRADIENTS, hidden),
            saved.new_empty(batch, hidden),
            saved.new_empty(batch if CELLS[cell] == "lstm" else 0, hidden),
        )
        arguments = {
            **sizes(weight, bits, cell, steps, batch, groups),
            **given(saved=saved, dy=dy, dh_n=dh_n, dc_n=dc_n, lengths=lengths),
            **given(**dict(zip(("dgates", "dh0", "dc0"), results, strict=True))),
            "reverse": reverse,
        }
        if by_steps:
            steps_backward(simt.Device(), arguments)
        else:
            simt.Device().run("rnn_backward", **arguments)
        return results

    with torch.library._scoped_library("modmask", "IMPL") as library:
        library.impl("rnn_loop", loop, "CPU")
        library.impl("rnn_loop_backward", loop_backward, "CPU")
        yield


@pytest.mark.parametrize("options", WHOLE, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_the_whole_operation_around_the_loop(loops_on_simt, cell, options):
    """As on a GPU, with the products of the CPU, forward and backward."""
    check_whole(cell, options, gpu.forward, gpu.backward)


@pytest.mark.parametrize(("cell", "hidden"), list(itertools.product(CELLS, (64, 256))))
def test_plans_fit_the_device(simt, cell, hidden):
    """Blocks for 4 samples of 16 sequences run at once on an A100 and an H100."""
    plan = np.zeros(2, np.int32)
    for multiprocessors, most_shared in ((108, 166912), (132, 232448)):
        simt.Device().run(
            "plan_rnn",
            plan=plan,
            cell=cell,
            steps=50,
            rows=16,
            groups=4,
            hidden=hidden,
            multiprocessors=multiprocessors,
            most_shared=most_shared,
        )
        units, rows = plan
        assert 0 < rows <= 16
        assert 4 * -(-hidden // units) <= multiprocessors


def test_a_device_without_kernels_goes_to_the_reference(monkeypatch):
    served = {}
    monkeypatch.setattr(_library, "implement", lambda name, _, call: served.update({name: call}))
    monkeypatch.setattr(_native, "cuda_unserved", lambda device: "too old")
    monkeypatch.setattr(_gpu, "absent", lambda: "absent")
    module = masked_rnn_module
    gpu.serve(module._reference, module._backward_reference)
    x, weights = torch.randn(3, 8, 5), (torch.randn(8, 5), torch.randn(8, 2))
    operands = (x, None, None, *weights, *(torch.randn_like(w) for w in weights), *4 * (None,))
    rest = (torch.tensor(1), None, 0, False, (0, 1, 2, 3), 0, 2, 1.0, True)
    rest += estimators.arguments("gumbel_sigmoid", False)
    y, h_n, c_n, saved = served["masked_rnn"](*operands, *rest)
    for t, exact in zip((y, h_n, c_n), module._reference(*operands, *rest)[:3], strict=True):
        assert torch.equal(t, exact)
    # what the fake kernel promises to compilers
    assert saved.shape == (3, 8, SAVED, 2)
    needs = sum(1 << i for i, t in enumerate(operands) if t is not None)
    arguments = (torch.ones_like(y), None, None, y, saved, *operands, *rest, needs)
    found = served["masked_rnn_backward"](*arguments)
    for t, exact in zip(found, module._backward_reference(*arguments), strict=True):
        assert torch.equal(t, exact)


def test_explain():
    """One launch where the weight fits the chip, else steps; with Triton alone steps."""
    weight, logits = torch.ones(24, 6), torch.zeros(2, 24, 6)

    def explain(fits, kind):
        return gpu.explain("lstm", weight, logits, 4, estimators.GUMBEL_SIGMOID, kind, fits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "cuda_loaded", lambda: True)
        patch.setattr(_native, "cuda_unserved", lambda device: "not built")
        assert explain(lambda *_: True, "cuda") == ("cuda", "the time loop in one launch")
        assert "does not fit the chip" in explain(lambda *_: False, "cuda")[1]
        asked = []

        def up_to_16(device, cell, steps, rows, groups, hidden):
            asked.append((cell, groups, hidden))
            return rows <= 16

        assert "up to 16 rows of a group, then step by step" in explain(up_to_16, "cuda")[1]
        assert set(asked) == {(0, 8, 6)}
        backend, why = explain(up_to_16, "triton")
        assert backend == "triton"
        assert "cells in PyTorch; cuda: not built" in why
        patch.setattr(_gpu, "absent", lambda: "absent")
        patch.setattr(_native, "cuda_loaded", lambda: False)
        assert explain(up_to_16, None)[0] == "reference"
