"""Addition / multiplication with a feed-forward network: do the operations use different weights?

Csordás, van Steenkiste, Schmidhuber, "Are Neural Nets Modular? Inspecting Functional Modularity
Through Differentiable Weight Masks", ICLR 2021 (arXiv 2010.02066).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import analysis
from ..files import atomic, read_json, write_json
from ..masks import LearnResult, MaskSet, learn_masks, mask_model
from ..models import FeedForward
from ..tasks import OPERATIONS, AddMul, digit_loss
from .run import Experiment, Run, SeedFolder
from .settings import Settings, option
from .training import derive_seed, train

if TYPE_CHECKING:
    from ..report import Page, Results

Masks = Mapping[str, Tensor]

SIZES: dict[str, tuple[int, ...]] = {
    "mini": (32, 32),
    "tiny": (200, 200),
    "small": (400, 400, 200),
    "medium": (800,) * 4,
    "big": (2000,) * 4,
    "huge": (4000,) * 4,
}
SETS: dict[str, tuple[str, ...]] = {
    "control": ("add", "mul"),
    "add": ("add",),
    "mul": ("mul",),
}
# rows evaluated at once
_CHUNK = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddMulSettings(Settings):
    """Settings of the experiment; the defaults are the published ones."""

    digits: int = option(2, "digits of the arguments and of the result (1 to 3)", minimum=1)
    size: str = option(
        "big",
        "widths of the hidden layers: "
        + "; ".join(f"{name} {','.join(map(str, widths))}" for name, widths in SIZES.items()),
        choices=tuple(SIZES),
    )
    hidden: tuple[int, ...] = option(
        (), "other widths, two or more, instead of a named size", minimum=1
    )
    steps: int = option(20_000, "training steps of the network", minimum=1)
    batch: int = option(128, "rows per step, of the network and of every mask", minimum=1)
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
        "learn the three masks in one pass over the network, or one after the other",
        choices=("joint", "separate"),
    )
    stability: bool = option(
        False, "learn every mask a second time, to see how far a repeated mask agrees"
    )
    checkpoint_every: int = option(1000, "steps between two checkpoints", minimum=1)
    device: str = option("cpu", "device that computes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.digits > 3:
            raise ValueError(f"setting digits must be at most 3, got {self.digits}")
        if len(self.hidden) == 1:
            raise ValueError(
                f"setting hidden must name two or more layers, got {self.hidden[0]}: the hidden "
                "weights between them are what the study compares"
            )
        if self.batch % self.samples:
            raise ValueError(
                f"setting batch must be a multiple of samples, got {self.batch} and {self.samples}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the hidden layers."""
        return self.hidden or SIZES[self.size]

    @property
    def alpha(self) -> float:
        """Penalty per logit."""
        return self.penalty / self.batch


PAPER = AddMulSettings()
# the calibrated small setting: raised mask learning rate and penalty make up for the few steps
QUICK = AddMulSettings(
    digits=1,
    size="tiny",
    steps=1500,
    mask_steps=3000,
    mask_lr=0.05,
    penalty=5e-3,
    stability=True,
)
SMOKE = QUICK.replace(size="mini", steps=300, mask_steps=60, stability=False, checkpoint_every=25)
PRESETS = {"paper": PAPER, "quick": QUICK, "smoke": SMOKE}


def build(settings: AddMulSettings, seed: int = 0) -> FeedForward:
    """The untrained network of a seed."""
    task = AddMul(settings.digits)
    generator = torch.Generator().manual_seed(derive_seed(seed, "initial weights"))
    model = FeedForward(task.in_features, settings.widths, task.out_features, generator=generator)
    return model.to(settings.device)


def load(settings: AddMulSettings, folder: SeedFolder) -> FeedForward:
    """The trained network of a finished seed."""
    model = build(settings)
    model.load_state_dict(load_file(folder.weights, device=settings.device))
    return model


def sources(settings: AddMulSettings) -> dict[str, AddMul]:
    """Data of every mask: the control sees both operations, the others their own only."""
    return {
        name: AddMul(settings.digits, operations, settings.batch, settings.device)
        for name, operations in SETS.items()
    }


