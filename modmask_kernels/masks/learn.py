"""The learning loop: masks for several functions of one frozen network, alone or side by side."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from ..nn import MaskedLinear
from .checkpoint import check_storable, load_checkpoint, save_checkpoint
from .convert import MaskedTensor, find_record, masked_layers, masked_tensors
from .files import weight_hash
from .mask_set import MaskSet
from .seeds import step_seed, stream_key

Batch = Any
Data = Callable[[int, torch.Generator], Batch]
Loss = Callable[[Any, Batch], Tensor]
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
            "kept" (fraction of logits above 0), "seconds" (since the start).
        time: seconds spent, over all resumed parts.
        masks: the threshold masks with their logits, by name of the set.
    """

    step: int
    metrics: list[dict[str, Any]]
    time: float
    masks: dict[str, MaskSet]


@dataclass
class _Stream:
    """One set being learned: its data, its noise and its optimiser."""

    name: str
    index: int
    data: Data
    generator: torch.Generator
    noise_key: int
    lr: float
    penalty: float
    grad_clip: float | None
    seed: Tensor  # 0-dim view of the seed buffer of the layers
    rows: list[Tensor]  # views [1, ...] of the logits of this set
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    count: Tensor  # the optimiser's step, one for all tensors
    # what the last step left, as 0-dim tensors, read only when somebody asks
    loss: Tensor = field(default_factory=lambda: torch.tensor(math.nan))
    norm: Tensor = field(default_factory=lambda: torch.tensor(math.nan))
    # first step with a loss or gradient that is not finite, where each step cannot be looked at
    bad_step: Tensor | None = None


@dataclass
class _Run:
    """Consecutive sets learned in one forward pass."""

    streams: list[_Stream]
    selection: tuple[int, int]
    leaves: list[Tensor]  # logits of these sets, [count, ...], one per masked tensor
    views: list[tuple[MaskedLinear, tuple[Tensor, Tensor | None, Tensor]]]


def _per_set(value: Any, name: str, argument: str) -> Any:
    """A setting of one set, from a common value or a mapping by set name."""
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        raise ValueError(f"{argument}: no value for set {name!r}, got {sorted(value)}")
    return value[name]


def _positive(value: Any, argument: str) -> float:
    if not isinstance(value, (int, float)) or not value > 0 or not math.isfinite(value):
        raise ValueError(f"{argument}: expected a positive number, got {value!r}")
    return float(value)


def _integer(value: Any, argument: str, least: int) -> int:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{argument}: expected an integer of at least {least}, got {value!r}")
    return int(value)


def _inputs_of(batch: Batch) -> Any:
    """The part of a batch that goes into the model."""
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


