"""Drawing functions. Each draws into a matplotlib figure, from statistics and a theme.

A statistic is {"mean", "std", "values"}; bars show the mean, whiskers the sample standard
deviation, small rings the single runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from .style import Theme

Statistic = Mapping[str, Any]


def _rings(
    axes: Any, theme: Theme, values: Sequence[float], position: float, limit: float | None = None
) -> None:
    axes.plot(
        values,
        [position] * len(values),
        linestyle="none",
        marker="o",
        markersize=2.6,
        markerfacecolor=theme.background,
        markeredgecolor=theme.ink,
        markeredgewidth=0.6,
        clip_on=False,
        zorder=4,
    )


def grouped_bars(
    canvas: Canvas,
    theme: Theme,
    labels: Sequence[str],
    series: Mapping[str, tuple[str, Sequence[Statistic]]],
    *,
    xlabel: str,
    limit: float | None = None,
    digits: int = 0,
    breaks: Sequence[int] = (),
    signed: bool = False,
    markers: Mapping[str, tuple[str, Sequence[float]]] | None = None,
) -> None:
    """Horizontal bars in groups, one bar per series, with the mean written beside each.

    Args:
        canvas: matplotlib figure.
        theme: colours.
        labels: names of the groups, top to bottom.
        series: name to (colour role, one statistic per group).
        xlabel: label of the value axis.
        limit: upper end of the axis (default: from the data).
        digits: digits of the written means.
        breaks: groups before which a gap opens.
        signed: whether values may be negative.
        markers: name of a series to (label, one value per group): a mark across its bar.
    """
    axes = canvas.subplots()
    count = len(series)
    height = 0.8 / count
    offset = np.cumsum([0.5 if i in breaks else 0.0 for i in range(len(labels))])
    centres = np.arange(len(labels)) + offset
    high = max((s["mean"] + (s["std"] or 0) for _, ss in series.values() for s in ss), default=1.0)
    low = min((s["mean"] - (s["std"] or 0) for _, ss in series.values() for s in ss), default=0.0)
    end = limit if limit is not None else (high or 1.0) * 1.02
    start = min(low * 1.05, 0.0) if signed else 0.0
    span = end - start
    handles: list[Any] = []
    for k, (name, (role, statistics)) in enumerate(series.items()):
        colour = theme.colour(role)
        places = centres - 0.4 + height * (k + 0.5)
        bars = axes.barh(
            places, [s["mean"] for s in statistics], height * 0.86, color=colour, label=name
        )
        handles.append(bars)
        for place, s in zip(places, statistics, strict=True):
            edge = s["mean"]
            if s["std"] is not None:
                axes.errorbar(
                    s["mean"], place, xerr=s["std"], color=theme.ink, linewidth=1, capsize=2
                )
                _rings(axes, theme, s["values"], place)
                edge = max(s["mean"] + s["std"], *s["values"])
            axes.text(
                max(edge, 0) + 0.015 * span,
                place,
                f"{s['mean']:,.{digits}f}".replace("-", "\N{MINUS SIGN}"),
                va="center",
                fontsize=8,
                color=theme.ink,
            )
        if markers and name in markers:
            text, values = markers[name]
            mark = axes.vlines(
                values,
                places - height * 0.5,
                places + height * 0.5,
                color=theme.ink,
                linewidth=1.6,
                linestyle=(0, (1.5, 1)),
                label=text,
                zorder=5,
            )
            if text not in [handle.get_label() for handle in handles]:
                handles.append(mark)
    axes.set_yticks(centres, labels)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(centres[-1] + 0.55, centres[0] - 0.55)
    axes.set_xlim(start, end + 0.13 * span)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=digits == 0))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: "" if limit is not None and x > limit else f"{x:,g}")
    )
    axes.set_xlabel(xlabel)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0)
    if start < 0:
        axes.axvline(0, color=theme.muted, linewidth=0.8)
    if count > 1 or markers:
        canvas.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=1.2)


def matrices(
    canvas: Canvas,
    theme: Theme,
    panels: Sequence[tuple[str, Sequence[Sequence[Statistic]]]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    ncols: int = 2,
    xlabel: str = "",
    ylabel: str = "",
) -> None:
    """A grid of small matrices of percentages with their values written in.

    Args:
        canvas: matplotlib figure.
        theme: colours.
        panels: (title, matrix of statistics) in reading order.
        rows: names of the matrix rows.
        columns: names of the matrix columns.
        ncols: panels side by side.
        xlabel: label below the lowest panels.
        ylabel: label left of the first panels.
    """
    nrows = -(-len(panels) // ncols)
    grid = canvas.subplots(nrows, ncols, squeeze=False)
    ramp = theme.ramp
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.set_visible(False)
            continue
        title, matrix = panels[index]
        means = np.array([[cell["mean"] for cell in row] for row in matrix])
        axes.imshow(means, cmap=ramp, vmin=0, vmax=100, aspect="auto")
        for (i, j), mean in np.ndenumerate(means):
            red, green, blue = to_rgb(ramp(mean / 100))
            bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
            std = matrix[i][j]["std"]
            axes.text(
                j,
                i,
                f"{mean:.0f}" + ("" if std is None else f"\n±{std:.1f}"),
                ha="center",
                va="center",
                fontsize=8.5 if std is None else 7.5,
                color="#14181d" if bright else "#ffffff",
            )
        axes.set_title(title)
        axes.set_xticks(range(len(columns)), columns if index + ncols >= len(panels) else [])
        axes.set_yticks(range(len(rows)), rows if index % ncols == 0 else [])
        axes.tick_params(length=0)
        axes.tick_params(axis="x", labelcolor=theme.ink)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
        axes.grid(which="minor", color=theme.background, linewidth=2)
        axes.tick_params(which="minor", length=0)
        axes.grid(which="major", visible=False)
    if xlabel:
        canvas.supxlabel(xlabel, fontsize=9, color=theme.muted)
    if ylabel:
        canvas.supylabel(ylabel, fontsize=9, color=theme.muted)


def histograms(
    canvas: Canvas,
    theme: Theme,
    series: Mapping[str, tuple[str, Sequence[Statistic]]],
    *,
    xlabel: str,
    ylabel: str,
    band: tuple[float, float] | None = None,
    band_label: str = "",
) -> None:
    """Histograms on [0, 1] with a logarithmic count axis, one panel per series.

    Args:
        canvas: matplotlib figure.
        theme: colours.
        series: name to (colour role, mean count of every bin).
        xlabel: label of the value axis.
        ylabel: label of the count axis.
        band: interval to shade.
        band_label: what the interval is.
    """
    grid = canvas.subplots(len(series), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, (role, bins)) in zip(grid, series.items(), strict=True):
        counts = np.array([b["mean"] for b in bins])
        edges = np.linspace(0, 1, len(counts) + 1)
        if band:
            axes.axvspan(*band, color=theme.grid, alpha=0.45, linewidth=0)
        # an empty bin has no place on a logarithmic axis: draw it at the bottom
        axes.stairs(
            np.maximum(counts, 0.5), edges, fill=True, color=theme.colour(role), baseline=0.5
        )
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
        axes.set_xlim(-0.01, 1.01)
        axes.set_title(name)
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        axes.minorticks_off()
        axes.tick_params(axis="y", labelcolor=theme.muted, length=0)
    if band and band_label:
        grid[0].text(
            sum(band) / 2,
            0.9,
            band_label,
            transform=grid[0].get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=8,
            color=theme.muted,
        )
    grid[-1].set_xlabel(xlabel)
    canvas.supylabel(ylabel, fontsize=9, color=theme.muted)


def curves(
    canvas: Canvas,
    theme: Theme,
    panels: Sequence[tuple[str, Mapping[str, tuple[str, Sequence[Statistic], Sequence[float]]]]],
    *,
    xlabel: str,
    logarithmic: Sequence[bool] = (),
    points: bool = False,
    logarithmic_steps: bool = False,
) -> None:
    """Curves over steps, mean over runs with a band of one standard deviation.

    Args:
        canvas: matplotlib figure.
        theme: colours.
        panels: (title, {name: (colour role, statistics, steps)}), top to bottom.
        xlabel: label of the step axis.
        logarithmic: per panel, whether the value axis is logarithmic.
        points: mark the steps.
        logarithmic_steps: whether the step axis is logarithmic.
    """
    grid = canvas.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    styles = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
    for index, (axes, (title, lines)) in enumerate(zip(grid, panels, strict=True)):
        for style, (name, (role, statistics, steps)) in zip(
            styles * len(lines), lines.items(), strict=False
        ):
            mean = np.array([s["mean"] for s in statistics])
            std = np.array([s["std"] or 0.0 for s in statistics])
            colour = theme.colour(role)
            axes.plot(
                steps,
                mean,
                color=colour,
                linestyle=style,
                label=name,
                marker="o" if points else None,
                markersize=4,
            )
            axes.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
        if index < len(logarithmic) and logarithmic[index]:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            # a short axis may hold no power of ten to label
            subs = (1.0,) if high > 30 * low else (1.0, 2.0, 5.0)
            axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.minorticks_off()
        else:
            axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", labelcolor=theme.muted, length=0)
    grid[-1].set_xlabel(xlabel)
    if logarithmic_steps:
        grid[-1].set_xscale("log")
        grid[-1].minorticks_off()
    if points:
        marked = sorted(
            {step for _, lines in panels for *_, steps in lines.values() for step in steps}
        )
        grid[-1].set_xticks(marked if len(marked) <= 6 else [marked[0], marked[-1]])
    grid[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    handles, names = grid[0].get_legend_handles_labels()
    canvas.legend(handles, names, loc="outside upper left", ncols=3, handlelength=2.2)
