"""Ablation: a network without the weights of a mask, beside controls of equal size."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..files import write_json
from ..masks import MaskSet
from ..masks.seeds import hash64

KINDS = ("zero", "reinit", "random", "complement")
INTACT = "intact"

# one number per example, in the same order at every call; or several such measures by name
Score = Callable[[nn.Module], Tensor | Mapping[str, Tensor]]


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Ablation:
    """What `ablate` returns.

    Attributes:
        rows: one per measure and kind, "intact" first: "measure", "kind", "draws", "examples",
            "removed" (fraction of the weights under masks), "mean", "low", "high" (of the score),
            "difference", "difference_low", "difference_high" (to the intact network, paired).
        settings: kinds, draws, seed, confidence, resamples and method.
        scores: [draws, examples] by measure and kind; not part of the file.
    """

    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    scores: dict[str, dict[str, Tensor]] = field(repr=False)

    def compare(self, kind: str, other: str, measure: str | None = None) -> Interval:
        """Mean score of one kind minus that of another, with the paired confidence interval.

        ``compare("zero", "random")`` asks whether the weights of the mask matter more than as many
        others do.

        Raises:
            ValueError: for a measure or kind that there is not.
        """
        if measure is None and len(self.scores) == 1:
            measure = next(iter(self.scores))
        if measure not in self.scores:
            raise ValueError(f"measure: expected one of {list(self.scores)}, got {measure!r}")
        found = self.scores[measure]
        for name, given in (("kind", kind), ("other", other)):
            if given not in found:
                raise ValueError(f"{name}: expected one of {list(found)}, got {given!r}")
        return _interval(found[kind], found[other], self.settings)

    def to_dict(self) -> dict[str, Any]:
        """Settings and rows as plain values."""
        return {"settings": dict(self.settings), "rows": [dict(row) for row in self.rows]}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write settings and rows as JSON; the file is replaced as a whole."""
        write_json(Path(path), self.to_dict())


def ablate(
    model: nn.Module,
    mask: Mapping[str, Tensor],
    evaluate: Score,
    *,
    kinds: Sequence[str] = KINDS,
    draws: int = 10,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 2000,
    strict: bool = True,
) -> Ablation:
    """Scores of a network without the weights of a mask, and of controls that lose as many.

    The kinds (those of NeuroSurgeon, Lepori et al. 2023), for every tensor of the mask:

    - "zero": the weights that the mask keeps are set to 0.
    - "reinit": they are drawn anew, by ``reset_parameters`` of their module where it has one, else
      from the normal distribution with the mean and deviation of the tensor.
    - "random": as many weights of the tensor, anywhere, are set to 0.
    - "complement": as many weights outside the mask are set to 0.

    To ablate what a mask leaves out, give its complement ``~mask``.

    Args:
        model: the network, plain or masked (its masks are dropped). It is not changed.
        mask: bool tensors by parameter name, a `MaskSet` for instance.
        evaluate: called with a plain copy of the network in eval mode; returns a tensor with one
            number per example (1.0 for a correct answer, 0.0 for a wrong one), or a mapping from
            names of measures to such tensors. Examples and their order must always be the same.
        kinds: some of those above.
        draws: how often the kinds with chance in them are drawn; "zero" is evaluated once.
        seed: every draw follows from it, the kind and the name of the tensor.
        confidence: of the intervals.
        resamples: of the bootstrap.
        strict: whether a `MaskSet` must come from a network of these very weights, where it knows.

    Returns:
        Ablation: a tidy table, and comparisons of any two kinds.

    Raises:
        ValueError: for wrong settings; for masks of another network; for "complement" where a mask
            keeps more than half of a tensor; for scores of changing size, of other than one
            dimension, or not finite.
        TypeError: if `evaluate` returns no tensors, or a mask is not a bool tensor.

    Method: percentile intervals of the paired bootstrap (Efron and Tibshirani 1993, chapters 8 and
    13). Each resample draws the examples with replacement, the same for both networks compared, and
    the draws of each kind with replacement.
    """
    _check(kinds, draws, confidence, resamples)
    if isinstance(mask, MaskSet):
        mask.check(model, strict=strict)
    for name, kept in mask.items():
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
            got = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
            raise TypeError(f"mask[{name!r}]: expected a bool tensor, got {got}")
    masks = {name: kept.detach().cpu() for name, kept in mask.items()}
    for name, kept in masks.items():
        if "complement" in kinds and 2 * int(kept.sum()) > kept.numel():
            raise ValueError(
                f"mask: the kind 'complement' needs as many weights outside the mask as inside, "
                f"but that of {name!r} keeps {int(kept.sum())} of {kept.numel()}"
            )
    whole = MaskSet.from_dict({n: torch.ones_like(kept) for n, kept in masks.items()})
    work = whole.bake(model).eval()
    intact = {name: work.get_parameter(name).detach().clone() for name in masks}
    scores: dict[str, dict[str, list[Tensor]]] = {}

    def score(kind: str) -> None:
        for measure, values in _checked(evaluate(work), kind, scores).items():
            scores.setdefault(measure, {}).setdefault(kind, []).append(values)

    with torch.no_grad():
        score(INTACT)
        for kind in kinds:
            for draw in range(1 if kind == "zero" else draws):
                for name, kept in masks.items():
                    values = _values(work, name, kept, kind, f"ablate\0{seed}\0{kind}\0{draw}")
                    work.get_parameter(name).copy_(values)
                score(kind)
                for name, values in intact.items():
                    work.get_parameter(name).copy_(values)

    settings = {
        "kinds": list(kinds),
        "draws": draws,
        "seed": seed,
        "confidence": confidence,
        "resamples": resamples,
        "method": "paired percentile bootstrap over examples and draws",
    }
    stacked = {m: {k: torch.stack(v) for k, v in found.items()} for m, found in scores.items()}
    total = sum(kept.numel() for kept in masks.values())
    removed = sum(int(kept.sum()) for kept in masks.values()) / max(total, 1)
    rows = [
        _row(measure, kind, values, found[INTACT], removed if kind != INTACT else 0.0, settings)
        for measure, found in stacked.items()
        for kind, values in found.items()
    ]
    return Ablation(rows, settings, stacked)


