"""Layers for inference in which every row of the batch sees the masks of its own set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from .. import ops
from .masked_any import _Cut, _is_packed, _Whole
from .masked_module import name_sets

Layer = TypeVar("Layer", bound="SelectModule")


class SelectModule(nn.Module):
    """A module some of whose parameters stand under bit-packed masks, one per set.

    Made by `from_dense` or, for whole models, by `select_masks`. Parameters and buffers keep the
    names and tensors of the plain module; the masks of a parameter are the buffer ``<name>_masks``,
    uint8 ``[sets, ceil(elements / 8)]``, one bit per weight and set.

    Attributes:
        set_names: names of the sets. masked: names of the parameters under masks.
        row_sets: int64 [batch], the set of each row, or [] for one set in all rows; None until
            `use_sets` says it. batch_dim: the dimension of the batch in inputs and outputs.
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Module
    set_names: tuple[str, ...]
    masked: tuple[str, ...]
    batch_dim: int
    row_sets: Tensor | None

    @classmethod
    def from_dense(
        cls: type[Layer],
        module: nn.Module,
        masks: Mapping[str, Tensor],
        *,
        sets: Sequence[str] | None = None,
        batch_dim: int = 0,
    ) -> Layer:
        """A layer over the very parameters of `module`.

        Args:
            module: the plain module; its Parameters, buffers and children are shared, not copied.
            masks: uint8 [sets, ceil(elements / 8)] by name of the parameter, see `ops.pack_bits`.
            sets: names of the sets; None numbers them.
            batch_dim: dimension of the batch in inputs and outputs.

        Raises:
            TypeError: for another kind of module.
            ValueError: for masks that do not fit the parameters, or one another.
        """
        if not isinstance(module, cls.dense_type):
            expected = f"torch.nn.{cls.dense_type.__name__}"
            raise TypeError(f"module: expected a {expected}, got {type(module).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for name in getattr(module, "__constants__", ()):
            setattr(layer, name, getattr(module, name))
        layer._parameters.update(module._parameters)
        layer._buffers.update(module._buffers)
        layer._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            layer.add_module(name, child)
        layer._take(module)
        counts = {len(bits) for bits in masks.values()}
        layer.set_names = name_sets(next(iter(counts), 1) if sets is None else sets)
        for name, bits in masks.items():
            elements = module.get_parameter(name).numel()
            expected_shape = (len(layer.set_names), (elements + 7) // 8)
            if bits.dtype != torch.uint8 or bits.shape != expected_shape:
                raise ValueError(
                    f"masks[{name!r}]: expected uint8 {list(expected_shape)}, packed bits of "
                    f"{elements} elements, got {bits.dtype} {list(bits.shape)}"
                )
            layer.register_buffer(_masks_of(name), bits)
        layer.masked = tuple(masks)
        layer.batch_dim = batch_dim
        layer.row_sets = None
        return layer.train(module.training)

    def _take(self, module: nn.Module) -> None:
        """Take over what the plain module has beside parameters, buffers and constants."""

    def set_index(self, set: int | str) -> int:
        """The index of a set given by its index or name; ValueError names what there is."""
        names = self.set_names
        if isinstance(set, str) and set in names:
            return names.index(set)
        if isinstance(set, int) and 0 <= set < len(names):
            return int(set)
        raise ValueError(
            f"set: expected one of {list(names)} or an index below {len(names)}, got {set!r}"
        )

    def _rows(self, batch: int) -> Tensor:
        """The set of each of `batch` rows."""
        if self.row_sets is None:
            raise RuntimeError(
                "no mask sets chosen: call the model inside `with use_sets(model, row_sets):`"
            )
        if self.row_sets.dim() == 0:
            return self.row_sets.expand(batch)
        return self.row_sets

    def extra_repr(self) -> str:
        """The sets, behind what the plain module shows."""
        plain = self.dense_type.extra_repr(self) if self.dense_type is not nn.Module else ""
        return f"{plain}, sets={list(self.set_names)}"


def _masks_of(name: str) -> str:
    return f"{name.replace('.', '_')}_masks"


class SelectLinear(SelectModule):
    """`torch.nn.Linear` in which every row of the batch sees its own mask set.

    Inference only. Neither a mask nor a masked weight is unpacked as a whole, see
    `ops.select_linear`. Made by `from_dense` or `select_masks`.

    Parameters:
        weight [out_features, in_features], bias [out_features] or None; buffers weight_masks,
        bias_masks (or None): uint8 [sets, ceil(elements / 8)].

    Shape:
        Input [..., in_features], output [..., out_features], the batch in `batch_dim`.

    Raises:
        RuntimeError: before `use_sets` has said which rows see which sets, or for a gradient.
        ValueError: for another number of rows than `use_sets` was given.

    Equivalent to::

        rows = [F.linear(x[r], weight * unpack_bits(weight_masks[s], weight.shape), bias)
                for r, s in enumerate(row_sets)]
        return torch.stack(rows)
    """

    dense_type = nn.Linear
    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """The product of each row with its masked weight."""
        return ops.select_linear(
            x,
            self.weight,
            self._buffers["weight_masks"],  # type: ignore[arg-type]
            self._rows(x.shape[self.batch_dim]),
            self.bias,
            self._buffers.get("bias_masks"),
            batch_dim=self.batch_dim,
        )


class _SelectConv(SelectModule):
    """What `SelectConv1d` and `SelectConv2d` share."""

    _operation: ClassVar[Callable[..., Tensor]]
    weight: Tensor
    bias: Tensor | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    output_padding: tuple[int, ...]

    def _take(self, module: nn.Module) -> None:
        self._padding_around: list[int] = module._reversed_padding_repeated_twice  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of each image with its masked weight."""
        moved = self.batch_dim % x.dim() != 0
        if moved:
            x = x.movedim(self.batch_dim, 0)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._padding_around, mode=self.padding_mode)
            padding = 0
        y = type(self)._operation(
            x,
            self.weight,
            self._buffers["weight_masks"],
            self._rows(x.shape[0]),
            self.bias,
            self._buffers.get("bias_masks"),
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return y.movedim(0, self.batch_dim) if moved else y


class SelectConv2d(_SelectConv):
    """`torch.nn.Conv2d` in which every image of the batch sees its own mask set.

    Inference only, see `ops.select_conv2d`. Made by `from_dense` or `select_masks`; parameters,
    buffers and errors are those of `SelectLinear`.

    Shape:
        Input [batch, in_channels, height, width], output [batch, out_channels, height, width].

    Equivalent to::

        images = [F.conv2d(x[r : r + 1], weight * unpack_bits(weight_masks[s], weight.shape), bias,
                           stride, padding, dilation, groups)
                  for r, s in enumerate(row_sets)]
        return torch.cat(images)
    """

    dense_type = nn.Conv2d
    _operation = staticmethod(ops.select_conv2d)


class SelectConv1d(_SelectConv):
    """`torch.nn.Conv1d` in which every row of the batch sees its own mask set.

    As `SelectConv2d` with one spatial dimension: input [batch, in_channels, length].

    Equivalent to::

        as `SelectConv2d`, with `F.conv1d`
    """

    dense_type = nn.Conv1d
    _operation = staticmethod(ops.select_conv1d)


class SelectAny(SelectModule):
    """Any module under selected mask sets: run once per set that occurs, on the rows of that set.

    The masks stay packed; the masked parameters of one set exist while the module runs for it. That
    is right for any module whose output belongs to its input row by row. Every tensor argument
    whose size along `batch_dim` is that of the first one is cut by rows; outputs are tensors or
    tuples of them. Recurrent layers and attention know their batch dimension themselves.

    Raises:
        TypeError: for packed sequences.
        RuntimeError: before `use_sets` has said which rows see which sets.
        ValueError: for another number of rows than `use_sets` was given.

    Equivalent to::

        for s in row_sets.unique():
            masked = {name: parameter * unpack_bits(masks[name][s], parameter.shape)}
            y[row_sets == s] = functional_call(module, masked, x[row_sets == s])
    """

    def _take(self, module: nn.Module) -> None:
        # not a child: names and state dict stay those of the module
        self.__dict__["_plain"] = module

    def __getattr__(self, name: str) -> Any:
        # settings of the plain module, but no methods: those know no masks
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.__dict__.get("_plain"), name, None)
            if value is None or callable(value):
                raise
            return value

    def train(self, mode: bool = True) -> SelectAny:
        """As `torch.nn.Module.train`."""
        self.__dict__["_plain"].train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module set by set; see the class."""
        plain: nn.Module = self.__dict__["_plain"]
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=_is_packed)
        if any(_is_packed(leaf) for leaf in leaves):
            raise TypeError(
                f"module: a PackedSequence cannot be cut by rows for {type(plain).__name__}; pad it"
            )
        batch_first = getattr(plain, "batch_first", None)
        dim = self.batch_dim if batch_first is None else int(not batch_first)
        first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
        if first is None or first.dim() <= dim:
            got = "no tensor" if first is None else f"shape {list(first.shape)}"
            raise ValueError(f"x must have its batch in dimension {dim}, got {got}")
        batch = first.shape[dim]
        row_sets = self._rows(batch)
        if row_sets.shape[0] != batch:
            raise ValueError(
                f"row_sets must have shape [{batch}], one set for each row of x "
                f"{list(first.shape)}, not {list(row_sets.shape)}"
            )
        args, kwargs = _Cut(batch, dim, 1).prepare(plain, args, kwargs)

        def pick(leaf: Any, rows: Tensor) -> Any:
            if isinstance(leaf, _Whole):
                if leaf.dim is None or not isinstance(leaf.value, Tensor):
                    return leaf.value
                each = leaf.value.shape[leaf.dim] // batch
                inner = torch.arange(each, device=rows.device)
                index = (rows.unsqueeze(1) * each + inner).flatten()
                return leaf.value.index_select(leaf.dim, index)
            if isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == batch:
                return leaf.index_select(dim, rows)
            return leaf

        outputs, order = [], []
        for s in torch.unique(row_sets).tolist() or [0]:
            rows = (row_sets == s).nonzero().squeeze(1)
            chosen = {**self._own(), **self._masked(s)}
            part_args, part_kwargs = pytree.tree_map(
                lambda leaf, rows=rows: pick(leaf, rows), (args, kwargs)
            )
            outputs.append(functional_call(plain, chosen, part_args, part_kwargs))
            order.append(rows)
        place = torch.cat(order).argsort()

        def join(dim: int) -> Callable[..., Any]:
            def of_leaves(*leaves: Any) -> Any:
                if not isinstance(leaves[0], Tensor):
                    return leaves[0]
                return torch.cat(leaves, dim).index_select(dim, place)

            return of_leaves

        if isinstance(plain, nn.RNNBase):
            y, *states = zip(*outputs, strict=True)
            # hidden states: [layers, batch, ...] whatever the layout of the input
            return join(dim)(*y), *(pytree.tree_map(join(1), *s) for s in states)
        if isinstance(plain, nn.MultiheadAttention):
            y, weights = zip(*outputs, strict=True)
            return join(dim)(*y), join(0)(*weights)
        return pytree.tree_map(join(dim), *outputs)

    def _own(self) -> dict[str, Tensor]:
        """Parameters and buffers that the plain module itself reads."""
        plain: nn.Module = self.__dict__["_plain"]
        names = (*plain._parameters, *plain._buffers)
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}

    def _masked(self, set: int) -> dict[str, Tensor]:
        """The masked parameters of one set."""
        found = {}
        for name in self.masked:
            parameter = self.get_parameter(name)
            kept = ops.unpack_bits(self._buffers[_masks_of(name)][set], parameter.shape)  # type: ignore[index]
            found[name] = parameter.masked_fill(~kept, 0)
        return found

    def extra_repr(self) -> str:
        """The plain module and the sets."""
        return f"{type(self.__dict__['_plain']).__name__}, sets={list(self.set_names)}"
