"""The results as tables: plain text for the terminal, Markdown for the documentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..report.page import Table
from .machine import headline

Results = dict[str, Any]
Row = dict[str, Any]

_MEBIBYTE = 2**20


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _spread(ratio: Row) -> str:
    return f"{_times(ratio['value'])} ({_times(ratio['p20'])}-{_times(ratio['p80'])})"


def linear_label(row: Row) -> str:
    """Name of a row of the linear suite."""
    return f"{row['out_features']}x{row['in_features']}, {row['batch']}, {row['samples']}"


def _linear_table(rows: Sequence[Row]) -> Table:
    def against(row: Row, name: str) -> str:
        found = row["baseline_ratio_to_plain"].get(name)
        return _times(found["value"] if found else None)

    reasons = {reason for row in rows for reason in row["absent"].values()}
    return Table(
        caption="masked_linear, forward and backward, float32: times as long as the plain layer",
        header=[
            "layer, batch, samples",
            "plain, ms",
            "fused, ms",
            "fused (p20-p80)",
            "target",
            "verdict",
            "naive",
            "compiled naive",
            "NeuroSurgeon",
            "floor",
        ],
        rows=[
            [
                linear_label(row),
                _ms(row["seconds"]["plain"]["median"]),
                _ms(row["seconds"]["fused"]["median"]),
                _spread(row["ratio_to_plain"]),
                _times(row["target"]),
                row["verdict"],
                against(row, "naive"),
                against(row, "compiled"),
                against(row, "neurosurgeon"),
                _times(row["floor"]["ratio_to_plain"]),
            ]
            for row in rows
        ],
        note="Plain: F.linear with a trainable weight and the same fixed bias. Naive: two uniforms "
        "per weight, logarithms, sigmoid, straight-through, bmm, in eager PyTorch; compiled naive: "
        "the same under torch.compile. NeuroSurgeon: its hard-concrete layer (soft masks, another "
        "distribution). Ratios: median over the rounds of one process, plain and candidate in "
        "turn in each; in brackets the 20th and 80th percentile. Naive, compiled naive, "
        "NeuroSurgeon, floor: times as long as plain, too. Met with the floor: within the wider "
        "bound that holds where the floor is printed. The C library keeps freed memory, for all "
        "alike." + "".join(f" Not measured: {reason}." for reason in sorted(reasons)),
    )


def _faster_table(rows: Sequence[Row]) -> Table:
    names = ("naive", "compiled", "neurosurgeon")
    return Table(
        caption="How many times faster than other masked layers",
        header=["layer, batch, samples", "naive", "compiled naive", "NeuroSurgeon"],
        rows=[
            [linear_label(row), *(_times(row["times_faster_than"].get(name)) for name in names)]
            for row in rows
        ],
    )


def _floor_table(rows: Sequence[Row]) -> Table:
    return Table(
        caption="The measured floor of masked_linear, and the distance from it",
        header=[
            "layer, batch, samples",
            "noise once, ms",
            "ns per number and core",
            "whole products, ms",
            "cut products, ms",
            "call, ms",
            "traffic, ms",
            "floor, ms",
            "fused, ms",
            "fused / floor",
        ],
        rows=[
            [
                linear_label(row),
                _ms(row["floor"]["noise_seconds"]),
                f"{row['floor']['noise_nanoseconds_per_number_and_core']:.2f}",
                _ms(row["floor"]["whole_products_seconds"]),
                _ms(row["floor"]["cut_products_seconds"]),
                _ms(row["floor"]["call_seconds"]),
                _ms(row["floor"]["traffic_seconds"]),
                _ms(row["floor"]["seconds"]),
                _ms(row["seconds"]["fused"]["median"]),
                _times(row["floor"]["fused_over_floor"]),
            ]
            for row in rows
        ],
        note="Noise: sample_mask_packed without what its call costs; forward and backward need it "
        "once each. Whole products: the plain layer. Cut products: the library's products with the "
        "batch in as many parts as samples. Call: the masked operation of a 16x16 layer, forward "
        "and backward, within a step of the plain layer, less a plain layer of that size there. "
        "Traffic: 7 words per weight at the speed of a copy. Floor: the larger of traffic and of "
        "whole products, call and twice the noise; masking, slopes and the cut are free in it.",
    )


def _memory_table(rows: Sequence[Row]) -> Table:
    def extra(row: Row, name: str) -> list[str]:
        return [f"{value / _MEBIBYTE:.1f}" for value in row["extra_bytes"][name].values()]

    counts = list(rows[0]["extra_bytes"]["fused"])
    return Table(
        caption="Peak extra memory of masked_linear, forward and backward, float32, MiB",
        header=[
            "layer, batch",
            "weight",
            "plain",
            *(f"fused, samples {count}" for count in counts),
            f"growth {counts[0]} to {counts[-1]}",
            "target",
            "verdict",
            *(f"naive, samples {count}" for count in counts),
        ],
        rows=[
            [
                f"{row['out_features']}x{row['in_features']}, {row['batch']}",
                f"{row['weight_bytes'] / _MEBIBYTE:.1f}",
                *extra(row, "plain"),
                *extra(row, "fused"),
                f"{row['fused_growth']:.3f}",
                f"{row['target_growth']:.2f}",
                row["verdict"],
                *extra(row, "naive"),
            ]
            for row in rows
        ],
        note="Resident high-water mark (VmHWM) of a fresh process that runs the layer, minus that "
        "of one that does everything but that; median of the repeats. The gradient of the weight "
        "or of the logits, one weight in size, is part of every figure.",
    )


def _step_table(rows: Sequence[Row]) -> Table:
    return Table(
        caption="One mask-learning step against one training step of the same network",
        header=[
            "network",
            "masked weights",
            "training, ms",
            "fused, ms",
            "fused (p20-p80)",
            "target",
            "verdict",
            "naive",
            "faster than naive",
            "noise once, ms",
            "calls, ms",
            "floor",
        ],
        rows=[
            [
                f"{row['size']} ({'-'.join(str(width) for width in row['hidden'])})",
                f"{row['masked_weights']:,}",
                _ms(row["seconds"]["plain"]["median"]),
                _ms(row["seconds"]["fused"]["median"]),
                _spread(row["ratio_to_plain"]),
                _times(row["target"]),
                row["verdict"],
                _times(row["naive_ratio_to_plain"]["value"]),
                _times(row["times_faster_than_naive"]),
                _ms(row["floor"]["noise_seconds"]),
                _ms(row["floor"]["call_seconds"]),
                _times(row["floor"]["ratio_to_plain"]),
            ]
            for row in rows
        ],
        note="Addition / multiplication networks, batch 128, samples 4 in every masked layer. All "
        "three columns include data generation, loss, clipping to 1.0 and fused Adam; the masked "
        "ones the penalty too. Noise, calls: as for masked_linear, of all layers. Floor: training "
        "plus calls plus twice the noise, over training; masking, slopes, the cut of products and "
        "the penalty are free in it.",
    )


def conv_label(row: Row) -> str:
    """Name of a row of the convolution suite."""
    options = [f"kernel {row['kernel']}"]
    options += [f"stride {row['stride']}"] if row["stride"] != 1 else []
    options += [f"{row['groups']} groups"] if row["groups"] != 1 else []
    return (
        f"{row['in_channels']} to {row['out_channels']}, {row['size']}x{row['size']}, "
        f"{', '.join(options)}; {row['batch']}, {row['samples']}"
    )


def _against_naive(caption: str, first: str, note: str, label: Callable[[Row], str]) -> Any:
    """A table of times beside plain and naive layers."""

    def make(rows: Sequence[Row]) -> Table:
        return Table(
            caption=caption,
            header=[
                first,
                "plain, ms",
                "fused, ms",
                "fused (p20-p80)",
                "target",
                "verdict",
                "naive",
                "fused / naive",
                "at most 1.05",
            ],
            rows=[
                [
                    label(row),
                    _ms(row["seconds"]["plain"]["median"]),
                    _ms(row["seconds"]["fused"]["median"]),
                    _spread(row["ratio_to_plain"]),
                    _times(row["target"]),
                    row["verdict"],
                    _times(row["naive_ratio_to_plain"]["value"]),
                    _times(row["ratio_to_naive"]["value"]),
                    row["verdict_naive"],
                ]
                for row in rows
            ],
            note=note + " Ratios as above.",
        )

    return make


_conv_table = _against_naive(
    "masked_conv2d, forward and backward, float32: times as long as the plain layer",
    "channels, images, options; batch, samples",
    "Plain: F.conv2d with a trainable weight and the same fixed bias. Naive: all masked weights as "
    "a tensor, in one grouped convolution.",
    conv_label,
)


def lstm_label(row: Row) -> str:
    """Name of a row of the LSTM suite."""
    layers = f"{row['layers']} layers of {row['units']}"
    return f"{layers}; {row['batch']}, {row['steps']}, {row['samples']}"


_lstm_table = _against_naive(
    "MaskedLSTM, forward and backward, float32: times as long as torch.nn.LSTM",
    "layers, units; batch, steps, samples",
    "Plain: torch.nn.LSTM with trainable weights and biases. Naive: masks and masked weights as "
    "tensors, one bmm per matrix and step in a Python loop.",
    lstm_label,
)


def _select_table(rows: Sequence[Row]) -> Table:
    return Table(
        caption="select_linear, forward, float32: times as long as one unmasked F.linear",
        header=[
            "layer; sets, rows",
            "plain, ms",
            "fused, ms",
            "fused (p20-p80)",
            "naive / fused",
            "by set / fused",
            "bits, MiB",
            "bools, MiB",
            "masked weights, MiB",
        ],
        rows=[
            [
                f"{row['out_features']}x{row['in_features']}; {row['sets']}, {row['batch']}",
                _ms(row["seconds"]["plain"]["median"]),
                _ms(row["seconds"]["fused"]["median"]),
                _spread(row["ratio_to_plain"]),
                _times(row["naive_over_fused"]),
                _times(row["by_set_over_fused"]),
                *(f"{size / _MEBIBYTE:.1f}" for size in row["mask_bytes"].values()),
            ]
            for row in rows
        ],
        note="Every row of the batch chooses a set at random. Naive: a masked weight for each row, "
        "then one bmm. By set: the rows of each set that occurs together, F.linear with its masked "
        "weight. Both hold the masks as bools, fused as bits. Plain: all rows see the same weight, "
        "without masks. The last columns: the masks of all sets, and the masked weights of naive.",
    )


def _top_k_table(rows: Sequence[Row]) -> Table:
    return Table(
        caption="Masks of the k largest scores, float32",
        header=["scores, k", "candidate", "time, ms", "extra memory, MiB"],
        rows=[
            [
                f"{row['count']:,}, {row['k']:,}",
                name,
                _ms(row["seconds"][name]["median"]),
                f"{row['extra_bytes'][name] / _MEBIBYTE:.1f}",
            ]
            for row in rows
            for name in row["seconds"]
        ],
        note="Extra memory: as above, the mask itself included (packed: 1 bit per score). "
        + " ".join(
            f"Against {row['quickest']}, the quicker library function: "
            f"{_times(row['ratio_to_quickest'])} times its time (target 1.00, "
            f"{row['verdict_time']}), {_times(row['times_less_memory'])} times less memory than "
            f"the library needs at least (target 5.00, {row['verdict_memory']})."
            for row in rows
        ),
    )


def _network_table(rows: Sequence[Row]) -> Table:
    return Table(
        caption="One mask-learning step of ResNet-18 and of a decoder against one training step",
        header=[
            "network, batch, samples",
            "training, ms",
            "fused, ms",
            "fused (p20-p80)",
            "target",
            "verdict",
            "naive",
            *(f"{name}, MiB" for name in ("training", "fused", "naive")),
            "memory, fused / training",
            "at most 1.30",
        ],
        rows=[
            [
                f"{row['network']}, {row['batch']}, {row['samples']}",
                _ms(row["seconds"]["plain"]["median"]),
                _ms(row["seconds"]["fused"]["median"]),
                _spread(row["ratio_to_plain"]),
                _times(row["target"]),
                row["verdict"],
                _times(row["naive_ratio_to_plain"]["value"]),
                *(f"{row['extra_bytes'][n] / _MEBIBYTE:.1f}" for n in ("plain", "fused", "naive")),
                _times(row["memory_ratio"]),
                row["verdict_memory"],
            ]
            for row in rows
        ],
        note="ResNet-18: 32x32 images, 3x3 stem. Decoder: as GPT-2, but a head of 10 classes and "
        "no embedding: 4 layers of 256, 4 heads, 128 embedded tokens. Linear layers and "
        "convolutions are masked. Training is in training mode; mask learning, fused and naive, is "
        "in evaluation mode, where batch normalisation is cheaper, and leaves biases and norms "
        "alone. Every step has loss, clipping to 1.0 and fused Adam; the masked ones the penalty "
        "too. Memory: peak beyond the plain model and the batch, so with the logits; one pair of "
        "processes.",
    )


def _antithetic_table(rows: Sequence[Row]) -> Table:
    def worth(row: Row, name: str) -> str:
        return f"{row['worth'][name]['mean']:.2f} (std {row['worth'][name]['std']:.2f})"

    return Table(
        caption="Plain mask samples with the gradient variance of one antithetic pair (u, 1 - u)",
        header=[
            "steps learned, rows per sample",
            "rows of the two samples",
            "antithetic pair",
            "two plain samples",
        ],
        rows=[
            [
                f"{row['learned']}, {row['rows']}",
                "the same" if row["same_rows"] else "each its own",
                worth(row, "antithetic"),
                worth(row, "plain"),
            ]
            for row in rows
        ],
        note="Total variance of the gradient of all logits of a trained add/mul network, mask for "
        "add; mean and standard deviation of repetitions with other seeds. Two plain samples are "
        "worth 2 but for chance: the accuracy. In learning each sample sees rows of its own.",
    )


_TABLES: dict[str, tuple[Callable[[Sequence[Row]], Table], ...]] = {
    "linear": (_linear_table, _faster_table, _floor_table),
    "memory": (_memory_table,),
    "step": (_step_table,),
    "conv": (_conv_table,),
    "lstm": (_lstm_table,),
    "network": (_network_table,),
    "select": (_select_table,),
    "top_k": (_top_k_table,),
    "antithetic": (_antithetic_table,),
}


def tables(results: Results) -> list[Table]:
    """All tables of the suites that were run."""
    return [
        make(results[suite])
        for suite, makers in _TABLES.items()
        if suite in results
        for make in makers
    ]


def text_table(table: Table) -> str:
    """A table in fixed-width text: the caption, the header, one line per row, the note."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]

    def format_line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    ruler = "  ".join("-" * width for width in widths)
    parts = [table.caption, "", format_line(table.header), ruler, *map(format_line, table.rows)]
    return "\n".join(parts + ([table.note] if table.note else []))


def text(results: Results) -> str:
    """Everything for the terminal."""
    parts = [headline(results["machine"]), *(text_table(table) for table in tables(results))]
    return "\n\n".join(parts)


def markdown(results: Results, command: str, figure: Any | None) -> str:
    """Everything as one page of Markdown.

    Args:
        results: what was measured.
        command: how to measure it again.
        figure: the `report.page.Figure` whose files lie beside the page, or None.
    """
    # needs matplotlib, which the text does not
    from ..report.summary import markdown_figure, markdown_table

    parts = ["# Speed and memory", headline(results["machine"]) + ".", f"```\n{command}\n```"]
    if figure is not None:
        parts.append(markdown_figure(figure).rstrip("\n"))
    parts += [markdown_table(table).rstrip("\n") for table in tables(results)]
    return "\n\n".join(parts) + "\n"
