"""Reports of finished runs: tables, figures, one HTML page, a summary for the documentation.

This part knows results only. It needs the packages of the extra `report` (matplotlib, jinja2).
"""

from __future__ import annotations

import importlib.util

from .page import Figure, Finding, Page, Section, Table, Tile
from .results import Results, format_count, format_percent, format_statistic

__all__ = [
    "Figure",
    "Finding",
    "Page",
    "Results",
    "Section",
    "Table",
    "Tile",
    "format_count",
    "format_percent",
    "format_statistic",
    "require",
    "write_report",
    "write_summary",
]


def require() -> None:
    """Check that the packages of the report are there, before hours of work depend on them.

    Raises:
        ModuleNotFoundError: says what to install.
    """
    missing = [n for n in ("matplotlib", "jinja2") if importlib.util.find_spec(n) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the report needs {' and '.join(missing)}: pip install 'modmask-kernels[report]'"
        )


def write_report(page: Page, folder: str) -> str:
    """Write figures/*.svg, light and dark, and report.html; returns the path of the page."""
    require()
    from .html import write_report as write

    return write(page, folder)


def write_summary(page: Page, results: Results, folder: str) -> str:
    """Write a small summary for the documentation; returns the path of its README.md.

    The folder gets metrics.json (without histograms and curves), README.md with findings and
    tables, and the page's key figures as SVG, light and dark.
    """
    require()
    from .summary import write_summary as write

    return write(page, results, folder)
