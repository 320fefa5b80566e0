"""What masked convolutions take on GPUs: those of ResNet-18, predicted as `roofline` does.

`python -m modmask_kernels.bench.roofline_conv` writes roofline_conv.json and a page to
docs/results/gpu. Nothing is measured. Patches of images are gathered by instructions, so all of a
kernel's are counted, from the machine code of that very convolution: of the loop that multiplies,
of the loop over samples and of what is outside, as often as tiles and steps run.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from ..files import read_json, write_json, write_text
from ..ops import _gpu
from ..ops._triton import Config
from ..ops.masked_conv.triton import Geometry, gradients_config, product_config, splits
from ..report.page import Table
from . import aot, instructions
from .roofline import COMPILED, FOLDER, NAIVE, Work

IMAGES, SAMPLES = 256, 4
SIZE = 2  # bytes of a bfloat16
ARCHITECTURES = {"A100": 80, "H100": 90, "H200": 90, "B200": 100}
KERNELS = ("conv_forward", "conv_dx", "conv_gradients")
# registers, bytes of shared memory and threads that a processor has
REGISTERS, SHARED, THREADS = 65536, {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}, 2048


class Convolution(NamedTuple):
    """One of ResNet-18, `times`: how many are alike; `size`: height and width of an image."""

    name: str
    channels: int
    outputs: int
    size: int
    taps: int
    stride: int
    times: int = 1

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.outputs * self.channels * self.taps * self.taps

    @property
    def out_size(self) -> int:
        """Height and width of an image of y."""
        return (self.size + 2 * (self.taps // 2) - self.taps) // self.stride + 1

    def geometry(self, images: int) -> Geometry:
        """As the kernels have it."""
        return Geometry(
            images,
            1,
            self.channels,
            self.outputs,
            (self.size, self.size),
            (self.out_size, self.out_size),
            (self.taps, self.taps),
            (self.stride, self.stride),
            (self.taps // 2,) * 4,
            (1, 1),
        )

    def options(self, kernel: str) -> dict[str, Any]:
        """Of `aot.convolution_of`."""
        packs = kernel == "conv_gradients" and self.packs
        shape = {name: getattr(self, name) for name in ("channels", "outputs", "size", "taps")}
        return {**shape, "stride": self.stride, "packs": packs}

    @property
    def first(self) -> bool:
        """Whether x is data, which needs no gradient."""
        return self.channels == 3

    @property
    def gradients_config(self) -> Config:
        """The tiles of dlogits."""
        quads = self.weights // self.outputs % 4 == 0
        return gradients_config(torch.bfloat16, self.outputs, simple=quads)

    @property
    def packs(self) -> bool:
        """Whether dlogits packs the masks of dx."""
        return self.weights // self.outputs % 32 == 0 and not self.first


RESNET18 = (
    Convolution("conv1", 3, 64, 224, 7, 2),
    Convolution("layer1", 64, 64, 56, 3, 1, 4),
    Convolution("layer2, first", 64, 128, 56, 3, 2),
    Convolution("layer2, shortcut", 64, 128, 56, 1, 2),
    Convolution("layer2", 128, 128, 28, 3, 1, 3),
    Convolution("layer3, first", 128, 256, 28, 3, 2),
    Convolution("layer3, shortcut", 128, 256, 28, 1, 2),
    Convolution("layer3", 256, 256, 14, 3, 1, 3),
    Convolution("layer4, first", 256, 512, 14, 3, 2),
    Convolution("layer4, shortcut", 256, 512, 14, 1, 2),
    Convolution("layer4", 512, 512, 7, 3, 1, 3),
)


class Code(NamedTuple):
    """Slots of instructions of a program: of a step of the product, of a sample beside that
    (gradients only), and beside both; and how many programs a processor holds."""

    step: float
    sample: float
    once: float
    resident: int


def measure(convolution: Convolution, kernel: str, capability: int) -> Code:
    """From the compiled kernel."""
    launch = aot.convolution_of(kernel, torch.bfloat16, **convolution.options(kernel))
    found = aot.compile_launch(launch, capability)
    loops = [found.instructions(), *found.loops()]
    products = [counts for counts in loops if any("MMA" in name for name in counts)]
    inner = products[-1]
    outer = products[1] if kernel == "conv_gradients" and len(products) > 2 else inner
    slots = [instructions.slots(counts) * found.threads for counts in (loops[0], outer, inner)]
    resident = min(
        REGISTERS // (found.registers * found.threads),
        SHARED[capability] // (found.shared + 1024),
        THREADS // found.threads,
    )
    return Code(slots[2], slots[1] - slots[2], slots[0] - slots[1], resident)


def measure_all() -> dict[str, Any]:
    """`measure` of every convolution, kernel and architecture."""
    codes = {
        str(capability): {
            convolution.name: {
                kernel: measure(convolution, kernel, capability)._asdict()
                for kernel in KERNELS
                if not (convolution.first and kernel == "conv_dx")
            }
            for convolution in RESNET18
        }
        for capability in sorted(set(ARCHITECTURES.values()))
    }
    return {"triton": triton.__version__, "codes": codes}


def _code(counted: Mapping[str, float]) -> Code:
    return Code(counted["step"], counted["sample"], counted["once"], int(counted["resident"]))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def plain_step(c: Convolution, images: int = IMAGES) -> list[Work]:
    """Forward and backward of `torch.nn.Conv2d` with a trainable weight."""
    pixels = images * c.out_size**2
    operations = 2.0 * pixels * c.weights
    traffic = SIZE * (images * c.channels * c.size**2 + pixels * c.outputs + c.weights)
    names = ("forward", "dweight") if c.first else ("forward", "dx", "dweight")
    return [Work(name, float(traffic), operations) for name in names]


def masked_step(
    c: Convolution,
    codes: Mapping[str, Mapping[str, float]],
    masks: Mapping[str, Mapping[str, float]],
    images: int = IMAGES,
    samples: int = SAMPLES,
) -> list[Work]:
    """Forward and backward of the masked convolution, masks packed, as the kernels do it.

    Args:
        codes: of `measure_all`, by kernel. masks: of `bench.instructions`.
    """
    geometry = c.geometry(images // samples)
    bits = samples * c.weights / 8
    traffic = plain_step(c, images)[0].bytes
    draw = Work(
        "masks",
        4 * c.weights + bits,
        0.0,
        (masks["pack"]["slots"] * samples + masks["pack_once"]["slots"]) * c.weights,
    )

    def product(kernel: str, rows: int, depth: int, size: tuple[int, int]) -> Work:
        tile = product_config(torch.bfloat16, rows, backward=kernel == "conv_dx")
        code = _code(codes[kernel])
        stacks, of_stack = geometry.stacked(size, tile.n)
        programs = samples * stacks * _ceil(of_stack * size[0] * size[1], tile.n)
        programs *= _ceil(rows, tile.m)
        steps = programs * _ceil(depth, tile.k)
        operations = 2.0 * steps * tile.m * tile.n * tile.k
        slots = steps * code.step + programs * code.once
        return Work(kernel[5:], traffic + bits, operations, slots, code.resident)

    taps = c.taps**2
    works = [draw._replace(name="masks of forward")]
    works.append(product("conv_forward", c.outputs, c.channels * taps, geometry.out_size))
    tile, code = c.gradients_config, _code(codes["conv_gradients"])
    tiles = _ceil(c.outputs, tile.m) * _ceil(geometry.depth, tile.n)
    stacks, of_stack = geometry.stacked(geometry.out_size, tile.k)
    blocks = stacks * _ceil(of_stack * geometry.out_area, tile.k)
    parts = splits(tiles, samples, blocks)
    steps = tiles * samples * blocks
    each = tiles * samples * _ceil(parts, samples)
    works.append(
        Work(
            "dlogits",
            traffic + 4 * c.weights * (1 + parts) + (bits if c.packs else 0.0),
            2.0 * steps * tile.m * tile.n * tile.k,
            steps * code.step + each * code.sample + tiles * parts * code.once,
            code.resident,
        )
    )
    if parts > 1:
        works.append(Work("sum of dlogits", 4.0 * c.weights * (parts + 1)))
    if not c.first:
        if not c.packs:
            works.append(draw._replace(name="masks of dx"))
        works.append(product("conv_dx", c.channels, c.outputs * taps, geometry.size))
    return works


def seconds_of(work: Work, device: _gpu.Device) -> float:
    """Seconds predicted, as the chooser does."""
    matrix = work.operations / device.products(SIZE, tf32=True)
    busy = _gpu.arithmetic(work.instructions / device.lanes, matrix, work.resident)
    return max(work.bytes / device.bandwidth, busy) / _gpu.SHARE + _gpu.LAUNCH


def words_per_weight(c: Convolution, samples: int, size: int = SIZE) -> dict[str, float]:
    """Weight-sized traffic of a training step, in words of 4 bytes per weight.

    `unique`: what every launch touches at least once, parts of dlogits left out; `parts`: those,
    written and read where several programs share a tile, in the cache for they take no more than
    two tiles per program of a full device; `read_again`: how often forward reads a weight.
    """
    bits = samples / 32
    weight = size / 4
    unique = (1 + bits) + (weight + bits) + (1 + weight + 1)
    if not c.first:
        unique += (bits if c.packs else 1 + bits) + (weight + bits)
    geometry = c.geometry(IMAGES // samples)
    tile = product_config(torch.bfloat16, c.outputs)
    stacks, of_stack = geometry.stacked(geometry.out_size, tile.n)
    again = samples * stacks * _ceil(of_stack * geometry.out_area, tile.n)
    config = c.gradients_config
    tiles = _ceil(c.outputs, config.m) * _ceil(geometry.depth, config.n)
    blocks = stacks * _ceil(of_stack * geometry.out_area, config.k)
    parts = splits(tiles, samples, blocks)
    return {
        "unique": unique,
        "parts": 0.0 if parts == 1 else 2.0 * parts,
        "read_again": float(again),
        "naive": NAIVE[0] + NAIVE[1] * samples,
        "compiled": COMPILED[0] + COMPILED[1] * samples,
    }


def row_of(
    c: Convolution,
    device: _gpu.Device,
    measured: Mapping[str, Any],
    masks: Mapping[str, Any],
) -> dict[str, Any]:
    """All that is predicted of a convolution on a device."""
    architecture = str(ARCHITECTURES[device.name])
    masked = masked_step(c, measured["codes"][architecture][c.name], masks[architecture])
    plain = plain_step(c)
    seconds = {
        name: sum(seconds_of(work, device) for work in step)
        for name, step in (("masked", masked), ("plain", plain))
    }
    moved = 4.0 * (NAIVE[0] + NAIVE[1] * SAMPLES) * c.weights / device.bandwidth / _gpu.SHARE
    return {
        "device": device.name,
        **c._asdict(),
        "weights": c.weights,
        "seconds": {**seconds, "naive": seconds["plain"] + moved},
        "words_per_weight": words_per_weight(c, SAMPLES),
        "kernels": {
            work.name: {**work._asdict(), "seconds": seconds_of(work, device)} for work in masked
        },
    }


def predict_all(measured: Mapping[str, Any], masks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of all convolutions on all devices; `masks`: instructions.json."""
    return [row_of(c, device, measured, masks) for device in _gpu.DEVICES for c in RESNET18]


