"""The state of a learning run and its single step, without the loop around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import MaskedModule
from ..nn.granularity import check_competing
from .batches import batch_size, call_model, cut, cuts_checked, inputs_of, join
from .checkpoint import check_storable
from .convert import MaskedTensor, find_record, masked_layers, masked_tensors, unwrapped
from .fingerprint import weight_hash
from .penalties import Annealing, add_l0_gradient, expected_l0
from .ranks import Ranks, is_sharded
from .seeds import step_seed, stream_key

Data = Callable[[int, torch.Generator], Any]
Loss = Callable[[Any, Any], Tensor]
Views = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """How masks are learned; what may differ between sets is a number or a mapping by name."""

    lr: float | Mapping[str, float]
    penalty: float | Mapping[str, float]
    grad_clip: float | Mapping[str, float | None] | None
    union_clip: bool
    seed: int
    betas: tuple[float, float]
    eps: float
    mode: str
    batch_dim: int
    penalty_form: str = "linear"
    tau: Callable[[int], float] | None = None  # by step


@dataclass
class Stream:
    """One set being learned: its data, its noise and its optimiser."""

    name: str
    index: int
    data: Data
    task_loss: Loss
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
    # of the last step; tensors where reading them would stop the queue of kernels
    loss: Tensor | float = math.nan
    norm: Tensor | float = math.nan
    # first step with a loss or gradient that is not finite, or -1, on such devices
    bad_step: Tensor | None = None


@dataclass
class Run:
    """Consecutive sets learned in one forward pass."""

    streams: list[Stream]
    selection: tuple[int, int]
    leaves: list[Tensor]  # logits of these sets, [count, ...], one per masked tensor
    views: list[tuple[MaskedModule, Views]]
    checked: bool = False  # what the layers cut


class Learner:
    """Logits, optimisers and random streams of the sets to learn; `step` advances them all.

    Each set owns contiguous rows of the logits. The layers get leaves over the rows that one
    forward pass needs, so that a gradient has the size of what is learned and arrives without a
    copy; the optimiser works on views of the same memory, and nothing is copied back.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Mapping[str, Loss],
        data: Mapping[str, Data],
        settings: Settings,
        *,
        immediate: bool | None = None,
        data_parallel: bool | None = False,
    ) -> None:
        """`immediate`: look at every step's loss at once; None decides by the device.

        `data_parallel`: see `learn_masks`.
        """
        self.model = model
        self.ranks = Ranks(data_parallel)
        self.settings = settings
        self.layers = masked_layers(model)
        self.tensors = masked_tensors(self.layers)
        self.samples = _common_samples(self.layers)
        self.taus = [layer.tau for layer in self.layers.values()]
        for layer in self.layers.values():
            check_competing(layer.granularity, layer.estimator.name, mode=settings.mode)
        if settings.penalty_form == "l0":
            for name, tensor in self.tensors.items():
                if tensor.n_of_m is not None:
                    raise ValueError(
                        "penalty_form: expected 'linear' for n:m masks, whose count is fixed, got "
                        f"'l0' ({name!r} keeps {tensor.n_of_m[0]} of {tensor.n_of_m[1]})"
                    )
                expected_l0(tensor.logits.new_zeros(()), tensor.estimator, tensor.tau)
        _check_tensors(self.layers, self.tensors)
        first = next(iter(self.layers.values()))
        self.device = next(iter(self.tensors.values())).logits.device
        self.immediate = self.device.type == "cpu" if immediate is None else immediate
        self.seed = torch.zeros(first.sets, dtype=torch.int64, device=self.device)
        self.scale = torch.ones((), device=self.device)

        by_index = {
            first.set_index(name): (name, source, loss[name]) for name, source in data.items()
        }
        self.runs: list[Run] = []
        for start, count in _consecutive(sorted(by_index)):
            stop = start + count
            leaves = {
                name: tensor.logits.detach()[start:stop].requires_grad_()
                for name, tensor in self.tensors.items()
            }
            rows = [leaf.detach().chunk(count) for leaf in leaves.values()]
            streams = [
                self._stream(start + n, *by_index[start + n], [row[n] for row in rows])
                for n in range(count)
            ]
            views = self._views(leaves, self.seed[start:stop])
            self.runs.append(Run(streams, (start, count), list(leaves.values()), views))
        self.streams = [stream for run in self.runs for stream in run.streams]

        self.ranks.share(t.logits.detach() for t in self.tensors.values())
        self.weights: list[Tensor] = []
        if settings.union_clip:
            if self.ranks.count > 1:
                raise ValueError("union_clip: expected one process, not a data-parallel job")
            if len(self.streams) > 1:
                raise ValueError(
                    "union_clip: expected one set, since the gradients of the weights belong to "
                    f"all sets at once; got {[s.name for s in self.streams]}"
                )
            self.weights = self._trained_weights()
        self._weight_hash: str | None = None

    def _stream(
        self, index: int, name: str, source: Data, task_loss: Loss, rows: list[Tensor]
    ) -> Stream:
        chosen, seed = self.settings, self.settings.seed
        sets = next(iter(self.layers.values())).set_names
        generator = torch.Generator()
        generator.manual_seed(step_seed(stream_key(seed, name, "data"), 0))
        late = None if self.immediate else torch.full((), -1, device=self.device)
        clip = of_set(chosen.grad_clip, name, "grad_clip", sets)
        return Stream(
            name=name,
            index=index,
            data=source,
            task_loss=task_loss,
            generator=generator,
            noise_key=stream_key(seed, name, "noise"),
            lr=_positive(of_set(chosen.lr, name, "lr", sets), "lr"),
            penalty=_number(of_set(chosen.penalty, name, "penalty", sets), "penalty"),
            grad_clip=None if clip is None else _positive(clip, "grad_clip"),
            seed=self.seed[index],
            rows=rows,
            exp_avgs=[torch.zeros_like(row) for row in rows],
            exp_avg_sqs=[torch.zeros_like(row) for row in rows],
            count=torch.zeros((), device=self.device),
            bad_step=late,
        )

    def _views(
        self, leaves: Mapping[str, Tensor], seed: Tensor
    ) -> list[tuple[MaskedModule, Views]]:
        """What each layer uses in place of its logits and seed; tied layers share a leaf."""
        leaf_of = {id(t.logits): leaves[name] for name, t in self.tensors.items()}
        views: list[tuple[MaskedModule, Views]] = []
        for layer in self.layers.values():
            of_layer = {leaf: leaf_of[id(layer.logits_of(leaf))] for leaf in layer.masked}
            views.append((layer, (of_layer, seed)))
        return views

    def _trained_weights(self) -> list[Tensor]:
        """The parameters that took gradients before the model was masked."""
        logits = {id(t.logits) for t in self.tensors.values()}
        record = find_record(self.model)
        trained = {} if record is None else record.requires_grad
        return [
            p
            for n, p in unwrapped(self.model).named_parameters()
            if id(p) not in logits and p.is_floating_point() and trained.get(n, True)
        ]

    def select(self, run: Run) -> None:
        """Let the sets of a run work in all layers."""
        for layer, views in run.views:
            layer.active_sets = run.selection
            layer._views = views

    def step(self, step: int) -> None:
        """One optimiser step of every set. An error leaves the sets of its run unchanged."""
        dim = self.settings.batch_dim
        if self.settings.tau is not None:
            tau = _positive(self.settings.tau(step), "tau")
            for layer in self.layers.values():
                layer.tau = tau
        for run in self.runs:
            if len(self.runs) > 1:
                self.select(run)
            batches, inputs = [], []
            for stream in run.streams:
                stream.seed.fill_(step_seed(stream.noise_key, step))
                batch = stream.data(step, stream.generator)
                batches.append(batch)
                inputs.append(inputs_of(batch))
            sizes = [
                batch_size(part, self.samples, dim, stream.name, step)
                for stream, part in zip(run.streams, inputs, strict=True)
            ]
            if sizes.count(sizes[0]) < len(sizes):
                got = ", ".join(f"{s.name!r} {n}" for s, n in zip(run.streams, sizes, strict=True))
                raise ValueError(
                    "data: sets learned together need batches of one size, "
                    f"got {got} at step {step}"
                )
            self.ranks.check_sizes(sizes, step, self.device)
            with self._first_cuts_checked(run, sum(sizes)):
                output = call_model(_inside_ddp(self.model), join(inputs, dim, step))
            outputs = cut(output, len(sizes), sizes[0], dim)
            losses = [
                _checked_loss(*of_set) for of_set in zip(run.streams, outputs, batches, strict=True)
            ]
            torch.autograd.backward(losses)
            self._update(run, losses, step)

    def _first_cuts_checked(self, run: Run, batch: int) -> AbstractContextManager[None]:
        if run.checked or self.samples * len(run.streams) == 1:
            return nullcontext()
        run.checked = True
        return cuts_checked(self.model, self.layers, batch, self.settings.batch_dim)

    def _update(self, run: Run, losses: Sequence[Tensor], step: int) -> None:
        several = len(run.streams)
        parts: list[Sequence[Tensor]] = []
        for leaf in run.leaves:
            gradient = leaf.grad
            leaf.grad = None
            if gradient is None:  # a layer that the model did not call
                gradient = torch.zeros_like(leaf)
            self.ranks.average([gradient])
            parts.append((gradient,) if several == 1 else gradient.chunk(several))
        if self.ranks.count > 1:
            losses = [loss.detach().clone() for loss in losses]
            self.ranks.average(losses)
        gradients = [[part[n] for part in parts] for n in range(several)]
        weights = [p.grad for p in self.weights if p.grad is not None]
        for stream, loss, grads in zip(run.streams, losses, gradients, strict=True):
            # d/dl of penalty * sum(l), which takes part in the clipping
            if stream.penalty and self.settings.penalty_form == "l0":
                self._add_l0_gradients(stream, grads)
            elif stream.penalty:
                torch._foreach_add_(grads, stream.penalty)
            norms = torch._foreach_norm(grads + weights)
            if self.immediate:
                stream.loss = loss.item()
                stream.norm = math.sqrt(sum(norm.item() ** 2 for norm in norms))
            else:
                stream.loss = loss.detach()
                stream.norm = torch.linalg.vector_norm(torch.stack(norms))
        if self.immediate:  # before any set is changed
            for stream, grads in zip(run.streams, gradients, strict=True):
                if not (math.isfinite(stream.loss) and math.isfinite(stream.norm)):
                    self._complain(stream, grads, step)
        for stream, grads in zip(run.streams, gradients, strict=True):
            scale = self._scale(stream)
            if scale is not None and weights:
                torch._foreach_div_(weights, scale)
            skip = self._skip(stream, step)
            stream.count.add_(1 if skip is None else 1 - skip)
            torch._fused_adam_(
                stream.rows,
                grads,
                stream.exp_avgs,
                stream.exp_avg_sqs,
                [],
                [stream.count] * len(grads),
                lr=stream.lr,
                beta1=self.settings.betas[0],
                beta2=self.settings.betas[1],
                weight_decay=0.0,
                eps=self.settings.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
                found_inf=skip,
            )

    def _add_l0_gradients(self, stream: Stream, grads: Sequence[Tensor]) -> None:
        tau = next(iter(self.layers.values())).tau if self.settings.tau is not None else None
        for tensor, row, grad in zip(self.tensors.values(), stream.rows, grads, strict=True):
            now = tensor.tau if tau is None else tau
            add_l0_gradient(grad, row, tensor.estimator, now, stream.penalty)

    def _scale(self, stream: Stream) -> Tensor | None:
        """What the optimiser divides gradients by: (norm + 1e-6) / clip where above 1.

        It is the reciprocal of the factor of `torch.nn.utils.clip_grad_norm_`.
        """
        if stream.grad_clip is None:
            return None
        if isinstance(stream.norm, float):
            ratio = (stream.norm + 1e-6) / stream.grad_clip
            return self.scale.fill_(ratio) if ratio > 1.0 else None
        return ((stream.norm + 1e-6) / stream.grad_clip).clamp_(min=1.0)

    def _skip(self, stream: Stream, step: int) -> Tensor | None:
        """1.0 from the first step on that is not finite, decided on the device."""
        if stream.bad_step is None:
            return None
        finite = torch.isfinite(stream.norm) & torch.isfinite(stream.loss).view(())  # type: ignore[arg-type]
        bad = ~finite & (stream.bad_step < 0)
        stream.bad_step.masked_fill_(bad, step)
        return (stream.bad_step >= 0).to(torch.float32)

    def _complain(self, stream: Stream, grads: Sequence[Tensor], step: int) -> None:
        """Raise for a step that is not finite, naming the tensor it shows in first."""
        where = f"set {stream.name!r}, step {step}"
        for name, row in zip(self.tensors, stream.rows, strict=True):
            if bool(row.isnan().any()):
                raise FloatingPointError(f"logits: NaN in the logits of {name!r} ({where})")
        if not math.isfinite(stream.loss):
            raise FloatingPointError(f"loss: expected a finite value, got {stream.loss} ({where})")
        for name, grad in zip(self.tensors, grads, strict=True):
            if not bool(grad.isfinite().all()):
                raise FloatingPointError(
                    f"loss: its gradient is not finite in the logits of {name!r} ({where})"
                )
        raise FloatingPointError(f"loss: the norm of its gradient is {stream.norm} ({where})")

    def check_late(self) -> None:
        """Raise for a step that was not finite, on devices where steps are not looked at."""
        for stream in self.streams:
            step = -1 if stream.bad_step is None else int(stream.bad_step)
            if step >= 0:
                raise FloatingPointError(
                    f"loss: the loss or its gradient was not finite (set {stream.name!r}, step "
                    f"{step}); the logits are those before that step"
                )

    def row(self, stream: Stream, step: int, seconds: float) -> dict[str, Any]:
        """The metrics of one set after `step` steps; FloatingPointError for NaN logits."""
        kept = total = 0
        for (name, tensor), row in zip(self.tensors.items(), stream.rows, strict=True):
            covered = tensor.weights_per_logit
            kept += covered * int(torch.count_nonzero(tensor.kept(row[0])))
            total += tensor.parameter.numel()
            # kernels drop a weight whose logit is NaN, so that no loss tells of it
            if bool(row.isnan().any()):
                raise FloatingPointError(
                    f"logits: NaN in the logits of {name!r} (set {stream.name!r}, step {step})"
                )
        return {
            "step": step,
            "set": stream.name,
            "loss": float(stream.loss),
            "grad_norm": float(stream.norm),
            "kept": kept / max(total, 1),
            "seconds": seconds,
        }

    def describe(self, stream: Stream) -> dict[str, Any]:
        """The settings under which a set is learned, as plain values."""
        return {
            "lr": stream.lr,
            "penalty": stream.penalty,
            "grad_clip": stream.grad_clip,
            "union_clip": bool(self.settings.union_clip),
            "betas": list(self.settings.betas),
            "eps": self.settings.eps,
            "mode": self.settings.mode,
            **self._unusual(),
        }

    def _unusual(self) -> dict[str, Any]:
        """Settings that are told only where they are not the usual ones."""
        found: dict[str, Any] = {}
        if self.settings.penalty_form != "linear":
            found["penalty_form"] = self.settings.penalty_form
        tau = self.settings.tau
        if tau is not None:  # of other functions the start is what can be told
            found["tau"] = repr(tau) if isinstance(tau, Annealing) else f"from {tau(0)}"
        return found

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the run that goes on from it."""
        if self._weight_hash is None:
            self._weight_hash = weight_hash(self.model)
        layers = self.layers.values()
        return {
            "sets": [stream.name for stream in self.streams],
            "seed": self.settings.seed,
            "learning": [self.describe(stream) for stream in self.streams],
            "samples": self.samples,
            "tau": self.taus,
            "estimator": [list(layer.estimator) for layer in layers],
            **({"antithetic": True} if any(layer.antithetic for layer in layers) else {}),
            "batch_dim": self.settings.batch_dim,
            "tensors": {
                n: [t.tensor_id, *t.parameter.shape, *_granularity(t)]
                for n, t in self.tensors.items()
            },
            "weight_hash": self._weight_hash,
            **({} if self.ranks.count == 1 else {"processes": self.ranks.count}),
        }

    def data_state(self, stream: Stream) -> Any:
        """The state of a set's data source; TypeError if a checkpoint cannot hold it."""
        state_of = getattr(stream.data, "state_dict", None)
        state = {} if state_of is None else state_of()
        check_storable(state, f"data[{stream.name!r}].state_dict()")
        return state

    def state(self) -> dict[str, Any]:
        """All that a later process needs to go on with the same bits."""
        sets = {}
        for stream in self.streams:
            sets[stream.name] = {
                # clones, since a view would bring the logits of all sets along
                "logits": [row.clone() for row in stream.rows],
                "exp_avgs": stream.exp_avgs,
                "exp_avg_sqs": stream.exp_avg_sqs,
                "count": stream.count,
                "generator": stream.generator.get_state(),
                "data": self.data_state(stream),
            }
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "identity": self.identity(),
            "sets": sets,
            "weight_grads": [p.grad for p in self.weights],
            "rng": rng,
        }

    def _check_identity(self, state: Mapping[str, Any]) -> None:
        given = state.get("identity")
        identity: Mapping[Any, Any] = given if isinstance(given, dict) else {}
        own = self.identity()
        for name in [*own, *(name for name in identity if name not in own)]:
            found, value = identity.get(name), own.get(name)
            if found != value:
                raise ValueError(
                    f"resume: the checkpoint is of another run: its {name} is {found!r}, "
                    f"now {value!r}"
                )

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, or raise ValueError and leave everything as it is.

        The message names the setting if the state is of another run.
        """
        self._check_identity(state)
        try:
            rng = state["rng"]
            sets = [state["sets"][stream.name] for stream in self.streams]
            pairs = [
                pair
                for stream, own in zip(self.streams, sets, strict=True)
                for into, values in (
                    (stream.rows, own["logits"]),
                    (stream.exp_avgs, own["exp_avgs"]),
                    (stream.exp_avg_sqs, own["exp_avg_sqs"]),
                    ([stream.count], [own["count"]]),
                )
                for pair in zip(into, values, strict=True)
            ]
            weights = list(zip(self.weights, state["weight_grads"], strict=True))
            fits = all(into.shape == values.shape for into, values in pairs)
            generators = [own["generator"] for own in sets]
            fits = fits and all(g.dtype == torch.uint8 for g in [*generators, rng["cpu"]])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"resume: the checkpoint is damaged ({error!r})") from None
        if not fits:
            raise ValueError("resume: the checkpoint is damaged (a tensor of wrong shape or type)")
        for stream, own in zip(self.streams, sets, strict=True):
            stream.generator.set_state(own["generator"])
            load = getattr(stream.data, "load_state_dict", None)
            if load is not None:
                load(own["data"])
        for into, values in pairs:
            into.copy_(values)
        for parameter, grad in weights:
            parameter.grad = None if grad is None else grad.to(parameter.device)
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.device)


def _inside_ddp(model: nn.Module) -> nn.Module:
    """The model without the wrapper, which waits for gradients of the logits it knows."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _checked_loss(stream: Stream, output: Any, batch: Any) -> Tensor:
    """The task loss of one set, ValueError unless it is a scalar that depends on the masks."""
    try:
        value = stream.task_loss(output, batch)
    except TypeError as error:
        raise TypeError(
            f"loss: called as loss(output, batch) for set {stream.name!r}, with the batch as its "
            f"data returned it ({type(batch).__name__}): {error}"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"loss: expected a scalar tensor for set {stream.name!r}, got {got}")
    if not value.requires_grad:
        raise ValueError(f"loss: the loss of set {stream.name!r} does not depend on the masks")
    return value


