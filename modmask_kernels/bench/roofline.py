"""What masked linear layers take on GPUs, predicted from bytes, operations and instructions.

`python -m modmask_kernels.bench.roofline` writes roofline.json, a page and a figure to
docs/results/gpu. Nothing is measured: each kernel of a training step is counted (device memory that
it must touch at least once, operations of its tiles, instructions that masks cost by the compiled
kernels, instructions.json) and held against the ceilings of the maker's data sheet.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files import read_json, write_json, write_text
from ..ops import _gpu
from ..ops.masked_linear.gpu import LEAST_SAVED
from ..report.page import Figure, Table

FOLDER = Path("docs/results/gpu")
BATCHES = (8, 64, 256, 1024, 4096, 8192)
SAMPLES = (1, 4, 8)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# rows of a group beyond which Hopper takes wide tiles for dlogits, as `ops.masked_linear.triton`:
# one program of them fills a processor
MANY = 512
# words of 4 bytes per weight and training step that masking moves beyond the products, by counting
# the passes of the ordinary code and of what torch.compile makes of it: a + b * samples
NAIVE = (1.0, 48.0)
COMPILED = (4.0, 10.0)
# most that the design allows the ratio to the plain layer to be: (batch, samples) on the H100
TARGETS = {("H100", "bfloat16", 4096, 8192, 4): 1.2, ("H100", "bfloat16", 4096, 256, 4): 3.0}


class Layer(NamedTuple):
    """A masked linear layer with one set; TF32 counts as float32's rate."""

    outputs: int
    inputs: int
    batch: int
    samples: int
    dtype: str
    logits_size: int = 4

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.outputs * self.inputs

    @property
    def size(self) -> int:
        """Bytes of a weight."""
        return DTYPES[self.dtype].itemsize


class Work(NamedTuple):
    """What a kernel does: bytes of device memory, operations of products, slots of instructions;
    and how many of its programs a processor holds at once."""

    name: str
    bytes: float
    operations: float = 0.0
    instructions: float = 0.0
    resident: int = 1


def floor_of(work: Work, layer: Layer, device: _gpu.Device) -> float:
    """Seconds that no kernel can go below: the most used of the three ceilings, fully used."""
    return max(
        work.bytes / device.bandwidth,
        work.operations / device.products(layer.size, tf32=True),
        work.instructions / device.lanes,
    )


def seconds_of(work: Work, layer: Layer, device: _gpu.Device) -> float:
    """Seconds predicted, as the chooser does."""
    matrix = work.operations / device.products(layer.size, tf32=True)
    busy = _gpu.arithmetic(work.instructions / device.lanes, matrix, work.resident)
    return max(work.bytes / device.bandwidth, busy) / _gpu.SHARE + _gpu.LAUNCH


def plain_step(layer: Layer) -> list[Work]:
    """Forward and backward of `torch.nn.Linear` with a trainable weight."""
    operations = 2.0 * layer.batch * layer.weights
    rows = layer.batch * (layer.inputs + layer.outputs) * layer.size
    traffic = rows + layer.weights * layer.size
    return [Work(name, traffic, operations) for name in ("forward", "dx", "dweight")]


def _tile(layer: Layer, source: str) -> int:
    """Rows of x that share a tile of masked weight."""
    from ..ops.masked_linear import triton

    rows = layer.batch // layer.samples
    return triton.product_config(DTYPES[layer.dtype], rows, source == "regenerate").m


def source_of(layer: Layer, device: _gpu.Device) -> str:
    """Where the masks of the two products come from: kept bits, or as the chooser says."""
    if layer.weights >= LEAST_SAVED:
        return "bits"
    rows = layer.batch // layer.samples
    product = _gpu.Product(
        *(1, layer.samples, rows, layer.outputs, layer.inputs, layer.size),
        tile=_tile(layer, "regenerate"),
        tf32=True,
    )
    return _gpu.choose(product, device, None).source


