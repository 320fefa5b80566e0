"""One mask for every masked tensor of a model: algebra, counts, files, and back to plain layers."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .. import ops
from ..files import atomic, sort_metadata
from ..ops._blocks import divides, expand_blocks
from ..ops.estimators import GUMBEL_SIGMOID, Estimator, of_settings
from ..ops.sample_mask.reference import threshold
from .convert import (
    MaskedTensor,
    counterpart,
    find_masked_layers,
    find_record,
    masked_layers,
    masked_tensors,
    unmask_model,
    unwrapped,
)
from .fingerprint import weight_hash

FORMAT = "modmask-mask-set"
FORMAT_VERSION = 1
GRANULAR_VERSION = 2  # of files with masks smaller than their weight, or n:m masks


def _count_bits(packed: Tensor) -> int:
    """Number of ones among the bits of a uint8 tensor."""
    pairs = packed - ((packed >> 1) & 0x55)
    quads = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return int(((quads + (quads >> 4)) & 0x0F).sum(dtype=torch.int64))


def _padding(size: int) -> int:
    """The bits of the last byte that belong to `size` elements."""
    return (1 << (size % 8)) - 1 if size % 8 else 0xFF


class MaskSet(Mapping[str, Tensor]):
    """One boolean mask per masked parameter, kept as bits on the CPU.

    Masks that were learned with one logit for many weights are kept, and saved, in the shape of
    the logits; counts and densities are those of the weights.

    A mapping from parameter name ("0.weight") to a bool tensor of the parameter's shape, in the
    order of the model. ``a & b``, ``a | b``, ``a - b`` (in a, not in b) and ``~a`` give new sets
    without logits; ``==`` compares names, shapes and bits.

    Build one with `from_model`, `from_dict` or `load`.

    Attributes:
        metadata: where the masks come from: "weight_hash" (SHA-256 of the frozen weights), "set",
            "settings", "seed", "steps", "tensor_ids", "library_version", as far as known.
        logits: float32 logits by name, or None.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        packed: Mapping[str, Tensor],
        shapes: Mapping[str, torch.Size] | None = None,
        logits: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
        mask_shapes: Mapping[str, torch.Size] | None = None,
        n_of_m: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Internal: from packed bits. Use `from_model`, `from_dict` or `load`."""
        if shapes is None:
            raise TypeError(
                "MaskSet is made of bool tensors by MaskSet.from_dict(masks), of a masked model by "
                "MaskSet.from_model, of a file by MaskSet.load"
            )
        self._packed = dict(packed)
        self._shapes = dict(shapes)
        self._mask_shapes = dict(shapes if mask_shapes is None else mask_shapes)
        self._n_of_m = dict(n_of_m or {})  # what the logits mean
        self.logits: dict[str, Tensor] | None = None if logits is None else dict(logits)
        self.metadata: dict[str, Any] = dict(metadata or {})

    @classmethod
    def from_dict(
        cls, masks: Mapping[str, Tensor], *, metadata: Mapping[str, Any] | None = None
    ) -> MaskSet:
        """From bool tensors by parameter name.

        Raises:
            TypeError: if a mask is not a bool tensor.
        """
        packed, shapes = {}, {}
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"masks[{name!r}]: expected a bool tensor, got {got}")
            packed[name] = ops.pack_bits(mask.detach().cpu().contiguous())
            shapes[name] = mask.shape
        return cls(packed, shapes, None, metadata)

    @classmethod
    def from_model(cls, model: nn.Module, set: int | str = 0, logits: bool = False) -> MaskSet:
        """The threshold masks of one set of a masked model: logit > 0, or n of every m.

        Args:
            model: a model with masked layers.
            set: index or name.
            logits: whether to keep the logits too.

        Raises:
            ValueError: if there is no such set or no masked layer.
        """
        layers = masked_layers(model)
        first = next(iter(layers.values()))
        index = first.set_index(set)
        name = first.set_names[index]
        tensors = masked_tensors(layers)
        rows = {n: t.logits.detach()[index] for n, t in tensors.items()}
        result = cls.from_dict({n: tensors[n].kept(row) for n, row in rows.items()})
        result._shapes = {n: t.parameter.shape for n, t in tensors.items()}
        result._n_of_m = {n: t.n_of_m for n, t in tensors.items() if t.n_of_m is not None}
        if logits:
            result.logits = {n: row.to("cpu", torch.float32).clone() for n, row in rows.items()}
        record = find_record(model)
        result.metadata = {
            "set": name,
            "weight_hash": weight_hash(model),
            "tensor_ids": {n: t.tensor_id for n, t in tensors.items()},
        }
        if record is not None:
            result.metadata["settings"] = dict(record.settings)
            result.metadata.update(copy.deepcopy(record.learned.get(name, {})))
        return result

    @property
    def names(self) -> list[str]:
        """The parameter names, in the order of the model."""
        return list(self._packed)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each mask, which is that of its parameter."""
        return dict(self._shapes)

    @property
    def mask_shapes(self) -> dict[str, torch.Size]:
        """The shape in which each mask is kept, which is that of its logits."""
        return dict(self._mask_shapes)

    def __getitem__(self, name: str) -> Tensor:
        return expand_blocks(self._small(name), self._shapes[name])

    def packed(self, name: str) -> Tensor:
        """The bits of one mask, one per weight, uint8 [ceil(weights / 8)]; see `ops.pack_bits`."""
        if name not in self._packed:
            raise KeyError(f"no mask named {name!r}; there are {self.names}")
        if self._mask_shapes[name] == self._shapes[name]:
            return self._packed[name]
        return ops.pack_bits(self[name])

    def _small(self, name: str) -> Tensor:
        """A mask in the shape of its logits."""
        if name not in self._packed:
            raise KeyError(f"no mask named {name!r}; there are {self.names}")
        return ops.unpack_bits(self._packed[name], self._mask_shapes[name])

    def _bits(self, name: str, like: MaskSet) -> Tensor:
        """The bits of a mask, one per weight where the other set has it in another shape."""
        same = self._mask_shapes[name] == like._mask_shapes[name]
        return self._packed[name] if same else self.packed(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, name: object) -> bool:
        return name in self._packed

    def counts(self) -> dict[str, tuple[int, int]]:
        """(kept, total) weights by name."""
        counts = {}
        for name, bits in self._packed.items():
            total = self._shapes[name].numel()
            covered = total // max(self._mask_shapes[name].numel(), 1)
            counts[name] = (covered * _count_bits(bits), total)
        return counts

    def density(self) -> float:
        """The kept fraction over all tensors; 0 where there are no weights at all."""
        counts = self.counts().values()
        return sum(kept for kept, _ in counts) / max(sum(total for _, total in counts), 1)

    def subset(self, names: Iterable[str]) -> MaskSet:
        """The masks of some parameters only; KeyError if one is missing."""
        names = list(names)
        for name in names:
            if name not in self._packed:
                raise KeyError(f"no mask named {name!r}; there are {self.names}")
        return MaskSet(
            {n: self._packed[n] for n in names},
            {n: self._shapes[n] for n in names},
            None if self.logits is None else {n: self.logits[n] for n in names},
            self.metadata,
            {n: self._mask_shapes[n] for n in names},
            {n: self._n_of_m[n] for n in names if n in self._n_of_m},
        )

    def __repr__(self) -> str:
        counts = self.counts().values()
        kept, total = sum(k for k, _ in counts), sum(t for _, t in counts)
        name = self.metadata.get("set")
        label = f"{name!r}, " if isinstance(name, str) else ""
        return f"MaskSet({label}{len(self)} tensors, {kept} of {total} weights kept)"

    # algebra

    def _combine(self, other: MaskSet, combine: Callable[[Tensor, Tensor], Tensor]) -> MaskSet:
        if self._shapes != other._shapes:
            names = self._shapes.keys() | other._shapes.keys()
            name = min(n for n in names if self._shapes.get(n) != other._shapes.get(n))
            sides = [
                f"is missing on the {side}"
                if name not in shapes
                else f"has shape {tuple(shapes[name])} on the {side}"
                for shapes, side in ((self._shapes, "left"), (other._shapes, "right"))
            ]
            raise ValueError(
                f"the mask sets are of different models: {name!r} {' and '.join(sides)}"
            )
        packed = {n: combine(self._bits(n, other), other._bits(n, self)) for n in self._packed}
        small = {
            n: shape if shape == other._mask_shapes[n] else self._shapes[n]
            for n, shape in self._mask_shapes.items()
        }
        own = self.metadata.get("weight_hash")
        common = own if own == other.metadata.get("weight_hash") else None
        metadata = {"weight_hash": common} if common else None
        return MaskSet(packed, self._shapes, None, metadata, small)

    def __and__(self, other: object) -> MaskSet:
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self._combine(other, torch.bitwise_and)

    def __or__(self, other: object) -> MaskSet:
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self._combine(other, torch.bitwise_or)

    def __sub__(self, other: object) -> MaskSet:
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self._combine(other, lambda a, b: a & ~b)

    def __invert__(self) -> MaskSet:
        packed = {}
        for name, bits in self._packed.items():
            flipped = ~bits
            if flipped.numel():
                flipped[-1] &= _padding(self._mask_shapes[name].numel())
            packed[name] = flipped
        common = self.metadata.get("weight_hash")
        metadata = {"weight_hash": common} if common else None
        return MaskSet(packed, self._shapes, None, metadata, self._mask_shapes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self._shapes == other._shapes and all(
            torch.equal(self._bits(name, other), other._bits(name, self)) for name in self._packed
        )

    # files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: "mask/NAME" packed bits, "logits/NAME" float32 if kept.

        The metadata (strings, as the format demands) hold the format version, the shapes and the
        provenance as JSON. The file is replaced as a whole.
        """
        from .. import __version__

        tensors = {f"mask/{name}": bits for name, bits in self._packed.items()}
        for name, values in (self.logits or {}).items():
            tensors[f"logits/{name}"] = values.contiguous()
        provenance = {"library_version": __version__, **self.metadata}
        entries = [self._entry(name) for name in self._shapes]
        granular = any(len(entry) > 2 for entry in entries)
        metadata = {
            "format": FORMAT,
            "format_version": str(GRANULAR_VERSION if granular else FORMAT_VERSION),
            "masks": json.dumps(entries),
            "provenance": json.dumps(provenance, sort_keys=True),
        }
        with atomic(Path(path)) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata)
            sort_metadata(temporary)

    def _entry(self, name: str) -> list[Any]:
        """Name and shape for a file, where they differ the shape of the logits, and (n, m)."""
        shape, small = self._shapes[name], self._mask_shapes[name]
        if name in self._n_of_m:
            return [name, list(shape), list(small), list(self._n_of_m[name])]
        return [name, list(shape)] if small == shape else [name, list(shape), list(small)]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskSet:
        """Read a file written by `save`; nothing in the file is trusted or executed.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, not of this format, of a newer version of it, or
                inconsistent in itself; the message says what is wrong.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no mask file at {path}")
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except Exception as error:  # the parser of a foreign library, fed with a foreign file
            raise ValueError(f"{path}: not a readable mask file ({error})") from None
        try:
            return cls._parse(metadata, tensors)
        except ValueError as error:
            raise ValueError(f"{path}: not a valid mask file ({error})") from None

    @classmethod
    def _parse(cls, metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> MaskSet:
        if metadata.get("format") != FORMAT:
            raise ValueError(f"format: expected {FORMAT!r}, got {metadata.get('format')!r}")
        version = metadata.get("format_version", "")
        if version not in (str(FORMAT_VERSION), str(GRANULAR_VERSION)):
            raise ValueError(
                f"format_version: expected {FORMAT_VERSION} or {GRANULAR_VERSION}, "
                f"got {version!r}; "
                "it was written by another version of the library"
            )
        granular = version == str(GRANULAR_VERSION)
        shapes, small, n_of_m = _parse_shapes(_parse_json(metadata, "masks"), granular)
        provenance = _parse_json(metadata, "provenance")
        if not isinstance(provenance, dict):
            raise ValueError("provenance: expected an object")
        packed = {name: _take_bits(tensors, name, shape) for name, shape in small.items()}
        logits = None
        if any(key.startswith("logits/") for key in tensors):
            settings = provenance.get("settings")
            rule = of_settings(settings) if isinstance(settings, dict) else GUMBEL_SIGMOID
            logits = {
                name: _take_logits(tensors, name, shape, packed[name], n_of_m.get(name), rule)
                for name, shape in small.items()
            }
        if tensors:
            raise ValueError(f"unexpected tensor {min(tensors)!r}")
        return cls(packed, shapes, logits, provenance, small, n_of_m)

    # models

    def check(self, model: nn.Module, *, strict: bool = True) -> None:
        """Raise ValueError, naming the difference, if these masks are for another model.

        Args:
            model: a plain or masked model.
            strict: whether the weights must be those the masks were learned for (by hash, if the
                set knows it); otherwise names and shapes have to fit.
        """
        parameters = dict(unwrapped(model).named_parameters(remove_duplicate=False))
        for name, shape in self._shapes.items():
            if name not in parameters:
                raise ValueError(f"the masks are for another model: it has no parameter {name!r}")
            got = parameters[name].shape
            if got != shape:
                raise ValueError(
                    f"the masks are for another model: the mask of {name!r} has shape "
                    f"{tuple(shape)}, the parameter {tuple(got)}"
                )
        expected = self.metadata.get("weight_hash")
        if strict and expected is not None:
            found = weight_hash(model)
            if found != expected:
                raise ValueError(
                    "the masks are for another model: names and shapes fit, but the weights "
                    f"differ (SHA-256 {str(expected)[:12]}... of the masks, {found[:12]}... of the "
                    "model); strict=False skips this check"
                )

    def apply(
        self,
        model: nn.Module,
        set: int | str = 0,
        *,
        magnitude: float = 1.0,
        strict: bool = True,
    ) -> None:
        """Write the masks into one set of a masked model, as logits.

        Args:
            model: a masked model whose masked parameters are those of this set.
            set: index or name of the set to overwrite.
            magnitude: without stored logits, or where the model's thresholds would read them as
                other masks, kept weights get this logit, others its negative.
            strict: see `check`.

        Raises:
            ValueError: if the masks are for another model, do not cover its masked parameters, or
                are finer than its logits.
        """
        layers = masked_layers(model)
        index = next(iter(layers.values())).set_index(set)
        if not magnitude > 0:
            raise ValueError(f"magnitude: expected a positive number, got {magnitude}")
        self.check(model, strict=strict)
        tensors = masked_tensors(layers)
        if tensors.keys() != self._shapes.keys():
            name = min(tensors.keys() ^ self._shapes.keys())
            here, there = ("set", "model") if name in self._shapes else ("model", "set")
            raise ValueError(
                f"the masks are for another model: the {here} masks {name!r}, the {there} does not"
            )
        values = {
            name: self._as_logits(name, tensor, magnitude) for name, tensor in tensors.items()
        }
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.logits[index].copy_(values[name])

    def _as_logits(self, name: str, tensor: MaskedTensor, magnitude: float) -> Tensor:
        """Logits of a model's shape that its threshold turns into the mask."""
        shape = tensor.logits.shape[1:]
        if not divides(self._mask_shapes[name], shape):
            raise ValueError(
                f"the mask of {name!r} has one value for {tuple(self._mask_shapes[name])} blocks, "
                f"the logits of the model are {tuple(shape)}: too few for it"
            )
        kept = expand_blocks(self._small(name), shape)
        if self.logits is not None:
            values = expand_blocks(self.logits[name], shape)
            if torch.equal(tensor.kept(values), kept):
                return values
        values = torch.full(shape, -magnitude).masked_fill_(kept, magnitude)
        if not torch.equal(tensor.kept(values), kept):
            if tensor.n_of_m is None:
                raise ValueError(f"the mask of {name!r} is none that {tensor.estimator} can have")
            n, m = tensor.n_of_m
            raise ValueError(f"the mask of {name!r} does not keep {n} of every {m} inputs")
        return values

    def bake(self, model: nn.Module, *, strict: bool = True) -> nn.Module:
        """A new plain model with the masks multiplied into its weights.

        Parameters without a mask in this set stay whole. A weight that a masked linear layer
        shares with another kind of module (a tied embedding) is untied in the copy.

        Args:
            model: a plain or masked model; it is copied, not changed.
            strict: see `check`.

        Raises:
            ValueError: if the masks are for another model.
        """
        self.check(model, strict=strict)
        owners = masked_places(model, self.names)
        baked = copy.deepcopy(unwrapped(model))
        if find_masked_layers(baked):
            baked = unmask_model(baked)
        for name, places in owners.items():
            prefix, leaf = places[0]
            former = baked.get_submodule(prefix)._parameters[leaf]
            assert former is not None
            values = former.detach().masked_fill(~self[name].to(former.device), 0)
            masked = nn.Parameter(values, requires_grad=former.requires_grad)
            for prefix, leaf in places:
                baked.get_submodule(prefix)._parameters[leaf] = masked
        return baked


def masked_places(model: nn.Module, names: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """Where the parameters that stand under masks sit, as (module, leaf); tied ones several times.

    In a masked model those are its masked layers, in a plain one the layers that can be masked; a
    parameter elsewhere has its own place only.
    """
    model = unwrapped(model)
    layers: dict[str, nn.Module] = dict(find_masked_layers(model)) or {
        name: module for name, module in model.named_modules() if counterpart(module) is not None
    }
    places: dict[int, list[tuple[str, str]]] = {}
    for n, module in layers.items():
        for path, parameter in module.named_parameters(n, remove_duplicate=False):
            prefix, _, leaf = path.rpartition(".")
            places.setdefault(id(parameter), []).append((prefix, leaf))
    found = {}
    for name in names:
        prefix, _, leaf = name.rpartition(".")
        masked = model.get_submodule(prefix)._parameters.get(leaf)
        of_layers = places.get(id(masked), [])
        # its own place too: an embedding that `also` named may share the weight of a layer
        found[name] = of_layers if (prefix, leaf) in of_layers else [(prefix, leaf), *of_layers]
    return found


def _parse_json(metadata: Mapping[str, str], key: str) -> Any:
    if key not in metadata:
        raise ValueError(f"{key}: missing from the metadata")
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: not JSON: {error}") from None


def _parse_sizes(name: str, shape: Any) -> torch.Size:
    """A shape, bounded so that no arithmetic overflows."""
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"masks: expected sizes for {name!r}, got {str(shape)[:80]}")
    if len(shape) > 16 or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise ValueError(f"masks: impossible shape of {name!r}: {str(shape)[:80]}")
    return torch.Size(shape)


def _parse_shapes(
    listed: Any, granular: bool
) -> tuple[dict[str, torch.Size], dict[str, torch.Size], dict[str, tuple[int, int]]]:
    """Names with shapes of parameters and of masks, and (n, m) where there is one; checked."""
    shapes: dict[str, torch.Size] = {}
    small: dict[str, torch.Size] = {}
    n_of_m: dict[str, tuple[int, int]] = {}
    if not isinstance(listed, list):
        raise ValueError("masks: expected a list")
    for entry in listed:
        lengths = (2, 3, 4) if granular else (2,)
        if not (isinstance(entry, list) and len(entry) in lengths and isinstance(entry[0], str)):
            raise ValueError(f"masks: expected [name, shape], got {str(entry)[:80]}")
        name, shape, *rest = entry
        if name in shapes:
            raise ValueError(f"masks: {name!r} occurs twice")
        shapes[name] = _parse_sizes(name, shape)
        small[name] = _parse_sizes(name, rest[0]) if rest else shapes[name]
        if not divides(small[name], shapes[name]):
            raise ValueError(f"masks: {rest[0]} of {name!r} does not divide {shape}")
        if len(rest) > 1:
            n_of_m[name] = _parse_n_of_m(name, rest[1], shapes[name], small[name])
    return shapes, small, n_of_m


def _parse_n_of_m(name: str, numbers: Any, shape: torch.Size, small: torch.Size) -> tuple[int, int]:
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
        raise ValueError(f"masks: expected [n, m] for {name!r}, got {str(numbers)[:80]}")
    fits = len(numbers) == 2 and 0 < numbers[0] <= numbers[1]
    if not fits or len(shape) < 2 or small != shape or shape[1] % numbers[1]:
        raise ValueError(f"masks: impossible [n, m] of {name!r}: {str(numbers)[:80]}")
    return numbers[0], numbers[1]


def _take(tensors: dict[str, Tensor], key: str, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    tensor = tensors.pop(key, None)
    if tensor is None:
        raise ValueError(f"tensor {key!r} is missing")
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(
            f"tensor {key!r}: expected {dtype} {tuple(shape)}, "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor


def _take_bits(tensors: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    size = shape.numel()
    bits = _take(tensors, f"mask/{name}", torch.uint8, torch.Size([(size + 7) // 8]))
    if size and int(bits[-1]) & ~_padding(size):
        raise ValueError(f"tensor 'mask/{name}': bits are set beyond its {size} elements")
    return bits


def _take_logits(
    tensors: dict[str, Tensor],
    name: str,
    shape: torch.Size,
    bits: Tensor,
    n_of_m: tuple[int, int] | None,
    rule: Estimator,
) -> Tensor:
    values = _take(tensors, f"logits/{name}", torch.float32, shape)
    if bool(values.isnan().any()):
        raise ValueError(f"tensor 'logits/{name}' holds NaN")
    if not torch.equal(ops.pack_bits(threshold(values, n_of_m, rule)), bits):
        raise ValueError(f"tensor 'logits/{name}' contradicts its mask")
    return values
