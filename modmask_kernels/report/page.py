"""What a report page consists of, before it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .style import Theme


@dataclass(frozen=True)
class Figure:
    """A figure that can be drawn in any theme.

    Attributes:
        name: stem of its files.
        caption: what it shows and how to read it.
        alt: the same for readers who do not see it.
        draw: called with a matplotlib figure and a theme.
        size: width and height in inches; widths of 4.4 or less are legible on a phone.
        key: whether the summary for the documentation takes it.
    """

    name: str
    caption: str
    alt: str
    draw: Callable[[Any, Theme], None]
    size: tuple[float, float] = (4.4, 3.0)
    key: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows. `words`: its cells are text, not numbers."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    words: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page: text, then figures, then tables."""

    title: str
    text: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Finding:
    """One thing that the numbers say. Where `sure` is False, the text gives a qualifier."""

    headline: str
    text: str
    sure: bool = True


@dataclass(frozen=True)
class Tile:
    """One number that a reader should take away."""

    value: str
    label: str


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    experiment: str
    question: str
    method: list[str]
    setting: str
    tiles: list[Tile]
    findings: list[Finding]
    limits: list[str]
    sections: list[Section]
    settings: Table
    provenance: list[Table]
    source: str
    command: str

    @property
    def figures(self) -> list[Figure]:
        """All figures in the order of the page."""
        return [figure for section in self.sections for figure in section.figures]
