import re

import pytest

from modmask_kernels.analysis import mean_std
from modmask_kernels.report import Figure, figures
from modmask_kernels.report.style import DARK, LIGHT, render_svg


def one(value):
    return mean_std([value])._asdict()


def two(a, b):
    return mean_std([a, b])._asdict()


def draw(function, *arguments, theme=LIGHT, **options):
    return render_svg(
        Figure("name", "", "alt", lambda canvas, t: function(canvas, t, *arguments, **options)),
        theme,
    )


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("stats", [[one(3.0), one(0.0)], [two(2.0, 4.0), two(0.0, 0.0)]])
def test_grouped_bars(theme, stats):
    svg = draw(
        figures.grouped_bars, ["x", "y"], {"s": ("first", stats)}, xlabel="per cent", theme=theme
    )
    assert {"x", "y", "per cent", "3", "0"} <= set(texts(svg))
    assert theme.colour("first").lower() in svg
    assert "system-ui" in svg
    assert "DejaVu" not in svg


def test_negative_bars_and_markers():
    svg = draw(
        figures.grouped_bars,
        ["x"],
        {"a": ("first", [two(-3.0, -1.0)]), "b": ("second", [one(2.0)])},
        xlabel="",
        signed=True,
        markers={"a": ("chance", [0.1]), "b": ("chance", [0.2])},
    )
    assert "\N{MINUS SIGN}2" in texts(svg)
    assert texts(svg).count("chance") == 1


def test_all_zero_bars():
    draw(figures.grouped_bars, ["x"], {"a": ("first", [one(0.0)])}, xlabel="")


def test_matrices():
    matrix = [[two(99.0, 100.0), one(0.0), one(0.4)], [one(1.0), one(50.0), one(49.0)]]
    panels = [("left", matrix), ("right", matrix), ("third", matrix)]
    svg = draw(figures.matrices, panels, rows=["+", "-"], columns=["a", "b", "c"])
    written = texts(svg)
    assert {"left", "right", "third", "a", "50"} <= set(written)
    assert "99" in " ".join(written) or "100" in " ".join(written)


def test_histograms_with_empty_bins():
    bins = [one(0.0)] * 498 + [one(12.0), one(30000.0)]
    svg = draw(
        figures.histograms,
        {"mask": ("third", bins)},
        xlabel="p",
        ylabel="n",
        band=(0.1, 0.9),
        band_label="undecided",
    )
    assert {"p", "n", "undecided", "mask"} <= set(texts(svg))


def test_curves():
    lines = {"a": ("first", [two(3.0, 4.0), two(1.0, 2.0)], [10, 20])}
    svg = draw(
        figures.curves, [("loss", lines), ("kept", lines)], xlabel="step", logarithmic=[True]
    )
    assert {"loss", "kept", "step", "a"} <= set(texts(svg))


def test_svg_is_reproducible_and_carries_no_date():
    arguments = (figures.grouped_bars, ["x"], {"s": ("first", [one(1.0)])})
    first, second = (draw(*arguments, xlabel="") for _ in range(2))
    assert first == second
    assert "dc:date" not in first


@pytest.mark.parametrize(
    ("values", "ticks"),
    [((0.15, 0.6), {"0.2", "0.5"}), ((0.0008, 2.0), {"0.001", "0.01", "0.1", "1"})],
)
def test_a_logarithmic_axis_has_readable_ticks(values, ticks):
    lines = {"a": ("first", [one(value) for value in values], [0, 1])}
    shown = texts(draw(figures.curves, [("loss", lines)], xlabel="step", logarithmic=[True]))
    assert {text for text in shown if text.startswith("0.") or text == "1"} >= ticks