def masked_step(
    layer: Layer, device: _gpu.Device, counts: Mapping[str, Mapping[str, float]]
) -> list[Work]:
    """Forward and backward of the masked layer, as the kernels here do it.

    `counts`: instructions per weight by what costs them, of `bench.instructions`.
    """
    source = source_of(layer, device)
    rows = layer.batch // layer.samples
    tile = _tile(layer, source)
    tiles = layer.samples * math.ceil(rows / tile)
    operations = 2.0 * tiles * tile * layer.weights
    traffic = layer.batch * (layer.inputs + layer.outputs) * layer.size
    traffic += layer.weights * layer.size
    bits = layer.samples * layer.weights / 8
    logits = layer.weights * layer.logits_size
    each = layer.samples * layer.weights
    masks = bits if source == "bits" else logits
    resident = device.resident if source == "bits" and layer.size == 2 else 1
    slots = counts[source]["slots"] * tiles * layer.weights
    product = Work("", traffic + masks, operations, slots, resident)
    once = counts["pack_once"]["slots"] * layer.weights
    draw = Work("", logits + bits, 0.0, counts["pack"]["slots"] * each + once)
    slope = counts["slope"]["slots"] * each + counts["slope_once"]["slots"] * layer.weights
    hopper = device.name in ("H100", "H200")
    dlogits = Work(
        "dlogits",
        traffic + 2 * logits,
        2.0 * layer.batch * layer.weights,
        slope,
        2 if hopper and layer.size == 2 and rows <= MANY else 1,
    )
    steps = [product._replace(name="forward"), dlogits, product._replace(name="dx")]
    if source == "bits":
        steps.insert(0, draw._replace(name="masks"))
        if layer.weights < LEAST_SAVED:  # the backward packs them again
            steps.insert(3, draw._replace(name="masks of dx"))
    return steps


def ordinary_step(layer: Layer, words: tuple[float, float]) -> list[Work]:
    """The plain products, and masks as tensors: `words` per weight of traffic beside them."""
    moved = 4.0 * (words[0] + words[1] * layer.samples) * layer.weights
    return [*plain_step(layer), Work("masks", moved)]


def words_per_weight(step: Sequence[Work], layer: Layer) -> float:
    """Weight-sized traffic of a step, in words of 4 bytes per weight."""
    rows = 3 * layer.batch * (layer.inputs + layer.outputs) * layer.size
    return (sum(work.bytes for work in step) - rows) / 4 / layer.weights


def row_of(layer: Layer, device: _gpu.Device, counts: Mapping[str, Any]) -> dict[str, Any]:
    """All that is predicted of a layer on a device."""

    def total(step: Sequence[Work]) -> float:
        return sum(seconds_of(work, layer, device) for work in step)

    masked, plain = masked_step(layer, device, counts), plain_step(layer)
    low = masked_step(layer._replace(logits_size=2), device, counts)
    floor = sum(floor_of(work, layer, device) for work in masked)
    seconds = {"masked": total(masked), "plain": total(plain), "floor": floor}
    key = (device.name, layer.dtype, layer.outputs, layer.batch, layer.samples)
    return {
        "device": device.name,
        **layer._asdict(),
        "source": source_of(layer, device),
        "seconds": seconds,
        "ratio_to_plain": seconds["masked"] / seconds["plain"],
        "floor_to_plain": floor / sum(floor_of(work, layer, device) for work in plain),
        "ratio_with_bfloat16_logits": total(low) / seconds["plain"],
        "naive": total(ordinary_step(layer, NAIVE)) / seconds["plain"],
        "compiled": total(ordinary_step(layer, COMPILED)) / seconds["plain"],
        "words_per_weight": words_per_weight(masked, layer),
        "target": TARGETS.get(key),
        "kernels": {
            work.name: {**work._asdict(), "seconds": seconds_of(work, layer, device)}
            for work in masked
        },
    }


def predict_all(counts: Mapping[str, Any], size: int = 4096) -> list[dict[str, Any]]:
    """Rows for all devices, dtypes, batches and samples of a square layer.

    `counts`: instructions.json; each device takes the column of its architecture.
    """
    architecture = {"A100": "80", "H100": "90", "H200": "90", "B200": "100"}
    return [
        row_of(Layer(size, size, batch, samples, dtype), device, counts[architecture[device.name]])
        for device in _gpu.DEVICES
        for dtype in DTYPES
        for batch in BATCHES
        for samples in SAMPLES
        if batch % samples == 0
    ]


