"""A whole mask-learning step against an ordinary training step of the same network.

The networks and the data are those of the addition / multiplication study. Data generation, loss,
penalty, clipping and optimiser belong to every step.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..experiments.addmul_fnn import AddMulFNN, AddMulSettings
from ..experiments.arithmetic import SIZES
from ..experiments.training import train
from ..masks import learn_masks, mask_model
from ..tasks import AddMul, digit_loss
from .baselines import naive_masked_model
from .linear import noise_function, verdict
from .timing import Timing, Visitor, calls_of, interleaved, keep_freed_memory, ratio, summary
from .verify import GateError

Batch = tuple[Tensor, Tensor]
Data = Callable[[int, torch.Generator], Batch]

# the largest wanted ratio of a mask-learning step to an ordinary one
TARGET = 1.5

# steps of a visit that are not timed: the first allocates the state of the optimiser
_SETTLING = 2


@dataclass(frozen=True)
class StepCase:
    """A network of the study, the batch, and the masks drawn per step."""

    size: str
    batch: int = 128
    samples: int = 4


def cases(quick: bool = False) -> list[StepCase]:
    """The rows of the full table, or of the short one."""
    return [StepCase("small")] if quick else [StepCase(s) for s in ("small", "medium", "big")]


class TimedData:
    """A data source that notes when it is asked; the time between two requests is one step."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self.asked: list[float] = []

    def __call__(self, step: int, generator: torch.Generator) -> Batch:
        """The batch of the data source."""
        self.asked.append(time.perf_counter())
        return self._data(step, generator)

    def steps(self) -> list[float]:
        """Seconds of every step but the last, whose end was not seen."""
        return [b - a for a, b in zip(self.asked, self.asked[1:], strict=False)]


def visitor_of(loop: Callable[[Data, int], object], data: Data) -> Visitor:
    """Times the steps of a training loop from inside, so that its set-up does not count.

    Args:
        loop: called with a data source and a number of steps.
        data: the source.
    """

    def visit(count: int) -> list[float]:
        timed = TimedData(data)
        loop(timed, _SETTLING + count + 1)
        return timed.steps()[_SETTLING:]

    return visit


