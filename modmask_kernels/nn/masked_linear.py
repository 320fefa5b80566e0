"""A linear layer under one or several learned masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops

Mode = Literal["sample", "soft", "threshold", "off"]
MODES: tuple[str, ...] = get_args(Mode)


def check_mode(mode: object) -> None:
    """Raise ValueError unless `mode` is one of the modes of a masked layer, or None."""
    if mode is not None and mode not in MODES:
        expected = ", ".join(repr(m) for m in MODES)
        raise ValueError(f"mode: expected {expected} or None, got {mode!r}")


def name_sets(sets: int | Sequence[str]) -> tuple[str, ...]:
    """The names of the mask sets: those given, or '0', '1', ... for a number."""
    if isinstance(sets, str):
        raise ValueError(f"sets: expected a number or a list of names, got the string {sets!r}")
    if isinstance(sets, int):
        if sets < 1:
            raise ValueError(f"sets: expected at least 1, got {sets}")
        return tuple(str(s) for s in range(sets))
    names = tuple(sets)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"sets: expected a number or a list of non-empty names, got {sets!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"sets: expected distinct names, got {list(names)}")
    return names


class MaskedLinear(nn.Module):
    """`torch.nn.Linear` whose weight stands under one mask per set, each drawn from logits.

    The batch is cut into ``active sets * samples`` equal contiguous groups along `batch_dim`;
    group ``g = set * samples + sample`` sees its own draw of the mask of its set
    (Csordás et al. 2021, section 2; a mask value is 1 with probability sigmoid(logit), its
    gradient is that of the concrete distribution, straight-through).

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
        sets: number of mask sets, or their names.
        samples: mask samples per batch and set, in the modes "sample" and "soft".
        tau: temperature of the surrogate gradient and of soft masks.
        mask_bias: whether the bias stands under a mask too.
        init: initial value of all logits; sigmoid(2.0) = 0.88 is kept at first.
        tensor_id: number of the weight in its model; it selects the stream of noise, so two
            weights that share one seed need different numbers. The bias gets the next one.

    Parameters:
        weight: [out_features, in_features], `dtype`. bias: [out_features] or None.
        weight_logits: [sets, out_features, in_features], float32, whatever `dtype` is.
        bias_logits: [sets, out_features], float32, or None without `mask_bias`.
        ``Module.to(dtype)`` and its relatives leave the logits in float32.

    Attributes (may be changed at any time):
        mode: "sample" (0/1 masks, drawn), "soft" (values between, drawn), "threshold"
            (logit > 0), "off" (plain linear), or None: "sample" while training, else "threshold".
        active_sets: None for all sets, or ``(first, count)``. In mode "threshold" the batch is
            cut into as many groups as there are active sets, so choose one set to evaluate it.
        samples, tau, tensor_id, bias_tensor_id, batch_dim, set_names.
        sample_offset: index of the first sample; rank r of a data-parallel job that shares the
            seeds uses ``r * samples``.
        seed: int64 [sets], a buffer outside the state dict. None draws one seed per active set
            from torch's default generator at every forward pass.

    Shape:
        Input [..., in_features] in the dtype of the weight, output [..., out_features].

    Raises:
        ValueError: for a wrong mode, selection of sets, or number of sets; the operation itself
            rejects inputs that do not fit and batches that do not divide.

    Equivalent to::

        groups = x.chunk(sets * samples, dim=batch_dim)
        masks = sample_mask(weight_logits, seed=seed, samples=samples, tensor_id=tensor_id)
        y = torch.cat([F.linear(x_g, weight * masks[g % samples, g // samples], bias)
                       for g, x_g in enumerate(groups)], dim=batch_dim)
    """

    __constants__: ClassVar[list[str]] = ["in_features", "out_features"]
    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None
    weight_logits: nn.Parameter
    bias_logits: nn.Parameter | None
    seed: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        sets: int | Sequence[str] = 1,
        samples: int = 1,
        tau: float = 1.0,
        mask_bias: bool = False,
        init: float = 2.0,
        tensor_id: int = 0,
    ) -> None:
        super().__init__()
        if mask_bias and not bias:
            raise ValueError("mask_bias: expected False for a layer without bias, got True")
        self.in_features = in_features
        self.out_features = out_features
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._add_masks(sets, samples, tau, mask_bias, init, tensor_id)
        self.reset_parameters()

    def _add_masks(
        self,
        sets: int | Sequence[str],
        samples: int,
        tau: float,
        mask_bias: bool,
        init: float,
        tensor_id: int,
    ) -> None:
        self.set_names = name_sets(sets)
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples: expected an integer of at least 1, got {samples!r}")
        if not tau > 0 or not math.isfinite(tau):
            raise ValueError(f"tau: expected a positive number, got {tau!r}")
        self.samples = samples
        self.tau = float(tau)
        self.init = float(init)
        self.tensor_id = tensor_id
        self.bias_tensor_id = tensor_id + 1
        self.batch_dim = 0
        self.sample_offset = 0
        self._mode: Mode | None = None
        self._active: tuple[int, int] | None = None
        # leaves over the logits of the active sets and their seeds, put here by a learning loop
        # so that no gradient of all sets is built when some are learned
        self._views: tuple[Tensor, Tensor | None, Tensor] | None = None

        def logits_of(parameter: Tensor) -> nn.Parameter:
            shape = (len(self.set_names), *parameter.shape)
            values = torch.full(shape, self.init, dtype=torch.float32, device=parameter.device)
            return nn.Parameter(values)

        self.weight_logits = logits_of(self.weight)
        if mask_bias and self.bias is not None:
            self.bias_logits = logits_of(self.bias)
        else:
            self.register_parameter("bias_logits", None)
        self.register_buffer("seed", None, persistent=False)

    def reset_parameters(self) -> None:
        """Weight and bias as in `torch.nn.Linear`, all logits at `init`."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.constant_(self.weight_logits, self.init)
        if self.bias_logits is not None:
            nn.init.constant_(self.bias_logits, self.init)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        *,
        sets: int | Sequence[str] = 1,
        samples: int = 1,
        tau: float = 1.0,
        mask_bias: bool = False,
        init: float = 2.0,
        tensor_id: int = 0,
    ) -> MaskedLinear:
        """A masked layer over the very weight and bias of `linear`, which are frozen by this.

        Args:
            linear: any `torch.nn.Linear`; its Parameters are shared, not copied.
            sets, samples, tau, mask_bias, init, tensor_id: as for the class. `mask_bias` is
                ignored where there is no bias.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features = linear.in_features
        layer.out_features = linear.out_features
        layer.weight = linear.weight
        layer.register_parameter("bias", linear.bias)
        layer._add_masks(sets, samples, tau, mask_bias, init, tensor_id)
        layer.weight.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        return layer.train(linear.training)

    def to_dense(self, set: int | str = 0) -> nn.Linear:
        """A new `torch.nn.Linear` with the threshold mask (logit > 0) of `set` multiplied in."""
        index = self.set_index(set)
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        with torch.no_grad():
            weight = self.weight.masked_fill(~(self.weight_logits[index] > 0), 0)
            linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
            if self.bias is not None:
                bias = self.bias.clone()
                if self.bias_logits is not None:
                    bias.masked_fill_(~(self.bias_logits[index] > 0), 0)
                linear.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    @property
    def sets(self) -> int:
        """Number of mask sets."""
        return self.weight_logits.shape[0]

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
        """One of "sample", "soft", "threshold", "off", or None to follow `training`."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode | None) -> None:
        check_mode(mode)
        self._mode = mode

    @property
    def active_sets(self) -> tuple[int, int] | None:
        """None for all sets, or (first, count)."""
        return self._active

    @active_sets.setter
    def active_sets(self, active: tuple[int, int] | None) -> None:
        if active is not None:
            first, count = active
            if first < 0 or count < 1 or first + count > self.sets:
                raise ValueError(
                    f"active_sets: expected (first, count) within {self.sets} sets, got {active}"
                )
            active = (int(first), int(count))
        self._active = active
        self._views = None

    def _logits(self) -> tuple[Tensor, Tensor | None]:
        """The logits of the active sets."""
        if self._views is not None:
            return self._views[:2]
        logits, bias_logits = self.weight_logits, self.bias_logits
        if self._active is not None and self._active[1] != logits.shape[0]:
            rows = slice(self._active[0], sum(self._active))
            return logits[rows], None if bias_logits is None else bias_logits[rows]
        return logits, bias_logits

    def _seed(self, sets: int) -> Tensor:
        """One seed for each of the `sets` active sets."""
        if self._views is not None:
            return self._views[2]
        if self.seed is None:
            low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
            return torch.randint(low, high, (sets,), device=self.weight_logits.device)
        if self._active is not None and sets != self.seed.shape[0]:
            return self.seed.narrow(0, self._active[0], sets)
        return self.seed

    def forward(self, x: Tensor) -> Tensor:
        """The masked product of x [..., in_features]; see the class for groups and modes."""
        mode = self._mode
        if mode is None:
            mode = "sample" if self.training else "threshold"
        if mode == "off":
            return F.linear(x, self.weight, self.bias)
        logits, bias_logits = self._logits()
        return ops.masked_linear(
            x,
            self.weight,
            logits,
            self.bias,
            bias_logits,
            seed=None if mode == "threshold" else self._seed(logits.shape[0]),
            tensor_id=self.tensor_id,
            bias_tensor_id=self.bias_tensor_id,
            sample_offset=self.sample_offset,
            samples=self.samples,
            tau=self.tau,
            hard=mode != "soft",
            batch_dim=self.batch_dim,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLinear:
        # conversions of dtype are for the weights: a logit of 2 + lr is 2 again in bfloat16
        logits = [p for p in (self.weight_logits, self.bias_logits) if p is not None]
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

    def extra_repr(self) -> str:
        """The sizes, the sets, and the options that are not at their defaults."""
        shown = [
            f"in_features={self.in_features}",
            f"out_features={self.out_features}",
            f"bias={self.bias is not None}",
            f"sets={list(self.set_names)}",
            f"samples={self.samples}",
        ]
        if self.tau != 1.0:
            shown.append(f"tau={self.tau}")
        if self.bias_logits is not None:
            shown.append("mask_bias=True")
        if self._mode is not None:
            shown.append(f"mode={self._mode!r}")
        return ", ".join(shown)
