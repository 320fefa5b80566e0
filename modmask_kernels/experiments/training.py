"""Ordinary training of a network, resumable to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import atomic
from ..masks.seeds import hash64
from ..progress import progress_bar

Batch = tuple[Any, ...]  # inputs, targets, and what else the loss needs


def derive_seed(seed: int, *names: str) -> int:
    """A seed in [0, 2**63) for one purpose within a run; different names give unrelated seeds."""
    return hash64("/".join(("modmask", str(seed), *names))) >> 1


def train(
    model: nn.Module,
    loss: Callable[[Tensor, Any], Tensor],
    data: Callable[[int, torch.Generator], Batch],
    steps: int,
    *,
    lr: float = 1e-3,
    grad_clip: float = 1.0,
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 1000,
    log_every: int = 100,
    progress: bool = True,
    description: str = "network",
) -> list[dict[str, float]]:
    """Train all parameters with Adam for exactly `steps` steps.

    A checkpoint holds parameters, optimiser, data generator and step, so that a run continued
    after a kill ends with the bits of an unbroken one (same machine, versions and threads).

    Args:
        model: trained in place, in training mode.
        loss: (output, batch) to a scalar.
        data: (step, generator) to a batch (inputs, targets, ...).
        steps: number of optimiser steps.
        lr: learning rate; betas (0.9, 0.999), eps 1e-8, no weight decay.
        grad_clip: largest global L2 norm of the gradient; 0 turns clipping off.
        seed: seed of the data generator.
        checkpoint: file to write and, if it exists, to continue from.
        checkpoint_every: steps between two checkpoints.
        log_every: steps between two records of the loss.
        progress: show a progress bar with rate and time left.
        description: text before the bar.

    Returns:
        rows {"step", "loss"}.

    Raises:
        FloatingPointError: the loss is NaN or infinite at a recorded step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=lr, fused=True)
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[str, float]] = []
    first = 0
    if checkpoint is not None and checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"])
        first, rows = state["step"], state["rows"]

    model.train()
    with progress_bar(steps, first, description, shown=progress) as bar:
        for step in range(first, steps):
            batch = data(step, generator)
            value = loss(model(batch[0]), batch)
            optimiser.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            if grad_clip:
                nn.utils.clip_grad_norm_(parameters, grad_clip)
            optimiser.step()
            done = step + 1
            if done % log_every == 0 or done == steps:
                number = value.item()
                if not torch.isfinite(value):
                    raise FloatingPointError(f"the training loss is {number} at step {step}")
                rows.append({"step": done, "loss": number})
                bar.set_postfix_str(f"loss {number:.4f}", refresh=False)
            if checkpoint is not None and (done % checkpoint_every == 0 or done == steps):
                with atomic(checkpoint) as path:
                    torch.save(
                        {
                            "step": done,
                            "model": model.state_dict(),
                            "optimiser": optimiser.state_dict(),
                            "generator": generator.get_state(),
                            "rows": rows,
                        },
                        path,
                    )
            bar.update()
    return rows
