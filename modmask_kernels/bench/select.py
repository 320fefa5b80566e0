"""select_linear against masking row by row: every row of the batch sees a mask set of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .. import ops
from .timing import keep_freed_memory, ratio, summary, time_functions
from .verify import GateError


@dataclass(frozen=True)
class SelectCase:
    """One row of the table: a layer, its mask sets, and a batch whose rows choose at random."""

    out_features: int
    in_features: int
    sets: int
    batch: int


@dataclass(frozen=True)
class Selected:
    """The operands: x `[batch, in]`, weight `[out, in]`, masks, the set of each row.

    `masks` are packed bits; `dense`, the same as bools `[sets, out, in]`, is for who knows no bits.
    """

    x: Tensor
    weight: Tensor
    masks: Tensor
    dense: Tensor
    row_sets: Tensor

    @staticmethod
    def random(
        case: SelectCase,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Selected:
        """Masks that keep half of the weights."""
        generator = torch.Generator(device).manual_seed(0)
        given: dict[str, Any] = {"generator": generator, "device": device}
        shape = (case.out_features, case.in_features)
        dense = torch.rand(case.sets, *shape, **given) < 0.5
        return Selected(
            x=torch.randn(case.batch, case.in_features, **given).to(dtype),
            weight=(torch.randn(*shape, **given) / math.sqrt(case.in_features)).to(dtype),
            masks=torch.stack([ops.pack_bits(mask) for mask in dense]),
            dense=dense,
            row_sets=torch.randint(case.sets, (case.batch,), **given),
        )


def _fused(p: Selected) -> Tensor:
    return ops.select_linear(p.x, p.weight, p.masks, p.row_sets)


def _naive(p: Selected) -> Tensor:
    """A masked weight for every row, then one bmm."""
    return torch.bmm(p.weight * p.dense[p.row_sets], p.x.unsqueeze(2)).squeeze(2)


def _by_set(p: Selected) -> Tensor:
    """The rows of each set that occurs together."""
    y = p.x.new_empty(p.x.shape[0], p.weight.shape[0])
    for s in sorted(set(p.row_sets.tolist())):
        rows = (p.row_sets == s).nonzero().squeeze(1)
        y[rows] = F.linear(p.x[rows], p.weight * p.dense[s])
    return y


def _plain(p: Selected) -> Tensor:
    """No masks: all rows see the same weight."""
    return F.linear(p.x, p.weight)


CANDIDATES: dict[str, Callable[[Selected], Tensor]] = {
    "plain": _plain,
    "fused": _fused,
    "naive": _naive,
    "by set": _by_set,
}


def cases(quick: bool = False) -> list[SelectCase]:
    """The rows of the full table, or of the short one."""
    rows = [SelectCase(1024, 1024, 100, batch) for batch in (8, 32, 128)]
    return rows[1:2] if quick else rows


def check(problem: Selected) -> float:
    """Raise GateError unless every candidate computes the same.

    Returns:
        the largest error of the fused operation over what is allowed: twice that of naive masking,
        plus one unit in the last place of the largest output.
    """
    exact = _by_set(replace(problem, x=problem.x.double(), weight=problem.weight.double()))
    errors = {
        name: float((CANDIDATES[name](problem) - exact).abs().max())
        for name in ("fused", "naive", "by set")
    }
    unit = float(exact.abs().max()) * torch.finfo(problem.x.dtype).eps
    allowed = 2 * errors["naive"] + unit
    for name, error in errors.items():
        if not error <= allowed:
            raise GateError(f"{name}: error {error:.3g} of select_linear, allowed {allowed:.3g}")
    return errors["fused"] / allowed


@torch.no_grad()
def run_case(case: SelectCase, *, rounds: int, visit_seconds: float = 0.02) -> dict[str, object]:
    """One row: checked, then timed."""
    keep_freed_memory()
    problem = Selected.random(case)
    error = check(problem)
    functions = {name: functools.partial(f, problem) for name, f in CANDIDATES.items()}
    timings = time_functions(functions, rounds=rounds, visit_seconds=visit_seconds)
    return {
        **asdict(case),
        "dtype": "float32",
        "seconds": summary(timings),
        "ratio_to_plain": asdict(ratio(timings["fused"], timings["plain"])),
        "naive_over_fused": ratio(timings["naive"], timings["fused"]).value,
        "by_set_over_fused": ratio(timings["by set"], timings["fused"]).value,
        "error_over_allowed": {"fused": error},
        "mask_bytes": {
            "fused": problem.masks.nbytes,
            "naive": problem.dense.nbytes,
            "masked weights": case.batch * problem.weight.nbytes,
        },
    }


def run(*, quick: bool = False, progress: bool = True) -> list[dict[str, object]]:
    """All rows."""
    rows = cases(quick)
    with tqdm(rows, desc="select", unit="row", disable=not progress) as bar:
        return [run_case(case, rounds=3 if quick else 7) for case in bar]