def of_set(value: Any, name: str, argument: str, sets: Sequence[str]) -> Any:
    """A setting of one of the sets of a model, from a common value or a mapping by set name."""
    if not isinstance(value, Mapping):
        return value
    unknown = [key for key in value if key not in sets]
    if unknown:
        raise ValueError(
            f"{argument}: expected names of sets, one of {list(sets)}, got {unknown[0]!r}"
        )
    if name not in value:
        raise ValueError(f"{argument}: no value for set {name!r}, got {list(value)}")
    return value[name]


def _number(value: Any, argument: str) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{argument}: expected a finite number, got {value!r}")
    return float(value)


def _positive(value: Any, argument: str) -> float:
    if _number(value, argument) <= 0:
        raise ValueError(f"{argument}: expected a positive number, got {value!r}")
    return float(value)


def _consecutive(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted indices as (first, count) of consecutive ones."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and sum(runs[-1]) == index:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs


def _granularity(tensor: MaskedTensor) -> list[Any]:
    """What tells logits of unlike granularity apart; nothing where there is one per weight."""
    small = tensor.logits.shape[1:]
    if small != tensor.parameter.shape:
        return [list(small)]
    return [] if tensor.n_of_m is None else [list(tensor.n_of_m)]


def _common_samples(layers: Mapping[str, MaskedModule]) -> int:
    (first_name, first), *others = layers.items()
    for name, layer in others:
        if layer.draws != first.draws:
            raise ValueError(
                f"model: the masked layers need one number of samples, got {first.draws} in "
                f"{first_name!r} and {layer.draws} in {name!r}"
            )
    return first.draws


def _check_tensors(layers: Mapping[str, MaskedModule], tensors: Mapping[str, MaskedTensor]) -> None:
    """Devices, numbers and values of the masked tensors."""
    numbers: dict[int, str] = {}
    sets = next(iter(layers.values())).set_names
    device = next(iter(tensors.values())).logits.device
    for name, (parameter, logits, tensor_id, *_) in tensors.items():
        if parameter.is_meta:
            raise ValueError(f"model: {name!r} is on the meta device, it has no values")
        if parameter.is_inference() or logits.is_inference():
            raise ValueError(
                f"model: {name!r} or its logits came from torch.inference_mode(), through which "
                "no gradient goes; make, load and mask the model outside"
            )
        if is_sharded(logits):
            raise ValueError(
                f"logits: those of {name!r} are sharded; keep them whole with fully_shard(..., "
                "ignored_params={p for n, p in model.named_parameters() if n.endswith('_logits')})"
            )
        if logits.device != parameter.device:
            raise ValueError(
                f"logits: those of {name!r} are on {logits.device}, "
                f"the weight on {parameter.device}"
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
        bad = logits.detach().isnan().flatten(1).any(1).nonzero()
        if bad.numel():
            raise FloatingPointError(
                f"logits: NaN in the logits of {name!r} (set {sets[int(bad[0])]!r}, step 0)"
            )
