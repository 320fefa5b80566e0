"""The results as one figure: time and memory relative to the plain layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..report.page import Figure
from .tables import Results, Row, linear_label

# shape and colour both tell the series apart
_SERIES = {
    "fused": ("fused", "first", "o"),
    "compiled": ("compiled naive", "third", "^"),
    "naive": ("naive", "second", "s"),
    "neurosurgeon": ("NeuroSurgeon", "fourth", "D"),
    "predicted": ("fused, predicted", "plain", "x"),
}
_TITLE = "Time relative to the plain layer or step"
_ROW_HEIGHT = 0.25
_PANEL_HEIGHT = 1.0

Panel = tuple[str, list[str], list[dict[str, float]], list[float | None]]


def _short_conv_label(row: Row) -> str:
    stride = f"/{row['stride']}" if row["stride"] != 1 else ""
    groups = f" g{row['groups']}" if row["groups"] != 1 else ""
    return (
        f"conv {row['in_channels']}-{row['out_channels']} {row['kernel']}x{row['kernel']}{stride}"
        f"{groups}, {row['samples']}"
    )


def _time_panel(results: Results) -> Panel | None:
    labels: list[str] = []
    points: list[dict[str, float]] = []
    targets: list[float | None] = []
    for row in results.get("linear", []):
        labels.append(linear_label(row))
        others = {k: v["value"] for k, v in row["baseline_ratio_to_plain"].items()}
        points.append({"fused": row["ratio_to_plain"]["value"], **others})
        targets.append(row["target"])
    for row in results.get("step", []):
        labels.append(f"learning step, {row['size']}")
        naive = row["naive_ratio_to_plain"]["value"]
        points.append({"fused": row["ratio_to_plain"]["value"], "naive": naive})
        targets.append(row["target"])
    for row in results.get("conv", []):
        labels.append(_short_conv_label(row))
        naive = row["naive_ratio_to_plain"]["value"]
        points.append({"fused": row["ratio_to_plain"]["value"], "naive": naive})
        targets.append(row["target"])
    for row in results.get("lstm", []):
        labels.append(f"LSTM {row['layers']}x{row['units']}, {row['samples']}")
        naive = row["naive_ratio_to_plain"]["value"]
        points.append({"fused": row["ratio_to_plain"]["value"], "naive": naive})
        targets.append(row["target"])
    for row in results.get("network", []):
        labels.append(f"learning step, {row['network']}, {row['samples']}")
        naive = row["naive_ratio_to_plain"]["value"]
        points.append({"fused": row["ratio_to_plain"]["value"], "naive": naive})
        targets.append(row["target"])
    return (_TITLE, labels, points, targets) if labels else None


def _memory_panel(results: Results) -> Panel | None:
    labels: list[str] = []
    points: list[dict[str, float]] = []
    for row in results.get("memory", []):
        extra: dict[str, Row] = row["extra_bytes"]
        plain = max(next(iter(extra["plain"].values())), 1)
        for count, fused in extra["fused"].items():
            labels.append(f"{row['out_features']}x{row['in_features']}, {row['batch']}, {count}")
            points.append({"fused": fused / plain, "naive": extra["naive"][count] / plain})
    title = "Peak extra memory relative to the plain layer"
    return (title, labels, points, [None] * len(labels)) if labels else None


def _draw_panel(axes: Any, theme: Any, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    title, labels, points, targets = panel
    places = list(range(len(labels)))
    axes.set_xscale("log", base=2)
    axes.axvline(1.0, color=theme.colour("plain"), linewidth=1.4, zorder=1)
    for name, (label, role, marker) in _SERIES.items():
        found = [(p[name], place) for p, place in zip(points, places, strict=True) if name in p]
        if found:
            axes.plot(
                *zip(*found, strict=True),
                linestyle="none",
                marker=marker,
                markersize=5.5,
                color=theme.colour(role),
                label=label,
                zorder=3,
            )
    marks = [(t, place) for t, place in zip(targets, places, strict=True) if t is not None]
    if marks:
        axes.plot(
            *zip(*marks, strict=True),
            linestyle="none",
            marker="|",
            markersize=11,
            markeredgewidth=1.4,
            color=theme.ink,
            label="target",
            zorder=2,
        )
    low, high = axes.get_xlim()
    # room at the left edge for the numbers of the fused kernel
    axes.set_xlim(min(low, 1.0) * 0.35, high * 1.1)
    for point, place in zip(points, places, strict=True):
        axes.text(
            0.01,
            place,
            f"{point['fused']:.2f}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=theme.colour("first"),
        )
    axes.set_yticks(places, labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_title(title)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x")
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def figure_of(results: Results) -> Figure | None:
    """The figure, not yet drawn; None if nothing was measured."""
    panels = [panel for panel in (_time_panel(results), _memory_panel(results)) if panel]
    if not panels:
        return None
    return figure_of_panels(
        "speed",
        panels,
        "Rows: layer, batch, samples; for convolutions channels, kernel (/stride, g "
        "groups), samples; for LSTMs layers x units, samples. The vertical line is the plain layer "
        "(or the ordinary training step); left is better. The scale is logarithmic; numbers are "
        "those of the fused kernel.",
    )


def figure_of_panels(name: str, panels: Sequence[Panel], caption: str) -> Figure:
    """Panels below each other: a title, labels, and at each the ratios by series and a target."""
    heights = [_ROW_HEIGHT * len(panel[1]) + _PANEL_HEIGHT for panel in panels]

    def draw(canvas: Any, theme: Any) -> None:
        grid = canvas.subplots(
            len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        for axes, panel in zip(grid[:, 0], panels, strict=True):
            _draw_panel(axes, theme, panel)
        # the first panel has all the series
        canvas.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=3)

    rows = ", ".join(
        f"{label}: fused {point['fused']:.2f} times"
        for panel in panels[:1]
        for label, point in zip(panel[1], panel[2], strict=True)
    )
    return Figure(
        name=name,
        caption=caption,
        alt=f"{panels[0][0]}. {rows}.",
        draw=draw,
        size=(4.4, sum(heights) + 0.4),
        key=True,
    )
