"""Recurrent layers and cells under one or several learned masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .. import ops
from ..ops._masked_product import check_batch, uses_kernel
from .mask_options import MaskOptions, takes_mask_options
from .masked_module import MaskedModule, is_bias

if TYPE_CHECKING:
    from typing_extensions import Unpack

State = tuple[Tensor, ...]  # h, and c of an LSTM
_PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class MaskedRecurrent(MaskedModule):
    """What layers and cells share."""

    dense_type: ClassVar[Any]
    operation: ClassVar[Callable[..., Any]]
    plain: ClassVar[Callable[..., Any]]  # without masks
    states: ClassVar[int]
    _OPTIONS: ClassVar[tuple[str, ...]]

    input_size: int
    hidden_size: int
    bias: bool
    proj_size: int = 0

    def reset_parameters(self) -> None:
        """Weights and biases as in the plain layer, all logits at `init`."""
        bound = 1 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0
        for name, parameter in self.named_parameters():
            if not name.endswith("_logits"):
                nn.init.uniform_(parameter, -bound, bound)
        self.reset_logits()

    def _adopt(self, module: nn.Module, options: MaskOptions, frozen: bool = False) -> None:
        """Take over the Parameters and options of a plain module, under masks."""
        for name in self._OPTIONS:
            setattr(self, name, getattr(module, name))
        for name, parameter in module._parameters.items():
            self.register_parameter(name, parameter)
        self._add_masks(options, frozen=frozen)
        self.train(module.training)

    @classmethod
    def _from_dense(cls, module: nn.Module, options: MaskOptions) -> Any:
        if not isinstance(module, cls.dense_type):
            expected = cls.dense_type.__name__
            raise TypeError(f"module: expected a torch.nn.{expected}, got {type(module).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adopt(module, options, frozen=True)
        return layer

    def _apply_operation(
        self,
        x: Tensor,
        state: State,
        names: Sequence[str],
        rule: dict[str, Any],
        masked: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> tuple[Tensor, State]:
        """The fused operation with the parameters `names`, in the order of `_PARAMETERS`.

        `rule`: that of the mode. `masked`: parameters that have their masks already, for a single
        group, in place of a rule.
        """
        tensors = [getattr(self, name) if name in self._parameters else None for name in names]
        if masked is None:
            logits = [self._logits(name) for name in names]
            options.update(
                tensor_ids=[self.tensor_ids.get(name, 0) for name in names],
                sample_offset=self.sample_offset,
                samples=self.samples,
                **rule,
            )
        else:
            tensors = [masked.get(n, t) for n, t in zip(names, tensors, strict=True)]
            kept = x.new_ones((), dtype=torch.float32)
            logits = [kept.expand(t.shape) for t in tensors[:2] if t is not None] + [None, None]
        y, last = type(self).operation(
            x,
            *(*tensors[:2], *logits[:2], *tensors[2:], *logits[2:]),
            **dict(zip(("h0", "c0"), state, strict=False)),
            **options,
        )
        return y, last if isinstance(last, tuple) else (last,)

    def _given(self, states: State) -> Any:
        """The states as the plain operation takes them."""
        return states if self.states == 2 else states[0]

    def _by_group(
        self,
        x: Tensor,
        dim: int,
        mode: str,
        seed: Tensor | None,
        run: Callable[[dict[str, Tensor], slice], State],
    ) -> State:
        """`run(masked parameters, rows)` for every group of x, joined along dimension `dim`."""
        sets, samples = self._groups(mode, seed)
        rows = check_batch(x, dim, sets, samples)
        found = [
            run(self._masked_group(g, mode, seed), slice(g * rows, (g + 1) * rows))
            for g in range(sets * samples)
        ]
        return tuple(torch.cat(parts, dim) for parts in zip(*found, strict=True))

    def _check_states(self, hx: State | None) -> None:
        """Raise unless there are as many states as the plain module takes."""
        if hx is None:
            return
        if not isinstance(hx, (tuple, list)) or not all(isinstance(h, Tensor) for h in hx):
            expected = "a tensor" if self.states == 1 else f"{self.states} tensors"
            got = hx[0] if self.states == 1 else hx
            raise TypeError(f"hx: expected {expected}, got {type(got).__name__}")
        if len(hx) != self.states:
            raise ValueError(f"hx: expected {self.states} states, got {len(hx)}")

    @property
    def fused(self) -> bool:
        """Whether the fused operation serves this layer; else each group runs the plain one."""
        return self.granularity == "weight" and self.proj_size == 0


class _MaskedRNNLayer(MaskedRecurrent):
    """`MaskedLSTM` and `MaskedGRU`."""

    num_layers: int
    batch_first: bool
    dropout: float
    bidirectional: bool

    _OPTIONS: ClassVar[tuple[str, ...]] = (
        *("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout"),
        *("bidirectional", "proj_size"),
    )

    def batch_dim_of(self, x: Tensor) -> int:
        return 0 if self.batch_first or x.dim() < 3 else 1

    def flatten_parameters(self) -> None:
        """Does nothing; for code written for the plain layer."""

    def dense_shell(self) -> nn.Module:
        """A plain layer of these sizes and options on the meta device, for other Parameters."""
        options: dict[str, Any] = {name: getattr(self, name) for name in self._OPTIONS}
        if options["proj_size"] == 0:
            del options["proj_size"]
        plain: nn.Module = self.dense_type(**options, device="meta")
        return plain

    def to_dense(self, set: int | str = 0) -> nn.Module:
        """A new plain layer with the threshold masks of `set` multiplied in."""
        dense = super().to_dense(set)
        cast(Any, dense)._init_flat_weights()
        return dense

    def _names(self, layer: int, direction: int) -> list[str]:
        """In the order of the plain layer; the last one is that of a projection."""
        suffix = f"_l{layer}" + ("_reverse" if direction else "")
        return [name + suffix for name in (*_PARAMETERS, "weight_hr")]

    def _forward(
        self, x: Tensor | PackedSequence, hx: State | None
    ) -> tuple[Tensor | PackedSequence, State]:
        self._check_states(hx)
        if isinstance(x, PackedSequence):
            padded, lengths = pad_packed_sequence(x)
            padded, last = self._run(padded, hx, lengths)
            order = x.sorted_indices
            if order is not None:
                padded, lengths = padded.index_select(1, order), lengths[order.to(lengths.device)]
            data = pack_padded_sequence(padded, lengths).data
            return PackedSequence(data, x.batch_sizes, order, x.unsorted_indices), last
        if x.dim() not in (2, 3):
            raise ValueError(f"input: expected 2 or 3 dimensions, got {list(x.shape)}")
        if x.dim() == 2:
            if hx is not None and any(h.dim() != 2 for h in hx):
                raise ValueError("hx: expected 2 dimensions beside an input without a batch")
            states = None if hx is None else tuple(h.unsqueeze(1) for h in hx)
            y, last = self._run(x.unsqueeze(1), states, None)
            return y.squeeze(1), tuple(h.squeeze(1) for h in last)
        y, last = self._run(x.transpose(0, 1) if self.batch_first else x, hx, None)
        return y.transpose(0, 1) if self.batch_first else y, last

    def _run(self, x: Tensor, hx: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        """All layers; x [steps, batch, input_size], lengths on the CPU."""
        self._check_input(x, hx)
        mode = self.effective_mode
        rule = {"seed": None} if mode == "off" else self._rule(mode)
        if mode != "off" and self.fused:
            return self._run_fused(x, hx, lengths, rule)

        def run(masked: dict[str, Tensor], rows: slice) -> tuple[Tensor, ...]:
            of_group = x[:, rows]
            states = (
                self._zeros(of_group) if hx is None else tuple(h[:, rows].contiguous() for h in hx)
            )
            return self._run_plain(
                of_group, states, None if lengths is None else lengths[rows], masked
            )

        y, *last = self._by_group(x, 1, mode, rule["seed"], run)
        return y, tuple(last)

    def _zeros(self, x: Tensor) -> State:
        """The states at the start of x [steps, batch, input_size]."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)
        return tuple(x.new_zeros(count, x.shape[1], size) for size in sizes[: self.states])

    def _run_plain(
        self, x: Tensor, states: State, lengths: Tensor | None, masked: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """The plain layer with some masked parameters: y and the last states.

        By our kernel, which can be compiled, where it serves; else by the operation below the plain
        module, since a compiled region cannot make a module.
        """
        if masked and self.proj_size == 0 and uses_kernel(x):
            y, last = self._run_fused(x, states, lengths, {}, masked)
            return (y, *last)
        names = [
            name
            for layer in range(self.num_layers)
            for direction in range(2 if self.bidirectional else 1)
            for name in self._names(layer, direction)
            if self._parameters.get(name) is not None
        ]
        weights = [masked[n] if n in masked else self._parameter(n) for n in names]
        options: tuple[Any, ...] = (
            *(weights, self.bias, self.num_layers, self.dropout, self.training),
            self.bidirectional,
        )
        if lengths is None:
            y, *last = type(self).plain(x, self._given(states), *options, False)
            return (y, *last)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        data, sizes, order, back = packed
        assert order is not None
        assert back is not None
        states = tuple(h.index_select(1, order) for h in states)
        y, *last = type(self).plain(data, sizes, self._given(states), *options)
        y, _ = pad_packed_sequence(PackedSequence(y, sizes, order, back), total_length=x.shape[0])
        return (y, *(h.index_select(1, back) for h in last))

    def _check_input(self, x: Tensor, hx: State | None) -> None:
        if x.shape[-1] != self.input_size:
            raise ValueError(
                f"input: expected {self.input_size} values per step, got {x.shape[-1]}"
            )
        if hx is None:
            return
        directions = 2 if self.bidirectional else 1
        for n, h in enumerate(hx):
            size = self.proj_size if self.proj_size and n == 0 else self.hidden_size
            expected = [self.num_layers * directions, x.shape[1], size]
            if list(h.shape) != expected:
                raise ValueError(f"hx: expected shape {expected}, got {list(h.shape)}")

    def _run_fused(
        self,
        x: Tensor,
        hx: State | None,
        lengths: Tensor | None,
        rule: dict[str, Any],
        masked: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        directions = 2 if self.bidirectional else 1
        where = None if lengths is None else lengths.to(x.device)
        last: list[State] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for direction in range(directions):
                number = layer * directions + direction
                y, states = self._apply_operation(
                    x,
                    () if hx is None else tuple(h[number] for h in hx),
                    self._names(layer, direction)[: len(_PARAMETERS)],
                    rule,
                    masked,
                    lengths=where,
                    reverse=direction == 1,
                )
                outputs.append(y)
                last.append(states)
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
        return x, tuple(torch.stack(h) for h in zip(*last, strict=True))

    def extra_repr(self) -> str:
        """The sizes, options and sets that are not at their defaults."""
        shown = [str(self.input_size), str(self.hidden_size)]
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0}
        defaults.update(bidirectional=False, proj_size=0)
        for name, default in defaults.items():
            if getattr(self, name) != default:
                shown.append(f"{name}={getattr(self, name)}")
        if any(is_bias(name) for name in self.masked):
            shown.append("mask_bias=True")
        return f"{', '.join(shown)}, {self._mask_repr()}"


class MaskedLSTM(_MaskedRNNLayer):
    """`torch.nn.LSTM` whose weights stand under one mask per set and sequence.

    The batch is cut into ``active sets * samples`` equal contiguous groups; group
    ``g = set * samples + sample`` runs through all steps, layers and directions with its own draw
    of the masks of its set (Csordás et al. 2021, section 2). Each direction of each layer is one
    fused operation (`ops.masked_lstm`), forward and backward; with `proj_size` or a coarser
    granularity the layer runs once per group on masked copies of its weights.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype: as in `torch.nn.LSTM`, all of them.
        options: sets, samples, tau, mask_bias, init, tensor_id, granularity: see `MaskOptions`.

    Parameters:
        weight_ih_l0, weight_hh_l0, bias_ih_l0, ...: as in the plain layer.
        ``<name>_logits``: [sets, *shape], float32, beside each masked parameter.

    Attributes:
        mode, active_sets, samples, tau, set_names, sample_offset, seed, tensor_ids: see
            `MaskedModule`; all may be changed at any time. The batch dimension is that of
            `batch_first`; `batch_dim` has no say.

    Shape:
        As the plain layer, packed sequences included: a sequence belongs to the group of its place
        in the batch before any sorting by length. Without a batch dimension there must be one
        group.

    Raises:
        ValueError: for options that the plain layer rejects, inputs and states that do not fit, and
            batches that do not divide.

    Equivalent to::

        for g, (x, hx) in enumerate(groups of input and states):
            masked = {n: p * sample_mask(logits of n, seed=seed, samples=samples,
                                         tensor_id=tensor_ids[n])[g % samples, g // samples]}
            y.append(functional_call(lstm, masked, (x, hx)))
    """

    dense_type = nn.LSTM
    operation = staticmethod(ops.masked_lstm)
    plain = staticmethod(torch.lstm)
    states = 2

    @takes_mask_options
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[MaskOptions],
    ) -> None:
        super().__init__()
        plain = nn.LSTM(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self._adopt(plain, options)

    @classmethod
    @takes_mask_options
    def from_dense(
        cls,
        lstm: nn.LSTM,
        **options: Unpack[MaskOptions],
    ) -> MaskedLSTM:
        """A masked layer over the very Parameters of `lstm`, which are frozen by this.

        Args:
            lstm: any `torch.nn.LSTM`; its Parameters are shared, not copied.
            options: see `MaskOptions`.
        """
        layer: MaskedLSTM = cls._from_dense(lstm, options)
        return layer

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """Outputs of the last layer, and (h_n, c_n), as in the plain layer."""
        y, last = self._forward(input, hx)
        return y, cast("tuple[Tensor, Tensor]", last)


class MaskedGRU(_MaskedRNNLayer):
    """`torch.nn.GRU` whose weights stand under one mask per set and sequence.

    As `MaskedLSTM`, on `ops.masked_gru`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype: as in `torch.nn.GRU`, all of them.
        options: sets, samples, tau, mask_bias, init, tensor_id, granularity: see `MaskOptions`.

    Parameters, Attributes, Shape:
        See `MaskedLSTM`; there is one state, h.

    Raises:
        ValueError: for options that the plain layer rejects, inputs and states that do not fit, and
            batches that do not divide.

    Equivalent to::

        for g, (x, hx) in enumerate(groups of input and states):
            masked = {n: p * sample_mask(logits of n, seed=seed, samples=samples,
                                         tensor_id=tensor_ids[n])[g % samples, g // samples]}
            y.append(functional_call(gru, masked, (x, hx)))
    """

    dense_type = nn.GRU
    operation = staticmethod(ops.masked_gru)
    plain = staticmethod(torch.gru)
    states = 1

    @takes_mask_options
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[MaskOptions],
    ) -> None:
        super().__init__()
        plain = nn.GRU(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self._adopt(plain, options)

    @classmethod
    @takes_mask_options
    def from_dense(
        cls,
        gru: nn.GRU,
        **options: Unpack[MaskOptions],
    ) -> MaskedGRU:
        """A masked layer over the very Parameters of `gru`, which are frozen by this.

        Args:
            gru: any `torch.nn.GRU`; its Parameters are shared, not copied.
            options: see `MaskOptions`.
        """
        layer: MaskedGRU = cls._from_dense(gru, options)
        return layer

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Any, Tensor]:
        """Outputs of the last layer, and h_n, as in the plain layer."""
        y, last = self._forward(input, None if hx is None else (hx,))
        return y, last[0]


