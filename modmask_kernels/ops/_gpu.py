"""GPU kernels: whether they can run, what a device does per second, where masks come from.

A masked product on a GPU takes its masks from packed bits, drawn beforehand by a kernel of its own,
or draws them anew in every tile of the product. `choose` decides by the time that a model predicts
from counted bytes, operations and instructions and from the ceilings of the device.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import _native

# asked without importing it, which takes longer than all of this package
TRITON_ERROR: str | None = (
    None if importlib.util.find_spec("triton") is not None else "Triton is not installed"
)
"""Why the Triton kernels are absent, or None."""
if _native.FORCED_BACKEND == "triton" and TRITON_ERROR is not None:
    _native.refuse(RuntimeError(f"MODMASK_BACKEND=triton, but {TRITON_ERROR}"))

SOURCES = ("bits", "regenerate")


def _forced_by_environment() -> tuple[str | None, bool]:
    value = os.environ.get("MODMASK_GPU_MASKS", "")
    choices = (*SOURCES, "repack")
    if value and value not in choices:
        expected = ", ".join(choices)
        _native.refuse(ValueError(f"MODMASK_GPU_MASKS must be one of {expected}, not {value!r}"))
    source = "bits" if value == "repack" else value or None
    return source, value in ("", "bits")


FORCED_SOURCE, SAVES = _forced_by_environment()
"""Where MODMASK_GPU_MASKS wants masks to come from, or None; whether the packed masks of a forward
pass may be kept for the backward, not "repack"."""


def absent() -> str | None:
    """Why no Triton kernel runs in this process, or None."""
    if _native.FORCED_BACKEND not in (None, "triton"):
        return f"MODMASK_BACKEND={_native.FORCED_BACKEND}"
    return TRITON_ERROR


class Device(NamedTuple):
    """Ceilings of a device, from its maker's data sheet.

    Attributes:
        bandwidth: of device memory, bytes per second.
        lanes: instructions of single lanes per second: processors * 128 * clock.
        dense: products of matrices without sparsity, operations per second, of two-byte numbers,
            TF32 and float32.
        resident: programs of a two-byte product with packed masks that a processor holds at once,
            by their registers and shared memory.
    """

    name: str
    bandwidth: float
    lanes: float
    dense: tuple[float, float, float]
    resident: int = 1

    def products(self, element_size: int, tf32: bool) -> float:
        """Operations per second of a product in a dtype."""
        return self.dense[0 if element_size == 2 else 1 if tf32 else 2]


DEVICES = (
    Device("A100", 2.039e12, 108 * 128 * 1.41e9, (312e12, 156e12, 19.5e12)),
    Device("H100", 3.35e12, 132 * 128 * 1.83e9, (989e12, 494e12, 67e12), 2),
    Device("H200", 4.8e12, 132 * 128 * 1.83e9, (989e12, 494e12, 67e12), 2),
    Device("B200", 8.0e12, 148 * 128 * 1.85e9, (2250e12, 1125e12, 75e12), 2),
)


@functools.lru_cache
def device_of(index: int) -> Device:
    """The description of a CUDA device; one that is not listed is taken for an A100 by its size."""
    properties = torch.cuda.get_device_properties(index)
    for device in DEVICES:
        if device.name in properties.name:
            return device
    like = DEVICES[0]
    share = properties.multi_processor_count / 108
    return Device(
        properties.name,
        like.bandwidth * share,
        like.lanes * share,
        (like.dense[0] * share, like.dense[1] * share, like.dense[2] * share),
    )


# Slots per weight and tile beyond those of a plain product; where packed per weight and mask, and
# per weight: docs/results/gpu/instructions.json, sm_90, rounded up.
UNPACK = 3.0
REGENERATE = 37.0
PACK = 11.0
PACK_ONCE = 24.0
LAUNCH = 3e-6  # seconds, of one more kernel
SHARE = 0.7  # of the ceilings that kernels reach


class Product(NamedTuple):
    """Sizes of a masked product, forward or of the gradient of x.

    `tile`: rows of x that share the tile of a masked weight.
    """

    sets: int
    per_set: int
    rows: int
    outputs: int
    inputs: int
    element_size: int
    tile: int = 128
    tf32: bool = False
    hard: bool = True
    quads: bool = True


class Choice(NamedTuple):
    """Where masks come from, why, and the seconds predicted for either source."""

    source: str
    reason: str
    seconds: dict[str, float]


def arithmetic(instructions: float, matrix: float, resident: int) -> float:
    """Seconds of a kernel whose programs take turns between instructions and matrix units.

    Alone on a processor a program uses one of them at a time. Of several at once another one uses
    what this one does not; of the shorter of both times, one part in `resident` remains exposed.
    """
    return max(instructions, matrix) + min(instructions, matrix) / resident


def predict(p: Product, device: Device) -> dict[str, float]:
    """Seconds of a masked product by the source of its masks, drawing included.

    Memory and arithmetic overlap, the larger counts. The instructions that make the operand of a
    matrix unit come before it, see `arithmetic`. Every row tile of a group makes its operand anew.
    """
    weights = p.outputs * p.inputs
    groups = p.sets * p.per_set
    tiles = groups * math.ceil(p.rows / p.tile)
    rate = device.products(p.element_size, p.tf32)
    operations = 2 * tiles * p.tile * weights / rate
    rows = groups * p.rows * (p.inputs + p.outputs)
    elements = (weights + rows) * p.element_size
    bits = groups * weights / 8
    logits = 4 * p.sets * weights
    noise = REGENERATE if p.quads else 1.5 * REGENERATE

    resident = device.resident if p.element_size == 2 else 1

    def seconds(traffic: float, slots: float, matrix: float, resident: int = 1) -> float:
        busy = arithmetic(slots / device.lanes, matrix, resident)
        return max(traffic / device.bandwidth, busy) / SHARE + LAUNCH

    pack = seconds(logits + bits, (PACK * groups + PACK_ONCE * p.sets) * weights, 0.0)
    return {
        "bits": pack + seconds(elements + bits, UNPACK * tiles * weights, operations, resident),
        "regenerate": seconds(elements + logits, noise * tiles * weights, operations),
    }


def choose(p: Product, device: Device, forced: str | None = FORCED_SOURCE) -> Choice:
    """Where the masks of a product come from: a pure function of sizes and device."""
    seconds = predict(p, device)
    if not p.hard:
        return Choice("regenerate", "soft masks have no bits", seconds)
    if forced is not None:
        return Choice(forced, f"MODMASK_GPU_MASKS={forced}", seconds)
    source = min(SOURCES, key=seconds.__getitem__)
    times = ", ".join(f"{name} {1e6 * seconds[name]:.0f} us" for name in SOURCES)
    return Choice(source, f"predicted for {device.name}: {times}", seconds)


def crossover(of_rows: Callable[[int], Product], device: Device) -> int:
    """The most rows of a group, a power of two, that have masks regenerated; 0 if none have.

    `of_rows`: the product by the rows of its groups.
    """
    most = 0
    for rows in (2**i for i in range(15)):
        if choose(of_rows(rows), device, None).source != "regenerate":
            break
        most = rows
    return most


# The kernel for few rows, in CUDA C++: instructions of a lane per weight that a block reads, per
# mask of it that is drawn or unpacked, per job of up to 1, 4 or 8 rows, and per row. By hand from
# csrc/cuda/masked_linear.cuh, whose inner loops are short; a figure measured would be better.
FEW_WEIGHT = 40.0
FEW_DRAW = 25.0
FEW_UNPACK = 12.0
FEW_JOB = 5.0
FEW_ROW = 1.3
FEW_JOBS = 8  # of a block, which reads the weight and its logits once for all of them
KINDS = ("cuda", "triton")


def predict_few_rows(p: Product, device: Device) -> dict[str, float]:
    """Seconds of a product by the kernel for few rows, drawing included, as `predict` has them."""
    weights = p.outputs * p.inputs
    groups = p.sets * p.per_set
    height = 1 if p.rows <= 1 else 4 if p.rows <= 4 else 8
    jobs = math.ceil(p.rows / height)
    reads = p.sets * math.ceil(p.per_set * jobs / FEW_JOBS)
    tiles = max(groups, reads)  # of masks
    products = groups * jobs * weights * (FEW_JOB + height * FEW_ROW)
    operands = reads * weights * p.element_size + groups * p.rows * (p.inputs + p.outputs) * (
        p.element_size + 4
    )
    bits, logits = groups * weights / 8, 4 * p.sets * weights

    def seconds(traffic: float, instructions: float) -> float:
        return max(traffic / device.bandwidth, instructions / device.lanes) / SHARE + LAUNCH

    of_reads = reads * weights * FEW_WEIGHT + products
    pack = seconds(logits + bits, (PACK * groups + PACK_ONCE * p.sets) * weights)
    unpacked = of_reads + tiles * weights * FEW_UNPACK
    drawn = of_reads + tiles * weights * FEW_DRAW
    # one launch more adds the parts up
    return {
        "bits": pack + LAUNCH + seconds(operands + bits, unpacked),
        "regenerate": LAUNCH + seconds(operands + 4 * reads * weights, drawn),
    }


class Way(NamedTuple):
    """How a product is computed: by which kernels, `cuda` or `triton`, with masks from where."""

    kind: str
    source: str
    reason: str
    seconds: dict[tuple[str, str], float]


def choose_way(
    p: Product,
    device: Device,
    kinds: tuple[str, ...],
    sources: tuple[str, ...] = SOURCES,
    forced: str | None = FORCED_SOURCE,
) -> Way:
    """The quickest of the kinds of kernels and sources of masks: a function of sizes and device.

    Args:
        kinds: of `KINDS`, those that serve.
        sources: of `SOURCES`, those that the masks allow.
        forced: a source that is taken where the masks allow it.
    """
    if forced in sources:
        sources = (forced,)
    predicted = {"cuda": predict_few_rows, "triton": predict}
    seconds = {
        (kind, source): predicted[kind](p, device)[source] for kind in kinds for source in sources
    }
    kind, source = min(seconds, key=seconds.__getitem__)
    if len(kinds) == 1:
        reason = f"the only kernels here, for {device.name}"
    else:
        times = ", ".join(f"{k} {s} {1e6 * t:.0f} us" for (k, s), t in seconds.items())
        reason = f"predicted for {device.name}: {times}"
    return Way(kind, source, reason, seconds)
