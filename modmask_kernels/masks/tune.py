"""The penalty of a new network: the largest one at which a mask on the whole task holds."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..files import read_json, write_json
from .convert import mask_model
from .fingerprint import weight_hash
from .learn import DEFAULT_PENALTY, learn_masks
from .learner import Data, Loss

FORMAT = 1


@dataclass(frozen=True)
class PenaltyTrial:
    """One learned mask.

    Attributes:
        penalty: coefficient per logit.
        score: of the network with the mask.
        kept: fraction of the weights that the mask keeps.
        holds: whether the score is within the tolerance.
    """

    penalty: float
    score: float
    kept: float
    holds: bool


@dataclass(frozen=True)
class PenaltySearch:
    """What `tune_penalty` returns.

    Attributes:
        penalty: the largest coefficient per logit that held, or None if none did.
        above: the smallest that did not hold, or None if all did.
        unmasked: score of the network without a mask.
        tolerance: by how much a score may be lower.
        trials: all masks in the order in which they were learned.
    """

    penalty: float | None
    above: float | None
    unmasked: float
    tolerance: float
    trials: list[PenaltyTrial]


def tune_penalty(
    model: nn.Module,
    loss: Loss,
    data: Data,
    steps: int,
    score: Callable[[nn.Module], float],
    *,
    tolerance: float = 1.0,
    start: float = DEFAULT_PENALTY,
    factor: float = 4.0,
    precision: float = 1.5,
    most: int = 12,
    mask: Mapping[str, Any] | None = None,
    record: str | os.PathLike[str] | None = None,
    **learning: Any,
) -> PenaltySearch:
    """Find the largest penalty at which a mask learned on the whole task costs no accuracy.

    A penalty too small leaves masks dense, so that they overlap whatever they serve; one too large
    ruins the task itself. Where the border lies depends on network, data, steps and learning rate.
    Penalties grow or shrink by `factor` until one holds and one does not, then the gap is halved
    (geometrically) until it is at most `precision`. Every mask starts anew with the same seed.

    Args:
        model: the trained network, without masks; it stays as it is.
        loss, data, steps: of `learn_masks`, over the whole task.
        score: ``score(model) -> number`` of a plain network in eval mode, larger is better: right
            answers in per cent, of the worst function where there are several.
        tolerance: by how much a mask's score may be below the network's, in units of the score.
        start: the first penalty per logit (beta / batch size).
        factor: step of the search for a bracket, above 1.
        precision: largest ratio of the penalties around the border, above 1.
        most: largest number of masks to learn.
        mask: arguments of `mask_model`, samples for instance.
        record: JSON file with the masks learned so far, written after each. If it exists, the
            search continues from it, within a mask too.
        learning: further arguments of `learn_masks`: lr, grad_clip, seed, progress and so on.

    Returns:
        PenaltySearch. It assumes that more penalty never makes a mask better, which single masks
        near the border do not always keep; `trials` shows them.

    Raises:
        ValueError: for settings out of range, a score that is not finite, or a record of another
            search.
    """
    for value, name, least in (
        (tolerance, "tolerance", 0.0),
        (start, "start", 0.0),
        (factor, "factor", 1.0),
        (precision, "precision", 1.0),
    ):
        above = value >= least if name == "tolerance" else value > least
        if not (above and math.isfinite(value)):
            wanted = "at least 0" if name == "tolerance" else f"above {least:g}"
            raise ValueError(f"{name}: expected a finite number {wanted}, got {value!r}")
    if most < 1:
        raise ValueError(f"most: expected at least 1, got {most}")
    taken = {"penalty", "checkpoint", "resume", "sets"} & set(learning)
    if taken:
        raise ValueError(f"{sorted(taken)[0]}: the search sets it itself")

    def scored(network: nn.Module) -> float:
        value = float(score(network.eval()))
        if not math.isfinite(value):
            raise ValueError(f"score: expected a finite number, got {value}")
        return value

    described = {
        "format": FORMAT,
        "weights": weight_hash(model),
        "steps": steps,
        "start": start,
        "factor": factor,
        "tolerance": tolerance,
        "precision": precision,
        "mask": {key: repr(value) for key, value in (mask or {}).items()},
        "learning": {
            key: repr(value)
            for key, value in learning.items()
            if key not in ("progress", "description", "callback", "checkpoint_every")
        },
    }
    file = None if record is None else Path(record)
    trials = _earlier(file, described)
    unmasked = scored(copy.deepcopy(model))

    def learn(penalty: float) -> PenaltyTrial:
        masked = mask_model(copy.deepcopy(model), ["control"], **(mask or {}))
        text = {"description": f"penalty {penalty:.3g} per logit", **learning}
        checkpoint = None if file is None else file.with_suffix(f".{len(trials)}.pt")
        result = learn_masks(
            masked,
            loss,
            data,
            steps,
            penalty=penalty,
            checkpoint=checkpoint,
            resume=checkpoint is not None,
            **text,
        ).masks["control"]
        found = scored(result.bake(copy.deepcopy(model)))
        trial = PenaltyTrial(penalty, found, result.density(), found >= unmasked - tolerance)
        trials.append(trial)
        if file is not None:
            write_json(file, {**described, "trials": [asdict(each) for each in trials]})
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        return trial

    while True:
        low = max((t.penalty for t in trials if t.holds), default=None)
        high = min((t.penalty for t in trials if not t.holds), default=None)
        if low is not None and high is not None and low > high:
            # a mask beyond the border held by luck
            low = max((t.penalty for t in trials if t.holds and t.penalty < high), default=None)
        if len(trials) >= most or (low and high and high / low <= precision):
            return PenaltySearch(low, high, unmasked, tolerance, trials)
        if low is None and high is None:
            learn(start)
        elif high is None:
            assert low is not None
            learn(low * factor)
        elif low is None:
            learn(high / factor)
        else:
            learn(math.sqrt(low * high))


def _earlier(file: Path | None, described: Mapping[str, Any]) -> list[PenaltyTrial]:
    if file is None or not file.exists():
        return []
    found = read_json(file)
    if not isinstance(found, dict) or "trials" not in found:
        raise ValueError(f"record: {file} holds no search for a penalty")
    differing = [key for key, value in described.items() if found.get(key) != value]
    if differing:
        raise ValueError(f"record: {file} is of another search; {differing[0]} differs")
    return [PenaltyTrial(**trial) for trial in found["trials"]]