class _MaskedCell(MaskedRecurrent):
    """`MaskedLSTMCell` and `MaskedGRUCell`."""

    weight_ih: Tensor
    weight_hh: Tensor

    _OPTIONS: ClassVar[tuple[str, ...]] = ("input_size", "hidden_size", "bias")

    def batch_dim_of(self, x: Tensor) -> int:
        return 0

    @takes_mask_options
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[MaskOptions],
    ) -> None:
        super().__init__()
        self._adopt(self.dense_type(input_size, hidden_size, bias, device, dtype), options)

    @classmethod
    @takes_mask_options
    def from_dense(
        cls,
        cell: nn.RNNCellBase,
        **options: Unpack[MaskOptions],
    ) -> Any:
        """A masked cell over the very Parameters of the plain `cell`, which are frozen by this.

        Args:
            cell: a plain cell of this kind; its Parameters are shared, not copied.
            options: see `MaskOptions`.
        """
        return cls._from_dense(cell, options)

    def dense_shell(self) -> nn.Module:
        """A plain cell of these sizes on the meta device, for other Parameters."""
        plain: nn.Module = self.dense_type(
            self.input_size, self.hidden_size, self.bias, device="meta"
        )
        return plain

    def _step(self, x: Tensor, hx: State | None) -> State:
        self._check_states(hx)
        if x.dim() not in (1, 2) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"input: expected shape [batch, {self.input_size}] or [{self.input_size}], "
                f"got {list(x.shape)}"
            )
        if x.dim() == 1:
            states = None if hx is None else tuple(h.unsqueeze(0) for h in hx)
            return tuple(h.squeeze(0) for h in self._step(x.unsqueeze(0), states))
        for h in () if hx is None else hx:
            if list(h.shape) != [x.shape[0], self.hidden_size]:
                raise ValueError(
                    f"hx: expected shape {[x.shape[0], self.hidden_size]}, got {list(h.shape)}"
                )
        mode = self.effective_mode
        rule = {"seed": None} if mode == "off" else self._rule(mode)
        if mode != "off" and self.fused:
            _, last = self._apply_operation(x.unsqueeze(0), hx or (), _PARAMETERS, rule)
            return last

        def run(masked: dict[str, Tensor], rows: slice) -> State:
            zeros = x.new_zeros(x[rows].shape[0], self.hidden_size)
            states = (zeros,) * self.states if hx is None else tuple(h[rows] for h in hx)
            weights = [masked.get(n, self._parameters.get(n)) for n in _PARAMETERS]
            last = type(self).plain(x[rows], self._given(states), *weights)
            return last if isinstance(last, tuple) else (last,)

        return self._by_group(x, 0, mode, rule["seed"], run)

    def extra_repr(self) -> str:
        """The sizes, the sets, and the options that are not at their defaults."""
        shown = f"{self.input_size}, {self.hidden_size}"
        if not self.bias:
            shown += ", bias=False"
        if any(is_bias(name) for name in self.masked):
            shown += ", mask_bias=True"
        return f"{shown}, {self._mask_repr()}"


