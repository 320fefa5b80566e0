"""The HTML page and its figures."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import jinja2

from ..files import write_text
from .page import Page
from .style import THEMES, render_svg

_TEMPLATES = Path(__file__).parent / "templates"


def template(name: str) -> jinja2.Template:
    """A template of the pages."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["nobreak"] = no_break
    return environment.get_template(name)


def draw_figures(page: Page) -> dict[str, dict[str, str]]:
    """SVG text of all figures: name to {"light", "dark"}."""
    names = [figure.name for figure in page.figures]
    if len(set(names)) != len(names):
        raise ValueError(f"figure names must differ, got {', '.join(names)}")
    return {
        figure.name: {theme.name: render_svg(figure, theme) for theme in THEMES}
        for figure in page.figures
    }


def no_break(text: str) -> str:
    """No line break inside "+ mask", "4 %", "200 × 200" and "41 ± 2"."""
    text = re.sub("([+\N{MULTIPLICATION SIGN}]) (masks?\\b)", "\\1\N{NO-BREAK SPACE}\\2", text)
    return re.sub(
        "(\\d) (%|[\N{MULTIPLICATION SIGN}±] \\d)", "\\1\N{NO-BREAK SPACE}\\2", text
    ).replace("± ", "±\N{NO-BREAK SPACE}")


def render_html(page: Page, drawings: dict[str, dict[str, str]]) -> str:
    """The page as one self-contained HTML text; equal input gives equal text."""
    images = {
        name: {
            theme: "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
            for theme, svg in versions.items()
        }
        for name, versions in drawings.items()
    }
    return template("report.html").render(page=page, images=images)


def write_report(page: Page, folder: str) -> str:
    """Write figures/NAME-{light,dark}.svg and report.html; returns the path of the page."""
    drawings = draw_figures(page)
    for name, versions in drawings.items():
        for theme, svg in versions.items():
            write_text(Path(folder) / "figures" / f"{name}-{theme}.svg", svg)
    path = Path(folder) / "report.html"
    write_text(path, render_html(page, drawings))
    return str(path)
