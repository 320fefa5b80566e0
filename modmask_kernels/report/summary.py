"""A summary of a run for the documentation, small enough for a repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import write_json, write_text
from .page import Figure, Page, Table
from .results import Results
from .style import THEMES, render_svg

# curves and histograms are long and are in the figures
_LONG = 24


def _compact(value: Any) -> Any:
    """Without long lists; floats rounded to six significant digits."""
    if isinstance(value, dict):
        short = {k: _compact(v) for k, v in value.items()}
        kept = {k: v for k, v in short.items() if v is not _DROPPED}
        return kept if kept or not value else _DROPPED
    if isinstance(value, list):
        return _DROPPED if len(value) > _LONG else [_compact(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


_DROPPED = object()


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def markdown_table(table: Table) -> str:
    """A table in GitHub's Markdown, its caption above and its note below."""
    width = max(len(row) for row in [table.header, *table.rows])
    header = table.header or [""] * width
    align = ["---"] + ["---" if table.words else "---:"] * (width - 1)
    lines = [header, align, *table.rows]
    text = "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines)
    note = f"\n\n{table.note}" if table.note else ""
    return f"**{table.caption}**\n\n{text}{note}\n"


def markdown_figure(figure: Figure) -> str:
    """A figure in Markdown, light or dark as the reader's page is."""
    return (
        "<picture>\n"
        f'<source media="(prefers-color-scheme: dark)" srcset="{figure.name}-dark.svg">\n'
        f'<img src="{figure.name}-light.svg" alt="{figure.alt}">\n'
        "</picture>\n\n"
        f"{figure.caption}\n"
    )


def markdown(page: Page, command: str) -> str:
    """The page as Markdown, with its key figures."""
    parts = [f"# {page.question}", page.setting, f"```\n{command}\n```", " ".join(page.method)]
    parts.append("## What was found")
    parts.append(
        "\n".join(
            f"- **{f.headline}**{'' if f.sure else ' (with care)'} {f.text}" for f in page.findings
        )
    )
    parts.append("## What it does not say")
    parts.append("\n".join(f"- {limit}" for limit in page.limits))
    for section in page.sections:
        figures = [figure for figure in section.figures if figure.key]
        if not figures and not section.tables:
            continue
        parts.append(f"## {section.title}")
        parts += section.text
        parts += [markdown_figure(figure) for figure in figures]
        parts += [markdown_table(table) for table in section.tables]
    parts.append("## Settings and provenance")
    parts += [markdown_table(table) for table in [page.settings, *page.provenance]]
    parts.append(page.source)
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def write_summary(page: Page, results: Results, folder: str) -> str:
    """Write README.md, metrics.json and the key figures; returns the path of README.md."""
    target = Path(folder)
    for figure in page.figures:
        if figure.key:
            for theme in THEMES:
                write_text(target / f"{figure.name}-{theme.name}.svg", render_svg(figure, theme))
    metrics = {
        "experiment": results.experiment,
        "preset": results.preset,
        "settings": results.settings,
        "seeds": results.seeds,
        "summary": _compact(results.summary),
        "provenance": results.provenance,
    }
    write_json(target / "metrics.json", metrics)
    path = target / "README.md"
    write_text(path, markdown(page, page.command))
    return str(path)
