"""Any module under learned masks: the general path."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from ..ops import _group_affine
from ..ops._masked_product import check_batch
from .mask_options import MaskOptions, takes_mask_options
from .masked_module import MaskedModule, names_to_mask

if TYPE_CHECKING:
    from typing_extensions import Unpack

# arguments of torch.nn modules whose batch is not where that of the input is
_BATCH_FIRST = ("key_padding_mask",)
_OF_POSITIONS = ("attn_mask", "src_mask", "tgt_mask", "memory_mask", "mask")


class MaskedAny(MaskedModule):
    """Any module, with or without children, whose parameters stand under masks: run group by group.

    For every group one masked copy of each masked parameter is made, and the unmodified module runs
    with it on its part of the batch (`torch.func.functional_call`). That is right for any module
    whose output belongs to its input row by row, and costs what as many separate calls cost; linear
    layers, convolutions and attention have fused layers instead. Made by `from_dense`.

    Parameters, buffers and children keep the names and tensors of the module; the logits
    ``<name>_logits``, ``[sets, *shape]`` in float32 (smaller with a coarser granularity, for
    parameters of two dimensions or more), sit beside their parameters.

    A normalisation by itself runs once, for the whole batch: masks of its weights do not touch what
    it computes before them, and scale and shift of every group are one operation more. So a batch
    normalisation takes the statistics of the whole batch, as the plain module does; inside a module
    with children it sees one group at a time.

    Attributes:
        mode, active_sets, samples, tau, batch_dim, tensor_ids, set_names, sample_offset, seed: see
            `MaskedModule`; all may be changed at any time. Recurrent layers know their batch
            dimension themselves.

    Shape:
        As the module. Arguments and outputs may be trees (tuples, dicts, dataclasses) with None and
        other values between the tensors. Every tensor whose size along `batch_dim` is that of the
        first one is cut into groups; masks over pairs of positions (``attn_mask`` and its
        like), padding masks and hidden states are cut where `torch.nn` has their batch, or
        not at all. The outputs are put together along the same dimension.

    Raises:
        ValueError: for a batch that does not divide.
        TypeError: if an output has no batch dimension (a loss, for instance), or for packed
            sequences, where several groups are needed.

    Equivalent to::

        for g, part in enumerate(x.chunk(sets * samples, dim=batch_dim)):
            mask = sample_mask(logits, seed=seed, samples=samples)[g % samples, g // samples]
            parts.append(functional_call(module, {name: parameter * mask}, part))
        return torch.cat(parts, dim=batch_dim)
    """

    @classmethod
    @takes_mask_options
    def from_dense(
        cls,
        module: nn.Module,
        *,
        accept: Callable[[str, nn.Module], bool] | None = None,
        **options: Unpack[MaskOptions],
    ) -> MaskedAny:
        """Masks over the very parameters of `module`, which are frozen by this.

        Args:
            module: any module; its Parameters, buffers and children are shared, not copied.
            accept: ``accept(name, child)``, True for the children at any depth whose own
                parameters are masked; None masks those of all.
            options: see `MaskOptions`; biases are found by their names.

        Raises:
            TypeError: for something else than a module that can be called.
            ValueError: for one that has nothing to mask.
        """
        if not isinstance(module, nn.Module) or _has_no_forward(module):
            raise TypeError(f"module: expected a module to call, got {type(module).__name__}")
        if not names_to_mask(module, options.get("mask_bias", False), accept):
            raise ValueError(f"module: {type(module).__name__} has no parameter to mask")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for name, parameter in module._parameters.items():
            layer.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            kept = name not in module._non_persistent_buffers_set
            layer.register_buffer(name, buffer, persistent=kept)
        for name, child in module._modules.items():
            layer.add_module(name, child)
        # not a child: names and state dict stay those of the module
        layer.__dict__["_plain"] = module
        layer._add_masks(options, frozen=True, accept=accept)
        return layer.train(module.training)

    def __getattr__(self, name: str) -> Any:
        # settings of the plain module ("embedding_dim"), but no methods: those know no masks
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.__dict__.get("_plain"), name, None)
            if value is None or callable(value):
                raise
            return value

    def batch_dim_of(self, x: Tensor) -> int:
        """See `MaskedModule`."""
        plain: nn.Module = self.__dict__["_plain"]
        return int(not plain.batch_first) if isinstance(plain, nn.RNNBase) else self.batch_dim

    def dense_shell(self) -> nn.Module:
        """The plain module again, for other Parameters."""
        plain: nn.Module = self.__dict__["_plain"]
        shell = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
        for name in self.masked:
            prefix, _, leaf = name.rpartition(".")
            if prefix:
                del shell.get_submodule(prefix)._parameters[f"{leaf}_logits"]
        return shell

    def train(self, mode: bool = True) -> MaskedAny:
        """As `torch.nn.Module.train`."""
        self.__dict__["_plain"].train(mode)
        return super().train(mode)

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers that the plain module itself reads."""
        plain: nn.Module = self.__dict__["_plain"]
        all_of_it = {n: getattr(self, n) for n in (*plain._parameters, *plain._buffers)}
        return {name: tensor for name, tensor in all_of_it.items() if tensor is not None}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module group by group; see the class."""
        plain: nn.Module = self.__dict__["_plain"]
        tensors = self._tensors()
        mode = self.effective_mode
        if mode == "off":
            return functional_call(plain, tensors, args, kwargs)
        seed = self._rule(mode)["seed"]
        sets, samples = self._groups(mode, seed)
        groups = sets * samples
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=_is_packed)
        first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
        if groups > 1 and any(_is_packed(leaf) for leaf in leaves):
            raise TypeError(
                f"module: the general path cannot cut a PackedSequence into {groups} groups for "
                f"{type(plain).__name__}; pad it"
            )
        dim = self.batch_dim if first is None else self.batch_dim_of(first)
        if groups > 1:
            if first is None or first.dim() <= dim or first.shape[dim] == 1:
                got = "no tensor" if first is None else f"shape {list(first.shape)}"
                raise ValueError(
                    f"x must have its batch, of {groups} groups, in dimension {dim}, got {got}; "
                    "mask the module around one that meets no batch"
                )
            rows = check_batch(first, dim, sets, samples)
            if _is_norm(plain) and first is not None:
                return self._normalise(first, groups, dim, seed, mode)
            cut = _Cut(groups, dim, rows)
            args, kwargs = cut.prepare(plain, args, kwargs)

        outputs = []
        for g in range(groups):
            chosen = {**tensors, **self._masked_group(g, mode, seed)}
            of_group = (args, kwargs) if groups == 1 else cut.part((args, kwargs), g)
            outputs.append(functional_call(plain, chosen, *of_group))
        if groups == 1:
            return outputs[0]
        if isinstance(plain, nn.RNNBase):
            y, *state = zip(*outputs, strict=True)
            # hidden states: [layers, batch, ...] whatever the layout of the input
            return cut.join(y), *(_Cut(groups, 1, cut.rows).join(s) for s in state)
        return cut.join(outputs)

    def _normalise(
        self, x: Tensor, groups: int, dim: int, seed: Tensor | None, mode: str
    ) -> Tensor:
        """The whole batch normalised at once, then scaled and shifted by every group's values."""
        plain: nn.Module = self.__dict__["_plain"]
        tensors = self._tensors()
        neutral = {
            name: torch.full_like(tensors[name], value)
            for name, value in (("weight", 1), ("bias", 0))
            if name in tensors
        }
        y: Tensor = functional_call(plain, {**tensors, **neutral}, (x,))
        values = {name: self._of_groups(name, groups, mode, seed).flatten(1) for name in neutral}
        last = getattr(plain, "normalized_shape", None)  # else channels are in dimension 1
        channel_dim = 1 if last is None else y.dim() - len(cast("tuple[int, ...]", last))
        y = _group_affine.group_affine(
            y.movedim(dim, 0), values["weight"], values.get("bias"), channel_dim
        )
        return y.movedim(0, dim)

    def cost(self) -> str:
        """What a forward pass in mode "sample" does, in words."""
        values = [self._parameter(name) for name in self.masked]
        count = sum(p.numel() for p in values)
        size = sum(p.numel() * p.element_size() for p in values)
        plain: nn.Module = self.__dict__["_plain"]
        if _is_norm(plain):
            why = _group_affine.unserved(values[0].dtype, values[0].device)
            by = "the cuda kernels" if why is None else why
            return (
                f"one call of {type(plain).__name__} per batch, scaled and shifted by "
                f"{count:,} masked values in each of {self.sets * self.samples} groups: {by}"
            )
        return (
            f"{self.sets * self.samples} calls of {type(plain).__name__} per "
            f"batch, each with a masked copy of {count:,} values, {size:,} bytes"
        )

    def extra_repr(self) -> str:
        """The plain module, the sets, and the options that are not at their defaults."""
        plain: nn.Module = self.__dict__["_plain"]
        shown = type(plain).__name__ if self._modules else repr(plain)
        return f"{shown}, {self._mask_repr()}"


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def _is_norm(plain: nn.Module) -> bool:
    """Whether it normalises, then scales and shifts by its weight and bias."""
    kinds = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    own = any(type(plain).forward is kind.forward for kind in kinds)
    return (own or isinstance(plain, _NormBase)) and plain._parameters.get("weight") is not None


def _has_no_forward(module: nn.Module) -> bool:
    """Whether it only holds others, as `torch.nn.ModuleList` does."""
    return type(module).forward is nn.Module.forward


class _Whole:
    """An argument that every group gets as it is, or that is cut along a dimension of its own."""

    def __init__(self, value: Any, dim: int | None) -> None:
        self.value = value
        self.dim = dim


class _Cut:
    """A batch in `groups` parts of `rows` rows along dimension `dim`."""

    def __init__(self, groups: int, dim: int, rows: int) -> None:
        self.groups = groups
        self.dim = dim
        self.rows = rows

    def prepare(
        self, plain: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, those marked whose batch is elsewhere by the conventions of torch.nn."""
        names = list(inspect.signature(type(plain).forward).parameters)[1:]
        recurrent = isinstance(plain, nn.RNNBase)

        def mark(name: str, value: Any) -> Any:
            if recurrent and name == "hx":
                return pytree.tree_map(lambda h: _Whole(h, 1), value)
            if not isinstance(value, Tensor) or type(plain).__module__.split(".")[0] != "torch":
                return value
            if name.endswith(_BATCH_FIRST):
                return _Whole(value, 0)
            if name in _OF_POSITIONS:
                # [positions, positions], or [batch * heads, positions, positions]
                return _Whole(value, None if value.dim() == 2 else 0)
            return value

        named = zip([*names, *[""] * len(args)], args, strict=False)
        return tuple(mark(n, a) for n, a in named), {n: mark(n, a) for n, a in kwargs.items()}

    def part(self, tree: Any, g: int) -> Any:
        """What group g gets of the arguments."""

        def of_leaf(leaf: Any) -> Any:
            if isinstance(leaf, _Whole):
                if leaf.dim is None:
                    return leaf.value
                rows = leaf.value.shape[leaf.dim] // self.groups
                return leaf.value.narrow(leaf.dim, g * rows, rows)
            batch = self.groups * self.rows
            if isinstance(leaf, Tensor) and leaf.dim() > self.dim and leaf.shape[self.dim] == batch:
                return leaf.narrow(self.dim, g * self.rows, self.rows)
            return _replace_fields(leaf, lambda value: self.part(value, g))

        return pytree.tree_map(of_leaf, tree)

    def join(self, outputs: Sequence[Any]) -> Any:
        """The output of the whole batch."""

        def of_leaves(*leaves: Any) -> Any:
            first = leaves[0]
            if isinstance(first, Tensor):
                if first.dim() <= self.dim or first.shape[self.dim] != self.rows:
                    raise TypeError(
                        f"module: expected outputs with {self.rows} rows in dimension {self.dim}, "
                        f"one part of the batch, got shape {list(first.shape)}: it does not say "
                        "which row it belongs to"
                    )
                return torch.cat(leaves, self.dim)
            if dataclasses.is_dataclass(first) and not isinstance(first, type):
                fields = [f.name for f in dataclasses.fields(first)]
                return dataclasses.replace(
                    first, **{n: self.join([getattr(leaf, n) for leaf in leaves]) for n in fields}
                )
            return first

        return pytree.tree_map(of_leaves, outputs[0], *outputs[1:])


def _replace_fields(value: Any, change: Callable[[Any], Any]) -> Any:
    """A dataclass with changed fields; anything else as it is."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {f.name: change(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return dataclasses.replace(value, **fields)