class _Learner:
    """The state of a run and its single step."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Mapping[str, Data],
        *,
        lr: float | Mapping[str, float],
        penalty: float | Mapping[str, float],
        grad_clip: float | Mapping[str, float | None] | None,
        union_clip: bool,
        seed: int,
        betas: tuple[float, float],
        eps: float,
        mode: str,
        batch_dim: int,
        immediate: bool | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        self.betas = betas
        self.eps = eps
        self.batch_dim = batch_dim
        self.layers = masked_layers(model)
        self.tensors = masked_tensors(self.layers)
        self.samples = _common_samples(self.layers)
        _check_tensors(self.layers, self.tensors)
        first = next(iter(self.layers.values()))
        self.device = first.weight_logits.device
        # on the CPU looking at a value costs nothing, elsewhere it stops the queue of kernels
        self.immediate = self.device.type == "cpu" if immediate is None else immediate

        self.seed = torch.zeros(first.sets, dtype=torch.int64, device=self.device)
        by_index = {first.set_index(name): (name, source) for name, source in data.items()}
        self.runs: list[_Run] = []
        for selection in _consecutive(sorted(by_index)):
            start, count = selection
            leaves = {
                n: t.logits.detach()[start : start + count].requires_grad_()
                for n, t in self.tensors.items()
            }
            rows = [leaf.detach().chunk(count) for leaf in leaves.values()]
            streams = []
            for position in range(count):
                name, source = by_index[start + position]
                own = [r[position] for r in rows]
                generator = torch.Generator()
                generator.manual_seed(step_seed(stream_key(seed, name, "data"), 0))
                streams.append(
                    _Stream(
                        name=name,
                        index=start + position,
                        data=source,
                        generator=generator,
                        noise_key=stream_key(seed, name, "noise"),
                        lr=_positive(_per_set(lr, name, "lr"), "lr"),
                        penalty=_finite(_per_set(penalty, name, "penalty"), "penalty"),
                        grad_clip=_optional(_per_set(grad_clip, name, "grad_clip"), "grad_clip"),
                        seed=self.seed[start + position],
                        rows=own,
                        exp_avgs=[torch.zeros_like(r) for r in own],
                        exp_avg_sqs=[torch.zeros_like(r) for r in own],
                        count=torch.zeros((), device=self.device),
                        bad_step=None if self.immediate else self._no_step(),
                    )
                )
            self.runs.append(
                _Run(
                    streams,
                    selection,
                    list(leaves.values()),
                    self._views(leaves, self.seed[start : start + count]),
                )
            )
        self.streams = [stream for run in self.runs for stream in run.streams]

        self.weights: list[Tensor] = []
        if union_clip:
            if len(self.streams) > 1:
                raise ValueError(
                    "union_clip: expected one set, since the gradients of the weights belong to "
                    f"all sets at once; got {[s.name for s in self.streams]}"
                )
            self.weights = self._trained_weights()
        self.settings: dict[str, Any] = {
            "sets": [s.name for s in self.streams],
            "seed": seed,
            "lr": [s.lr for s in self.streams],
            "penalty": [s.penalty for s in self.streams],
            "grad_clip": [s.grad_clip for s in self.streams],
            "union_clip": bool(union_clip),
            "betas": list(betas),
            "eps": eps,
            "mode": mode,
            "samples": self.samples,
            "tau": [layer.tau for layer in self.layers.values()],
            "tensors": {n: [t.tensor_id, *t.parameter.shape] for n, t in self.tensors.items()},
            "weight_hash": weight_hash(model),
        }

    def _no_step(self) -> Tensor:
        return torch.full((), -1, dtype=torch.int64, device=self.device)

    def _views(
        self, leaves: Mapping[str, Tensor], seed: Tensor
    ) -> list[tuple[MaskedLinear, tuple[Tensor, Tensor | None, Tensor]]]:
        """What each layer uses in place of its logits and seed; tied layers share a leaf."""
        leaf_of = {id(t.logits): leaves[name] for name, t in self.tensors.items()}
        return [
            (
                layer,
                (
                    leaf_of[id(layer.weight_logits)],
                    None if layer.bias_logits is None else leaf_of[id(layer.bias_logits)],
                    seed,
                ),
            )
            for layer in self.layers.values()
        ]

    def _trained_weights(self) -> list[Tensor]:
        """The parameters that took gradients before the model was masked."""
        logits = {id(t.logits) for t in self.tensors.values()}
        record = find_record(self.model)
        trained = {} if record is None else record.requires_grad
        return [
            p
            for n, p in self.model.named_parameters()
            if id(p) not in logits and p.is_floating_point() and trained.get(n, True)
        ]

    def select(self, run: _Run) -> None:
        """Let the sets of a run work in all layers."""
        for layer, views in run.views:
            layer.active_sets = run.selection
            layer._views = views

    def step(self, step: int) -> None:
        """One optimiser step of every set."""
        for run in self.runs:
            if len(self.runs) > 1:
                self.select(run)
            batches = [stream.data(step, stream.generator) for stream in run.streams]
            for stream in run.streams:
                stream.seed.fill_(step_seed(stream.noise_key, step))
            inputs, size = self._join(run.streams, batches, step)
            outputs = self._cut(_call(self.model, inputs), len(batches), size)
            for stream, output, batch in zip(run.streams, outputs, batches, strict=True):
                stream.loss = self._task_loss(stream, output, batch)
            torch.autograd.backward([stream.loss for stream in run.streams])
            self._update(run, step)

    def _task_loss(self, stream: _Stream, output: Any, batch: Batch) -> Tensor:
        value = self.loss(output, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: expected a scalar tensor for set {stream.name!r}, got {got}")
        if not value.requires_grad:
            raise ValueError(f"loss: the loss of set {stream.name!r} does not depend on the masks")
        return value

    # batches

    def _join(
        self, streams: Sequence[_Stream], batches: Sequence[Batch], step: int
    ) -> tuple[Any, int]:
        """The inputs of all sets as one batch, and the size of each part."""
        parts = [_inputs_of(batch) for batch in batches]
        sizes = [
            self._size(stream, part, step) for stream, part in zip(streams, parts, strict=True)
        ]
        if len(parts) == 1:
            return parts[0], sizes[0]
        if len(set(sizes)) > 1:
            got = ", ".join(f"{s.name!r} {n}" for s, n in zip(streams, sizes, strict=True))
            raise ValueError(
                f"data: sets learned together need batches of one size, got {got} at step {step}"
            )
        if all(isinstance(part, Tensor) for part in parts):
            return torch.cat(parts, dim=self.batch_dim), sizes[0]
        flat, layouts = zip(*(pytree.tree_flatten(part) for part in parts), strict=True)
        if any(layout != layouts[0] for layout in layouts):
            raise ValueError(f"data: the inputs of the sets differ in structure at step {step}")
        joined = []
        for leaves in zip(*flat, strict=True):
            if isinstance(leaves[0], Tensor):
                joined.append(torch.cat(leaves, dim=self.batch_dim))
            elif all(leaf == leaves[0] for leaf in leaves):
                joined.append(leaves[0])
            else:
                raise ValueError(
                    f"data: the inputs of the sets differ in a value that is no tensor: {leaves}"
                )
        return pytree.tree_unflatten(joined, layouts[0]), sizes[0]

    def _size(self, stream: _Stream, inputs: Any, step: int) -> int:
        """The batch size of the inputs of one set, checked."""
        tensors = (
            [inputs]
            if isinstance(inputs, Tensor)
            else [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        )
        where = f"data[{stream.name!r}]"
        if not tensors or tensors[0].dim() <= self.batch_dim:
            raise ValueError(
                f"{where}: expected inputs with a batch in dimension {self.batch_dim} at step "
                f"{step}, got {tuple(tensors[0].shape) if tensors else type(inputs).__name__}"
            )
        size = tensors[0].shape[self.batch_dim]
        if size == 0:
            raise ValueError(f"{where}: the batch of step {step} is empty")
        if size % self.samples:
            raise ValueError(
                f"{where}: a batch of {size} does not divide into {self.samples} equal parts, one "
                f"for each mask sample (step {step})"
            )
        return size

    def _cut(self, output: Any, parts: int, size: int) -> Sequence[Any]:
        """The output of every set."""
        if parts == 1:
            return [output]
        if isinstance(output, Tensor):
            return self._cut_tensor(output, parts, size)
        leaves, layout = pytree.tree_flatten(output)
        columns = [
            self._cut_tensor(leaf, parts, size) if isinstance(leaf, Tensor) else [leaf] * parts
            for leaf in leaves
        ]
        return [pytree.tree_unflatten([c[n] for c in columns], layout) for n in range(parts)]

    def _cut_tensor(self, output: Tensor, parts: int, size: int) -> Sequence[Tensor]:
        d = self.batch_dim
        if output.dim() <= d or output.shape[d] != parts * size:
            raise ValueError(
                f"model: to learn {parts} sets together the output needs {parts * size} rows in "
                f"dimension {d}, got shape {tuple(output.shape)}"
            )
        return output.chunk(parts, dim=d)

    # the update

    def _update(self, run: _Run, step: int) -> None:
        with torch.no_grad():
            gradients: list[Sequence[Tensor]] = []
            for leaf in run.leaves:
                gradient = leaf.grad
                if gradient is None:  # a layer that the model did not call
                    gradient = torch.zeros_like(leaf)
                gradients.append(gradient.chunk(len(run.streams)))
                leaf.grad = None
            own = [[g[n] for g in gradients] for n in range(len(run.streams))]
            for stream, grads in zip(run.streams, own, strict=True):
                # d/dl of penalty * sum(l); it takes part in the clipping (spec 1.5, 1.7)
                if stream.penalty:
                    torch._foreach_add_(grads, stream.penalty)
                weights = [p.grad for p in self.weights if p.grad is not None]
                stream.norm = torch.linalg.vector_norm(
                    torch.stack(torch._foreach_norm(grads + weights))
                )
            if self.immediate:  # before any set is changed
                for stream, grads in zip(run.streams, own, strict=True):
                    self._check_finite(stream, grads, step)
            for stream, grads in zip(run.streams, own, strict=True):
                self._adam(stream, grads, step)

    def _adam(self, stream: _Stream, grads: list[Tensor], step: int) -> None:
        scale: Tensor | None = None
        if stream.grad_clip is not None:
            # torch.nn.utils.clip_grad_norm_ multiplies by clip / (norm + 1e-6), at most 1
            scale = ((stream.norm + 1e-6) / stream.grad_clip).clamp_(min=1.0)
            for parameter in self.weights:
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
            if self.immediate and float(scale) == 1.0:
                scale = None  # x / 1 is x, and the scaled gradients need not be stored
        skip: Tensor | None = None
        if stream.bad_step is not None:
            bad = ~torch.isfinite(stream.norm + stream.loss.detach().view(()).to(stream.norm))
            stream.bad_step.copy_(torch.where(bad & (stream.bad_step < 0), step, stream.bad_step))
            skip = (stream.bad_step >= 0).to(torch.float32)
            stream.count += 1 - skip
        else:
            stream.count += 1
        torch._fused_adam_(
            stream.rows,
            grads,
            stream.exp_avgs,
            stream.exp_avg_sqs,
            [],
            [stream.count] * len(grads),
            lr=stream.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
            found_inf=skip,
        )

    def _check_finite(self, stream: _Stream, grads: Sequence[Tensor], step: int) -> None:
        loss, norm = float(stream.loss.detach()), float(stream.norm)
        if math.isfinite(loss) and math.isfinite(norm):
            return
        where = f"set {stream.name!r}, step {step}"
        for name, row in zip(self.tensors, stream.rows, strict=True):
            if bool(row.isnan().any()):
                raise FloatingPointError(f"logits: NaN in the logits of {name!r} ({where})")
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss: expected a finite value, got {loss} ({where})")
        for name, grad in zip(self.tensors, grads, strict=True):
            if not bool(grad.isfinite().all()):
                raise FloatingPointError(
                    f"loss: its gradient is not finite in the logits of {name!r} ({where})"
                )
        raise FloatingPointError(f"loss: the norm of its gradient is {norm} ({where})")

    def check_late(self) -> None:
        """Raise for a step that was not finite, where each step could not be looked at."""
        for stream in self.streams:
            step = -1 if stream.bad_step is None else int(stream.bad_step)
            if step >= 0:
                raise FloatingPointError(
                    f"loss: the loss or its gradient was not finite (set {stream.name!r}, step "
                    f"{step}); the logits are those before that step"
                )

    # what is reported and kept

    def row(self, stream: _Stream, step: int, seconds: float) -> dict[str, Any]:
        """The metrics of one set after a step."""
        kept = sum(int(torch.count_nonzero(row > 0)) for row in stream.rows)
        total = sum(row.numel() for row in stream.rows)
        return {
            "step": step,
            "set": stream.name,
            "loss": float(stream.loss.detach()),
            "grad_norm": float(stream.norm),
            "kept": kept / max(total, 1),
            "seconds": seconds,
        }

    def state(self) -> dict[str, Any]:
        """All that a later process needs to go on with the same bits."""
        sets = {}
        for stream in self.streams:
            state_of = getattr(stream.data, "state_dict", None)
            own = {} if state_of is None else state_of()
            check_storable(own, f"data[{stream.name!r}].state_dict()")
            sets[stream.name] = {
                # clones, since a view would bring the logits of all sets along
                "logits": [row.clone() for row in stream.rows],
                "exp_avgs": stream.exp_avgs,
                "exp_avg_sqs": stream.exp_avg_sqs,
                "count": stream.count,
                "generator": stream.generator.get_state(),
                "data": own,
            }
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "settings": self.settings,
            "sets": sets,
            "weight_grads": [p.grad for p in self.weights],
            "rng": rng,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; ValueError names the setting if it is of another run."""
        for name, value in self.settings.items():
            found = state["settings"].get(name)
            if found != value:
                raise ValueError(
                    f"resume: the checkpoint is of another run: its {name} is {found!r}, "
                    f"now {value!r}"
                )
        with torch.no_grad():
            for stream in self.streams:
                own = state["sets"][stream.name]
                for target, source in (
                    (stream.rows, own["logits"]),
                    (stream.exp_avgs, own["exp_avgs"]),
                    (stream.exp_avg_sqs, own["exp_avg_sqs"]),
                    ([stream.count], [own["count"]]),
                ):
                    for t, s in zip(target, source, strict=True):
                        t.copy_(s)
                stream.generator.set_state(own["generator"])
                load = getattr(stream.data, "load_state_dict", None)
                if load is not None:
                    load(own["data"])
            for parameter, grad in zip(self.weights, state["weight_grads"], strict=True):
                parameter.grad = None if grad is None else grad.to(parameter.device)
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)


