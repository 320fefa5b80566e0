"""The results of a finished run, as its folder holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Results:
    """What a report is made of.

    Attributes:
        experiment: name of the experiment.
        preset: name of the preset that the settings started from.
        settings: name to value.
        seeds: the seeds that were run.
        summary: the metrics with {"mean", "std", "values"} in place of every number.
        per_seed: the metrics of every seed.
        provenance: versions, machine and time of every seed.
    """

    experiment: str
    preset: str
    settings: dict[str, Any]
    seeds: list[int]
    summary: dict[str, Any]
    per_seed: list[dict[str, Any]]
    provenance: list[dict[str, Any]]

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a results folder.

        Raises:
            FileNotFoundError: the run is not finished.
        """
        if not (path / "metrics.json").exists():
            raise FileNotFoundError(
                f"{path} holds no finished run: metrics.json is missing; continue it with `modmask "
                f"run --resume {path}`"
            )
        record = json.loads((path / "settings.json").read_text(encoding="utf-8"))
        metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        provenance = []
        for seed in metrics["seeds"]:
            file = path / f"seed-{seed}" / "provenance.json"
            provenance.append(json.loads(file.read_text("utf-8")) if file.exists() else {})
        return cls(
            experiment=record["experiment"],
            preset=record["preset"],
            settings=record["settings"],
            seeds=metrics["seeds"],
            summary=metrics["summary"],
            per_seed=metrics["per_seed"],
            provenance=provenance,
        )


def format_statistic(statistic: Mapping[str, Any], digits: int = 1) -> str:
    """Mean, with the sample standard deviation if there are several runs: "41.3 ± 0.8"."""
    mean = f"{statistic['mean']:,.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return mean if statistic["std"] is None else f"{mean} ± {statistic['std']:,.{digits}f}"


def format_percent(statistic: Mapping[str, Any], digits: int = 1) -> str:
    """A percentage for prose: "41.3 ± 0.8 %", but "100 %" where all runs have that number."""
    values = set(statistic["values"])
    if len(values) == 1 and statistic["mean"] == round(statistic["mean"]):
        return f"{statistic['mean']:.0f} %"
    return f"{format_statistic(statistic, digits)} %"


def format_count(statistic: Mapping[str, Any]) -> str:
    """A count, in whole numbers."""
    return format_statistic(statistic, 0)
