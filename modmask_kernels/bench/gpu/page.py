"""What was found as one page: pure functions of the JSON file."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from ...report.page import Figure, Table
from .. import machine as machines
from ..figure import Panel, figure_of_panels
from .cases import SUITES
from .rows import (
    Row,
    best,
    ceilings_of,
    median,
    over_prediction,
    quotient,
    share_of_ceiling,
)

_TITLES = {
    "linear": "masked_linear, forward and backward, against torch.nn.Linear",
    "conv": "masked_conv2d, forward and backward, against torch.nn.Conv2d",
    "lstm": "MaskedLSTM, forward and backward, against torch.nn.LSTM",
    "sample": "Drawing and packing masks, against one copy of the operand",
    "top_k": "Masks of half of the scores, against torch.topk",
    "select": "select_linear, forward, against F.linear without masks",
}
# columns of the ratio to plain beside `fused`
_OTHERS = {
    "naive": "naive",
    "compiled": "compiled naive",
    "by set": "by set",
    "packed": "packed",
}
_MEBIBYTE = 2**20


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.{digits}f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
    )


def _us(seconds: float | None) -> str:
    return _number(None if seconds is None else 1e6 * seconds, 1)


def measured(results: dict[str, Any], suite: str | None = None) -> list[Row]:
    """The rows with numbers, of a suite or of all."""
    rows = results.get("rows", [])
    return [r for r in rows if r["status"] == "measured" and suite in (None, r["suite"])]


def _ratio(row: Row, name: str, how: str | None) -> dict[str, float] | None:
    found: dict[str, float] | None = row["ratio_to_plain"].get(how, {}).get(name)
    return found


def _suite_table(results: dict[str, Any], suite: str) -> Table | None:
    rows = measured(results, suite)
    if not rows:
        return None
    ceilings = ceilings_of(results["rows"])
    others = [n for n in _OTHERS if any(_ratio(row, n, best(row)) for row in rows)]
    lines = []
    for row in rows:
        how = best(row)
        fused = _ratio(row, "fused", how)
        spread = ""
        if fused:
            spread = f"{_number(fused['value'])} ({_number(fused['p20'])}-{_number(fused['p80'])})"
        from_python = _ratio(row, "fused", "eager")
        peak = row["peak_bytes"]
        lines.append(
            [
                row["label"] + ("" if how != "eager" or not _on_gpu(results) else " *"),
                _us(median(row, "plain")),
                _us(median(row, "fused")),
                spread or "-",
                _number(from_python["value"] if from_python else None),
                *(_number((_ratio(row, n, how) or {}).get("value")) for n in others),
                *(_percent(share_of_ceiling(row, n, ceilings)) for n in ("plain", "fused")),
                *(_mebibytes(peak.get(n)) for n in ("plain", "fused", "naive")),
            ]
        )
    return Table(
        caption=_TITLES[suite],
        header=[
            *("row", "plain, us", "fused, us", "fused / plain (p20-p80)", "from Python"),
            *(f"{_OTHERS[n]} / plain" for n in others),
            *("plain, of the ceiling", "fused, of the ceiling"),
            *(f"peak {n}, MiB" for n in ("plain", "fused", "naive")),
        ],
        rows=lines,
    )


def _on_gpu(results: dict[str, Any]) -> bool:
    return not results["rehearsal"]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / _MEBIBYTE:.1f}"


def _ceiling_table(results: dict[str, Any]) -> Table | None:
    lines = []
    for row in measured(results, "ceilings"):
        seconds, work = median(row, "plain"), row["work"]["plain"]
        if seconds:
            rate = work["operations"] / seconds / 1e12
            said = f"{rate:.1f} TFLOP/s" if rate else f"{work['bytes'] / seconds / 1e12:.2f} TB/s"
            lines.append([row["label"], said])
    if not lines:
        return None
    return Table(
        "Ceilings, measured in the same run",
        ["what", "rate"],
        lines,
        note="Copy and triad (a + 3 b): bytes read and written. Products: torch.mm of random "
        "square matrices.",
    )


def _prediction_table(results: dict[str, Any]) -> Table | None:
    parts = ("forward", "dx", "dlogits")
    lines = []
    for row in measured(results, "linear"):
        quotients = over_prediction(row)
        if not quotients:
            continue
        predicted = row["prediction"]
        fused = _ratio(row, "fused", best(row))
        lines.append(
            [
                row["label"],
                predicted["source"],
                *(_us(predicted["seconds"][n]) for n in ("plain", "fused")),
                _number(quotients.get("plain")),
                _number(quotients.get("fused")),
                *(_number(quotients.get(n)) for n in parts),
                _number(predicted["ratios"]["fused"]),
                _number(fused["value"] if fused else None),
            ]
        )
    if not lines:
        return None
    medians = ", ".join(
        f"{name} {_number(quotient(results['rows'], name))}" for name in ("plain", "fused", *parts)
    )
    return Table(
        "Predicted and measured",
        [
            *("row", "masks from", "plain, predicted, us", "fused, predicted, us"),
            *(f"{name}, measured / predicted" for name in ("plain", "fused", *parts)),
            *("fused / plain, predicted", "measured"),
        ],
        lines,
        note="[The prediction](../roofline.md) of `bench.roofline`. The parts are differences: "
        "forward and backward for one gradient, less forward. Median measured / predicted: "
        f"{medians}.",
    )


def _other_table(results: dict[str, Any]) -> Table | None:
    lines = [
        [f"{row['suite']}: {row['label']}", row["status"], row["reason"]]
        for row in results.get("rows", [])
        if row["status"] != "measured"
    ]
    lines += [
        [f"{row['suite']}: {row['label']}", name, reason]
        for row in measured(results)
        for name, reason in row["absent"].items()
    ]
    return Table("Not measured", ["row", "what", "why"], lines, words=True) if lines else None


def _check_tables(results: dict[str, Any]) -> list[Table]:
    tables = []
    tests = results.get("tests")
    if tests is not None:
        lines = [["all together", tests["status"], tests.get("reason", "")]]
        lines += [["passed", str(tests["passed"]), ""]] if "passed" in tests else []
        lines += [["skipped", str(n), why] for why, n in tests.get("skipped", {}).items()]
        lines += [
            [f["test"], f"failed; alone: {f.get('alone', 'not run')}", _one_line(f["message"])]
            for f in tests.get("failed", [])
        ]
        tables.append(Table("Tests of tests/gpu", ["what", "outcome", "said"], lines, words=True))
    found = results.get("sanitizer")
    if found is not None:
        lines = [["all together", found["status"], found.get("reason", "")]]
        lines += [[tool, f["status"], f["said"]] for tool, f in found.get("tools", {}).items()]
        lines += [[way, "absent", reason] for way, reason in found.get("absent", {}).items()]
        tables.append(
            Table(
                "compute-sanitizer, every kernel on small shapes",
                ["tool", "outcome", "said"],
                lines,
                words=True,
            )
        )
    return tables


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def tables(results: dict[str, Any]) -> list[Table]:
    """All tables of what was run."""
    made = [
        *_check_tables(results),
        _ceiling_table(results),
        *(_suite_table(results, suite) for suite in SUITES if suite in _TITLES),
        _prediction_table(results),
        _other_table(results),
    ]
    return [table for table in made if table is not None]


def figure_of(results: dict[str, Any]) -> Figure | None:
    """Ratios to the plain layer, measured and predicted; None if nothing was measured."""
    panels: list[Panel] = []
    for suite in ("linear", "conv", "lstm"):
        labels: list[str] = []
        points: list[dict[str, float]] = []
        for row in measured(results, suite):
            ratios = row["ratio_to_plain"].get(best(row), {})
            if "fused" not in ratios:
                continue
            labels.append(row["label"])
            point = {n: ratios[n]["value"] for n in ("fused", "naive", "compiled") if n in ratios}
            predicted = row.get("prediction", {}).get("ratios")
            points.append(point | ({"predicted": predicted["fused"]} if predicted else {}))
        if labels:
            panels.append((f"{suite}: time relative to the plain layer", labels, points, []))
    if not panels:
        return None
    panels = [(title, labels, points, [None] * len(labels)) for title, labels, points, _ in panels]
    return figure_of_panels(
        "gpu",
        panels,
        "The vertical line is the plain layer; left is better. The scale is logarithmic; numbers "
        "are those of the fused kernel.",
    )


def headline(results: dict[str, Any]) -> str:
    """The device and the versions, in lines."""
    machine = results["machine"]
    gpu = machine["gpu"]
    if gpu is None:
        said = "No GPU"
    else:
        said = (
            f"{gpu['name']} (sm_{gpu['capability']}, {gpu['processors']} processors, "
            f"{gpu['memory'] / 2**30:.0f} GiB, driver {gpu['driver']}), CUDA {gpu['cuda']}, "
            f"cuDNN {gpu['cudnn']}"
        )
    kernels = f"CUDA kernels: {machine['cuda_kernels']}; Triton: {machine['triton']}."
    return f"{said}. {kernels}\n\n{machines.headline(machine)}."


def text(results: dict[str, Any]) -> str:
    """Everything for the terminal."""
    from ..tables import text_table

    return "\n\n".join([headline(results), *map(text_table, tables(results))])


def markdown(results: dict[str, Any], command: str, figure: Figure | None) -> str:
    """Everything as one page."""
    from ...report.summary import markdown_figure, markdown_table

    parts = ["# Measured on a GPU"]
    if results["rehearsal"]:
        parts = [
            "# Rehearsal on a CPU",
            "**Nothing here was measured on a GPU**: tiny shapes that try out the command.",
        ]
    parts += [headline(results), f"```\n{command}\n```"]
    if _on_gpu(results):
        parts.append(
            "Times are medians between CUDA events, the level 2 cache overwritten before every "
            "call, clocks as they are; of CUDA graphs, but for rows with a *, which were called "
            "from Python. `From Python`: the ratio when both are called from Python, launches "
            "and all. Candidates take turns; ratios are medians over the rounds of the ratio "
            "within one, with the 20th and 80th percentile. Of the ceiling: the time that the "
            "measured ceilings below allow for the least work, over the time taken. Peak: memory "
            "beyond the operands."
        )
    if figure is not None:
        parts.append(markdown_figure(figure).rstrip("\n"))
    parts += [markdown_table(table).rstrip("\n") for table in tables(results)]
    return "\n\n".join(parts) + "\n"


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def problems(results: dict[str, Any], wanted: Sequence[str]) -> list[str]:
    """What did not end well, in words; rows that time did not allow are not among it."""
    found = [
        f"{part}: {results[part].get('reason') or results[part]['status']}"
        for part in ("tests", "sanitizer")
        if part in wanted and results.get(part, {}).get("status") in ("failed", "stopped")
    ]
    rows = [r for r in results.get("rows", []) if r["status"] not in ("measured", "not reached")]
    if "bench" in wanted and rows:
        found.append(f"bench: {len(rows)} of {len(results['rows'])} rows failed")
    return found