def table_of(rows: Sequence[Mapping[str, Any]], dtype: str) -> Table:
    """The rows of a dtype with 4 samples."""
    chosen = [row for row in rows if row["dtype"] == dtype and row["samples"] == 4]
    return Table(
        caption=f"Predicted: one masked layer, {chosen[0]['outputs']}x{chosen[0]['inputs']}, "
        f"{dtype}, 4 samples, forward and backward, against the plain layer",
        header=[
            *("device, batch", "plain, us", "masked, us", "masked / plain", "target", "floors"),
            *("with bfloat16 logits", "compiled naive", "naive", "masks from", "words per weight"),
        ],
        rows=[
            [
                f"{row['device']}, {row['batch']}",
                f"{1e6 * row['seconds']['plain']:.0f}",
                f"{1e6 * row['seconds']['masked']:.0f}",
                f"{row['ratio_to_plain']:.2f}",
                "-" if row["target"] is None else f"{row['target']:.2f}",
                f"{row['floor_to_plain']:.2f}",
                f"{row['ratio_with_bfloat16_logits']:.2f}",
                f"{row['compiled']:.1f}",
                f"{row['naive']:.1f}",
                row["source"],
                f"{row['words_per_weight']:.1f}",
            ]
            for row in chosen
        ],
        note="Floors: the ratio of the times that no kernel can go below, with every ceiling fully "
        f"used; the prediction uses {_gpu.SHARE:.0%} of them, adds to the longer of products and "
        "instructions for masks the shorter, half of it where two programs fit a processor, and "
        f"{1e6 * _gpu.LAUNCH:.0f} us per kernel, masked and plain alike. Naive and "
        "compiled naive: the plain products and the weight-sized traffic of their masks. Words: "
        "weight-sized traffic of a step in 4 bytes per weight.",
    )


def figure_of(rows: Sequence[Mapping[str, Any]], dtype: str = "bfloat16") -> Figure:
    """The ratio to the plain layer over the batch, one panel per device."""
    names = list(dict.fromkeys(row["device"] for row in rows))
    chosen = [row for row in rows if row["dtype"] == dtype]

    def draw(canvas: Any, theme: Any) -> None:
        from matplotlib.ticker import FuncFormatter, NullLocator

        grid = canvas.subplots(len(names), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, name in zip(grid, names, strict=True):
            for samples, role, marker in zip(
                SAMPLES, ("second", "first", "third"), "s^o", strict=True
            ):
                found = [r for r in chosen if (r["device"], r["samples"]) == (name, samples)]
                batches = [row["batch"] for row in found]
                axes.plot(
                    batches,
                    [row["ratio_to_plain"] for row in found],
                    color=theme.colour(role),
                    marker=marker,
                    markersize=4.5,
                    label=f"{samples} sample{'s' * (samples > 1)}",
                )
            axes.axhline(1.0, color=theme.colour("plain"), linewidth=1.4, zorder=1)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(BATCHES)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_title(name)
            axes.grid(axis="y")
        grid[-1].set_xlabel("batch")
        canvas.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)

    at = [row for row in chosen if row["samples"] == 4 and row["batch"] in (256, 8192)]
    said = ", ".join(
        f"{row['device']} batch {row['batch']}: {row['ratio_to_plain']:.2f} times" for row in at
    )
    return Figure(
        name="roofline",
        caption="Predicted time of a masked layer, forward and backward, relative to the plain "
        f"layer ({dtype}, {chosen[0]['outputs']}x{chosen[0]['inputs']}). A prediction from counted "
        "work and data sheets; nothing was run on these devices.",
        alt=f"Predicted time relative to the plain layer, 4 samples. {said}.",
        draw=draw,
        size=(4.4, 1.9 * len(names) + 0.6),
        key=True,
    )


