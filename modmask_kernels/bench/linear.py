"""masked_linear, forward and backward, against plain, naive and published layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .. import ops
from . import baselines
from .timing import Timing, keep_freed_memory, ratio, summary, time_functions
from .verify import (
    GateError,
    Problem,
    check_distribution,
    check_finite,
    check_fused,
    check_packed_masks,
)

BASELINES = ("naive", "compiled", "neurosurgeon")

# words read and written per weight and step by a kernel that keeps nothing: forward reads weight
# and logits, the gradient of x reads both again, that of the logits reads both and writes one
WORDS_PER_WEIGHT = 7

_SEEDS = 16  # the noise of a call must not be that of the call before


@dataclass(frozen=True)
class LinearCase:
    """One row of the table: a layer `[out, in]`, a batch, and the number of masks in it."""

    out_features: int
    in_features: int
    batch: int
    samples: int

    @property
    def target(self) -> float | None:
        """Largest wanted ratio to the plain layer; None where none was set."""
        return self._of_width({(128, 1): 1.1, (128, 4): 1.5, (128, 8): 2.0, (8, 1): 1.25})

    @property
    def relaxed_target(self) -> float | None:
        """The ratio that passes with the measured floor beside it; None where there is none."""
        return self._of_width({(128, 4): 1.6, (128, 8): 2.2})

    def _of_width(self, table: dict[tuple[int, int], float]) -> float | None:
        bound = table.get((self.batch, self.samples))
        shape = (self.out_features, self.in_features)
        if bound is None or shape == (1024, 1024):
            return bound
        if self.batch == 128 and shape in ((384, 384), (832, 832)):
            return bound * 1.15
        return None


def cases(quick: bool = False) -> list[LinearCase]:
    """The rows of the full table, or of the short one."""
    if quick:
        return [LinearCase(1024, 1024, 128, 4), LinearCase(1024, 1024, 8, 1)]
    return [
        LinearCase(width, width, batch, samples)
        for width in (1024, 384, 832)
        for batch, samples in ((128, 1), (128, 4), (128, 8), (8, 1))
    ]


def _step(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor
) -> Callable[[], Tensor]:
    """Forward and backward with the gradients of `leaves` cleared first."""

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = forward()
        y.backward(grad)  # type: ignore[no-untyped-call]
        return y

    return step


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def plain_step(problem: Problem) -> Callable[[], Tensor]:
    """The plain layer with a trainable weight and the same fixed bias."""
    x, weight = _leaf(problem.x), _leaf(problem.weight)
    return _step(lambda: problem.plain(x, weight, problem.bias), (x, weight), problem.grad)


def fused_step(problem: Problem) -> Callable[[], Tensor]:
    """The fused operation with a fixed weight and trainable logits."""
    x, logits = _leaf(problem.x), _leaf(problem.logits)
    seeds = itertools.cycle([torch.tensor(seed) for seed in range(_SEEDS)])
    return _step(lambda: problem.fused(x, logits, next(seeds)), (x, logits), problem.grad)


def naive_step(
    problem: Problem, function: Callable[..., Tensor] = baselines.naive_masked_linear
) -> Callable[[], Tensor]:
    """Naive masking, eager or compiled, with a fixed weight and trainable logits."""
    x, logits = _leaf(problem.x), _leaf(problem.logits)
    return _step(
        lambda: function(x, problem.weight, logits, problem.bias, problem.samples),
        (x, logits),
        problem.grad,
    )


def neurosurgeon_step(problem: Problem) -> Callable[[], Tensor]:
    """The hard-concrete layer of NeuroSurgeon; checked before it is returned.

    Raises:
        baselines.NotAvailableError: it is not installed, or the problem has more than one sample.
    """
    if problem.samples != 1:
        raise baselines.NotAvailableError("NeuroSurgeon draws one mask per batch")
    layer = baselines.neurosurgeon_linear(problem.weight, problem.bias)
    x, logits = _leaf(problem.x), layer.get_parameter("weight_mask_params")
    step = _step(lambda: layer(x), (x, logits), problem.grad)
    y = step()
    check_finite({"y": y, "grad_x": x.grad, "grad_logits": logits.grad}, name="NeuroSurgeon")
    return step


def baseline_step(name: str, problem: Problem) -> Callable[[], Tensor]:
    """The step of a name of `BASELINES`, checked before it is returned.

    Raises:
        GateError: it computes something else than it should.
        baselines.NotAvailableError: it cannot run here.
    """
    if name == "neurosurgeon":
        return neurosurgeon_step(problem)
    function: Callable[..., Tensor] = baselines.naive_masked_linear
    if name == "compiled":
        function = baselines.compiled_naive_masked_linear()
    try:
        check_distribution(
            lambda x, logits: function(x, problem.weight, logits, problem.bias, problem.samples),
            problem,
            name=f"{name} masking",
        )
        return naive_step(problem, function)
    except GateError:
        raise
    except RuntimeError as error:
        # no compiler for the generated code: the reason is the first line, the rest a trace
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise baselines.NotAvailableError(f"torch.compile fails here: {reason[0]}") from error


# weights of the layer whose call costs as much as that of a large one, and its kernel nothing
_TINY = 16


def _beside(problem: Problem, layer: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
    """The plain step with the call of another layer in it, `layer(x, trainable)`, of size `_TINY`.

    The other layer comes first forward and last backward: after products, as in a network, when
    the caches hold their operands and not the code of a call.
    """
    x, weight = _leaf(problem.x), _leaf(problem.weight)
    tiny_x = torch.zeros(problem.samples, _TINY, requires_grad=True)
    tiny_weight = torch.zeros(_TINY, _TINY, requires_grad=True)
    tiny_grad = torch.zeros(problem.samples, _TINY)

    def step() -> None:
        for leaf in (x, weight, tiny_x, tiny_weight):
            leaf.grad = None
        tiny_y = layer(tiny_x, tiny_weight)
        y = problem.plain(x, weight, problem.bias)
        torch.autograd.backward((tiny_y, y), (tiny_grad, problem.grad))

    return step


def noise_function(logits: Tensor, samples: int) -> Callable[[], object]:
    """The bits of all masks once."""
    seeds = itertools.cycle([torch.tensor(seed) for seed in range(_SEEDS)])
    return lambda: ops.sample_mask_packed(logits, seed=next(seeds), samples=samples)


def floor_functions(problem: Problem) -> dict[str, Callable[[], object]]:
    """What no masked layer can do without.

    `noise`: the bits of all masks once; `noise_call`: of a layer that has next to none.
    `products`: the three products, cut into `samples` parts of the batch and done by the library.
    `copy`: one weight-sized tensor read, one written. `operation`, `layer`: the plain layer beside
    a call of the masked operation, or of a plain layer, that has next to nothing to do.
    """
    parts = [
        (x, grad, torch.empty_like(grad), torch.empty_like(x))
        for x, grad in zip(
            problem.x.chunk(problem.samples), problem.grad.chunk(problem.samples), strict=True
        )
    ]
    weight = problem.weight
    buffer = torch.empty_like(weight)
    tiny_weight, tiny_bias = torch.zeros(_TINY, _TINY), torch.zeros(_TINY)
    seeds = itertools.cycle([torch.tensor(seed) for seed in range(_SEEDS)])

    def products() -> None:
        for x, grad, y, grad_x in parts:
            torch.mm(x, weight.t(), out=y)
            torch.mm(grad, weight, out=grad_x)
            torch.mm(grad.t(), x, out=buffer)

    def operation(x: Tensor, logits: Tensor) -> Tensor:
        return ops.masked_linear(
            x, tiny_weight, logits, tiny_bias, seed=next(seeds), samples=problem.samples
        )

    return {
        "noise": noise_function(problem.logits, problem.samples),
        "noise_call": noise_function(tiny_weight, problem.samples),
        "products": products,
        "copy": lambda: buffer.copy_(weight),
        "operation": _beside(problem, operation),
        "layer": _beside(problem, lambda x, weight: F.linear(x, weight, tiny_bias)),
    }


def floor_of(case: LinearCase, timings: dict[str, Timing]) -> dict[str, float]:
    """The least time that the measured parts allow, in seconds, and what it is made of.

    The noise is needed twice, forward and backward, since nothing weight-sized is kept; the
    products cost at least what one whole product per pass costs; and an operation of its own costs
    more to call than one of PyTorch's. Masking, slopes and the cut are taken as free. The traffic
    counts `WORDS_PER_WEIGHT` at the speed of a plain copy of a tensor of this size.
    """

    def to_plain(name: str) -> float:
        return ratio(timings[name], timings["plain"]).value

    plain = timings["plain"].median
    noise = timings["noise"].median - timings["noise_call"].median
    call = timings["operation"].median - timings["layer"].median
    traffic = timings["copy"].median * WORDS_PER_WEIGHT / 2.0
    numbers = case.samples * case.out_features * case.in_features
    least = max(
        1.0
        + (to_plain("operation") - to_plain("layer"))
        + 2.0 * (to_plain("noise") - to_plain("noise_call")),
        WORDS_PER_WEIGHT / 2.0 * to_plain("copy"),
    )
    return {
        "noise_seconds": noise,
        "noise_nanoseconds_per_number_and_core": 1e9 * noise * torch.get_num_threads() / numbers,
        "whole_products_seconds": plain,
        "cut_products_seconds": timings["products"].median,
        "call_seconds": call,
        "traffic_bytes": 4.0 * WORDS_PER_WEIGHT * case.out_features * case.in_features,
        "traffic_seconds": traffic,
        "seconds": max(plain + call + 2.0 * noise, traffic),
        "ratio_to_plain": least,
        "fused_over_floor": to_plain("fused") / least,
    }


def verdict(
    value: float, target: float | None, relaxed: float | None = None, floor: float | None = None
) -> str:
    """How a measured number stands to its target, in words."""
    if target is None:
        return "no target"
    if value <= target:
        return "met"
    if relaxed is not None and value <= relaxed:
        return "met with the floor"
    forbidden = ", floor above target" if floor is not None and floor > target else ""
    return f"missed by {100.0 * (value / target - 1.0):.0f} %{forbidden}"


def run_case(
    case: LinearCase, *, names: Sequence[str] = BASELINES, rounds: int, visit_seconds: float = 0.02
) -> dict[str, object]:
    """Checks and times one row.

    Args:
        case: the row.
        names: baselines beside `plain`, of `BASELINES`.
        rounds: rounds of the interleaved timing.
        visit_seconds: length of a candidate's turn.

    Returns:
        a JSON-able dict; every number that the tables and the figure show.

    Raises:
        GateError: a candidate is wrong; nothing is timed then.
    """
    problem = Problem.random(case.out_features, case.in_features, case.batch, case.samples)
    error_shares = check_fused(problem)
    check_packed_masks(ops.sample_mask_packed, problem.logits, problem.samples)

    functions: dict[str, Callable[[], object]] = {
        "plain": plain_step(problem),
        "fused": fused_step(problem),
    }
    absent = {}
    for name in names:
        try:
            functions[name] = baseline_step(name, problem)
        except baselines.NotAvailableError as error:
            absent[name] = str(error)
    functions.update(floor_functions(problem))

    timings = time_functions(functions, rounds=rounds, visit_seconds=visit_seconds)
    to_plain = ratio(timings["fused"], timings["plain"])
    floor = floor_of(case, timings)
    return {
        **asdict(case),
        "dtype": "float32",
        "ratio_to_plain": asdict(to_plain),
        "target": case.target,
        "relaxed_target": case.relaxed_target,
        "verdict": verdict(
            to_plain.value, case.target, case.relaxed_target, floor["ratio_to_plain"]
        ),
        "baseline_ratio_to_plain": {
            name: asdict(ratio(timings[name], timings["plain"]))
            for name in names
            if name in timings
        },
        "times_faster_than": {
            name: ratio(timings[name], timings["fused"]).value for name in names if name in timings
        },
        "absent": absent,
        "floor": floor,
        "error_over_allowed": error_shares,
        "seconds": summary(timings),
    }


def run(*, quick: bool = False, progress: bool = True) -> list[dict[str, object]]:
    """All rows of the table; see `run_case`."""
    keep_freed_memory()
    rows = []
    bar = tqdm(cases(quick), desc="masked_linear", unit="shape", disable=not progress)
    for case in bar:
        bar.set_postfix_str(
            f"{case.out_features}x{case.in_features}, batch {case.batch}, samples {case.samples}"
        )
        rows.append(run_case(case, rounds=5 if quick else 41))
    return rows
