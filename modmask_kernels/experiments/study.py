"""A study of masks: one network, one mask per function, and what they tell about it.

Every experiment of the study "Are Neural Nets Modular?" (Csordás, van Steenkiste, Schmidhuber, ICLR
2021, arXiv 2010.02066) that freezes a network and compares masks is a `Study`: it states network,
data, loss and evaluation, and has its stages, measures, tests and report from here.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import analysis
from ..files import atomic, read_json, write_json
from ..masks import (
    LearnResult,
    MaskSet,
    PenaltySearch,
    learn_masks,
    mask_model,
    tune_penalty,
)
from .run import Experiment, Run, SeedFolder
from .settings import Settings, option
from .training import derive_seed, train

if TYPE_CHECKING:
    from ..report import Page, Results
    from .study_report import StudyReport

Masks = Mapping[str, Tensor]
Batch = tuple[Tensor, ...]
Source = Callable[[int, torch.Generator], Batch]
Loss = Callable[[Tensor, Any], Tensor]

CONTROL = "control"
UNMASKED = "unmasked"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySettings(Settings):
    """What all studies have in common; the defaults are the published ones."""

    steps: int = option(20_000, "training steps of the network", minimum=1)
    batch: int = option(128, "examples per step, of the network and of every mask", minimum=1)
    lr: float = option(1e-3, "learning rate of the network (Adam)", above=0)
    mask_steps: int = option(20_000, "learning steps of every mask", minimum=1)
    mask_lr: float = option(1e-2, "learning rate of the masks (Adam)", above=0)
    penalty: float = option(
        1e-4,
        "beta, the push against every logit; the coefficient per logit is beta / batch",
        minimum=0,
    )
    samples: int = option(4, "masks drawn per step, each for its part of the batch", minimum=1)
    mask_init: float = option(2.0, "initial logit of every weight")
    tau: float = option(1.0, "temperature of the mask samples", above=0)
    grad_clip: float = option(1.0, "largest gradient norm of network and masks; 0: off", minimum=0)
    learning: str = option(
        "joint",
        "learn the masks side by side, as far as they can share a pass over the network, or one "
        "after the other",
        choices=("joint", "separate"),
    )
    stability: bool = option(
        False, "learn every mask a second time, to see how far a repeated mask agrees"
    )
    checkpoint_every: int = option(1000, "steps between two checkpoints", minimum=1)
    device: str = option("cpu", "device that computes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch % self.samples:
            raise ValueError(
                f"setting batch must be a multiple of samples, got {self.batch} and {self.samples}"
            )

    @property
    def alpha(self) -> float:
        """Penalty per logit."""
        return self.penalty / self.batch


@dataclasses.dataclass(frozen=True)
class Function:
    """How a report calls a function of the network and its mask.

    Attributes:
        label: short name, of the mask too: "+".
        title: head of a column: "addition".
        many: what is counted: "additions".
        role: colour of its series.
    """

    label: str
    title: str
    many: str
    role: str


T = TypeVar("T", bound=StudySettings)


class Study(Experiment[T]):
    """A network is trained and frozen; a control mask and one mask per function are learned.

    Attributes:
        functions: name to wording of every mask but the control.
        noun, nouns: what a function is called: "operation", "operations".
        inverse_io: variants of the inverse-mask test that every run evaluates (see
            `analysis.inverse_mask`); "none" is always among them.
        question, method: the question of the report and the method in three sentences.
    """

    functions: ClassVar[Mapping[str, Function]]
    noun: ClassVar[str] = "function"
    nouns: ClassVar[str] = "functions"
    inverse_io: ClassVar[tuple[analysis.ExcludeIO, ...]] = ("none",)
    question: ClassVar[str]
    method: ClassVar[Sequence[str]]

    def __init__(self) -> None:
        self.tests = {
            "inverse": self.inverse_test,
            "half-mask": self.half_mask_test,
            "histogram": self.histogram_test,
            "stability": self.stability_test,
        }

    # --- what an experiment states ----------------------------------------------------------------

    @abstractmethod
    def network(self, settings: T, generator: torch.Generator) -> nn.Module:
        """The untrained network, its initial values drawn from the generator."""

    @abstractmethod
    def sources(self, settings: T) -> Mapping[str, Source]:
        """Data of every mask, the control first. The network is trained on those of the control."""

    @abstractmethod
    def loss(self, settings: T) -> Loss | Mapping[str, Loss]:
        """(output, batch) to a scalar, for the network and all masks, or one for each mask."""

    @abstractmethod
    def measure(self, model: nn.Module, settings: T) -> dict[str, Any]:
        """Evaluate a plain network in eval mode.

        Returns:
            "accuracy": right answers in per cent by name in `measured`; and whatever else the
            experiment wants to know of every condition.
        """

    @abstractmethod
    def layer_title(self, name: str, names: Sequence[str]) -> str:
        """What tables and figures call the masked parameter `name`, one of `names`."""

    @abstractmethod
    def network_text(self, settings: T) -> str:
        """The network in a few words: "22-200-200-10"."""

    @property
    def measured(self) -> Mapping[str, Function]:
        """What accuracies are taken of; the functions, if not said otherwise."""
        return self.functions

    @property
    @abstractmethod
    def report_type(self) -> type[StudyReport]:
        """The report of a finished run."""

    def facts(self, settings: T) -> dict[str, Any]:
        """Numbers of the task alone that the report needs."""
        return {}

    def change_network(self, model: nn.Module, settings: T) -> None:
        """Change the trained network in place before it is frozen."""

    def groups(self, settings: T) -> list[list[str]]:
        """Masks that are learned side by side: those with batches of equal numbers of rows."""
        return [self.masks]

    def io(self, names: Sequence[str]) -> tuple[str, ...]:
        """Input and output tensors; the others are the hidden ones."""
        return (names[0], names[-1])

    def halves(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Parts of the half-mask test: name to the parameters that the mask lies on."""
        early = analysis.early_half(names)
        return {"early": early, "late": [name for name in names if name not in early]}

    # --- stages -----------------------------------------------------------------------------------

    @property
    def masks(self) -> list[str]:
        """Names of all masks, the control first."""
        return [CONTROL, *self.functions]

    def describe(self, settings: T) -> str:
        """Network, steps, and the penalty both as the study writes it and per logit."""
        return (
            f"network {self.network_text(settings)}, {settings.steps:,} steps; masks "
            f"{settings.mask_steps:,} steps, penalty beta {settings.penalty:g} (alpha "
            f"{settings.alpha:.3g} per logit)"
        )

    def run_seed(self, settings: T, seed: int, folder: SeedFolder) -> dict[str, Any]:
        """Train the network, learn the masks, evaluate; or what of it is missing."""
        curve = self.train_network(settings, seed, folder)
        learning = self.learn(settings, folder, "masks", derive_seed(seed, "masks"))
        if settings.stability:
            self.repeat_masks(settings, seed, folder)
        with folder.stage("evaluation"):
            metrics = self.evaluate(settings, folder)
        shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
        return {"seed": seed, **metrics, "network_loss": curve, "learning": learning}

    def build(self, settings: T, seed: int = 0) -> nn.Module:
        """The untrained network of a seed."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "initial weights"))
        return self.network(settings, generator).to(settings.device)

    def load(self, settings: T, folder: SeedFolder) -> nn.Module:
        """The trained network of a seed."""
        model = self.build(settings)
        model.load_state_dict(load_file(folder.weights, device=settings.device))
        return model

    def train_network(self, settings: T, seed: int, folder: SeedFolder) -> list[dict[str, float]]:
        """Train the network of a seed, unless that is done; returns its learning curve."""
        record = folder.path / "network.json"
        if record.exists():
            return list(read_json(record))
        model = self.build(settings, seed)
        with folder.stage("network") as description:
            rows = train(
                model,
                _of(self.loss(settings), CONTROL),
                self.sources(settings)[CONTROL],
                settings.steps,
                lr=settings.lr,
                grad_clip=settings.grad_clip,
                seed=derive_seed(seed, "network data"),
                checkpoint=folder.checkpoint("network"),
                checkpoint_every=settings.checkpoint_every,
                log_every=max(settings.steps // 100, 1),
                progress=folder.progress,
                description=description,
            )
            self.change_network(model, settings)
            with atomic(folder.weights) as path:
                save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
        write_json(record, rows)
        return rows

    def learn(
        self, settings: T, folder: SeedFolder, stage: str, seed: int, suffix: str = ""
    ) -> dict[str, list[dict[str, float]]]:
        """Learn all masks over the seed's frozen network, or what is missing of them.

        Args:
            settings: of the run.
            folder: of the seed; its network must be there. The masks are written to it.
            stage: name of the stage.
            seed: source of data order and noise.
            suffix: put behind the names of the mask files.

        Returns:
            the learning curve of every mask: rows {"step", "loss", "kept_percent"}.
        """
        groups = self.groups(settings)
        if settings.learning == "separate":
            groups = [[name] for name in self.masks]
        curves: dict[str, list[dict[str, float]]] = {}
        model: nn.Module | None = None
        for group in groups:
            name = stage if len(groups) == 1 else " ".join((stage, *group))
            record = folder.path / f"{name.replace(' ', '-')}.json"
            if not record.exists():
                if model is None:
                    model = mask_model(
                        self.load(settings, folder),
                        self.masks,
                        settings.samples,
                        tau=settings.tau,
                        init=settings.mask_init,
                    )
                with folder.stage(name) as description:
                    result = self._learn_group(
                        settings, folder, model, group, seed, name, description
                    )
                    for key, mask in result.masks.items():
                        path = folder.mask(key + suffix)
                        path.parent.mkdir(exist_ok=True)
                        mask.save(path)
                write_json(record, learning_curves(result))
            curves |= read_json(record)
        return {key: curves[key] for key in self.masks}

    def _learn_group(
        self,
        settings: T,
        folder: SeedFolder,
        model: nn.Module,
        group: list[str],
        seed: int,
        name: str,
        description: str,
    ) -> LearnResult:
        data, loss = self.sources(settings), self.loss(settings)
        checkpoint = folder.checkpoint(name.replace(" ", "-"))
        checkpoint.parent.mkdir(exist_ok=True)
        return learn_masks(
            model,
            {key: _of(loss, key) for key in group},
            {key: data[key] for key in group},
            settings.mask_steps,
            lr=settings.mask_lr,
            penalty=settings.alpha,
            grad_clip=settings.grad_clip or None,
            seed=seed,
            sets=group,
            progress=folder.progress,
            checkpoint=checkpoint,
            checkpoint_every=settings.checkpoint_every,
            resume=True,
            callback_every=max(settings.mask_steps // 100, 1),
            description=description,
        )

    def repeat_masks(self, settings: T, seed: int, folder: SeedFolder) -> dict[str, Any]:
        """Learn all masks a second time with other data order and noise, and compare.

        Returns:
            {"all": {mask: IoU with its repetition}, "hidden": the same over the hidden layers}.
        """
        record = folder.path / "tests" / "stability.json"
        if record.exists():
            return dict(read_json(record))
        stage = "repeated masks"
        self.learn(settings, folder, stage, derive_seed(seed, stage), "-again")
        first, again = self.load_masks(folder), self.load_masks(folder, "-again")
        ends = self.io(list(first[CONTROL]))
        result = {
            "all": {key: analysis.stability(first[key], again[key]) for key in self.masks},
            "hidden": {key: analysis.stability(first[key], again[key], ends) for key in self.masks},
        }
        write_json(record, result)
        shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
        return result

    def tune(self, settings: T, seed: int, folder: SeedFolder, tolerance: float) -> PenaltySearch:
        """Find the largest penalty per logit at which the control mask holds, for one seed.

        The network is trained if it is not there. The score is the accuracy of the worst function.
        """
        self.train_network(settings, seed, folder)
        with folder.stage("penalty"):
            return tune_penalty(
                self.load(settings, folder),
                _of(self.loss(settings), CONTROL),
                self.sources(settings)[CONTROL],
                settings.mask_steps,
                lambda model: min(
                    self.measure(model, settings)["accuracy"][key] for key in self.measured
                ),
                tolerance=tolerance,
                start=settings.alpha,
                mask={"samples": settings.samples, "tau": settings.tau, "init": settings.mask_init},
                record=folder.path / "penalty.json",
                lr=settings.mask_lr,
                grad_clip=settings.grad_clip or None,
                seed=derive_seed(seed, "masks"),
                progress=folder.progress,
                checkpoint_every=settings.checkpoint_every,
            )

    def load_masks(self, folder: SeedFolder, suffix: str = "") -> dict[str, dict[str, Tensor]]:
        """The learned masks of a seed: {mask: {parameter, in network order: bool tensor}}."""
        return {key: dict(MaskSet.load(folder.mask(key + suffix)).items()) for key in self.masks}

    def conditions(self, masks: Mapping[str, Masks]) -> dict[str, Masks]:
        """The masks of an evaluation: the learned ones, their inverses, parts of the control's."""
        control = masks[CONTROL]
        names = list(control)
        inverses = {
            inverse_name(key, variant): analysis.inverse_mask(
                mask, exclude_io=variant, io=self.io(names), control=control
            )
            for variant in self.inverse_io
            for key, mask in masks.items()
        }
        parts = {half: on_part(control, part) for half, part in self.halves(names).items()}
        return {**masks, **inverses, **parts}

    def evaluate(self, settings: T, folder: SeedFolder) -> dict[str, Any]:
        """All results of a seed from its files; a pure function of network and masks."""
        model = self.load(settings, folder).eval()
        masks = self.load_masks(folder)
        names = list(masks[CONTROL])
        measures = {UNMASKED: self.measure(model, settings)}
        for key, mask in self.conditions(masks).items():
            measures[key] = self.measure(bake(model, mask), settings)
        results = {
            quantity: {key: measure[quantity] for key, measure in measures.items()}
            for quantity in measures[UNMASKED]
        }
        rates = results["accuracy"]
        logits = {key: load_logits(folder, key) for key in self.masks}
        return {
            **results,
            **self.facts(settings),
            **overlap(masks, self.io(names), self.layer_title),
            "half_mask": {
                half: {
                    "layers": part,
                    "drop": {key: rates[CONTROL][key] - rates[half][key] for key in self.measured},
                }
                for half, part in self.halves(names).items()
            },
            "undecided_percent": {
                key: 100 * analysis.undecided(tensors) for key, tensors in logits.items()
            },
            "histogram": {key: analysis.histogram(t).tolist() for key, t in logits.items()},
        }

    def page(self, results: Results) -> Page:
        """The report of a finished run."""
        return self.report_type(self, results).page()

    # --- tests on a finished run (`modmask test NAME RUN`) ----------------------------------------

    def _finished(self, run: Run) -> tuple[T, list[SeedFolder]]:
        folders = [run.folder(seed) for seed in run.seeds]
        for folder in folders:
            if not folder.metrics.exists():
                raise FileNotFoundError(
                    f"seed {folder.seed} of {run.path} is not finished; continue it with `modmask "
                    f"run --resume {run.path}`"
                )
        assert isinstance(run.settings, self.settings_type)
        return run.settings, folders

    def tune_text(
        self, run: Run, tolerance: float, progress: bool = True
    ) -> tuple[str, float | None]:
        """`tune` for every seed of a run: a table, and the penalty (beta) that holds for all."""
        settings = run.settings
        assert isinstance(settings, self.settings_type)
        rows, found = [], []
        for seed, folder in run.sessions(progress):
            search = self.tune(settings, seed, folder, tolerance)
            found.append(search.penalty)
            for trial in sorted(search.trials, key=lambda trial: trial.penalty):
                beta = trial.penalty * settings.batch
                rows.append(
                    [
                        f"seed {seed}, {beta:.3g}",
                        f"{trial.penalty:.3g}",
                        f"{trial.score:.2f}",
                        f"{search.unmasked:.2f}",
                        f"{100 * trial.kept:.2f}",
                        "yes" if trial.holds else "no",
                    ]
                )
        header = ["penalty (beta)", "alpha", "worst, %", "no mask, %", "kept, %", "holds"]
        held = [penalty for penalty in found if penalty is not None]
        least = min(held) * settings.batch if len(held) == len(found) else None
        return text_table(header, rows), least

    def inverse_test(self, run: Run, exclude_io: analysis.ExcludeIO = "none") -> str:
        """Accuracy with every mask and with its inverse, for every seed."""
        settings, folders = self._finished(run)
        rows = []
        for folder in folders:
            model, masks = self.load(settings, folder).eval(), self.load_masks(folder)
            for key, mask in masks.items():
                result = analysis.inverse_mask_test(
                    model,
                    mask,
                    lambda net: self.measure(net, settings)["accuracy"],
                    exclude_io=exclude_io,
                    io=self.io(list(mask)),
                    control=masks[CONTROL],
                )
                numbers = [part[name] for part in result for name in self.measured]
                rows.append([f"seed {folder.seed}, {key}", *(f"{n:.2f}" for n in numbers)])
        heads = [f"{part}: {name}" for part in ("mask", "inverse") for name in self.measured]
        return text_table(["right answers, %", *heads], rows)

    def half_mask_test(self, run: Run, early: int | None = None) -> str:
        """Accuracy with the whole control mask and with its halves, for every seed."""
        settings, folders = self._finished(run)
        names = list(self.load_masks(folders[0])[CONTROL])
        halves = self.halves(names)
        if early is not None:
            chosen = analysis.early_half(names, early)
            halves = {"early": chosen, "late": [name for name in names if name not in chosen]}
        rows = []
        for folder in folders:
            model, control = self.load(settings, folder).eval(), self.load_masks(folder)[CONTROL]
            whole = self.measure(bake(model, control), settings)["accuracy"]
            parts = [
                self.measure(bake(model, on_part(control, part)), settings)["accuracy"]
                for part in halves.values()
            ]
            for name in self.measured:
                numbers = [f"{rates[name]:.2f}" for rates in (whole, *parts)]
                drops = [f"{whole[name] - rates[name]:+.2f}" for rates in parts]
                rows.append([f"seed {folder.seed}, {name}", *numbers, *drops])
        listed = "".join(
            f"{half}: layers {', '.join(str(names.index(n) + 1) for n in part)} of {len(names)}\n"
            for half, part in halves.items()
        )
        header = ["right answers, %", "whole", *halves, *(f"drop {half}" for half in halves)]
        return listed + text_table(header, rows)

    def histogram_test(self, run: Run, bins: int = 10) -> str:
        """Histogram of the keep probabilities of every mask, and its undecided share."""
        _, folders = self._finished(run)
        header = [
            "weights with keep probability",
            *(f"< {i / bins:.3g}" for i in range(1, bins)),
            "≤ 1",
        ]
        rows = []
        for folder in folders:
            for key in self.masks:
                logits = load_logits(folder, key)
                share = 100 * analysis.undecided(logits)
                counts = analysis.histogram(logits, bins).tolist()
                title = f"seed {folder.seed}, {key} ({share:.1f} % undecided)"
                rows.append([title, *map(str, counts)])
        return text_table(header, rows)

    def stability_test(self, run: Run) -> str:
        """IoU of every mask with one learned again by other data order and noise."""
        settings, folders = self._finished(run)
        pairs = list(itertools.combinations(self.functions, 2))
        rows = []
        for folder in folders:
            folder.begin()
            result = self.repeat_masks(settings, folder.seed, folder)
            masks = self.load_masks(folder)
            ends = self.io(list(masks[CONTROL]))
            for part, title, exclude in (
                ("all", "all layers", ()),
                ("hidden", "hidden layers", ends),
            ):
                numbers = [result[part][key] for key in self.masks]
                numbers += [analysis.stability(masks[a], masks[b], exclude) for a, b in pairs]
                rows.append([f"seed {folder.seed}, {title}", *(f"{n:.3f}" for n in numbers)])
        run.write_metrics()
        header = ["IoU", *(f"{key}, again" for key in self.masks)]
        return text_table([*header, *(f"{a} with {b}" for a, b in pairs)], rows)


