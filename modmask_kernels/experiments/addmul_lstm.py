"""Addition / multiplication with an LSTM, which sees the question for three steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .addmul import AddMulStudy
from .arithmetic import CALIBRATED, RecurrentSettings, RecurrentStudy
from .training import derive_seed

# steps that show the question; the answer is read at the last one
STEPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddMulLSTMSettings(RecurrentSettings):
    """Settings of the experiment; the defaults are the published ones."""


PAPER = AddMulLSTMSettings()
QUICK = AddMulLSTMSettings(state=64, layers=1, **CALIBRATED)
SMOKE = QUICK.replace(state=16, steps=200, mask_steps=40, stability=False, checkpoint_every=25)
PRESETS = {"paper": PAPER, "quick": QUICK, "smoke": SMOKE}


class AddMulLSTM(AddMulStudy[AddMulLSTMSettings], RecurrentStudy[AddMulLSTMSettings]):
    """The study of addition and multiplication, on a recurrent network."""

    name = "addmul-lstm"
    title = "Addition / multiplication, LSTM"
    network_name = "An LSTM that sees the question for three steps"
    settings_type = AddMulLSTMSettings
    presets = PRESETS

    def steps(self, settings: AddMulLSTMSettings) -> tuple[int, Sequence[int]]:
        """The question at all steps, the answer at the last."""
        return STEPS, (STEPS - 1,)

    def halves(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Up to five random halves of the weight matrices, the same ones in every run."""
        return random_halves(names)


def random_halves(names: Sequence[str], count: int = 5) -> dict[str, list[str]]:
    """Up to `count` different subsets of ceil(L / 2) of L names, as the study takes them."""
    size = -(-len(names) // 2)
    generator = torch.Generator().manual_seed(derive_seed(0, "halves", *names))
    found: list[list[int]] = []
    for _ in range(100):
        drawn = sorted(torch.randperm(len(names), generator=generator)[:size].tolist())
        if drawn not in found:
            found.append(drawn)
        if len(found) == count:
            break
    return {f"half {n}": [names[i] for i in drawn] for n, drawn in enumerate(found, 1)}
