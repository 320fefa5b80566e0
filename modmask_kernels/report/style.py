"""Colours and matplotlib settings for light and dark pages.

Series take their colours from the palette of Okabe and Ito, which readers with any kind of colour
vision can tell apart; series are told apart by position or label as well.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas

if TYPE_CHECKING:
    from .page import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of one version of the page."""

    name: str
    background: str
    ink: str
    muted: str
    grid: str
    series: dict[str, str]

    def colour(self, role: str) -> str:
        """Colour of a series."""
        return self.series[role]

    @property
    def ramp(self) -> LinearSegmentedColormap:
        """From the background to one hue, for matrices."""
        low = {"light": "#f3f6f9", "dark": "#1d232b"}[self.name]
        return LinearSegmentedColormap.from_list("ramp", [low, self.series["first"]])


LIGHT = Theme(
    name="light",
    background="#ffffff",
    ink="#1b1f24",
    muted="#59636e",
    grid="#dfe3e8",
    series={
        "first": "#0072B2",
        "second": "#D55E00",
        "third": "#009E73",
        "fourth": "#CC79A7",
        "plain": "#6e7781",
    },
)
DARK = Theme(
    name="dark",
    background="#14181d",
    ink="#e6e9ed",
    muted="#9aa4af",
    grid="#2c333b",
    series={
        "first": "#56B4E9",
        "second": "#E69F00",
        "third": "#1DB88D",
        "fourth": "#CC79A7",
        "plain": "#8b949e",
    },
)
THEMES = (LIGHT, DARK)

_FONTS = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"


def _settings(theme: Theme) -> Any:
    return {
        "font.family": "sans-serif",
        # shipped with matplotlib, so that the layout is the same everywhere; wide, so that any
        # font of the reader's system fits
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "modmask",
        "text.color": theme.ink,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": 9,
        "axes.facecolor": "none",
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.titlecolor": theme.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.ink,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "legend.labelcolor": theme.ink,
        "lines.linewidth": 1.8,
    }


def render_svg(figure: Figure, theme: Theme) -> str:
    """Draw a figure in a theme, on a transparent ground; the same input gives the same text."""
    with matplotlib.rc_context(_settings(theme)):
        canvas = Canvas(figsize=figure.size, layout="constrained")
        figure.draw(canvas, theme)
        buffer = io.StringIO()
        FigureCanvasSVG(canvas).print_svg(  # type: ignore[no-untyped-call]
            buffer, metadata={"Date": None, "Creator": None, "Title": figure.alt}
        )
    # the reader's own interface font instead of the one that the layout was made with
    text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?sans-serif", _FONTS, buffer.getvalue())
    # a hundredth of a point is finer than any screen; what stands between tags is for people
    return re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)
