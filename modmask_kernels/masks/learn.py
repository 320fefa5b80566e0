"""The learning loop: masks for several functions of one frozen network, alone or side by side."""

from __future__ import annotations

import contextlib
import inspect
import math
import operator
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, SupportsIndex

import torch
from torch import nn

from ..progress import progress_bar
from .checkpoint import load_checkpoint, save_checkpoint
from .convert import find_record, masked_layers
from .learner import Data, Learner, Loss, Settings, of_set
from .mask_set import MaskSet
from .penalties import PENALTIES

Callback = Callable[[int, list[dict[str, Any]]], object]

LEARNING_MODES = ("sample", "soft")

# the published default: beta = 1e-4 over a batch of 128 (spec of the method, 1.5)
DEFAULT_PENALTY = 1e-4 / 128


@dataclass(frozen=True)
class LearnResult:
    """What `learn_masks` returns.

    Attributes:
        step: number of steps done, over all resumed parts.
        metrics: one row per set and interval: "step" (steps done), "set", "loss" (task loss of
            that step), "grad_norm" (of the set's logits, penalty included, before clipping),
            "kept" (fraction of the weights that the threshold masks keep), "seconds" (since the
            start).
        time: seconds spent, over all resumed parts.
        masks: the threshold masks with their logits, by name of the set.
    """

    step: int
    metrics: list[dict[str, Any]]
    time: float
    masks: dict[str, MaskSet]


