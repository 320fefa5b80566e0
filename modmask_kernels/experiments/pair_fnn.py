"""Double addition with a feed-forward network, which never sees both pairs together."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ..models import FeedForward
from ..report import Finding, Table, format_statistic
from ..tasks import PAIRS, AddPairsApart
from .arithmetic import CALIBRATED, CHUNK, FeedForwardSettings, FeedForwardStudy
from .pair import SETS, PairReport, PairSettings, PairStudy
from .settings import option
from .study import CONTROL, Loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairFNNSettings(PairSettings, FeedForwardSettings):
    """Settings of the experiment; the defaults are the published ones."""

    penalty: float = option(
        4e-4,
        "beta, the push against every logit; the coefficient per logit is beta / batch",
        minimum=0,
    )
    copy_weights: bool = option(
        False,
        "after training, let pair 1 run through the weights of pair 2: a positive control, in "
        "which the masks must coincide if the method can see sharing at all",
    )


PAPER = PairFNNSettings()
QUICK = PairFNNSettings(size="tiny", **CALIBRATED)
SMOKE = QUICK.replace(size="mini", steps=200, mask_steps=40, stability=False, checkpoint_every=25)
PRESETS = {"paper": PAPER, "quick": QUICK, "smoke": SMOKE}


class PairFNN(PairStudy[PairFNNSettings], FeedForwardStudy[PairFNNSettings]):
    """One function twice, on disjoint inputs and outputs of one network."""

    name = "pair-fnn"
    title = "Double addition, feed-forward network"
    network_name = "A feed-forward network, which sees one pair at a time,"
    settings_type = PairFNNSettings
    presets = PRESETS

    @property
    def report_type(self) -> type[PairFNNReport]:
        """With the positive control."""
        return PairFNNReport

    def features(self, settings: PairFNNSettings) -> tuple[int, int]:
        """A slot for each pair, in and out."""
        task = AddPairsApart(settings.digits)
        return task.in_features, task.out_features

    def sources(self, settings: PairFNNSettings) -> dict[str, AddPairsApart]:
        """The control sees both pairs, one after the other, the others their own only."""
        return {
            name: AddPairsApart(settings.digits, pairs, settings.batch, settings.device)
            for name, pairs in SETS.items()
        }

    def groups(self, settings: PairFNNSettings) -> list[list[str]]:
        """The control runs twice per example, the others once."""
        return [[CONTROL], list(self.functions)]

    def loss(self, settings: PairFNNSettings) -> Loss:
        """Cross-entropy of every digit of a row's own slot."""
        return AddPairsApart(settings.digits).loss

    def change_network(self, model: nn.Module, settings: PairFNNSettings) -> None:
        """The positive control."""
        if settings.copy_weights:
            copy_weights(model)

    @torch.no_grad()
    def measure(self, model: nn.Module, settings: PairFNNSettings) -> dict[str, Any]:
        """Accuracy over all argument pairs in either slot."""
        task = AddPairsApart(settings.digits, device=settings.device)
        rates = {}
        for name in PAIRS:
            rows = task.all_rows(name)
            parts = [torch.split(part, CHUNK) for part in rows]
            right = sum(
                int(torch.count_nonzero(task.right(model(inputs), (inputs, targets, pair))))
                for inputs, targets, pair in zip(*parts, strict=True)
            )
            rates[name] = 100 * right / task.combinations
        # the pairs do not meet: every first argument pair goes with every second
        return {"accuracy": rates, "both_percent": rates["first"] * rates["second"] / 100}


@torch.no_grad()
def copy_weights(model: nn.Module) -> None:
    """Let pair 1 run through the weights of pair 2, in place.

    The input columns of pair 2 overwrite those of pair 1, and its output rows and biases likewise.
    """
    assert isinstance(model, FeedForward)
    first, last = model.layers[0], model.layers[-1]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    columns = first.weight.view(len(first.weight), len(PAIRS), -1)
    columns[:, 0] = columns[:, 1]
    for parameter in (last.weight, last.bias):
        rows = parameter.view(len(PAIRS), -1)
        rows[0] = rows[1]


class PairFNNReport(PairReport):
    """Adds the positive control and the calibration of the quick setting."""

    def own_findings(self) -> list[Finding]:
        """What the copied weights are there for."""
        if not self.settings.copy_weights:
            return []
        return [
            Finding(
                "This is the positive control: both pairs run through the same weights.",
                "After training, the input columns and output rows of pair 2 were copied over "
                "those of pair 1. If the method can see sharing, the hidden masks must coincide up "
                "to the noise of learning them.",
            )
        ]

    def sharing(self) -> Finding:
        """As for all pairs; where weights were copied, it judges the method."""
        found = super().sharing()
        if not self.settings.copy_weights or not found.sure:
            return found
        if found.headline.startswith("Both additions use the same"):
            return Finding("The method sees sharing where there is sharing.", found.text)
        return Finding("The method misses sharing that is there.", found.text, sure=False)

    def beside_the_study(self) -> list[Table]:
        """With the calibration, where the settings are its own."""
        tables = super().beside_the_study()
        plain = self.settings.replace(copy_weights=False, inverse_io="none") == QUICK
        return [*tables, self.calibration_table()] if plain else tables

    def calibration_table(self) -> Table:
        """The small setting elsewhere and here."""
        a, hidden = self.accuracy, self.hidden
        found = self.pair(hidden, "first", "second")
        copied = self.settings.copy_weights
        other = "-" if copied else "10"

        def both(condition: str) -> str:
            return " / ".join(format_statistic(a[condition][key]) for key in self.functions)

        rows = [
            ["control mask: pair 1 / 2 right, %", "100 / 100", both("control")],
            [
                "pair 1 mask: pair 1 / 2 right, %",
                f"100 / {other}",
                both("first"),
            ],
            [
                "pair 2 mask: pair 1 / 2 right, %",
                f"{other} / 100",
                both("second"),
            ],
            ["hidden IoU", "0.86" if copied else "0.10-0.11", format_statistic(found["iou"], 2)],
            ["hidden IoMin", "0.93" if copied else "0.19", format_statistic(found["io_min"], 2)],
        ]
        if not copied:
            rows += [
                ["pair 1 inverted: pair 1 / 2 right, %", "37-39 / 100", both("not_first")],
                ["pair 2 inverted: pair 1 / 2 right, %", "100 / 40-45", both("not_second")],
                ["control inverted: pair 1 / 2 right, %", "80-92 / 80-92", both("not_control")],
                [
                    "hidden weights kept by pair 1 / 2, %",
                    "4.4-4.9",
                    " / ".join(format_statistic(hidden["kept_percent"][f]) for f in self.functions),
                ],
                [
                    "shared, % of pair 1 / of pair 2",
                    "8.3-8.7",
                    " / ".join(
                        format_statistic(self.whole["shared_percent"][f]) for f in self.functions
                    ),
                ],
            ]
        seeds = "one seed" if copied else "two seeds"
        return Table(
            f"The small setting in an independent implementation ({seeds}), and this run",
            ["", "calibration", "here"],
            [[cell.replace("-", "\N{EN DASH}") for cell in row[:2]] + row[2:] for row in rows],
            note="A separate program with the same settings; the ranges are its own, so that a few "
            "seeds here may well lie outside.",
            words=True,
        )
