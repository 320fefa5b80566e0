"""How many plain mask samples an antithetic pair (u, 1 - u) replaces at equal gradient variance."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..masks import learn_masks, mask_model
from ..masks.convert import masked_layers
from ..models import FeedForward
from ..tasks import AddMul, digit_loss

_TRAINING_STEPS = 1500
_BLOCKS = 5  # repetitions, for the spread


@dataclass(frozen=True)
class AntitheticCase:
    """One row of the table.

    Attributes:
        learned: steps of mask learning before the measurement.
        rows: of the batch that each sample sees.
        same_rows: whether both samples of a pair see the same rows, so that masks alone make the
            variance; in learning each sees its own.
        draws: gradients per repetition.
    """

    learned: int
    rows: int
    same_rows: bool
    draws: int = 100
    hidden: int = 128
    training: int = _TRAINING_STEPS


def cases(quick: bool = False) -> list[AntitheticCase]:
    """The rows of the full table, or of the short one."""
    rows = [
        AntitheticCase(learned, rows, same_rows)
        for learned in (0, 300)
        for rows in (16, 128)
        for same_rows in (True, False)
    ]
    return rows[:1] if quick else rows


def _network(case: AntitheticCase) -> nn.Module:
    """A trained network under masks that have learned for some steps."""
    generator = torch.Generator().manual_seed(0)
    network = FeedForward(42, (case.hidden, case.hidden), 20, generator=generator)
    data = AddMul(batch_size=128)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    for step in range(case.training):
        batch = data(step, generator)
        optimiser.zero_grad()
        digit_loss(network(batch[0]), batch).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    mask_model(network, sets=["add"], samples=4)
    if case.learned > 0:
        learn_masks(
            network,
            digit_loss,
            {"add": AddMul(operations=["add"])},
            steps=case.learned,
            seed=0,
            progress=False,
        )
    return network


def _variance(
    network: nn.Module, case: AntitheticCase, samples: int, antithetic: bool, first_seed: int
) -> float:
    """Sum over all logits of the variance of the gradient, over draws of masks and batches."""
    layers = masked_layers(network).values()
    logits = [layer.logits_of(name) for layer in layers for name in layer.masked]
    rows = case.rows if case.same_rows else case.rows * samples
    data = AddMul(operations=["add"], batch_size=rows)
    # with the same rows for all draws, masks alone vary
    batch = data(0, torch.Generator().manual_seed(1))
    total: list[Tensor] = [torch.zeros_like(p, dtype=torch.float64) for p in logits]
    squares = [t.clone() for t in total]
    for layer in layers:
        layer.mode, layer.samples, layer.antithetic = "sample", samples, antithetic
    for draw in range(case.draws):
        seed = first_seed + draw
        for layer in layers:
            layer.seed = torch.tensor([seed])
        if not case.same_rows:
            batch = data(0, torch.Generator().manual_seed(seed))
        x, target = (t.repeat(samples, *[1] * (t.dim() - 1)) for t in batch)
        used = (x, target) if case.same_rows else batch
        gradients = torch.autograd.grad(digit_loss(network(used[0]), used), logits)
        for sums, sums_of_squares, gradient in zip(total, squares, gradients, strict=True):
            wide = gradient.double()
            sums += wide
            sums_of_squares += wide.square()
    n = case.draws
    parts = zip(total, squares, strict=True)
    return sum(float((q / n - (s / n).square()).sum()) * n / (n - 1) for s, q in parts)


def run_case(case: AntitheticCase) -> dict[str, object]:
    """Measures one row.

    Returns:
        a JSON-able dict: mean and standard deviation, over repetitions with other seeds, of the
        number of plain samples that have the gradient variance of one antithetic pair, and of two
        plain samples as a check (2 but for chance).
    """
    network = _network(case)
    found: dict[str, list[float]] = {"antithetic": [], "plain": []}
    for block in range(_BLOCKS):
        seed = 1000 * block

        def variance(samples: int, antithetic: bool, seed: int = seed) -> float:
            return _variance(network, case, samples, antithetic, seed)

        one = variance(1, False)
        found["antithetic"].append(one / variance(2, True))
        found["plain"].append(one / variance(2, False))
    return {
        **asdict(case),
        "repetitions": _BLOCKS,
        "worth": {
            name: {"mean": statistics.mean(values), "std": statistics.stdev(values)}
            for name, values in found.items()
        },
    }


def run(*, quick: bool = False, progress: bool = True) -> list[dict[str, object]]:
    """All rows of the table; see `run_case`."""
    rows = []
    bar = tqdm(cases(quick), desc="antithetic pairs", unit="row", disable=not progress)
    for case in bar:
        bar.set_postfix_str(f"{case.learned} steps learned, {case.rows} rows")
        rows.append(run_case(case))
    return rows