def _integer(value: SupportsIndex, argument: str, least: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{argument}: expected an integer, got {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{argument}: expected at least {least}, got {number}")
    return number


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 1


@contextlib.contextmanager
def _learning(learner: Learner, mode: str) -> Iterator[None]:
    """The model as learning needs it, and afterwards as it was."""
    model = learner.model
    training = [(module, module.training) for module in model.modules()]
    layers = [
        (
            layer,
            layer._mode,
            layer._active,
            layer._views,
            layer.seed,
            layer.sample_offset,
            layer.tau,
        )
        for layer in learner.layers.values()
    ]
    logits = {id(t.logits) for t in learner.tensors.values()}
    weights = [(p, p.requires_grad, p.grad) for p in model.parameters() if id(p) not in logits]
    wanted = {id(p) for p in learner.weights}
    try:
        model.eval()
        for parameter, _, _ in weights:
            parameter.requires_grad_(id(parameter) in wanted)
            if id(parameter) in wanted:
                parameter.grad = None
        for layer, *_ in layers:
            layer._mode = mode  # type: ignore[assignment]
            layer.seed = learner.seed
            layer.sample_offset += learner.ranks.rank * learner.samples
        learner.select(learner.runs[0])
        with torch.enable_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for layer, former_mode, active, views, seed, offset, tau in layers:
            layer._mode, layer._active, layer._views = former_mode, active, views
            layer.seed, layer.sample_offset, layer.tau = seed, offset, tau
        for parameter, flag, grad in weights:
            parameter.requires_grad_(flag)
            parameter.grad = grad


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C wait for the end of the step; a second one interrupts at once."""
    pending = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pending
        if pending:
            raise KeyboardInterrupt
        pending = True

    former = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or (
        former is not signal.default_int_handler
    ):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pending
    finally:
        signal.signal(signal.SIGINT, former)


def _choose(
    model: nn.Module, data: Mapping[str, Data] | Data, sets: Sequence[str | int] | None
) -> dict[str, Data]:
    """The data of the sets to learn, by name."""
    first = next(iter(masked_layers(model).values()))
    if not isinstance(data, Mapping):
        chosen = range(first.sets) if sets is None else sets
        if not callable(data) or len(chosen) != 1:
            raise TypeError(
                "data: expected a mapping from set name to callable (a bare callable serves one "
                f"set only, here are {len(chosen)}), got {type(data).__name__}"
            )
        _check_source(data, "data")
        return {first.set_names[first.set_index(chosen[0])]: data}
    try:
        named = {first.set_names[first.set_index(key)]: source for key, source in data.items()}
    except ValueError as error:
        raise ValueError(f"data: {str(error).removeprefix('set: ')}") from None
    if sets is not None:
        if isinstance(sets, str):
            raise ValueError(f"sets: expected a list of sets, got the string {sets!r}")
        names = [first.set_names[first.set_index(key)] for key in sets]
        missing = [name for name in names if name not in named]
        if missing or len(set(names)) != len(names):
            raise ValueError(
                f"sets: expected distinct sets that have data ({list(named)}), got {list(sets)}"
            )
        named = {name: named[name] for name in names}
    if not named:
        raise ValueError("data: expected at least one set, got none")
    for name, source in named.items():
        _check_source(source, f"data[{name!r}]")
    return named


def _check_source(source: object, argument: str) -> None:
    if not callable(source):
        raise TypeError(
            f"{argument}: expected a callable(step, generator), got {type(source).__name__}"
        )
    try:
        inspect.signature(source).bind(0, None)
    except TypeError as error:
        raise TypeError(f"{argument}: expected a callable(step, generator), but {error}") from None
    except ValueError:  # a built-in without a signature
        pass


def learn_masks(
    model: nn.Module,
    loss: Loss | Mapping[str, Loss],
    data: Mapping[str, Data] | Data,
    steps: int,
    *,
    lr: float | Mapping[str, float] = 1e-2,
    penalty: float | Mapping[str, float] = DEFAULT_PENALTY,
    grad_clip: float | Mapping[str, float | None] | None = 1.0,
    union_clip: bool = False,
    seed: int = 0,
    sets: Sequence[str | int] | None = None,
    mode: str = "sample",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    batch_dim: int = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    resume: bool = False,
    callback: Callback | None = None,
    callback_every: int = 100,
    description: str | None = None,
    data_parallel: bool | None = None,
    penalty_form: str = "linear",
    tau: Callable[[int], float] | None = None,
) -> LearnResult:
    """Learn masks for one or several functions of a frozen network.

    Every step minimises, for each set s, ``loss_s + penalty * sum(logits_s)`` by fused Adam on
    the logits of s alone; the gradient, penalty included, is clipped to the norm `grad_clip` over
    the set. The weights do not change. Several sets are learned side by side: their batches pass
    through the network as one, but each keeps its own data and noise streams (named by `seed` and
    the set's name), loss, clip norm and optimiser state, so that learning a set alone gives the
    same bits (where all masked layers run on kernels that compute each group by itself).

    The model is put into eval mode (no dropout, stored batch statistics) with sampled masks, and
    restored afterwards, also after an error or Ctrl-C. Ctrl-C ends the step, writes the
    checkpoint and raises KeyboardInterrupt.

    Args:
        model: a model with masked layers, all on one device.
        loss: ``loss(output, batch) -> scalar``, called per set on its part of the output; or one
            such function for each set, by name.
        data: by name of the set a ``callable(step, generator) -> batch``. A batch is
            ``(inputs, targets, ...)`` or the inputs alone; inputs are a tensor, a tuple
            (positional arguments) or a dict (keyword arguments) with the batch in dimension
            `batch_dim`. `generator` is a CPU generator of the set's own. Sources with other state
            offer ``state_dict()`` and ``load_state_dict()`` for checkpoints. With one set the
            callable may come bare.
        steps: number of steps in total; steps are counted from 0.
        lr, penalty, grad_clip: learning rate, coefficient of each logit (beta / batch size in
            the published settings), clip norm or None; numbers, or mappings by set name. How to
            choose them: docs/using-masks.md.
        union_clip: clip as the published implementation does, over the logits and the
            never-cleared gradients of the weights together; one set only. It costs the weight
            gradients, and is for comparison.
        seed: seed of the run.
        sets: names or indices of the sets to learn; None learns all that have data.
        mode: "sample" or "soft".
        betas, eps: of Adam.
        batch_dim: dimension of the batch in inputs and outputs.
        progress: show a progress bar, with the loss of each set and the fraction of the weights
            that it keeps, as of the last `callback_every` steps.
        checkpoint: file to write every `checkpoint_every` steps and at the end.
        resume: continue from `checkpoint` if it exists; the result is bit-identical to that of an
            unbroken run on the same machine, versions and threads (times aside).
        callback: called as ``callback(step, rows)`` every `callback_every` steps and at the end.
        description: text in front of the progress bar.
        data_parallel: whether the processes of the default `torch.distributed` group learn one
            result together; None: if there is such a group. Each calls this function with its own
            part of every batch; rank r draws samples ``r * samples ... r * samples + samples - 1``
            of the same seeds, gradients and losses are averaged, and all get the result that one
            process with all samples gets from the joint batch, up to rounding. The logits start
            from those of rank 0, which alone writes the checkpoint and shows the progress bar.
        penalty_form: "linear", the sum of the logits, or "l0", the expected number of masks that
            are not 0 (`masks.expected_l0`), with the same coefficient `penalty`.
        tau: the temperature of all layers as a function of the step, `masks.Annealing` for
            instance; None leaves that of each layer. Afterwards the layers have their own again.

    Returns:
        LearnResult: steps, metrics, time and the masks with their logits.

    Raises:
        ValueError: for wrong settings, an empty batch, a batch that does not divide by the
            samples, unequal batches of sets learned together, or a checkpoint of another run.
        FloatingPointError: for logits, a loss or gradients that are not finite; it names set,
            step and tensor, and the logits are those before that step.
        RuntimeError: inside `torch.inference_mode`.

    Source: Csordás et al. 2021, "Are Neural Nets Modular?", section 2 and appendix.

    Equivalent to, for one set, with the masked layers in mode "sample"::

        optimizer = torch.optim.Adam(logits, lr=lr, betas=betas, eps=eps)
        for step in range(steps):
            batch = data(step, generator)
            optimizer.zero_grad()
            (loss(model(batch[0]), batch) + penalty * sum(l.sum() for l in logits)).backward()
            torch.nn.utils.clip_grad_norm_(logits, grad_clip)
            optimizer.step()
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "learn_masks needs gradients, which torch.inference_mode() excludes: call it outside, "
            "or inside torch.inference_mode(False)"
        )
    steps = _integer(steps, "steps", 0)
    seed = _integer(seed, "seed")
    checkpoint_every = _integer(checkpoint_every, "checkpoint_every", 1)
    callback_every = _integer(callback_every, "callback_every", 1)
    batch_dim = _integer(batch_dim, "batch_dim", 0)
    if mode not in LEARNING_MODES:
        raise ValueError(f"mode: expected one of {list(LEARNING_MODES)}, got {mode!r}")
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(map(_is_share, betas)):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
    if not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite number of at least 0, got {eps!r}")
    if resume and checkpoint is None:
        raise ValueError("resume: expected a checkpoint to resume from, got checkpoint=None")

    if penalty_form not in PENALTIES:
        raise ValueError(f"penalty_form: expected one of {list(PENALTIES)}, got {penalty_form!r}")
    if tau is not None and not callable(tau):
        raise TypeError(f"tau: expected a callable(step), got {type(tau).__name__}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: expected a callable(step, rows), got {type(callback).__name__}")
    settings = Settings(
        lr=lr,
        penalty=penalty,
        grad_clip=grad_clip,
        union_clip=union_clip,
        seed=seed,
        betas=(float(betas[0]), float(betas[1])),
        eps=float(eps),
        mode=mode,
        batch_dim=batch_dim,
        penalty_form=penalty_form,
        tau=tau,
    )
    chosen = _choose(model, data, sets)
    names = next(iter(masked_layers(model).values())).set_names
    losses = {name: of_set(loss, name, "loss", names) for name in chosen}
    for name, of_name in losses.items():
        if not callable(of_name):
            raise TypeError(
                f"loss: expected a callable(output, batch) for set {name!r}, got {of_name!r}"
            )
    learner = Learner(model, losses, chosen, settings, data_parallel=data_parallel)
    if checkpoint is not None:  # better now than after the first thousand steps
        for stream in learner.streams:
            learner.data_state(stream)
        learner.identity()  # by all processes: it gathers weights in shards
    metrics: list[dict[str, Any]] = []
    done, earlier = 0, 0.0
    with _learning(learner, mode):
        if resume and checkpoint is not None and Path(checkpoint).exists():
            state = load_checkpoint(checkpoint)
            done, earlier, metrics = state["step"], state["time"], state["metrics"]
            if done > steps:
                raise ValueError(f"steps: the checkpoint has {done} steps, more than {steps}")
            learner.load_state(state)
        start = time.perf_counter() - earlier

        def save(step: int) -> None:
            if checkpoint is not None and learner.ranks.rank == 0:
                learner.check_late()
                now = {"step": step, "time": time.perf_counter() - start, "metrics": metrics}
                save_checkpoint(checkpoint, {**learner.state(), **now})

        def report(step: int) -> None:
            learner.check_late()
            seconds = time.perf_counter() - start
            rows = [learner.row(stream, step, seconds) for stream in learner.streams]
            metrics.extend(rows)
            each = (f"{row['set']} {row['loss']:.4g} kept {row['kept']:.1%}" for row in rows)
            bar.set_postfix_str(f"loss {', '.join(each)}", refresh=False)
            if callback is not None:
                callback(step, rows)

        saved = done
        label = description or f"masks {', '.join(s.name for s in learner.streams)}"
        with (
            progress_bar(steps, done, label, shown=progress and learner.ranks.rank == 0) as bar,
            _deferred_interrupt() as interrupted,
        ):
            for step in range(done, steps):
                learner.step(step)
                bar.update()
                done = step + 1
                if done % callback_every == 0 or done == steps:
                    report(done)
                if done % checkpoint_every == 0 or done == steps:
                    save(done)
                    saved = done
                if interrupted():
                    if saved != done:
                        save(done)
                    raise KeyboardInterrupt
        seconds = time.perf_counter() - start

    record = find_record(model)
    masks = {}
    for stream in learner.streams:
        learned = {"seed": seed, "steps": done, "learning": learner.describe(stream)}
        if record is not None:
            record.learned[stream.name] = learned
        masks[stream.name] = MaskSet.from_model(model, stream.index, logits=True)
        masks[stream.name].metadata.update(learned)
    return LearnResult(step=done, metrics=metrics, time=seconds, masks=masks)