def _check(kinds: Sequence[str], draws: int, confidence: float, resamples: int) -> None:
    if isinstance(kinds, str) or not kinds or any(kind not in KINDS for kind in kinds):
        raise ValueError(f"kinds: expected a list of some of {list(KINDS)}, got {kinds!r}")
    for name, value in (("draws", draws), ("resamples", resamples)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")


def _checked(result: Any, kind: str, before: Mapping[str, Any]) -> dict[str, Tensor]:
    """The scores of one network by measure, in float64."""
    named = result if isinstance(result, Mapping) else {"score": result}
    if before and named.keys() != before.keys():
        raise ValueError(
            f"evaluate: expected the measures {list(before)} for kind {kind!r}, got {list(named)}"
        )
    found = {}
    for name, values in named.items():
        if not isinstance(values, Tensor):
            raise TypeError(
                f"evaluate: expected a tensor with one number per example for {name!r}, got "
                f"{type(values).__name__}: a mean alone has no paired interval"
            )
        if values.dim() != 1 or not len(values):
            raise ValueError(
                f"evaluate: expected one number per example for {name!r}, shape [examples], "
                f"got {list(values.shape)}"
            )
        found[name] = values.detach().to("cpu", torch.float64)
        if not bool(found[name].isfinite().all()):
            raise ValueError(f"evaluate: a score of {name!r} is not finite (kind {kind!r})")
        if before and len(values) != len(before[name][INTACT][0]):
            raise ValueError(
                f"evaluate: expected {len(before[name][INTACT][0])} scores of {name!r} as for the "
                f"intact network, got {len(values)} for kind {kind!r}"
            )
    return found


def _values(work: nn.Module, name: str, kept: Tensor, kind: str, stream: str) -> Tensor:
    """One tensor of the ablated network."""
    parameter = work.get_parameter(name)
    seed = hash64(f"{stream}\0{name}")
    generator = torch.Generator().manual_seed(seed & (2**63 - 1))
    if kind == "reinit":
        fresh = _fresh(work, name, generator).to(parameter)
        return torch.where(kept.to(parameter.device), fresh, parameter)
    removed = kept
    if kind != "zero":
        order = torch.rand(kept.shape, generator=generator)
        if kind == "complement":
            order.masked_fill_(kept, -1.0)
        removed = ops.top_k_mask([order], int(kept.sum()))[0]
    return parameter.masked_fill(removed.to(parameter.device), 0)


def _fresh(work: nn.Module, name: str, generator: torch.Generator) -> Tensor:
    """A parameter as at the start of training."""
    prefix, _, leaf = name.rpartition(".")
    module = work.get_submodule(prefix)
    reset = next((n for n in ("reset_parameters", "_reset_parameters") if hasattr(module, n)), "")
    if not reset:
        values = module.get_parameter(leaf).detach().float().cpu()
        noise = torch.randn(values.shape, generator=generator)
        return values.mean() + noise * values.std(correction=0)
    copied = copy.deepcopy(module).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        getattr(copied, reset)()
    return copied.get_parameter(leaf).detach()


def _row(
    measure: str,
    kind: str,
    values: Tensor,
    intact: Tensor,
    removed: float,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    own = _interval(values, None, settings)
    difference = _interval(values, intact, settings)
    return {
        "measure": measure,
        "kind": kind,
        "draws": len(values),
        "examples": values.shape[1],
        "removed": removed,
        "mean": own.value,
        "low": own.low,
        "high": own.high,
        "difference": difference.value,
        "difference_low": difference.low,
        "difference_high": difference.high,
    }


def _interval(a: Tensor, b: Tensor | None, settings: Mapping[str, Any]) -> Interval:
    """Mean of a, minus that of b: scores [draws, examples] of the same examples."""
    if a is b:
        return Interval(0.0, 0.0, 0.0)
    generator = torch.Generator().manual_seed(hash64(f"bootstrap\0{settings['seed']}") >> 1)
    count, examples = settings["resamples"], a.shape[1]
    each = max(1, min(count, 2**21 // examples))
    means = []
    for first in range(0, count, each):
        rows = min(each, count - first)

        def resampled(scores: Tensor, rows: int = rows) -> Tensor:
            """[rows, examples]: the mean over draws taken with replacement."""
            draws = len(scores)
            picked = torch.randint(draws, (rows, draws), generator=generator)
            weights = torch.zeros(rows, draws, dtype=scores.dtype)
            ones = torch.ones_like(weights).expand_as(picked)
            return weights.scatter_add_(1, picked, ones) @ scores / draws

        values = resampled(a) if b is None else resampled(a) - resampled(b)
        chosen = torch.randint(examples, (rows, examples), generator=generator)
        means.append(values.gather(1, chosen).mean(1))
    tail = (1 - settings["confidence"]) / 2
    limits = torch.quantile(torch.cat(means), torch.tensor([tail, 1 - tail], dtype=torch.float64))
    value = a.mean() if b is None else a.mean() - b.mean()
    return Interval(float(value), *limits.tolist())
