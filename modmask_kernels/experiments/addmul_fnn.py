"""Addition / multiplication with a feed-forward network: do the operations use different weights?

Csordás, van Steenkiste, Schmidhuber, "Are Neural Nets Modular? Inspecting Functional Modularity
Through Differentiable Weight Masks", ICLR 2021 (arXiv 2010.02066).
"""

# ruff: noqa: RUF001 - the multiplication sign and dashes belong to the text

from __future__ import annotations

import dataclasses

from ..report import Table, format_statistic
from .addmul import AddMulReport, AddMulStudy
from .arithmetic import CALIBRATED, FeedForwardSettings, FeedForwardStudy


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddMulSettings(FeedForwardSettings):
    """Settings of the experiment; the defaults are the published ones."""


PAPER = AddMulSettings()
QUICK = AddMulSettings(size="tiny", **CALIBRATED)
SMOKE = QUICK.replace(size="mini", steps=300, mask_steps=60, stability=False, checkpoint_every=25)
PRESETS = {"paper": PAPER, "quick": QUICK, "smoke": SMOKE}


class AddMulFNN(AddMulStudy[AddMulSettings], FeedForwardStudy[AddMulSettings]):
    """Train a network on both operations, learn the masks of both and of either, compare them."""

    name = "addmul-fnn"
    title = "Addition / multiplication, feed-forward network"
    network_name = "A feed-forward network"
    settings_type = AddMulSettings
    presets = PRESETS

    @property
    def report_type(self) -> type[AddMulFNNReport]:
        """With the calibration of the quick setting."""
        return AddMulFNNReport


class AddMulFNNReport(AddMulReport):
    """Adds the ranges of the independent implementation that calibrated the quick setting."""

    def beside_the_study(self) -> list[Table]:
        """With the calibration, where the settings are its own."""
        tables = super().beside_the_study()
        return [*tables, self.calibration_table()] if self.settings == QUICK else tables

    def calibration_table(self) -> Table:
        """The small setting elsewhere and here."""
        a, hidden, whole = self.accuracy, self.hidden, self.whole
        of = [self.pair(part, "add", "mul") for part in (self.layers[0], hidden, self.layers[-1])]

        def both(condition: str) -> str:
            return " / ".join(format_statistic(a[condition][op]) for op in ("add", "mul"))

        rows = [
            ["control mask: + / × right, %", "100 / 100", both("control")],
            ["+ mask: + / × right, %", "100 / 4", both("add")],
            ["× mask: + / × right, %", "4 / 100", both("mul")],
            ["+ inverted: + / × right, %", "21–26 / 27–48", both("not_add")],
            ["× inverted: + / × right, %", "53–58 / 36–40", both("not_mul")],
            ["control inverted: + / × right, %", "25–36 / 48–53", both("not_control")],
            [
                "hidden weights kept by + / ×, %",
                "4.4–4.7 / 3.2–3.3",
                " / ".join(format_statistic(hidden["kept_percent"][f]) for f in self.functions),
            ],
            [
                "IoU input / hidden / output",
                "0.32 / 0.19–0.22 / 0.54–0.56",
                " / ".join(format_statistic(s["iou"], 2) for s in of),
            ],
            [
                "IoMin input / hidden / output",
                "0.57–0.59 / 0.38–0.44 / 0.74–0.77",
                " / ".join(format_statistic(s["io_min"], 2) for s in of),
            ],
            [
                "shared, % of + / of ×",
                "40–41 / 52–57",
                " / ".join(format_statistic(whole["shared_percent"][f]) for f in self.functions),
            ],
            [
                "undecided, %",
                "1.5–2.4",
                " / ".join(format_statistic(s) for s in self.summary["undecided_percent"].values()),
            ],
        ]
        return Table(
            "The small setting in an independent implementation (two seeds), and this run",
            ["", "calibration", "here"],
            rows,
            note="A separate program with the same settings, run with two seeds; the ranges are "
            "theirs, so that a few seeds here may well lie outside. The inverted masks vary most: "
            "nothing trains what a network does without the weights that it needs.",
            words=True,
        )
