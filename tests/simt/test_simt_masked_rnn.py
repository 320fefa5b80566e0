"""The time loop of masked LSTM and GRU layers as one CUDA kernel, on the CPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from ops.tolerance import check_close

from modmask_kernels import _native, ops
from modmask_kernels.ops import _library, estimators
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


def run(simt, c: Case, i: Inputs, seed: int = 0) -> dict[str, torch.Tensor]:
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
        "bits": bits.numpy() if c.masked else None,
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
    device.run(
        "rnn_forward",
        **common,
        gates=i.gates.numpy(),
        hidden_bias=numpy(bias),
        h0=numpy(i.h0),
        c0=numpy(i.c0),
        h=empty(2, batch, c.hidden).numpy(),
        saved=saved.numpy(),
        arrivals=np.zeros(1, np.uint32),
        **{name: t.numpy() for name, t in results.items()},
    )
    dgates = empty(c.steps, batch, GRADIENTS, c.hidden)
    gradients = {"dh0": empty(batch, c.hidden)} | ({"dc0": empty(batch, c.hidden)} if lstm else {})
    device.run(
        "rnn_backward",
        **common,
        saved=saved.numpy(),
        dy=i.dy.numpy(),
        dh_n=i.dh_n.numpy(),
        dc_n=i.dc_n.numpy() if lstm else None,
        dgates=dgates.numpy(),
        arrivals=np.zeros(1, np.uint32),
        **{name: t.numpy() for name, t in gradients.items()},
    )
    recurrent = dgates[:, :, : GATES[c.cell]]
    extra = {"dbias": recurrent.flatten(2).sum((0, 1))} if i.bias is not None else {}
    kept = gradients if i.h0 is not None else {}
    of_input = dgates if lstm else dgates[:, :, [0, 1, 3]]
    return results | {"dgates": of_input.flatten(2)} | kept | extra


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(simt, case):
    inputs = Inputs(case)
    ours = run(simt, case, inputs)
    plain = by_reference(case, inputs, torch.float32)
    exact = by_reference(case, inputs, torch.float64)
    assert ours.keys() == plain.keys()
    check_close((name, ours[name], plain[name], exact[name]) for name in ours)


def test_the_order_of_threads_changes_nothing(simt):
    case = Case("lstm", 3, 5, 9, samples=2)
    inputs = Inputs(case)
    first, second = (run(simt, case, inputs, seed) for seed in (1, 2))
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


WHOLE = [
    {},
    {"bias": True, "mask_bias": True, "lengths": True},
    {"bias": True, "reverse": True, "lengths": True},
    {"seed": None, "reverse": True},
    {"estimator": "hard_concrete", "antithetic": True, "states": False, "bias": True},
    {"steps": 0},
]


@pytest.fixture
def loops_on_simt(simt):
    """The operations of the time loop, for CPU tensors."""

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
        simt.Device().run(
            "rnn_forward",
            **sizes(weight, bits, cell, steps, batch, groups),
            **given(gates=gates, hidden_bias=bias, h0=h0, c0=c0, lengths=lengths),
            **given(**dict(zip(("y", "h_n", "c_n", "saved"), results, strict=True))),
            h=np.zeros((2, batch, hidden), np.float32),
            reverse=reverse,
        )
        return results

    def loop_backward(saved, weight, bits, dy, dh_n, dc_n, lengths, cell, reverse, groups, samples):
        steps, batch, _, hidden = saved.shape
        results = (
            saved.new_empty(steps, batch, GRADIENTS, hidden),
            saved.new_empty(batch, hidden),
            saved.new_empty(batch if CELLS[cell] == "lstm" else 0, hidden),
        )
        simt.Device().run(
            "rnn_backward",
            **sizes(weight, bits, cell, steps, batch, groups),
            **given(saved=saved, dy=dy, dh_n=dh_n, dc_n=dc_n, lengths=lengths),
            **given(**dict(zip(("dgates", "dh0", "dc0"), results, strict=True))),
            reverse=reverse,
        )
        return results

    with torch.library._scoped_library("modmask", "IMPL") as library:
        library.impl("rnn_loop", loop, "CPU")
        library.impl("rnn_loop_backward", loop_backward, "CPU")
        yield


@pytest.mark.parametrize("options", WHOLE, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_the_whole_operation_around_the_loop(loops_on_simt, cell, options):
    """As on a GPU, with the products of the CPU, forward and backward."""
    o = {"steps": 4, "bias": False, "mask_bias": False, "lengths": False, "states": True} | options
    sets, samples, rows, inputs, hidden = 2, 2, 3, 5, 6
    seed = o.get("seed", torch.tensor([3, 4]))
    batch, width = rows * sets * (1 if seed is None else samples), GATES[cell] * hidden
    g = torch.Generator().manual_seed(3)

    def random(*shape, when=True):
        return torch.randn(*shape, generator=g) if when else None

    operands = [
        random(o["steps"], batch, inputs),
        random(batch, hidden, when=o["states"]),
        random(batch, hidden, when=o["states"] and cell == "lstm"),
        random(width, inputs),
        random(width, hidden) / hidden**0.5,
        random(sets, width, inputs),
        random(sets, width, hidden),
        *(random(width, when=o["bias"]) for _ in range(2)),
        *(random(sets, width, when=o["mask_bias"]) for _ in range(2)),
    ]
    chosen = estimators.arguments(o.get("estimator", "gumbel_sigmoid"), o.get("antithetic", False))
    lengths = torch.arange(batch) % (o["steps"] + 1) if o["lengths"] else None
    rule = (CELLS.index(cell), o.get("reverse", False), (4, 5, 6, 7), 1, samples, 1.0, True)
    rest = (seed, lengths, *rule, *chosen)
    needs = sum(1 << i for i, t in enumerate(operands) if t is not None)
    dy, dh_n = random(o["steps"], batch, hidden), random(batch, hidden)
    dc_n = random(batch, hidden, when=cell == "lstm")

    def exact(dtype):
        wide = [None if t is None else t.to(dtype) for t in operands]
        y, h_n, c_n, saved = masked_rnn_module._reference(*wide, *rest)
        ds = (t if t is None else t.to(dtype) for t in (dy, dh_n, dc_n))
        return [
            y,
            h_n,
            c_n,
            *masked_rnn_module._backward_reference(*ds, y, saved, *wide, *rest, needs),
        ]

    y, h_n, c_n, saved = gpu.forward(*operands, *rest)
    ours = [y, h_n, c_n, *gpu.backward(dy, dh_n, dc_n, y, saved, *operands, *rest, needs)]
    names = ["y", "h_n", "c_n", *("d" + name for name in masked_rnn_module._NAMES)]
    check_close(zip(names, ours, exact(torch.float32), exact(torch.float64), strict=True))


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


def test_sizes_that_fit_no_device_go_to_the_reference(monkeypatch):
    served = {}
    monkeypatch.setattr(_library, "implement", lambda name, _, call: served.update({name: call}))
    monkeypatch.setattr(_native, "cuda_unserved", lambda device: None)
    asked = []
    monkeypatch.setattr(_native, "rnn_fits", lambda device, *sizes: asked.append(sizes))
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
    assert asked == 2 * [(0, 3, 4, 2, 2)]