@torch.no_grad()
def answer_counts(model: nn.Module, task: AddMul) -> Tensor:
    """Confusion counts over *all* argument pairs of both operations.

    Args:
        model: a plain network; it is evaluated as it is.
        task: a task with both operations.

    Returns:
        int64 [3, 2] on the CPU: outcome (sum, product, neither) by requested operation. The
        diagonal holds the right answers.
    """
    counts = torch.zeros(len(OPERATIONS) + 1, len(OPERATIONS), dtype=torch.int64)
    for start in range(0, len(task), _CHUNK):
        index = torch.arange(start, min(start + _CHUNK, len(task)), device=task.device)
        first, second, operation = task.arguments(index)
        predictions = task.predictions(model(task.rows(index)[0]))
        counts += analysis.confusion_counts(
            predictions, task.results(first, second), operation
        ).cpu()
    return counts


def accuracy(counts: Tensor, task: AddMul) -> dict[str, float]:
    """Percentage of right answers per operation."""
    return {op: 100 * int(counts[i, i]) / task.pairs for i, op in enumerate(OPERATIONS)}


def layer_title(index: int, layers: int) -> str:
    """Name of a weight matrix in tables and figures."""
    if index == 0:
        return "input"
    return "output" if index == layers - 1 else f"hidden {index}"


def overlap(masks: Mapping[str, Masks]) -> dict[str, Any]:
    """Sizes and overlaps of the three masks, per layer, over the hidden layers and over all.

    Args:
        masks: "control", "add" and "mul", each name to bool tensor in the order of the network.

    Returns:
        {"layers": [...], "hidden": {...}, "all": {...}}; IoU, IoMin and their chance levels are
        fractions, sharing and remaining are percentages.
    """
    control = masks["control"]
    names = list(control)

    def part(chosen: list[str]) -> dict[str, Any]:
        cut = {key: {name: mask[name] for name in chosen} for key, mask in masks.items()}
        counts = {key: analysis.kept_counts(mask) for key, mask in cut.items()}
        kept = {key: sum(k for k, _ in count.values()) for key, count in counts.items()}
        size = sum(total for _, total in counts["control"].values())
        return {
            "size": size,
            "kept": kept,
            "kept_percent": {key: 100 * count / size for key, count in kept.items()},
            "iou": analysis.stability(cut["add"], cut["mul"]),
            "chance_iou": analysis.chance_stability(cut["add"], cut["mul"]),
            "io_min": analysis.overall_io_min(cut["add"], cut["mul"]),
            "chance_io_min": analysis.chance_overall_io_min(cut["add"], cut["mul"]),
            "shared_percent": {
                "add": 100 * analysis.total_shared(cut["add"], [cut["mul"]]),
                "mul": 100 * analysis.total_shared(cut["mul"], [cut["add"]]),
            },
            "chance_shared_percent": {
                "add": 100 * analysis.chance_total_shared(cut["add"], cut["mul"]),
                "mul": 100 * analysis.chance_total_shared(cut["mul"], cut["add"]),
            },
            "remaining_percent": {
                key: 100 * analysis.total_remaining(cut["control"], cut[key])
                for key in ("add", "mul")
            },
        }

    layers = []
    for index, name in enumerate(names):
        layers.append(
            {
                "name": name,
                "title": layer_title(index, len(names)),
                "rows": control[name].shape[0],
                "columns": control[name].shape[1],
                **part([name]),
            }
        )
    whole = part(names)
    whole["mul_to_add"] = whole["kept"]["mul"] / max(whole["kept"]["add"], 1)
    return {"layers": layers, "hidden": part(names[1:-1]), "all": whole}


