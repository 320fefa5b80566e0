import json
import re

import pytest

from modmask_kernels import report
from modmask_kernels.experiments import get
from modmask_kernels.report import Results, Table, format_count, format_percent, format_statistic
from modmask_kernels.report.summary import markdown_table


def test_summary(results, tmp_path):
    page = get("addmul-fnn").page(results)
    path = report.write_summary(page, results, str(tmp_path))
    text = (tmp_path / "README.md").read_text("utf-8")
    assert path == str(tmp_path / "README.md")
    assert text.startswith(f"# {page.question}")
    assert "modmask run addmul-fnn --preset smoke --seeds 2" in text
    for finding in page.findings:
        assert finding.headline in text
    names = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert len(names) == 2 * sum(figure.key for figure in page.figures)
    assert all((tmp_path / name).exists() for name in names)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1

    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["settings"] == results.settings
    assert "histogram" not in metrics["summary"]
    accuracy = metrics["summary"]["accuracy"]["control"]["add"]
    assert accuracy["values"] == results.summary["accuracy"]["control"]["add"]["values"]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 500_000


def test_markdown_table_escapes_bars():
    text = markdown_table(Table("T", ["", "a|b"], [["r", "1"]], note="N"))
    assert text == "**T**\n\n|  | a\\|b |\n| --- | ---: |\n| r | 1 |\n\nN\n"


def test_statistics_as_text():
    single = {"mean": 41.26, "std": None, "values": [41.26]}
    several = {"mean": 1234.5, "std": 0.25, "values": [1, 2]}
    assert format_statistic(single) == "41.3"
    assert format_statistic(several) == "1,234.5 ± 0.2"
    assert format_percent(single) == "41.3 %"
    assert format_percent({"mean": 100.0, "std": 0.0, "values": [100.0, 100.0]}) == "100 %"
    assert format_count(several) == "1,234 ± 0"


def test_results_need_a_finished_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="modmask run --resume"):
        Results.load(tmp_path)
