"""Masked products of few rows on the device, against the reference in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from mask_arguments import bytes_of, mask_arguments, top_k_cuts
from ops.tolerance import check_close

from modmask_kernels import ops
from modmask_kernels.ops import estimators
from modmask_kernels.ops.masked_linear import reference
from modmask_kernels.ops.select import reference as select_reference

SEEDS = {"each": torch.tensor([-3, 4, 11]), "one": torch.tensor(5), "none": None}


@dataclass
class Case:
    rows: int = 5  # per group
    inputs: int = 37
    outputs: int = 29
    sets: int = 2
    samples: int = 2
    dtype: torch.dtype = torch.float32
    seed: str = "each"
    hard: bool = True
    bias: bool = True
    packed: bool = False
    tau: float = 1.0
    logits_only: bool = False
    options: dict = field(default_factory=dict)

    def draw(self):
        seed = SEEDS[self.seed]
        if seed is not None and seed.dim():
            seed = seed[: self.sets]
        return {
            "seed": seed,
            "samples": self.samples,
            "tensor_id": 3,
            "tau": self.tau,
            **self.options,
        }

    def tensors(self):
        g = torch.Generator().manual_seed(self.rows)

        def normal(*shape, scale=1.0, dtype=self.dtype):
            return (torch.randn(shape, generator=g) * scale).to(dtype)

        groups = self.sets * (1 if self.seed == "none" else self.samples)
        t = {
            "x": normal(groups * self.rows, self.inputs),
            "weight": normal(self.outputs, self.inputs, scale=1 / math.sqrt(self.inputs)),
            "logits": normal(self.sets, self.outputs, self.inputs, scale=2.0, dtype=torch.float32),
            "bias": normal(self.outputs) if self.bias else None,
            "bias_logits": normal(self.sets, self.outputs, scale=2.0, dtype=torch.float32)
            if self.bias
            else None,
        }
        return t, normal(groups * self.rows, self.outputs)

    def expected(self, tensors, dy, dtype=None):
        leaves = {
            k: None if t is None else t.to(dtype or t.dtype, copy=True).requires_grad_()
            for k, t in tensors.items()
        }
        draw = {**self.draw(), "hard": self.hard, "bias_tensor_id": 4}
        draw["estimator"] = estimators.resolve(draw.get("estimator", "gumbel_sigmoid"))
        y = reference.masked_linear(**leaves, **draw)
        named = {k: t for k, t in leaves.items() if t is not None}
        gradients = torch.autograd.grad(y, list(named.values()), dy.to(y.dtype))
        return {"y": y.detach()} | {f"d{k}": g for k, g in zip(named, gradients, strict=True)}

    def run(self, simt, tensors, dy, order=0):
        t, draw = tensors, self.draw()
        arguments = {
            **mask_arguments(t["logits"], **draw),
            "dtype": str(self.dtype).removeprefix("torch."),
            "rows": self.rows,
            "in": self.inputs,
            "out": self.outputs,
            "hard": self.hard,
            "bias_tensor_id": 4,
            "dy": bytes_of(dy),
            **{name: bytes_of(value) for name, value in t.items()},
        }
        if self.bias and arguments["cuts"] is not None:
            arguments["bias_cuts"] = top_k_cuts(t["bias_logits"], draw["estimator"])
        results = {"y": torch.full_like(dy, 9.0), "dx": torch.full_like(t["x"], 9.0)}
        results["dlogits"] = torch.full_like(t["logits"], 9.0)
        results["dweight"] = torch.full_like(t["weight"], 9.0)
        if self.bias:
            results["dbias"] = torch.full_like(t["bias"], 9.0)
            results["dbias_logits"] = torch.full_like(t["bias_logits"], 9.0)
        arguments |= {name: bytes_of(value) for name, value in results.items()}
        self.device = simt.Device(order)
        chosen = estimators.resolve(draw.get("estimator", "gumbel_sigmoid"))
        plain = arguments["seeds"] is not None and chosen.name == "gumbel_sigmoid"
        # as the launchers: hard masks are drawn in the product where that is simple
        if self.packed or arguments["among"] or (self.hard and not plain):
            count = self.outputs * self.inputs
            bytes_ = -(-count // 8)
            bits = np.zeros((arguments["samples"], self.sets, bytes_), np.uint8)
            self.device.run("sample_bits", **arguments, bits=bits, count=count)
            arguments |= {"bits": bits, "set_stride": bytes_, "sample_stride": self.sets * bytes_}
        self.device.run("masked_linear", **arguments)
        self.device.run("masked_linear_dx", **arguments)
        self.device.run("masked_linear_gradients", **arguments | {"dweight": None})
        if not self.logits_only:
            self.device.run("masked_linear_gradients", **arguments)
        if self.bias:
            sums = dy.view(-1, self.rows, self.outputs).sum(1, dtype=torch.float32)
            self.device.run("bias_gradients", **arguments, sums=bytes_of(sums))
        if self.logits_only:
            del results["dweight"]
        return results

    def check(self, simt):
        tensors, dy = self.tensors()
        ours = self.run(simt, tensors, dy)
        plain = self.expected(tensors, dy)
        exact = self.expected(tensors, dy, torch.float64)
        check_close([(name, ours[name], plain[name], exact[name]) for name in ours])


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 16, 19])
def test_rows(simt, rows):
    Case(rows=rows).check(simt)


@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 1), (1, 200), (33, 3), (32, 128), (70, 260), (3, 1030), (300, 9)]
)
def test_shapes(simt, outputs, inputs):
    Case(rows=3, outputs=outputs, inputs=inputs).check(simt)


@pytest.mark.parametrize(("sets", "samples"), [(1, 1), (1, 3), (3, 1), (1, 9), (2, 4)])
@pytest.mark.parametrize("rows", [1, 6])
def test_sets_and_samples(simt, sets, samples, rows):
    Case(rows=rows, sets=sets, samples=samples, outputs=40, inputs=132).check(simt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_dtypes(simt, dtype, rows, packed):
    case = Case(rows=rows, dtype=dtype, packed=packed, outputs=45, inputs=140, bias=not packed)
    case.check(simt)


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("tau", [0.5, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_soft_masks(simt, rows, tau, seed):
    Case(rows=rows, hard=False, tau=tau, seed=seed, samples=3).check(simt)


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "hard_concrete"},
        {"estimator": "sigmoid"},
        {"estimator": estimators.threshold(0.3)},
        {"estimator": estimators.top_k(0.4)},
        {"antithetic": True, "sample_offset": 5},
        {"element_offset": 3},
        {"element_offset": 2**34 - 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", ["each", "none"])
def test_estimators_and_offsets(simt, options, seed):
    Case(seed=seed, inputs=132, options=options).check(simt)


@pytest.mark.parametrize("inputs", [8, 136])
@pytest.mark.parametrize("n_of_m", [(2, 4), (1, 2), (3, 8)], ids=str)
@pytest.mark.parametrize("seed", ["each", "none"])
def test_n_of_m(simt, inputs, n_of_m, seed):
    Case(inputs=inputs, bias=False, seed=seed, options={"n_of_m": n_of_m}).check(simt)


@pytest.mark.parametrize("packed", [False, True])
def test_many_splits_in_any_order(simt, packed):
    case = Case(rows=2, outputs=5, inputs=1100, sets=1, packed=packed)
    for cut in (case, replace(case, outputs=290, inputs=6)):
        tensors, dy = cut.tensors()
        first, second = (cut.run(simt, tensors, dy, order) for order in (1, 2))
        for name in first:
            assert torch.equal(first[name], second[name]), name
        cut.check(simt)


@pytest.mark.parametrize("samples", [1, 4, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_a_training_step_moves_seven_words_per_weight(simt, packed, samples):
    """At most, whatever the samples, as different sectors of 32 bytes; none is read again."""
    case = Case(4, 256, 64, 1, samples, bias=False, packed=packed, logits_only=True)
    case.run(simt, *case.tensors())
    traffic = case.device.traffic()
    weights = 64 * 256
    per_weight = {
        name: (t["read_sectors"] + t["written_sectors"]) * 8 / weights
        for name, t in traffic.items()
    }
    of_bits = 3 * samples / 32 if packed else 0.0  # written once, read twice
    assert per_weight["weight"] == 3  # y, dx, dlogits
    assert per_weight["logits"] == (2 if packed else 3)
    assert per_weight["dlogits"] == 1
    assert per_weight.get("bits", 0.0) == pytest.approx(of_bits, rel=0.1)
    assert sum(per_weight[n] for n in ("weight", "logits", "dlogits")) + of_bits <= 7
    for name in ("weight", "logits"):
        assert traffic[name]["read_bytes"] == traffic[name]["read_sectors"] * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked_bias", [False, True])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 5, 7), (11, 40, 131), (9, 33, 256)])
def test_selected_masks(simt, dtype, masked_bias, rows, outputs, inputs):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(rows, inputs, generator=g).to(dtype)
    weight = (torch.randn(outputs, inputs, generator=g) / math.sqrt(inputs)).to(dtype)
    bias = torch.randn(outputs, generator=g).to(dtype)
    masks = [torch.rand(outputs, inputs, generator=g) < 0.6 for _ in range(3)]
    bits = torch.stack([ops.pack_bits(m) for m in masks])
    bias_bits = torch.stack([ops.pack_bits(m[:, 0]) for m in masks]) if masked_bias else None
    row_sets = torch.randint(0, 3, (rows,), generator=g)
    y = torch.full((rows, outputs), 9.0, dtype=dtype)
    simt.Device().run(
        "masked_linear",
        **mask_arguments(torch.zeros(1, 1), torch.tensor(0), samples=rows),
        **{name: bytes_of(t) for name, t in (("x", x), ("weight", weight), ("bias", bias))},
        **{"dtype": str(dtype).removeprefix("torch."), "rows": 1, "in": inputs, "out": outputs},
        y=bytes_of(y),
        bits=bits.numpy(),
        bias_bits=bytes_of(bias_bits),
        row_sets=row_sets.numpy(),
    )
    arguments = (bits, row_sets)
    plain = select_reference.select_linear(x, weight, *arguments, bias, bias_bits)
    exact = select_reference.select_linear(
        x.double(), weight.double(), *arguments, bias.double(), bias_bits
    )
    check_close([("y", y, plain, exact)])