class AddMulFNN(Experiment[AddMulSettings]):
    """Train a network on both operations, learn the masks of both and of either, compare them."""

    name = "addmul-fnn"
    title = "Addition / multiplication, feed-forward network"
    summary = "does a network use different weights for addition and for multiplication?"
    settings_type = AddMulSettings
    presets = PRESETS

    def __init__(self) -> None:
        self.tests = {
            "inverse": inverse_test,
            "half-mask": half_mask_test,
            "histogram": histogram_test,
            "stability": stability_test,
        }

    def describe(self, settings: AddMulSettings) -> str:
        """Network, steps, and the penalty both as the study writes it and per logit."""
        task = AddMul(settings.digits)
        sizes = (task.in_features, *settings.widths, task.out_features)
        return (
            f"network {'-'.join(map(str, sizes))}, {settings.steps:,} steps; masks "
            f"{settings.mask_steps:,} steps, penalty beta {settings.penalty:g} (alpha "
            f"{settings.alpha:.3g} per logit)"
        )

    def run_seed(self, settings: AddMulSettings, seed: int, folder: SeedFolder) -> dict[str, Any]:
        """Train the network, learn the masks, evaluate; or what of it is missing."""
        curve = self._train(settings, seed, folder)
        learning = self._learn(settings, seed, folder)
        if settings.stability:
            repeat_masks(settings, seed, folder)
        with folder.stage("evaluation"):
            metrics = evaluate(settings, folder)
        shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
        return {"seed": seed, **metrics, "network_loss": curve, "learning": learning}

    def _train(
        self, settings: AddMulSettings, seed: int, folder: SeedFolder
    ) -> list[dict[str, float]]:
        record = folder.path / "network.json"
        if record.exists():
            return list(read_json(record))
        model = build(settings, seed)
        with folder.stage("network") as description:
            rows = train(
                model,
                digit_loss,
                AddMul(settings.digits, OPERATIONS, settings.batch, settings.device),
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
            with atomic(folder.weights) as path:
                save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
        write_json(record, rows)
        return rows

    def _learn(
        self, settings: AddMulSettings, seed: int, folder: SeedFolder
    ) -> dict[str, list[dict[str, float]]]:
        return learn(settings, folder, "masks", derive_seed(seed, "masks"))

    def page(self, results: Results) -> Page:
        """The report of a finished run."""
        from .addmul_report import page

        return page(results)


def learn(
    settings: AddMulSettings, folder: SeedFolder, stage: str, seed: int, suffix: str = ""
) -> dict[str, list[dict[str, float]]]:
    """Learn the masks of all sets over the seed's frozen network, or what is missing of them.

    Args:
        settings: of the run.
        folder: of the seed; its network must be there. The masks are written to it.
        stage: name of the stage.
        seed: source of data order and noise.
        suffix: put behind the names of the mask files.

    Returns:
        the learning curve of every set: rows {"step", "loss", "kept_percent"}.
    """
    groups = {stage: list(SETS)}
    if settings.learning == "separate":
        groups = {f"{stage} {name}": [name] for name in SETS}
    curves: dict[str, list[dict[str, float]]] = {}
    model: nn.Module | None = None
    for name, group in groups.items():
        record = folder.path / f"{name.replace(' ', '-')}.json"
        if not record.exists():
            if model is None:
                model = mask_model(
                    load(settings, folder),
                    list(SETS),
                    settings.samples,
                    tau=settings.tau,
                    init=settings.mask_init,
                )
            with folder.stage(name) as description:
                result = _learn_group(settings, folder, model, group, seed, name, description)
                for key, mask in result.masks.items():
                    path = folder.mask(key + suffix)
                    path.parent.mkdir(exist_ok=True)
                    mask.save(path)
            write_json(record, learning_curves(result))
        curves |= read_json(record)
    return curves


def _learn_group(
    settings: AddMulSettings,
    folder: SeedFolder,
    model: nn.Module,
    group: list[str],
    seed: int,
    name: str,
    description: str,
) -> LearnResult:
    data = sources(settings)
    checkpoint = folder.checkpoint(name.replace(" ", "-"))
    checkpoint.parent.mkdir(exist_ok=True)
    return learn_masks(
        model,
        digit_loss,
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


def learning_curves(result: LearnResult) -> dict[str, list[dict[str, float]]]:
    """Loss and kept weights over the steps, by set; nothing that differs between equal runs."""
    curves: dict[str, list[dict[str, float]]] = {}
    for row in result.metrics:
        point = {"step": row["step"], "loss": row["loss"], "kept_percent": 100 * row["kept"]}
        curves.setdefault(row["set"], []).append(point)
    return curves


def repeat_masks(settings: AddMulSettings, seed: int, folder: SeedFolder) -> dict[str, Any]:
    """Learn all masks a second time with other data order and noise, and compare.

    Returns:
        {"all": {set: IoU of the two masks}, "hidden": the same over the hidden layers}, fractions.
    """
    record = folder.path / "tests" / "stability.json"
    if record.exists():
        return dict(read_json(record))
    learn(settings, folder, "repeated masks", derive_seed(seed, "repeated masks"), "-again")
    first = load_masks(settings, folder)
    again = load_masks(settings, folder, "-again")
    ends = [list(first["control"])[i] for i in (0, -1)]
    result = {
        "all": {key: analysis.stability(first[key], again[key]) for key in SETS},
        "hidden": {key: analysis.stability(first[key], again[key], ends) for key in SETS},
    }
    write_json(record, result)
    shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
    return result


def weight_names(settings: AddMulSettings) -> list[str]:
    """The masked parameters in the order of the network."""
    return [f"layers.{index}.weight" for index in range(len(settings.widths) + 1)]


def load_masks(
    settings: AddMulSettings, folder: SeedFolder, suffix: str = ""
) -> dict[str, dict[str, Tensor]]:
    """The learned masks of a seed as bool tensors: {set: {parameter: mask}}."""
    masks = {key: MaskSet.load(folder.mask(key + suffix)) for key in SETS}
    return {
        key: {name: mask[name] for name in weight_names(settings)} for key, mask in masks.items()
    }


def load_logits(folder: SeedFolder, key: str) -> dict[str, Tensor]:
    """The logits of a learned mask: {parameter: float32 tensor}."""
    path = folder.mask(key)
    logits = MaskSet.load(path).logits
    if logits is None:
        raise ValueError(f"{path} holds no logits")
    return logits


def bake(model: nn.Module, masks: Masks) -> nn.Module:
    """A plain copy of the network with the masked weights set to zero."""
    return MaskSet.from_dict(masks).bake(model)


def conditions(masks: Mapping[str, Masks]) -> dict[str, Masks]:
    """The masks of an evaluation: the learned ones, their inverses, the control's halves."""
    early, late = analysis.half_masks(masks["control"])
    return {
        **masks,
        **{f"not_{key}": analysis.inverse_mask(mask) for key, mask in masks.items()},
        "early": early,
        "late": late,
    }


def evaluate(settings: AddMulSettings, folder: SeedFolder) -> dict[str, Any]:
    """All results of a seed from its files; a pure function of network and masks."""
    model = load(settings, folder).eval()
    task = AddMul(settings.digits, device=settings.device)
    masks = load_masks(settings, folder)
    names = weight_names(settings)

    counts = {"unmasked": answer_counts(model, task)}
    for key, mask in conditions(masks).items():
        counts[key] = answer_counts(bake(model, mask), task)
    rates = {key: accuracy(count, task) for key, count in counts.items()}
    early = analysis.early_half(names)

    logits = {key: load_logits(folder, key) for key in SETS}
    return {
        "accuracy": rates,
        "confusion": {
            key: {
                "counts": count.tolist(),
                "percent": analysis.confusion_percent(count).tolist(),
            }
            for key, count in counts.items()
        },
        "coinciding_percent": coinciding(task),
        **overlap(masks),
        "half_mask": {
            "early": early,
            "late": [name for name in names if name not in early],
            "early_drop": {op: rates["control"][op] - rates["early"][op] for op in OPERATIONS},
            "late_drop": {op: rates["control"][op] - rates["late"][op] for op in OPERATIONS},
        },
        "undecided_percent": {
            key: 100 * analysis.undecided(tensors) for key, tensors in logits.items()
        },
        "histogram": {key: analysis.histogram(t).tolist() for key, t in logits.items()},
    }


def coinciding(task: AddMul) -> float:
    """Percentage of argument pairs whose sum equals their product, so that one answer is both."""
    first, second, _ = task.arguments(torch.arange(task.pairs, device=task.device))
    add, mul = task.results(first, second)
    return 100 * int(torch.count_nonzero(add == mul)) / task.pairs


# --- tests on a finished run (`modmask test NAME RUN`)
# ----------------------------------------------


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


def _folders(run: Run) -> tuple[AddMulSettings, list[SeedFolder]]:
    settings = run.settings
    assert isinstance(settings, AddMulSettings)
    folders = [run.folder(seed) for seed in run.seeds]
    for folder in folders:
        if not folder.metrics.exists():
            raise FileNotFoundError(
                f"seed {folder.seed} of {run.path} is not finished; continue it with `modmask run "
                f"--resume {run.path}`"
            )
    return settings, folders


def inverse_test(run: Run, exclude_io: analysis.ExcludeIO = "none") -> str:
    """Accuracy with every mask and with its inverse, for every seed."""
    settings, folders = _folders(run)
    names = weight_names(settings)
    task = AddMul(settings.digits, device=settings.device)
    rows = []
    for folder in folders:
        model, masks = load(settings, folder).eval(), load_masks(settings, folder)
        for key, mask in masks.items():
            result = analysis.inverse_mask_test(
                model,
                mask,
                lambda net: accuracy(answer_counts(net, task), task),
                exclude_io=exclude_io,
                io=(names[0], names[-1]),
                control=masks["control"],
            )
            numbers = [result.masked[op] for op in OPERATIONS]
            numbers += [result.inverse[op] for op in OPERATIONS]
            rows.append([f"seed {folder.seed}, {key}", *(f"{n:.2f}" for n in numbers)])
    return text_table(
        ["right answers, %", "mask: add", "mask: mul", "inverse: add", "inverse: mul"], rows
    )


def half_mask_test(run: Run, early: int | None = None) -> str:
    """Accuracy with the whole control mask, its early half and its late half, for every seed."""
    settings, folders = _folders(run)
    task = AddMul(settings.digits, device=settings.device)
    rows = []
    count = 0
    for folder in folders:
        result = analysis.half_mask_test(
            load(settings, folder).eval(),
            load_masks(settings, folder)["control"],
            lambda net: accuracy(answer_counts(net, task), task),
            early=early,
        )
        count = len(result.early)
        for op in OPERATIONS:
            numbers = (result.whole, result.early_masked, result.late_masked)
            drops = (result.early_drop, result.late_drop)
            rows.append(
                [f"seed {folder.seed}, {op}"]
                + [f"{part[op]:.2f}" for part in numbers]
                + [f"{part[op]:+.2f}" for part in drops]
            )
    total = len(weight_names(settings))
    header = ["right answers, %", "whole", "early", "late", "drop early", "drop late"]
    return f"early: layers 1 to {count} of {total}\n" + text_table(header, rows)


def histogram_test(run: Run, bins: int = 10) -> str:
    """Histogram of the keep probabilities of every mask, and its undecided share."""
    _, folders = _folders(run)
    header = [
        "weights with keep probability",
        *(f"< {i / bins:.3g}" for i in range(1, bins)),
        "≤ 1",
    ]
    rows = []
    for folder in folders:
        for key in SETS:
            logits = load_logits(folder, key)
            share = 100 * analysis.undecided(logits)
            counts = analysis.histogram(logits, bins).tolist()
            rows.append([f"seed {folder.seed}, {key} ({share:.1f} % undecided)", *map(str, counts)])
    return text_table(header, rows)


def stability_test(run: Run) -> str:
    """IoU of every mask with one learned again by other data order and noise, for every seed."""
    settings, folders = _folders(run)
    rows = []
    for folder in folders:
        folder.begin()
        result = repeat_masks(settings, folder.seed, folder)
        masks = load_masks(settings, folder)
        ends = [weight_names(settings)[i] for i in (0, -1)]
        other = {
            "all": analysis.stability(masks["add"], masks["mul"]),
            "hidden": analysis.stability(masks["add"], masks["mul"], ends),
        }
        for part, title in (("all", "all layers"), ("hidden", "hidden layers")):
            numbers = [*(result[part][key] for key in SETS), other[part]]
            rows.append([f"seed {folder.seed}, {title}", *(f"{n:.3f}" for n in numbers)])
    run.write_metrics()
    header = ["IoU", *(f"{key}, again" for key in SETS), "add with mul"]
    return text_table(header, rows)