def targets_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What the layers with a target spend, kernel by kernel, and what is left for each ceiling."""
    lines = []
    for row in rows:
        if row["target"] is None:
            continue
        device = next(d for d in _gpu.DEVICES if d.name == row["device"])
        layer = Layer(*(row[name] for name in Layer._fields))
        plain = row["seconds"]["plain"]
        name = f"{row['device']}, {row['batch']}"
        limits = []
        for kernel, work in row["kernels"].items():
            of = Work(kernel, *(work[field] for field in Work._fields[1:]))
            each = (
                of.bytes / device.bandwidth,
                of.operations / device.products(layer.size, tf32=True),
                of.instructions / device.lanes,
            )
            limits.append((max(each[:2]), each, work["seconds"]))
            lines.append([f"{name}: {kernel}", *_microseconds(*each, work["seconds"]), "-"])
        total = [sum(each[i] for _, each, _ in limits) for i in range(3)]
        spent = row["seconds"]["masked"]
        lines.append([f"{name}: all", *_microseconds(*total, spent), f"{spent / plain:.2f}"])
        # as if masks took no instruction
        free = sum(most / _gpu.SHARE + _gpu.LAUNCH for most, _, _ in limits)
        limits_of_all = {"without instructions": free, "target": row["target"] * plain}
        for what, seconds in limits_of_all.items():
            cells = ["-"] * 3 + _microseconds(seconds)
            lines.append([f"{name}: {what}", *cells, f"{seconds / plain:.2f}"])
    return Table(
        caption="The layers with a target, bfloat16, 4 samples: microseconds at which each "
        "ceiling, fully used, lets a kernel pass, and those predicted",
        header=[
            "device, batch: kernel",
            "memory",
            "products",
            "instructions",
            "predicted",
            "ratio",
        ],
        rows=lines,
        note="Without instructions: the prediction for the same kernels if drawing, packing, "
        "unpacking and slopes were free. Masks are drawn twice, packed for both products and for "
        "the slope in dlogits.",
    )


def _microseconds(*seconds: float) -> list[str]:
    return [f"{1e6 * t:.1f}" for t in seconds]


def page(rows: Sequence[Mapping[str, Any]], counts: Mapping[str, Any], figure: Figure) -> str:
    """Everything as Markdown."""
    from ..report.summary import markdown_figure, markdown_table

    crossovers = [
        [device.name, *(str(_crossover(device, dtype)) for dtype in DTYPES)]
        for device in _gpu.DEVICES
    ]
    parts = [
        "# Masked layers on GPUs, predicted",
        "A prediction, not a measurement: bytes, operations and instructions of every kernel over "
        "the ceilings of each device. `modmask_kernels/ops/_gpu.py` holds the model, by which the "
        "chooser decides too; the instructions are those of [the compiled kernels]"
        f"(instructions.md), Triton {counts['triton']}.",
        "```\npython -m modmask_kernels.bench.roofline\n```",
        markdown_figure(figure).rstrip("\n"),
        *(markdown_table(table_of(rows, dtype)).rstrip("\n") for dtype in DTYPES),
        markdown_table(targets_table(rows)).rstrip("\n"),
        "Logits are float32: a decision is made of logits in float32, and steps of learning that "
        "are small beside them would be lost in bfloat16. What storing logits and their gradient "
        "in bfloat16 would give is a column of the tables above, of an option that is not built.",
        markdown_table(
            Table(
                caption="Most rows of a group for which masks are drawn inside the product",
                header=["device", *DTYPES],
                rows=crossovers,
                note="A 4096x4096 layer, 4 samples; 0: never.",
            )
        ).rstrip("\n"),
    ]
    return "\n\n".join(parts) + "\n"


def _crossover(device: _gpu.Device, dtype: str) -> int:
    def of_rows(rows: int) -> _gpu.Product:
        layer = Layer(4096, 4096, 4 * rows, 4, dtype)
        return _gpu.Product(
            *(1, 4, rows, 4096, 4096, layer.size), tile=_tile(layer, "regenerate"), tf32=True
        )

    return _gpu.crossover(of_rows, device)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the prediction; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m modmask_kernels.bench.roofline", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help=f"[{FOLDER}]")
    arguments = parser.parse_args(argv)
    from ..report.style import THEMES, render_svg

    counts = read_json(FOLDER / "instructions.json")
    rows = predict_all(counts)
    figure = figure_of(rows)
    write_json(arguments.out / "roofline.json", {"share": _gpu.SHARE, "rows": rows})
    for theme in THEMES:
        write_text(arguments.out / f"roofline-{theme.name}.svg", render_svg(figure, theme))
    write_text(arguments.out / "roofline.md", page(rows, counts, figure))
    print(arguments.out / "roofline.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
