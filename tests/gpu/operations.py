"""One call of every operation, for comparisons between devices, dtypes and backends."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modmask_kernels import _native, ops
from modmask_kernels.ops import _gpu

SETS, SAMPLES = 2, 2
GROUPS = SETS * SAMPLES


class Case(NamedTuple):
    """`call(tensors, options)` gives the outputs; tensors are float64 on the CPU here."""

    call: Callable[[dict[str, Tensor], dict[str, Any]], tuple[Tensor, ...]]
    tensors: dict[str, Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(shape, generator=generator).double()


def product(operation: Callable[..., Tensor], x: Tensor, weight: Tensor, **more: Any) -> Case:
    inputs_first = "transpose" in operation.__name__ or operation is ops.masked_matmul
    outputs = weight.shape[1] * more.get("groups", 1) if inputs_first else weight.shape[0]
    tensors = {
        "x": x,
        "weight": weight,
        "logits": random(SETS, *weight.shape, seed=1),
        "bias": random(outputs, seed=2),
        "bias_logits": random(SETS, outputs, seed=3),
    }
    return Case(lambda t, options: (operation(*t.values(), **options, **more),), tensors)


def recurrent(
    operation: Callable[..., Any], gates: int, hidden: int, inputs: int, batch: int = 3 * GROUPS
) -> Case:
    tensors = {"x": random(5, batch, inputs)}
    for name, columns in (("weight_ih", inputs), ("weight_hh", hidden)):
        tensors[name] = random(gates * hidden, columns) / hidden**0.5
    for name, columns in (("logits_ih", inputs), ("logits_hh", hidden)):
        tensors[name] = random(SETS, gates * hidden, columns, seed=1)
    tensors["bias_ih"], tensors["bias_hh"] = random(gates * hidden), random(gates * hidden, seed=1)

    def call(t: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
        y, states = operation(*t.values(), **options)
        return (y, *states) if isinstance(states, tuple) else (y, states)

    return Case(call, tensors)


CASES = {
    "linear": product(ops.masked_linear, random(3 * GROUPS, 37), random(29, 37)),
    "linear-even": product(ops.masked_linear, random(64 * GROUPS, 128), random(64, 128)),
    "linear-one-row": product(ops.masked_linear, random(GROUPS, 260), random(130, 260)),
    "matmul": product(ops.masked_matmul, random(3 * GROUPS, 37), random(37, 29)),
    "matmul-even": product(ops.masked_matmul, random(64 * GROUPS, 128), random(128, 64)),
    "conv1d": product(ops.masked_conv1d, random(GROUPS, 3, 11), random(5, 3, 3), padding=1),
    "conv1d-groups": product(
        ops.masked_conv1d, random(GROUPS, 6, 11), random(9, 2, 3), **{"groups": 3, "padding": 1}
    ),
    "conv2d": product(ops.masked_conv2d, random(GROUPS, 3, 9, 8), random(5, 3, 3, 3), stride=2),
    "conv2d-groups": product(
        ops.masked_conv2d,
        random(2 * GROUPS, 8, 9, 8),
        random(8, 4, 3, 2),
        **{"groups": 2, "stride": (1, 2), "dilation": (2, 1), "padding": (2, 1)},
    ),
    "conv2d-depthwise": product(
        ops.masked_conv2d, random(2 * GROUPS, 8, 9, 8), random(8, 1, 3, 3), groups=8, padding=1
    ),
    "conv2d-tiles": product(
        ops.masked_conv2d, random(2 * GROUPS, 24, 16, 8), random(136, 24, 3, 3), padding=1
    ),
    "conv2d-1x1": product(ops.masked_conv2d, random(2 * GROUPS, 32, 8, 8), random(72, 32, 1, 1)),
    "transposed2d-groups": product(
        ops.masked_conv_transpose2d,
        random(GROUPS, 8, 5, 4),
        random(8, 4, 3, 3),
        **{"groups": 2, "stride": 2, "padding": 1, "output_padding": 1},
    ),
    "transposed1d": product(ops.masked_conv_transpose1d, random(GROUPS, 3, 7), random(3, 4, 3)),
    "transposed2d": product(
        ops.masked_conv_transpose2d, random(GROUPS, 3, 5, 4), random(3, 4, 3, 3)
    ),
    "lstm": recurrent(ops.masked_lstm, 4, 18, 7),
    "gru": recurrent(ops.masked_gru, 3, 18, 7),
}


@contextlib.contextmanager
def by_reference() -> Iterator[None]:
    """Plain PyTorch on the same device, whatever kernels there are."""
    before = _native.FORCED_BACKEND
    _native.FORCED_BACKEND = "reference"
    try:
        yield
    finally:
        _native.FORCED_BACKEND = before


def moved(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Leaves on a device; logits keep at least float32."""
    logits = torch.promote_types(dtype, torch.float32)
    return {
        name: t.to(device, logits if "logits" in name else dtype).requires_grad_()
        for name, t in case.tensors.items()
    }


def exact(case: Case, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients in float64 on the CPU, of these very values."""
    return results(
        case,
        {n: t.detach().cpu().double().requires_grad_(t.requires_grad) for n, t in tensors.items()},
        **options,
    )


@functools.lru_cache
def upstream_of(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The gradient from above, the same number in every dtype.

    Kept, since a graph that is recorded takes nothing from the host.
    """
    return ((16 * random(*shape, seed=9)).round() / 16).to(device, dtype)


def results(case: Case, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs, and gradients of all tensors that require one, by name."""
    device = tensors["x"].device
    seed = torch.arange(SETS, device=device) + 5
    outputs = case.call(tensors, {"seed": seed, "samples": SAMPLES, **options})
    upstream = [upstream_of(y.shape, device, y.dtype) for y in outputs]
    leaves = {n: t for n, t in tensors.items() if t.requires_grad}
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"d{n}": d for n, d in zip(leaves, gradients, strict=True)}


# All that adds up in these is this library's, in a fixed order: no kernel adds floats atomically.
# Convolutions are Triton's; without it they are cuDNN's.
EXACT = [n for n in CASES if _gpu.absent() is None or not n.startswith(("conv", "transposed"))]


def assert_same(name: str, found: dict, expected: dict) -> None:
    """Equal bits where no kernel of a library, with an order of its own, adds up."""
    for key in expected:
        if name in EXACT or found[key].device.type == "cpu":
            assert torch.equal(found[key], expected[key]), key
        else:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4)
