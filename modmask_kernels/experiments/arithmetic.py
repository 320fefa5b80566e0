"""What the studies on arithmetic share: settings, and the two kinds of networks."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from ..models import FeedForward, Recurrent
from .settings import format_value, option
from .study import Study, StudySettings
from .study_report import StudyReport

SIZES: dict[str, tuple[int, ...]] = {
    "mini": (32, 32),
    "tiny": (200, 200),
    "small": (400, 400, 200),
    "medium": (800,) * 4,
    "big": (2000,) * 4,
    "huge": (4000,) * 4,
}
# rows evaluated at once
CHUNK = 10_000
# the calibrated small setting: raised mask learning rate and penalty make up for the few steps
CALIBRATED: dict[str, Any] = {
    "digits": 1,
    "steps": 1500,
    "mask_steps": 3000,
    "mask_lr": 0.05,
    "penalty": 5e-3,
    "stability": True,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticSettings(StudySettings):
    """Settings of all studies on arithmetic."""

    digits: int = option(2, "digits of the arguments and of the result", minimum=1)

    @property
    def largest(self) -> int:
        """The most digits that can be evaluated exactly."""
        return 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.digits > self.largest:
            raise ValueError(f"setting digits must be at most {self.largest}, got {self.digits}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForwardSettings(ArithmeticSettings):
    """Settings of a feed-forward network; the defaults are the published ones."""

    size: str = option(
        "big",
        "widths of the hidden layers: "
        + "; ".join(f"{name} {','.join(map(str, widths))}" for name, widths in SIZES.items()),
        choices=tuple(SIZES),
    )
    hidden: tuple[int, ...] = option(
        (), "other widths, two or more, instead of a named size", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.hidden) == 1:
            raise ValueError(
                f"setting hidden must name two or more layers, got {self.hidden[0]}: the hidden "
                "weights between them are what the study compares"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the hidden layers."""
        return self.hidden or SIZES[self.size]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentSettings(ArithmeticSettings):
    """Settings of an LSTM; the defaults are the published ones."""

    state: int = option(256, "units of every LSTM layer", minimum=1)
    layers: int = option(2, "LSTM layers", minimum=1)


A = TypeVar("A", bound=ArithmeticSettings)
F = TypeVar("F", bound=FeedForwardSettings)
R = TypeVar("R", bound=RecurrentSettings)


class ArithmeticStudy(Study[A]):
    """A study whose task says how many values go in and out."""

    @abstractmethod
    def features(self, settings: A) -> tuple[int, int]:
        """Sizes of an input and of an output."""

    @abstractmethod
    def network_words(self, settings: A) -> str:
        """The network in the words of a report."""


class FeedForwardStudy(ArithmeticStudy[F]):
    """A study of a feed-forward network."""

    def network(self, settings: F, generator: torch.Generator) -> FeedForward:
        """Linear layers with ReLU between them."""
        inputs, outputs = self.features(settings)
        return FeedForward(inputs, settings.widths, outputs, generator=generator)

    def network_text(self, settings: F) -> str:
        """ "22-200-200-10" """
        inputs, outputs = self.features(settings)
        return "-".join(map(str, (inputs, *settings.widths, outputs)))

    def network_words(self, settings: F) -> str:
        """ "a network with hidden layers 200 - 200, size tiny" """
        name = "" if settings.hidden else f", size {settings.size}"
        widths = " \N{EN DASH} ".join(str(w) for w in settings.widths)
        return f"a network with hidden layers {widths}{name}"

    def layer_title(self, name: str, names: Sequence[str]) -> str:
        """ "input", "hidden 1", "output" """
        index = list(names).index(name)
        if index == 0:
            return "input"
        return "output" if index == len(names) - 1 else f"hidden {index}"


class RecurrentStudy(ArithmeticStudy[R]):
    """A study of an LSTM."""

    @abstractmethod
    def steps(self, settings: R) -> tuple[int, Sequence[int]]:
        """How long every input vector is shown, and the steps at which the output is read."""

    def network(self, settings: R, generator: torch.Generator) -> Recurrent:
        """LSTM layers and a linear output layer."""
        inputs, outputs = self.features(settings)
        repeat, read = self.steps(settings)
        return Recurrent(
            inputs,
            settings.state,
            outputs,
            num_layers=settings.layers,
            repeat=repeat,
            read=read,
            generator=generator,
        )

    def network_text(self, settings: R) -> str:
        """ "LSTM 42-256-256-20" """
        inputs, outputs = self.features(settings)
        sizes = (inputs, *([settings.state] * settings.layers), outputs)
        return f"LSTM {'-'.join(map(str, sizes))}"

    def network_words(self, settings: R) -> str:
        """ "an LSTM of 2 layers with 256 units" """
        layers = f"{settings.layers} layer{'s' if settings.layers > 1 else ''}"
        return f"an LSTM of {layers} with {settings.state} units"

    def layer_title(self, name: str, names: Sequence[str]) -> str:
        """ "input 1" (input-hidden), "recurrent 1" (hidden-hidden), ..., "output" """
        if not name.startswith("lstm."):
            return "output"
        layer = int(name.rpartition("_l")[2]) + 1
        return f"{'input' if 'weight_ih' in name else 'recurrent'} {layer}"


class ArithmeticReport(StudyReport):
    """What the reports on arithmetic share."""

    study: ArithmeticStudy[Any]
    neutral = (*StudyReport.neutral, "size")

    def digits_text(self) -> str:
        """ "two-digit numbers, results modulo 100" """
        digits = self.settings.digits
        count = "one-digit" if digits == 1 else f"{digits}-digit"
        return f"{count} numbers, results modulo {10**digits}"

    def task_text(self) -> str:
        """Data and network in half a sentence."""
        return f"{self.digits_text()}, {self.study.network_words(self.settings)}"

    def accuracy_over(self) -> str:
        """Accuracies are exact."""
        return "over all argument pairs"

    def accuracy_limit(self) -> str:
        """That fit is measured, not generalisation."""
        return (
            f"Accuracy is over all {100**self.settings.digits:,} argument pairs of each "
            f"{self.study.noun}, the same ones that training draws from: it measures fit, not "
            "generalisation."
        )

    def loss_title(self) -> str:
        """The loss of all studies on arithmetic."""
        return "loss per digit"

    def changed(self) -> list[str]:
        """As for all studies, with the widths of a named size."""
        found = super().changed()
        base = self.study.presets[self.results.preset]
        if (
            isinstance(self.settings, FeedForwardSettings)
            and not self.settings.hidden
            and self.settings.widths != base.widths
            and self.results.preset != "paper"
        ):
            found.insert(0, f"size (now {format_value(self.settings.size)})")
        return found