def _of(loss: Loss | Mapping[str, Loss], name: str) -> Loss:
    return loss[name] if isinstance(loss, Mapping) else loss


def inverse_name(mask: str, variant: str = "none") -> str:
    """Name of the condition with the inverse of a mask."""
    return f"not_{mask}" if variant == "none" else f"not_{mask}_{variant}"


def pair_name(first: str, second: str) -> str:
    """Name of a pair of masks in the metrics."""
    return f"{first} & {second}"


def on_part(masks: Masks, part: Sequence[str]) -> dict[str, Tensor]:
    """The mask on some parameters only; the others are kept whole."""
    return {n: mask if n in part else torch.ones_like(mask) for n, mask in masks.items()}


def bake(model: nn.Module, masks: Masks) -> nn.Module:
    """A plain copy of the network with the masked weights set to zero."""
    return MaskSet.from_dict(masks).bake(model)


def load_logits(folder: SeedFolder, key: str) -> dict[str, Tensor]:
    """The logits of a learned mask: {parameter: float32 tensor}."""
    path = folder.mask(key)
    logits = MaskSet.load(path).logits
    if logits is None:
        raise ValueError(f"{path} holds no logits")
    return logits


def learning_curves(result: LearnResult) -> dict[str, list[dict[str, float]]]:
    """Loss and kept weights over the steps, by mask; nothing that differs between equal runs."""
    curves: dict[str, list[dict[str, float]]] = {}
    for row in result.metrics:
        point = {"step": row["step"], "loss": row["loss"], "kept_percent": 100 * row["kept"]}
        curves.setdefault(row["set"], []).append(point)
    return curves