def naive_loop(
    model: nn.Module,
    loss: Callable[[Tensor, Batch], Tensor],
    data: Data,
    steps: int,
    *,
    penalty: float,
    lr: float = 1e-2,
    grad_clip: float = 1.0,
) -> None:
    """Mask learning over `baselines.naive_masked_model`, as it is usually written.

    Args:
        model: the masked model; all its trainable parameters are logits.
        loss: (output, batch) to a scalar.
        data: (step, generator) to a batch (inputs, targets).
        steps: number of steps.
        penalty: coefficient of the sum of all logits in the loss.
        lr: learning rate of Adam (fused).
        grad_clip: largest global norm of the gradient.
    """
    logits = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(logits, lr=lr, fused=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        batch = data(step, generator)
        value = loss(model(batch[0]), batch)
        value = value + penalty * sum(p.sum() for p in logits)
        optimiser.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(logits, grad_clip)
        optimiser.step()


def floor_visitors(masked: nn.Module, samples: int) -> dict[str, Visitor]:
    """What no mask-learning step can do without beside the training step.

    `noise`: the bits of all masked weights once; `noise_call`: of as many tiny layers. `operation`,
    `layer`: forward and backward of as many tiny layers, masked and plain.
    """
    logits = [p for name, p in masked.named_parameters() if name.endswith("weight_logits")]
    tiny = nn.Sequential(*(nn.Linear(16, 16) for _ in logits))
    x = torch.zeros(samples, 16)

    def step(model: nn.Module) -> Callable[[], object]:
        return lambda: model(x).sum().backward()

    def noise(all_logits: Sequence[Tensor]) -> Callable[[], object]:
        functions = [noise_function(each.detach().flatten(0, -2), samples) for each in all_logits]
        return lambda: [function() for function in functions]

    functions = {
        "noise": noise(logits),
        "noise_call": noise([torch.zeros(16, 16) for _ in logits]),
        "operation": step(mask_model(copy.deepcopy(tiny), samples=samples)),
        "layer": step(tiny),
    }
    return {name: calls_of(function, time.perf_counter) for name, function in functions.items()}


def floor_of(timings: Mapping[str, Timing]) -> dict[str, float]:
    """The least ratio to a training step that the measured parts allow, see `floor_visitors`.

    The noise is needed twice, forward and backward. Masking, slopes, cut products and the penalty
    are taken as free, and all else as in the training step.
    """

    def to_plain(name: str) -> float:
        return ratio(timings[name], timings["plain"]).value

    noise = timings["noise"].median - timings["noise_call"].median
    call = timings["operation"].median - timings["layer"].median
    return {
        "noise_seconds": noise,
        "call_seconds": call,
        "seconds": timings["plain"].median + call + 2.0 * noise,
        "ratio_to_plain": 1.0
        + (to_plain("operation") - to_plain("layer"))
        + 2.0 * (to_plain("noise") - to_plain("noise_call")),
    }


def run_case(case: StepCase, *, rounds: int, visit_seconds: float = 0.2) -> dict[str, object]:
    """Checks and times one network.

    Args:
        case: the network.
        rounds: rounds of the interleaved timing.
        visit_seconds: length of a candidate's turn.

    Returns:
        a JSON-able dict.

    Raises:
        GateError: the frozen weights moved, or the logits did not.
    """
    settings = AddMulSettings(size=case.size, batch=case.batch, samples=case.samples)
    data = AddMul(settings.digits, batch_size=case.batch)
    network = AddMulFNN().build(settings)
    masked = mask_model(copy.deepcopy(network), sets=["control"], samples=case.samples)
    naive = naive_masked_model(network, case.samples)

    def learn(source: Data, steps: int) -> None:
        learn_masks(
            masked,
            digit_loss,
            {"control": source},
            steps,
            lr=settings.mask_lr,
            penalty=settings.alpha,
            grad_clip=settings.grad_clip,
            progress=False,
        )

    before = {name: p.detach().clone() for name, p in masked.named_parameters()}
    learn(data, 2)
    for name, parameter in masked.named_parameters():
        same = torch.equal(before[name], parameter)
        if name.endswith("_logits") and (same or not bool(torch.isfinite(parameter).all())):
            raise GateError(f"mask learning left {name} as it was, or not finite")
        if not name.endswith("_logits") and not same:
            raise GateError(f"mask learning changed the frozen parameter {name}")

    timings = interleaved(
        {
            "plain": visitor_of(
                lambda source, steps: train(
                    network,
                    digit_loss,
                    source,
                    steps,
                    lr=settings.lr,
                    grad_clip=settings.grad_clip,
                    progress=False,
                ),
                data,
            ),
            "fused": visitor_of(learn, data),
            "naive": visitor_of(
                lambda source, steps: naive_loop(
                    naive,
                    digit_loss,
                    source,
                    steps,
                    penalty=settings.alpha,
                    lr=settings.mask_lr,
                    grad_clip=settings.grad_clip,
                ),
                data,
            ),
            **floor_visitors(masked, case.samples),
        },
        rounds=rounds,
        visit_seconds=visit_seconds,
        max_calls=100,
    )
    to_plain = ratio(timings["fused"], timings["plain"])
    floor = floor_of(timings)
    return {
        **asdict(case),
        "hidden": list(SIZES[case.size]),
        "masked_weights": sum(p.numel() for n, p in network.named_parameters() if "weight" in n),
        "ratio_to_plain": asdict(to_plain),
        "naive_ratio_to_plain": asdict(ratio(timings["naive"], timings["plain"])),
        "times_faster_than_naive": ratio(timings["naive"], timings["fused"]).value,
        "target": TARGET,
        "verdict": verdict(to_plain.value, TARGET, floor=floor["ratio_to_plain"]),
        "floor": floor,
        "seconds": summary(timings),
    }


def run(*, quick: bool = False, progress: bool = True) -> list[dict[str, object]]:
    """All networks; see `run_case`."""
    keep_freed_memory()
    rows = []
    bar = tqdm(cases(quick), desc="mask-learning step", unit="network", disable=not progress)
    for case in bar:
        bar.set_postfix_str(case.size)
        rows.append(run_case(case, rounds=5 if quick else 15))
    return rows
