"""Double addition with an LSTM, in six modes of input and output."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..tasks import IO_MODES, PAIRS, AddPairsInTime
from .arithmetic import CALIBRATED, CHUNK, RecurrentSettings, RecurrentStudy
from .pair import SETS, PairReport, PairSettings, PairStudy
from .settings import option
from .study import Loss

# half of them for each pair where the pairs take turns
STEPS = 6

MODES = {
    "together": "both pairs at all six steps, both sums read at the end",
    "only_one_io": "each pair for three steps, its sum read at the third of them",
    "only_one": "each pair for three steps, both sums read at the end",
    "same_output": "both pairs at all six steps, the sums read from one output at steps 3 and 6",
    "same_input": "the pairs through one input, three steps each, both sums read at the end",
    "same_io": "the pairs through one input, three steps each, and their sums from one output",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairLSTMSettings(PairSettings, RecurrentSettings):
    """Settings of the experiment; the defaults are the published ones."""

    io: str = option(
        "together",
        "where the network meets the pairs: "
        + "; ".join(f"{name}: {text}" for name, text in MODES.items()),
        choices=tuple(IO_MODES),
    )


PAPER = PairLSTMSettings()
QUICK = PairLSTMSettings(state=64, layers=1, **CALIBRATED)
SMOKE = QUICK.replace(state=16, steps=120, mask_steps=24, stability=False, checkpoint_every=25)
PRESETS = {"paper": PAPER, "quick": QUICK, "smoke": SMOKE}


class PairLSTM(PairStudy[PairLSTMSettings], RecurrentStudy[PairLSTMSettings]):
    """One function twice, in a recurrent network."""

    name = "pair-lstm"
    title = "Double addition, LSTM"
    network_name = "An LSTM"
    settings_type = PairLSTMSettings
    presets = PRESETS

    @property
    def report_type(self) -> type[PairLSTMReport]:
        """With the mode of input and output."""
        return PairLSTMReport

    def _task(self, settings: PairLSTMSettings, pairs: Sequence[str] = PAIRS) -> AddPairsInTime:
        return AddPairsInTime(settings.digits, pairs, settings.batch, settings.device, settings.io)

    def features(self, settings: PairLSTMSettings) -> tuple[int, int]:
        """As many slots as the mode has."""
        task = self._task(settings)
        return task.in_features, task.out_features

    def steps(self, settings: PairLSTMSettings) -> tuple[int, Sequence[int]]:
        """Every vector for an equal part of the steps."""
        task = self._task(settings)
        return STEPS // task.mode.vectors, task.read_steps(STEPS)

    def network_words(self, settings: PairLSTMSettings) -> str:
        """With the mode."""
        return f"{super().network_words(settings)}, {MODES[settings.io]}"

    def sources(self, settings: PairLSTMSettings) -> dict[str, AddPairsInTime]:
        """The control sees both pairs; for the others the inputs of the other pair are zero."""
        return {name: self._task(settings, pairs) for name, pairs in SETS.items()}

    def loss(self, settings: PairLSTMSettings) -> Mapping[str, Loss]:
        """Cross-entropy of every digit of the pairs that are in the source."""
        return {name: source.loss for name, source in self.sources(settings).items()}

    @torch.no_grad()
    def measure(self, model: nn.Module, settings: PairLSTMSettings) -> dict[str, Any]:
        """Accuracy per pair, both shown, over all argument pairs in either place."""
        task = self._task(settings)
        rows = task.all_rows()
        right = torch.cat(
            [
                task.right(model(inputs), (inputs, targets))
                for inputs, targets in zip(*(torch.split(r, CHUNK) for r in rows), strict=True)
            ]
        )
        percent = 100 * right.double().mean(0)
        return {
            "accuracy": dict(zip(PAIRS, percent.tolist(), strict=True)),
            "both_percent": 100 * float(right.all(1).double().mean()),
        }


class PairLSTMReport(PairReport):
    """Tells how accuracy was taken."""

    def limits(self) -> list[str]:
        """With the inputs of the masks."""
        limits = super().limits()
        limits.append(
            "While the mask of one pair is learned, the inputs of the other pair are zero, as in "
            "the study; accuracy is taken with both pairs shown, so a mask can fail its own pair "
            "by not ignoring the other."
        )
        return limits

    def accuracy_limit(self) -> str:
        """All argument pairs, but not always all combinations of two of them."""
        text = super().accuracy_limit()
        if self.settings.digits == 1:
            return text
        return text + (
            " Of the combinations of both pairs, as many are taken as there are argument pairs, "
            "each once in either place."
        )