def overlap(
    masks: Mapping[str, Masks],
    io: Sequence[str],
    layer_title: Callable[[str, Sequence[str]], str],
) -> dict[str, Any]:
    """Sizes and overlaps of the masks, per layer, over the hidden layers and over all.

    Args:
        masks: the control's and at least one more, each name to bool tensor in network order.
        io: names of the input and output tensors; the others are hidden.
        layer_title: name of a parameter for readers.

    Returns:
        {"layers": [...], "hidden": {...}, "all": {...}}; IoU, IoMin and their chance levels, one of
        each per pair of masks, are fractions, sharing and remaining are percentages.
    """
    control = masks[CONTROL]
    names = list(control)
    functions = [key for key in masks if key != CONTROL]

    def of_pair(a: Masks, b: Masks) -> dict[str, float]:
        kept = [sum(count for count, _ in analysis.kept_counts(mask).values()) for mask in (a, b)]
        return {
            "iou": analysis.stability(a, b),
            "chance_iou": analysis.chance_stability(a, b),
            "io_min": analysis.overall_io_min(a, b),
            "chance_io_min": analysis.chance_overall_io_min(a, b),
            "kept_ratio": kept[1] / max(kept[0], 1),
        }

    def part(chosen: Sequence[str]) -> dict[str, Any]:
        cut = {key: {name: mask[name] for name in chosen} for key, mask in masks.items()}
        counts = {key: analysis.kept_counts(mask) for key, mask in cut.items()}
        kept = {key: sum(k for k, _ in count.values()) for key, count in counts.items()}
        size = sum(total for _, total in counts[CONTROL].values())
        others = {f: [cut[other] for other in functions if other != f] for f in functions}
        return {
            "size": size,
            "kept": kept,
            "kept_percent": {key: 100 * count / max(size, 1) for key, count in kept.items()},
            "pairs": {
                pair_name(a, b): of_pair(cut[a], cut[b])
                for a, b in itertools.combinations(functions, 2)
            },
            "shared_percent": {
                f: 100 * analysis.total_shared(cut[f], others[f]) for f in functions
            },
            "chance_shared_percent": {
                f: 100 * analysis.chance_total_shared(cut[f], union(others[f], cut[f]))
                for f in functions
            },
            "remaining_percent": {
                f: 100 * analysis.total_remaining(cut[CONTROL], cut[f]) for f in functions
            },
        }

    layers = [
        {
            "name": name,
            "title": layer_title(name, names),
            "rows": control[name].shape[0],
            "columns": control[name][0].numel(),
            **part([name]),
        }
        for name in names
    ]
    hidden = [name for name in names if name not in io]
    return {"layers": layers, "hidden": part(hidden), "all": part(names)}


def union(masks: Sequence[Masks], like: Masks) -> dict[str, Tensor]:
    """Weights that at least one mask keeps; none where there are no masks."""
    empty = {name: torch.zeros_like(mask) for name, mask in like.items()}
    for mask in masks:
        empty = {name: kept | mask[name] for name, kept in empty.items()}
    return empty


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal; the first column is left-aligned."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
