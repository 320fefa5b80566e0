"""The HTML page: complete, self-contained, the same every time."""

import base64
import dataclasses
import re
from html.parser import HTMLParser

import pytest

from modmask_kernels import report
from modmask_kernels.experiments import get
from modmask_kernels.report import Figure, Finding, Page, Section, Table, Tile
from modmask_kernels.report.html import draw_figures, no_break, render_html
from modmask_kernels.report.style import DARK, LIGHT

VOID = {"meta", "link", "img", "source", "br"}


class Checker(HTMLParser):
    """Collects tags and attributes; complains about unbalanced tags."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(html):
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    return checker


def dot(canvas, theme):
    canvas.subplots().plot([0, 1], [0, 1], color=theme.colour("first"))


def small_page(**changes):
    page = Page(
        title="A title",
        experiment="example",
        question="Is 1 < 2 & 3 > 2?",
        method=["One.", "Two.", "Three."],
        setting="The setting.",
        tiles=[Tile("4 %", "of <all>")],
        findings=[Finding("Yes.", "It is."), Finding("Perhaps.", "It may be.", sure=False)],
        limits=["Not more."],
        sections=[
            Section(
                "Numbers",
                ["Some text."],
                [Figure("dot", "A caption.", 'An "alternative".', dot)],
                [Table("A table", ["", "a"], [["row", "1 ± 2"]], note="A note.")],
            )
        ],
        settings=Table("Settings", ["name", "value"], [["x", "1"]], words=True),
        provenance=[Table("Provenance", [""], [["y"]], words=True)],
        source="A source.",
        command="modmask run example",
    )
    return dataclasses.replace(page, **changes)


def test_small_page():
    page = small_page()
    html = render_html(page, draw_figures(page))
    checker = check(html)
    text = "".join(checker.text)
    assert "Is 1 < 2 & 3 > 2?" in text
    assert "of <all>" in text
    assert "<all>" not in html  # text never becomes markup
    assert text.count("(with care)") == 1
    for part in ("One. Two. Three.", "Not more.", "A caption.", "A note.", "A source."):
        assert part in text
    (image,) = [attributes for tag, attributes in checker.tags if tag == "img"]
    assert image["alt"] == 'An "alternative".'


def test_page_loads_nothing_and_runs_nothing(results, drawings):
    page = get("addmul-fnn").page(results)
    html = render_html(page, drawings)
    checker = check(html)
    tags = [tag for tag, _ in checker.tags]
    assert "script" not in tags
    assert "iframe" not in tags
    for tag, attributes in checker.tags:
        for name in ("src", "srcset", "href"):
            if name in attributes and tag != "a":
                assert attributes[name].startswith("data:"), (tag, attributes[name][:50])
        assert not any(name.startswith("on") for name in attributes)
    style = html.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert 'name="viewport"' in html
    for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html):
        svg = base64.b64decode(data).decode()
        # the only addresses are the names of the XML vocabularies
        addresses = set(re.findall(r"https?://[^\"' ]+", svg))
        assert all("w3.org" in a or "purl.org" in a or "creativecommons" in a for a in addresses)


def test_every_figure_is_there_in_light_and_dark(results, drawings):
    page = get("addmul-fnn").page(results)
    html = render_html(page, drawings)
    assert html.count("<picture>") == len(page.figures) == html.count("<figure>")
    for versions in drawings.values():
        assert versions["light"] != versions["dark"]
        for theme in (LIGHT, DARK):
            data = base64.b64encode(versions[theme.name].encode()).decode()
            assert data in html


def test_figures_stay_legible_on_a_phone(results):
    """Widths in inches at 96 pixels: type of 8 points must not shrink below 6 at 360 pixels."""
    for figure in get("addmul-fnn").page(results).figures:
        assert figure.size[0] * 96 <= (360 - 32) * 8 / 6


def test_rebuilding_gives_the_same_bytes(tmp_path, results, drawings):
    page = get("addmul-fnn").page(results)
    path = report.write_report(page, str(tmp_path))
    assert path == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text("utf-8") == render_html(page, drawings)
    for name, versions in drawings.items():
        for theme, svg in versions.items():
            assert (tmp_path / "figures" / f"{name}-{theme}.svg").read_text("utf-8") == svg
    assert len(list((tmp_path / "figures").iterdir())) == 2 * len(page.figures)


def test_equal_figure_names_are_an_error():
    page = small_page()
    twice = dataclasses.replace(page, sections=page.sections * 2)
    with pytest.raises(ValueError, match="figure names must differ"):
        draw_figures(twice)


def test_no_break():
    space = "\N{NO-BREAK SPACE}"
    assert no_break("the + mask of 4 % and 2 ± 1") == (
        f"the +{space}mask of 4{space}% and 2{space}±{space}1"
    )


def test_palette_is_that_of_okabe_and_ito():
    published = {"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"}
    light = {LIGHT.colour(role) for role in ("first", "second", "third", "fourth")}
    dark = {DARK.colour(role) for role in ("first", "second", "fourth")}
    assert light | dark <= published


def test_require_names_what_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"matplotlib and jinja2.*modmask-kernels\[report"
    ):
        report.require()
