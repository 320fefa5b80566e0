"""MaskedLSTM, forward and backward, against the plain layer and a naive loop over time."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..nn import MaskedAny, MaskedLSTM, MaskedModule
from . import baselines
from .conv import SLOWER_THAN_NAIVE
from .linear import verdict
from .timing import keep_freed_memory, ratio, summary, time_functions
from .verify import check_finite, check_results

Layer = TypeVar("Layer", bound=MaskedModule)

_SEEDS = 16
_LOGIT = 2.0


@dataclass(frozen=True)
class LSTMCase:
    """One row of the table: as many inputs as hidden units."""

    units: int
    samples: int
    layers: int = 2
    batch: int = 64
    steps: int = 50
    target: float | None = None  # largest wanted ratio to the plain layer


def cases(quick: bool = False) -> list[LSTMCase]:
    """The rows of the full table, or of the short one."""
    targets = [
        LSTMCase(256, 1, target=1.1),
        LSTMCase(256, 4, target=1.3),
        LSTMCase(64, 1, target=1.2),
        LSTMCase(64, 4, target=1.5),
    ]
    return targets[3:] if quick else [*targets, LSTMCase(256, 8), LSTMCase(64, 8)]


@dataclass(frozen=True)
class LSTMProblem:
    """A plain layer, its input [steps, batch, units] and the gradient from above."""

    plain: nn.LSTM
    x: Tensor
    grad: Tensor
    samples: int

    @staticmethod
    def of(case: LSTMCase) -> LSTMProblem:
        """Random operands on the CPU, float32."""
        generator = torch.Generator().manual_seed(0)
        plain = nn.LSTM(case.units, case.units, case.layers)
        with torch.no_grad():
            for parameter in plain.parameters():
                bound = case.units**-0.5
                parameter.uniform_(-bound, bound, generator=generator)
        shape = (case.steps, case.batch, case.units)
        return LSTMProblem(
            plain,
            torch.randn(shape, generator=generator),
            torch.randn(shape, generator=generator),
            case.samples,
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> LSTMProblem:
        """The same elsewhere, in another dtype."""
        plain = copy.deepcopy(self.plain).to(device, dtype)
        return LSTMProblem(
            plain, self.x.to(device, dtype), self.grad.to(device, dtype), self.samples
        )

    def masked(self, masked_type: type[Layer]) -> Layer:
        """A masked layer, drawing."""
        layer: Layer = masked_type.from_dense(  # type: ignore[attr-defined]
            copy.deepcopy(self.plain), samples=self.samples, init=_LOGIT
        )
        layer.mode = "sample"
        return layer

    def step(self, layer: nn.Module, parameters: list[nn.Parameter]) -> Callable[[], Tensor]:
        """Forward and backward; gradients are None before."""
        x = self.x.clone().requires_grad_()

        def run() -> Tensor:
            for leaf in (x, *parameters):
                leaf.grad = None
            y: Tensor = layer(x)[0]
            y.backward(self.grad)  # type: ignore[no-untyped-call]
            return y

        return run

    def results(self, layer: MaskedModule, dtype: torch.dtype) -> dict[str, Tensor]:
        """Output and gradients under one seed."""
        layer.to(dtype)
        x = self.x.to(dtype).requires_grad_()
        layer.seed = torch.tensor([7], device=self.x.device)
        logits = {name: layer.logits_of(name) for name in layer.masked}
        y = layer(x)[0]
        grads = torch.autograd.grad(y, (x, *logits.values()), self.grad.to(dtype))
        return dict(zip(("y", "grad_x", *logits), (y.detach(), *grads), strict=True))


def check(problem: LSTMProblem) -> dict[str, float]:
    """Compares the fused layer with the general path (the plain layer per group) in float64.

    Raises:
        GateError: an error is larger than twice that of the general path in the dtype of the
            problem, plus one unit in the last place of the largest entry.
    """
    dtype = problem.x.dtype
    return check_results(
        "masked_lstm",
        ours=problem.results(problem.masked(MaskedLSTM), dtype),
        plain=problem.results(problem.masked(MaskedAny), dtype),
        exact=problem.results(problem.masked(MaskedAny), torch.float64),
    )


def run_case(case: LSTMCase, *, rounds: int, visit_seconds: float = 0.1) -> dict[str, object]:
    """Checks and times one row.

    Returns:
        a JSON-able dict; every number that the table shows.

    Raises:
        GateError: a candidate is wrong; nothing is timed then.
    """
    problem = LSTMProblem.of(case)
    error_shares = check(problem)
    fused = problem.masked(MaskedLSTM)
    fused_step = problem.step(fused, [fused.logits_of(name) for name in fused.masked])
    seeds = itertools.cycle([torch.tensor([seed]) for seed in range(_SEEDS)])

    def seeded_step() -> Tensor:
        fused.seed = next(seeds)
        return fused_step()

    naive = baselines.NaiveMaskedLSTM(problem.plain, case.samples, _LOGIT)
    naive_step = problem.step(naive, list(naive.logits))
    check_finite(
        {"y": naive_step(), **{f"grad_{n}": p.grad for n, p in enumerate(naive.logits)}},
        name="naive masking",
    )
    timings = time_functions(
        {
            "plain": problem.step(problem.plain, list(problem.plain.parameters())),
            "fused": seeded_step,
            "naive": naive_step,
        },
        rounds=rounds,
        visit_seconds=visit_seconds,
    )
    to_plain = ratio(timings["fused"], timings["plain"])
    to_naive = ratio(timings["fused"], timings["naive"])
    return {
        **asdict(case),
        "dtype": "float32",
        "ratio_to_plain": asdict(to_plain),
        "verdict": verdict(to_plain.value, case.target),
        "naive_ratio_to_plain": asdict(ratio(timings["naive"], timings["plain"])),
        "ratio_to_naive": asdict(to_naive),
        "verdict_naive": verdict(to_naive.value, SLOWER_THAN_NAIVE),
        "error_over_allowed": error_shares,
        "seconds": summary(timings),
    }


def run(*, quick: bool = False, progress: bool = True) -> list[dict[str, object]]:
    """All rows of the table; see `run_case`."""
    keep_freed_memory()
    rows = []
    bar = tqdm(cases(quick), desc="MaskedLSTM", unit="shape", disable=not progress)
    for case in bar:
        bar.set_postfix_str(f"{case.units} units, samples {case.samples}")
        rows.append(run_case(case, rounds=3 if quick else 9))
    return rows