def _ratio(rows: Sequence[Mapping[str, Any]], name: str = "masked") -> float:
    total: dict[str, float] = {
        n: sum(r["times"] * r["seconds"][n] for r in rows) for n in (name, "plain")
    }
    return total[name] / total["plain"]


def tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Of the ratios on all devices, and of what the kernels take on one."""
    devices = [device.name for device in _gpu.DEVICES]
    of = {name: [row for row in rows if row["device"] == name] for name in devices}
    ratios = [
        [f"{c.name} ({c.times})", f"{c.weights}"]
        + [f"{_ratio([of[name][i]]):.2f}" for name in devices]
        + [f"{_ratio([of['H100'][i]], 'naive'):.2f}"]
        for i, c in enumerate(RESNET18)
    ]
    total = sum(c.times * c.weights for c in RESNET18)
    ratios.append(["all", f"{total}", *(f"{_ratio(of[name]):.2f}" for name in devices)])
    ratios[-1].append(f"{_ratio(of['H100'], 'naive'):.2f}")
    kernels = []
    for row in of["H100"]:
        us = {name: f"{1e6 * work['seconds']:.0f}" for name, work in row["kernels"].items()}
        drawn = sum(
            work["seconds"] for name, work in row["kernels"].items() if name.startswith("masks")
        )
        words = row["words_per_weight"]
        kernels.append(
            [
                row["name"],
                f"{1e6 * row['seconds']['plain']:.0f}",
                f"{1e6 * row['seconds']['masked']:.0f}",
                f"{1e6 * drawn:.0f}",
                *(us.get(name, "-") for name in ("forward", "dx", "dlogits", "sum of dlogits")),
                f"{words['unique']:.1f}",
                f"{words['parts']:.0f}",
                f"{words['naive']:.0f}",
                f"{words['read_again']:.0f}",
            ]
        )
    settings = (
        f"{IMAGES} images of 224x224 pixels, {SAMPLES} samples, bfloat16, forward and backward"
    )
    return [
        Table(
            caption=f"Predicted: masked / plain, the convolutions of ResNet-18, {settings}",
            header=["convolution (how many)", "weights", *devices, "naive, H100"],
            rows=ratios,
            note="Masks packed before. The plain convolution is given "
            f"{_gpu.SHARE:.0%} of the ceilings too, with no instruction of its own counted. "
            "conv1 needs no gradient of its x. Naive: the plain convolution and the weight-sized "
            "traffic of masks as tensors, its launches left out.",
        ),
        Table(
            caption="Predicted: microseconds of the kernels on H100",
            header=[
                *("convolution", "plain", "masked", "masks", "forward", "dx", "dlogits", "sums"),
                *("words per weight", "and parts", "naive", "read again"),
            ],
            rows=kernels,
            note="Words: weight-sized traffic of a step in 4 bytes per weight, each launch reading "
            "the weight once; parts: those of dlogits where programs share a tile of few weights, "
            "written and read again, within the cache; read again: tiles of pixels that read the "
            "weight in forward, from the cache where it fits.",
        ),
    ]


def page(rows: Sequence[Mapping[str, Any]], version: str) -> str:
    """Everything as Markdown."""
    from ..report.summary import markdown_table

    parts = [
        "# Masked convolutions on GPUs, predicted",
        "A prediction, not a measurement, by the model of [linear layers](roofline.md). Here every "
        "instruction of a kernel counts, those that gather patches as those that mask, from its "
        f"machine code (Triton {version}). They are what the kernels wait for: with images this "
        "large beside the weight they are predicted to be slower than masks as tensors, whose "
        "convolutions are cuDNN's. dx with a stride also multiplies by the zeros between.",
        "```\npython -m modmask_kernels.bench.roofline_conv\n```",
        *(markdown_table(table).rstrip("\n") for table in tables(rows)),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the prediction; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m modmask_kernels.bench.roofline_conv",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help=f"[{FOLDER}]")
    arguments = parser.parse_args(argv)
    masks = read_json(FOLDER / "instructions.json")
    measured = measure_all()
    rows = predict_all(measured, masks)
    write_json(arguments.out / "roofline_conv.json", {**measured, "rows": rows})
    write_text(arguments.out / "roofline_conv.md", page(rows, measured["triton"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
