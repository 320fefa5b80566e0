"""What all masked layers share: mask sets, their logits, seeds and modes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._blocks import expand_blocks, times_blocks
from ..ops.estimators import GUMBEL_SIGMOID, Estimator
from ..ops.sample_mask.reference import threshold
from .granularity import (
    Granularity,
    check_competing,
    check_granularity,
    logits_shape,
    n_of_m,
)
from .mask_options import MaskOptions, with_defaults

Mode = Literal["sample", "soft", "threshold", "noiseless", "off"]
MODES: tuple[str, ...] = get_args(Mode)

Layer = TypeVar("Layer", bound="MaskedModule")


def check_mode(mode: object, name: str = "mode") -> None:
    """Raise ValueError unless `mode` is one of the modes of a masked layer, or None."""
    if mode is not None and mode not in MODES:
        expected = ", ".join(repr(m) for m in MODES)
        raise ValueError(f"{name}: expected {expected} or None, got {mode!r}")


def check_tau(tau: object, name: str) -> None:
    """Raise ValueError unless `tau` is a temperature."""
    if not isinstance(tau, (int, float)) or not 0 < tau < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {tau!r}")


def check_init(init: object) -> None:
    """Raise ValueError unless `init` can be the value of logits."""
    if not isinstance(init, (int, float)) or math.isnan(init):
        raise ValueError(f"init: expected a number, got {init!r}")


def name_sets(sets: int | Sequence[str]) -> tuple[str, ...]:
    """The names of the mask sets: those given, or '0', '1', ... for a number."""
    if isinstance(sets, str):
        raise ValueError(f"sets: expected a number or a list of names, got the string {sets!r}")
    if isinstance(sets, int):
        if sets < 1:
            raise ValueError(f"sets: expected at least 1, got {sets}")
        return tuple(str(s) for s in range(sets))
    names = tuple(sets) if isinstance(sets, Iterable) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"sets: expected a number or a list of non-empty names, got {sets!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"sets: expected distinct names, got {list(names)}")
    return names


def is_bias(name: str) -> bool:
    """Whether a parameter is one of those that `bias=True` adds: "bias", "bias_ih_l0" and such."""
    leaf = name.rpartition(".")[2]
    return leaf == "bias" or leaf.startswith("bias_") or leaf.endswith("_bias")


def names_to_mask(
    module: nn.Module, bias: bool, accept: Callable[[str, nn.Module], bool] | None = None
) -> list[str]:
    """The parameters of a module, at any depth, that stand under masks.

    `accept`: ``accept(name, child)``, whether those of a child at any depth do; None: all.
    """
    found = []
    for name, _ in module.named_parameters():
        prefix = name.rpartition(".")[0]
        if prefix and accept is not None and not accept(prefix, module.get_submodule(prefix)):
            continue
        if bias or not is_bias(name):
            found.append(name)
    return found


class MaskedModule(nn.Module):
    """A module some of whose parameters stand under one mask per set, each drawn from logits.

    The batch is cut into ``active sets * samples`` equal contiguous groups along `batch_dim`;
    group ``g = set * samples + sample`` sees its own draw of the masks of its set. The logits of a
    masked parameter ``name`` are the Parameter ``name_logits``, ``[sets, *shape]``, or smaller
    where one logit covers more than one weight (`granularity`). They are float32 whatever the dtype
    of the weights is; ``Module.to(dtype)`` and its relatives leave them there.

    A subclass calls `_add_masks` once its parameters exist, computes with `_logits`, `_seed` and
    `effective_mode`, and says in a class method `from_dense` and in `dense_shell` what its plain
    counterpart is. A masked parameter may belong to a child ("out_proj.weight"): then so do its
    logits.

    Attributes (may be changed at any time):
        mode: "sample" (masks as the estimator draws them, 0/1 by default), "soft" (values between,
            drawn), "threshold" (0/1 without noise: logit > 0), "noiseless" (values between, without
            noise), "off" (plain layer), or None: "sample" while training, else "threshold", or
            "noiseless" for the estimator hard_concrete, as published.
        estimator: how masks follow from logits and noise, a name or one of `ops.estimators`.
        antithetic: whether samples 2j and 2j + 1 use the same uniform numbers, mirrored.
        eval_mode: the mode outside training; None is "threshold", or "noiseless" for hard_concrete.
        eval_tau: temperature of the mode "noiseless"; None is 1 for hard_concrete, else `tau`.
        inclusive: whether the mode "threshold" keeps a logit of exactly 0 too, a convention of one
            published package. Mask sets and plain layers are made without it.
        active_sets: None for all sets, or ``(first, count)``. In mode "threshold" the batch is
            cut into as many groups as there are active sets, so choose one set to evaluate it.
        samples, tau, batch_dim, set_names.
        granularity: what one logit covers; fixed when the layer is made.
        tensor_ids: number of each masked parameter in its model, by name; it selects the stream of
            noise, so two parameters that share one seed need different numbers.
        sample_offset: index of the first sample; rank r of a data-parallel job that shares the
            seeds uses ``r * samples``.
        seed: int64 [sets], or [] for all sets, a buffer outside the state dict. None draws one
            seed per active set from torch's default generator at every forward pass.
    """

    seed: Tensor | None
    set_names: tuple[str, ...]
    tensor_ids: dict[str, int]
    antithetic: bool = False
    _eval_mode: Mode | None = None
    eval_tau: float | None = None
    inclusive: bool = False
    _estimator: Estimator = GUMBEL_SIGMOID

    def _add_masks(
        self,
        options: MaskOptions,
        *,
        frozen: bool = False,
        accept: Callable[[str, nn.Module], bool] | None = None,
    ) -> None:
        """Lay masks over the parameters that the module has by now.

        Args:
            options: `mask_bias` says whether the biases among the parameters are masked too.
            frozen: whether the parameters are those of a plain layer and stop requiring gradients.
            accept: as in `names_to_mask`.
        """
        given = with_defaults(options, type(self).__name__)
        samples, tau, init = given["samples"], given["tau"], given["init"]
        parameters, names = list(self.parameters()), names_to_mask(self, True, accept)
        if given["mask_bias"] and not frozen and not any(is_bias(name) for name in names):
            raise ValueError("mask_bias: expected False for a layer without bias, got True")
        self.set_names = name_sets(given["sets"])
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples: expected an integer of at least 1, got {samples!r}")
        check_tau(tau, "tau")
        check_init(init)
        self.samples = samples
        self.tau = float(tau)
        self.init = float(init)
        self.granularity = check_granularity(given["granularity"])
        self.batch_dim = 0
        self.sample_offset = 0
        self.masked = tuple(n for n in names if given["mask_bias"] or not is_bias(n))
        self.tensor_ids = {name: given["tensor_id"] + n for n, name in enumerate(self.masked)}
        self._mode: Mode | None = None
        self._active: tuple[int, int] | None = None
        # leaves over the logits of the active sets by parameter, and their seeds, put here by a
        # learning loop so that no gradient of all sets is built when some are learned
        self._views: tuple[dict[str, Tensor], Tensor] | None = None
        for name in self.masked:
            parameter = self._parameter(name)
            values = torch.full(
                (len(self.set_names), *logits_shape(self._granularity_of(name), parameter.shape)),
                self.init,
                dtype=torch.float32,
                device=parameter.device,
            )
            self._put_logits(name, nn.Parameter(values))
        self.register_buffer("seed", None, persistent=False)
        for parameter in parameters if frozen else ():
            parameter.requires_grad_(False)

    def reset_logits(self) -> None:
        """All logits at `init`."""
        for name in self.masked:
            nn.init.constant_(self.logits_of(name), self.init)

    def n_of_m(self, name: str) -> tuple[int, int] | None:
        """(n, m) where n of every m consecutive inputs of a parameter are kept, else None."""
        return n_of_m(self._granularity_of(name), self._parameter(name).dim())

    def _granularity_of(self, name: str) -> Granularity:
        """A bias has one logit per value, whatever its shape."""
        return "weight" if is_bias(name) else self.granularity

    def kept(self, name: str, set: int) -> Tensor:
        """The threshold mask of a parameter, bool, in the shape of the logits of one set."""
        logits = self.logits_of(name).detach()[set]
        return threshold(logits, self.n_of_m(name), self._estimator)

    def dense_shell(self) -> nn.Module:
        """A plain layer of these sizes and options on the meta device, for other Parameters."""
        raise NotImplementedError(f"{type(self).__name__} names no plain counterpart")

    def to_dense(self, set: int | str = 0) -> nn.Module:
        """A new plain layer with the threshold masks of `set` (see `kept`) multiplied in."""
        index = self.set_index(set)
        dense = self.dense_shell()
        masked_name = {id(self._parameter(name)): name for name in self.masked}
        made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
        with torch.no_grad():
            for name, _ in list(dense.named_parameters(remove_duplicate=False)):
                parameter = self._parameter(name)
                new = made.get(id(parameter))
                if new is None:
                    values = parameter.detach()
                    if id(parameter) in masked_name:
                        kept = self.kept(masked_name[id(parameter)], index)
                        values = values.masked_fill(~expand_blocks(kept, values.shape), 0)
                    else:
                        values = values.clone()
                    new = nn.Parameter(values, requires_grad=parameter.requires_grad)
                    made[id(parameter)] = new
                prefix, _, leaf = name.rpartition(".")
                dense.get_submodule(prefix).register_parameter(leaf, new)
        return dense.train(self.training)

    @property
    def sets(self) -> int:
        """Number of mask sets."""
        return len(self.set_names)

    def logits_of(self, name: str) -> nn.Parameter:
        """The logits [sets, ...] of a masked parameter."""
        return self._parameter(f"{name}_logits")

    def _parameter(self, name: str) -> nn.Parameter:
        """A parameter of this module or of a child, also one that a functional call put there."""
        prefix, _, leaf = name.rpartition(".")
        parameter = self.get_submodule(prefix)._parameters[leaf]
        assert parameter is not None
        return parameter

    def _put_logits(self, name: str, logits: nn.Parameter) -> None:
        """Let `logits` be those of a masked parameter; they sit beside it."""
        prefix, _, leaf = name.rpartition(".")
        self.get_submodule(prefix).register_parameter(f"{leaf}_logits", logits)

    def _drop_logits(self) -> None:
        """Take the logits away from the children, which are those of the plain module."""
        for name in self.masked:
            prefix, _, leaf = name.rpartition(".")
            if prefix:
                self.get_submodule(prefix)._parameters.pop(f"{leaf}_logits", None)

    def set_index(self, set: int | str) -> int:
        """The index of a set given by its index or name; ValueError names what there is."""
        if isinstance(set, str):
            if set in self.set_names:
                return self.set_names.index(set)
        elif isinstance(set, int) and 0 <= set < self.sets:
            return int(set)
        raise ValueError(
            f"set: expected one of {list(self.set_names)} or an index below {self.sets}, "
            f"got {set!r}"
        )

    @property
    def mode(self) -> Mode | None:
        """One of the modes of the class, or None to follow `training`."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode | None) -> None:
        check_mode(mode)
        check_competing(self.granularity, self._estimator.name, mode=mode)
        self._mode = mode

    @property
    def eval_mode(self) -> Mode | None:
        """The mode outside training, or None for that of the estimator."""
        return self._eval_mode

    @eval_mode.setter
    def eval_mode(self, mode: Mode | None) -> None:
        check_mode(mode, "eval_mode")
        check_competing(self.granularity, self._estimator.name, eval_mode=mode)
        self._eval_mode = mode

    @property
    def effective_mode(self) -> Mode:
        """The mode that the next forward pass has."""
        if self._mode is not None:
            return self._mode
        if self.training:
            return "sample"
        if self._eval_mode is not None:
            return self._eval_mode
        return "noiseless" if self._estimator.name == "hard_concrete" else "threshold"

    @property
    def estimator(self) -> Estimator:
        """How masks follow from logits and noise; a name may be assigned too."""
        return self._estimator

    @estimator.setter
    def estimator(self, estimator: str | Estimator) -> None:
        rule = ops.estimators.resolve(estimator)
        check_competing(self.granularity, rule.name)
        self._estimator = rule

    @property
    def draws(self) -> int:
        """The masks of each set that a batch meets while learning; one where all are the same."""
        return self.samples if self._estimator.draws else 1

    def _rule(self, mode: str) -> dict[str, Any]:
        """The arguments of an operation that say how masks follow in a mode other than "off"."""
        estimator, tau, seed, hard = self._estimator, self.tau, None, True
        if mode == "threshold":
            if self.inclusive and estimator.name not in ("threshold", "top_k"):
                estimator = ops.estimators.threshold(0.0, inclusive=True)
        elif mode == "noiseless":
            default = 1.0 if estimator.name == "hard_concrete" else tau
            tau, hard = default if self.eval_tau is None else self.eval_tau, False
        else:
            seed = self._seed() if estimator.draws else None
            hard = mode == "sample" and estimator.binary
        return {
            "seed": seed,
            "tau": tau,
            "hard": hard,
            "estimator": estimator,
            "antithetic": self.antithetic,
        }

    @property
    def active_sets(self) -> tuple[int, int] | None:
        """None for all sets, or (first, count)."""
        return self._active

    @active_sets.setter
    def active_sets(self, active: tuple[int, int] | None) -> None:
        if active is not None:
            pair = isinstance(active, (tuple, list)) and len(active) == 2
            first, count = active if pair else (-1, 0)
            whole = isinstance(first, int) and isinstance(count, int)
            if not whole or first < 0 or count < 1 or first + count > self.sets:
                raise ValueError(
                    f"active_sets: expected (first, count) within {self.sets} sets, got {active!r}"
                )
            active = (first, count)
        self._active = active
        self._views = None

    def _logits(self, name: str) -> Tensor | None:
        """The logits of the active sets; None for a parameter without masks."""
        if self._views is not None:
            return self._views[0].get(name)
        logits = self._parameters.get(f"{name}_logits")
        if "." in name and name in self.masked:
            logits = self.logits_of(name)
        if logits is None or self._active is None or self._active[1] == logits.shape[0]:
            return logits
        return logits[self._active[0] : sum(self._active)]

    def _seed(self) -> Tensor:
        """One seed for each active set."""
        if self._views is not None:
            return self._views[1]
        sets = self.sets if self._active is None else self._active[1]
        if self.seed is None:
            low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
            device = self.logits_of(self.masked[0]).device
            return torch.randint(low, high, (sets,), device=device)
        if self._active is not None and self.seed.dim() and sets != self.seed.shape[0]:
            return self.seed.narrow(0, self._active[0], sets)
        return self.seed

    def _masked_parameter(
        self, name: str, set: int, sample: int, seed: Tensor | None, mode: str
    ) -> Tensor:
        """A parameter under the mask of one group, as a tensor."""
        logits = self._logits(name)
        assert logits is not None
        rule = self._rule(mode)
        rule["seed"] = seed if seed is None or seed.dim() == 0 else seed[set]
        mask = ops.sample_mask(
            logits[set],
            sample_offset=self.sample_offset + sample,
            tensor_id=self.tensor_ids[name],
            n_of_m=self.n_of_m(name),
            **rule,
        )[0]
        parameter = self._parameter(name)
        return times_blocks(parameter, mask.to(parameter.dtype))

    def _of_groups(self, name: str, groups: int, mode: str, seed: Tensor | None) -> Tensor:
        """A parameter under the masks of all groups, [groups, *shape], at least in float32."""
        parameter, logits = self._parameter(name), self._logits(name)
        if logits is None:
            return parameter.expand(groups, *parameter.shape)
        rule = self._rule(mode)
        rule |= {"tensor_id": self.tensor_ids[name], "n_of_m": self.n_of_m(name)}
        if seed is None:
            rule["seed"] = None
            masks = torch.cat([ops.sample_mask(of_set, **rule) for of_set in logits])
        else:
            rule |= {"seed": seed.expand(logits.shape[0]), "samples": self.samples}
            masks = ops.sample_mask(logits, sample_offset=self.sample_offset, **rule)
            masks = masks.transpose(0, 1).flatten(0, 1)
        return times_blocks(parameter.expand(groups, *parameter.shape), masks)

    def batch_dim_of(self, x: Tensor) -> int:
        """The dimension of the first input that the layer cuts into groups."""
        return self.batch_dim

    def _groups(self, mode: str, seed: Tensor | None) -> tuple[int, int]:
        """Active sets, and samples of each; their product is the number of groups of a batch."""
        if mode == "off":
            return 1, 1
        sets = self.sets if self._active is None else self._active[1]
        return sets, 1 if seed is None else self.samples

    def _masked_group(
        self, group: int, mode: str, seed: Tensor | None, names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """The masked parameters, or those of them in `names`, as one group sees them."""
        if mode == "off":
            return {}
        set, sample = divmod(group, self._groups(mode, seed)[1])
        return {
            name: self._masked_parameter(name, set, sample, seed, mode)
            for name in (self.masked if names is None else names)
        }

    def _apply(self: Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        # conversions of dtype are for the weights: a logit of 2 + lr is 2 again in bfloat16
        logits = [self.logits_of(name) for name in self.masked]
        exempt = {id(p) for p in logits} | {id(p.grad) for p in logits if p.grad is not None}

        def apply(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if id(tensor) in exempt and out.dtype != tensor.dtype:
                return tensor.to(out.device)
            return out

        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._views = None
        self.__dict__.setdefault("granularity", "weight")  # pickled before there was a choice

    def _mask_repr(self) -> str:
        """The sets, and the options that are not at their defaults."""
        shown = [f"sets={list(self.set_names)}", f"samples={self.samples}"]
        if self._estimator != GUMBEL_SIGMOID:
            shown.append(f"estimator={self._estimator}")
        if self.antithetic:
            shown.append("antithetic=True")
        if self.tau != 1.0:
            shown.append(f"tau={self.tau}")
        if self.granularity != "weight":
            shown.append(f"granularity={self.granularity!r}")
        if "bias" in self.masked:
            shown.append("mask_bias=True")
        if self._mode is not None:
            shown.append(f"mode={self._mode!r}")
        return ", ".join(shown)


class MaskedWeightAndBias(MaskedModule):
    """A masked module with a weight and, maybe, a bias."""

    weight: Tensor
    bias: Tensor | None
    weight_logits: nn.Parameter
    bias_logits: nn.Parameter | None

    def _add_masks(self, options: MaskOptions, **how: Any) -> None:
        super()._add_masks(options, **how)
        if "bias" not in self.masked:
            self.register_parameter("bias_logits", None)

    def _adopt(self, module: nn.Module, options: MaskOptions) -> None:
        """Take over the Parameters of a plain layer, frozen, under masks with these options."""
        self.register_parameter("weight", module._parameters["weight"])
        self.register_parameter("bias", module._parameters["bias"])
        self._add_masks(options, frozen=True)
        self.train(module.training)

    @property
    def tensor_id(self) -> int:
        """The number of the weight in its model."""
        return self.tensor_ids["weight"]

    @tensor_id.setter
    def tensor_id(self, number: int) -> None:
        self.tensor_ids["weight"] = number

    @property
    def bias_tensor_id(self) -> int:
        """The number of the bias in its model."""
        return self.tensor_ids.get("bias", self.tensor_id + 1)

    @bias_tensor_id.setter
    def bias_tensor_id(self, number: int) -> None:
        self.tensor_ids["bias"] = number

    def _draw(self) -> dict[str, Any]:
        """The arguments of an operation that say which masks it draws."""
        return {
            "tensor_id": self.tensor_id,
            "bias_tensor_id": self.bias_tensor_id,
            "sample_offset": self.sample_offset,
            "samples": self.samples,
            "n_of_m": n_of_m(self.granularity, 2),
            **self._rule(self.effective_mode),
        }