class MaskedLSTMCell(_MaskedCell):
    """`torch.nn.LSTMCell` whose weights stand under one mask per set.

    Each call is one step. A sequence has one mask, as in `MaskedLSTM`, as long as `seed` stays:
    a learning loop sets one per optimisation step; without one every call draws its own.

    Args:
        input_size, hidden_size, bias, device, dtype: as in `torch.nn.LSTMCell`.
        options: sets, samples, tau, mask_bias, init, tensor_id, granularity: see `MaskOptions`.

    Shape:
        As the plain cell; the batch is cut into ``active sets * samples`` groups.

    Raises:
        ValueError: for inputs and states that do not fit, and batches that do not divide.

    Equivalent to::

        for g, (x, hx) in enumerate(groups of input and states):
            masked = {n: p * sample_mask(logits of n, seed=seed, samples=samples,
                                         tensor_id=tensor_ids[n])[g % samples, g // samples]}
            states.append(functional_call(cell, masked, (x, hx)))
    """

    dense_type = nn.LSTMCell
    operation = staticmethod(ops.masked_lstm)
    plain = staticmethod(torch.lstm_cell)
    states = 2

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The next (h, c)."""
        return cast("tuple[Tensor, Tensor]", self._step(input, hx))


class MaskedGRUCell(_MaskedCell):
    """`torch.nn.GRUCell` whose weights stand under one mask per set; see `MaskedLSTMCell`.

    Args:
        input_size, hidden_size, bias, device, dtype: as in `torch.nn.GRUCell`.
        options: sets, samples, tau, mask_bias, init, tensor_id, granularity: see `MaskOptions`.

    Shape:
        As the plain cell; the batch is cut into ``active sets * samples`` groups.

    Raises:
        ValueError: for inputs and states that do not fit, and batches that do not divide.

    Equivalent to::

        for g, (x, hx) in enumerate(groups of input and states):
            masked = {n: p * sample_mask(logits of n, seed=seed, samples=samples,
                                         tensor_id=tensor_ids[n])[g % samples, g // samples]}
            states.append(functional_call(cell, masked, (x, hx)))
    """

    dense_type = nn.GRUCell
    operation = staticmethod(ops.masked_gru)
    plain = staticmethod(torch.gru_cell)
    states = 1

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next h."""
        return self._step(input, None if hx is None else (hx,))[0]
