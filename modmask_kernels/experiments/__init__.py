"""The experiments, one file each: settings, run, report."""

from __future__ import annotations

import difflib
from typing import Any

from .addmul_fnn import AddMulFNN
from .addmul_lstm import AddMulLSTM
from .pair_fnn import PairFNN
from .pair_lstm import PairLSTM
from .run import Experiment, Run, SeedFolder
from .settings import Settings, option
from .study import Function, Study, StudySettings
from .training import derive_seed, train

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "Function",
    "Run",
    "SeedFolder",
    "Settings",
    "Study",
    "StudySettings",
    "derive_seed",
    "get",
    "option",
    "train",
]

EXPERIMENTS: dict[str, Experiment[Any]] = {
    experiment.name: experiment for experiment in (AddMulFNN(), AddMulLSTM(), PairFNN(), PairLSTM())
}


def get(name: str) -> Experiment[Any]:
    """The experiment of that name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    near = difflib.get_close_matches(name, EXPERIMENTS, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(EXPERIMENTS)}"
    raise ValueError(f"no experiment is called {name!r}; {hint}")