def _finite(value: Any, argument: str) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{argument}: expected a number, got {value!r}")
    return float(value)


def _optional(value: Any, argument: str) -> float | None:
    return None if value is None else _positive(value, argument)


def _consecutive(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted indices as (first, count) of consecutive ones."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and sum(runs[-1]) == index:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs


def _common_samples(layers: Mapping[str, MaskedLinear]) -> int:
    (first_name, first), *others = layers.items()
    for name, layer in others:
        if layer.samples != first.samples:
            raise ValueError(
                f"model: the masked layers need one number of samples, got {first.samples} in "
                f"{first_name!r} and {layer.samples} in {name!r}"
            )
    return first.samples


def _check_tensors(layers: Mapping[str, MaskedLinear], tensors: Mapping[str, MaskedTensor]) -> None:
    """Devices, numbers and values of the masked tensors."""
    numbers: dict[int, str] = {}
    device = next(iter(tensors.values())).logits.device
    for name, (parameter, logits, tensor_id) in tensors.items():
        if parameter.is_meta:
            raise ValueError(f"model: {name!r} is on the meta device, it has no values")
        if logits.device != parameter.device:
            raise ValueError(
                f"logits: those of {name!r} are on {logits.device}, the weight on "
                f"{parameter.device}"
            )
        if logits.device != device:
            raise ValueError(
                f"logits: expected all on one device, got {device} and, for {name!r}, "
                f"{logits.device}"
            )
        if logits.dtype != torch.float32:
            raise ValueError(f"logits: expected float32 for {name!r}, got {logits.dtype}")
        if tensor_id in numbers:
            raise ValueError(
                f"tensor_id: {numbers[tensor_id]!r} and {name!r} both have {tensor_id} and would "
                "draw the same noise; use mask_model or give every layer its own"
            )
        numbers[tensor_id] = name
        if bool(logits.detach().isnan().any()):
            sets = next(iter(layers.values())).set_names
            bad = logits.detach().isnan().flatten(1).any(1).nonzero()
            raise FloatingPointError(
                f"logits: NaN in the logits of {name!r} (set {sets[int(bad[0])]!r}, step 0)"
            )


@contextlib.contextmanager
def _learning(learner: _Learner, mode: str) -> Iterator[None]:
    """The model as learning needs it, and afterwards as it was."""
    model = learner.model
    training = [(module, module.training) for module in model.modules()]
    layers = [
        (layer, layer._mode, layer._active, layer._views, layer.seed)
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
        learner.select(learner.runs[0])
        with torch.enable_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for layer, former_mode, active, views, seed in layers:
            layer._mode, layer._active, layer._views = former_mode, active, views
            layer.seed = seed
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
                f"data: expected a mapping from set name to callable, got {type(data).__name__}"
            )
        return {first.set_names[first.set_index(chosen[0])]: data}
    named = {first.set_names[first.set_index(key)]: source for key, source in data.items()}
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
        if not callable(source):
            raise TypeError(
                f"data[{name!r}]: expected a callable(step, generator), got {type(source).__name__}"
            )
    return named


def learn_masks(
    model: nn.Module,
    loss: Loss,
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
        loss: ``loss(output, batch) -> scalar``, called per set on its part of the output.
        data: by name of the set a ``callable(step, generator) -> batch``. A batch is
            ``(inputs, targets, ...)`` or the inputs alone; inputs are a tensor, a tuple
            (positional arguments) or a dict (keyword arguments) with the batch in dimension
            `batch_dim`. `generator` is a CPU generator of the set's own. Sources with other state
            offer ``state_dict()`` and ``load_state_dict()`` for checkpoints. With one set the
            callable may come bare.
        steps: number of steps in total; steps are counted from 0.
        lr, penalty, grad_clip: learning rate, coefficient of each logit (beta / batch size in
            the published settings), clip norm or None; numbers, or mappings by set name.
        union_clip: clip as the published implementation does, over the logits and the
            never-cleared gradients of the weights together; one set only. It costs the weight
            gradients, and is for comparison.
        seed: seed of the run.
        sets: names or indices of the sets to learn; None learns all that have data.
        mode: "sample" or "soft".
        betas, eps: of Adam.
        batch_dim: dimension of the batch in inputs and outputs.
        progress: show a progress bar.
        checkpoint: file to write every `checkpoint_every` steps and at the end.
        resume: continue from `checkpoint` if it exists; the result is bit-identical to that of an
            unbroken run on the same machine, versions and threads (times aside).
        callback: called as ``callback(step, rows)`` every `callback_every` steps and at the end.
        description: text in front of the progress bar.

    Returns:
        LearnResult: steps, metrics, time and the masks with their logits.

    Raises:
        ValueError: for wrong settings, an empty batch, a batch that does not divide by the
            samples, unequal batches of sets learned together, or a checkpoint of another run.
        FloatingPointError: for logits, a loss or gradients that are not finite; it names set,
            step and tensor, and the logits are those before that step.

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
    _integer(steps, "steps", 0)
    _integer(checkpoint_every, "checkpoint_every", 1)
    _integer(callback_every, "callback_every", 1)
    if mode not in LEARNING_MODES:
        raise ValueError(f"mode: expected one of {list(LEARNING_MODES)}, got {mode!r}")
    beta1, beta2 = betas
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    if resume and checkpoint is None:
        raise ValueError("resume: expected a checkpoint to resume from, got checkpoint=None")

    learner = _Learner(
        model,
        loss,
        _choose(model, data, sets),
        lr=lr,
        penalty=penalty,
        grad_clip=grad_clip,
        union_clip=union_clip,
        seed=seed,
        betas=(float(beta1), float(beta2)),
        eps=float(eps),
        mode=mode,
        batch_dim=batch_dim,
    )
    metrics: list[dict[str, Any]] = []
    done, earlier = 0, 0.0
    with _learning(learner, mode):
        if resume and checkpoint is not None and Path(checkpoint).exists():
            state = load_checkpoint(checkpoint)
            learner.load_state(state)
            done, earlier, metrics = state["step"], state["time"], state["metrics"]
            if done > steps:
                raise ValueError(f"steps: the checkpoint has {done} steps, more than {steps}")
        start = time.perf_counter() - earlier

        def save(step: int) -> None:
            if checkpoint is not None:
                learner.check_late()
                now = {"step": step, "time": time.perf_counter() - start, "metrics": metrics}
                save_checkpoint(checkpoint, {**learner.state(), **now})

        def report(step: int) -> None:
            learner.check_late()
            seconds = time.perf_counter() - start
            rows = [learner.row(stream, step, seconds) for stream in learner.streams]
            metrics.extend(rows)
            losses = ", ".join(f"{row['set']} {row['loss']:.4g}" for row in rows)
            bar.set_postfix_str(f"loss {losses}", refresh=False)
            if callback is not None:
                callback(step, rows)

        saved = done
        label = description or f"masks {', '.join(s.name for s in learner.streams)}"
        with (
            tqdm(total=steps, initial=done, desc=label, unit="step", disable=not progress) as bar,
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
        learned = {
            "seed": seed,
            "steps": done,
            "learning": {
                "lr": stream.lr,
                "penalty": stream.penalty,
                "grad_clip": stream.grad_clip,
                "union_clip": bool(union_clip),
                "betas": list(betas),
                "eps": eps,
                "mode": mode,
            },
        }
        if record is not None:
            record.learned[stream.name] = learned
        masks[stream.name] = MaskSet.from_model(model, stream.index, logits=True)
        masks[stream.name].metadata.update(learned)
    return LearnResult(step=done, metrics=metrics, time=seconds, masks=masks)
