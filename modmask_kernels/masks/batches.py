"""Batches of several mask sets: one input for the model, and its output in parts again.

Everywhere `dim` is the dimension of the batch, and inputs are a tensor or a tree (tuples, lists,
dicts and what is registered with torch's pytree) of tensors.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..nn import MaskedModule


def inputs_of(batch: Any) -> Any:
    """The part of a batch that goes into the model: the first of a tuple or list, or all of it."""
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def call_model(model: nn.Module, inputs: Any) -> Any:
    """The output for a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def batch_size(inputs: Any, samples: int, dim: int, name: str, step: int) -> int:
    """The batch size of the inputs of set `name`; ValueError unless `samples` divides it."""
    if isinstance(inputs, Tensor):
        tensors = [inputs]
    else:
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    where = f"data[{name!r}]"
    if not tensors or tensors[0].dim() <= dim:
        got = f"shape {tuple(tensors[0].shape)}" if tensors else type(inputs).__name__
        raise ValueError(
            f"{where}: expected input tensors with the batch in dimension {dim} at step {step}, "
            f"got {got}"
        )
    size = tensors[0].shape[dim]
    if size == 0:
        raise ValueError(f"{where}: the batch of step {step} is empty")
    if size % samples:
        raise ValueError(
            f"{where}: a batch of {size} does not divide into {samples} equal parts, one for each "
            f"mask sample (step {step})"
        )
    return size


def join(parts: Sequence[Any], dim: int, step: int) -> Any:
    """The inputs of several sets one after the other; leaves that are no tensors must agree."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat(tuple(parts), dim)
    flat, layouts = zip(*(pytree.tree_flatten(part) for part in parts), strict=True)
    if any(layout != layouts[0] for layout in layouts):
        raise ValueError(f"data: the inputs of the sets differ in structure at step {step}")
    joined: list[Any] = []
    for leaves in zip(*flat, strict=True):
        if all(isinstance(leaf, Tensor) for leaf in leaves):
            joined.append(torch.cat(leaves, dim))
        elif any(isinstance(leaf, Tensor) for leaf in leaves) or leaves.count(leaves[0]) < len(
            leaves
        ):
            raise ValueError(
                f"data: the inputs of the sets differ in a value that is no tensor at step {step}: "
                f"{str(leaves)[:200]}"
            )
        else:
            joined.append(leaves[0])
    return pytree.tree_unflatten(joined, layouts[0])


def cut(output: Any, parts: int, size: int, dim: int) -> Sequence[Any]:
    """The output of a joined batch in `parts` parts of `size` rows."""
    if parts == 1:
        return [output]
    if isinstance(output, Tensor):
        return _cut_tensor(output, parts, size, dim)
    leaves, layout = pytree.tree_flatten(output)
    columns = [
        _cut_tensor(leaf, parts, size, dim) if isinstance(leaf, Tensor) else [leaf] * parts
        for leaf in leaves
    ]
    return [pytree.tree_unflatten([c[n] for c in columns], layout) for n in range(parts)]


def _cut_tensor(output: Tensor, parts: int, size: int, dim: int) -> Sequence[Tensor]:
    if output.dim() <= dim or output.shape[dim] != parts * size:
        raise ValueError(
            f"model: to learn {parts} sets together the output needs {parts * size} rows in "
            f"dimension {dim}, got shape {tuple(output.shape)}"
        )
    return output.chunk(parts, dim)


@contextlib.contextmanager
def cuts_checked(
    model: nn.Module, layers: Mapping[str, MaskedModule], batch: int, dim: int
) -> Iterator[None]:
    """Within it, ValueError where a masked layer would cut something else than the batch.

    A time-major input whose layer cuts dimension 0 has its time steps, not its rows, dealt out to
    the masks: no error where the sizes divide, and wrong masks. Nothing is looked at in a compiled
    model, which hooks would make compile again.
    """
    if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules()):
        yield
        return

    def check(name: str, layer: MaskedModule, called: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0] if inputs else None
        # the general path shares its hooks with the plain module, which sees single groups
        if called is not layer or not isinstance(x, Tensor):
            return
        cut = layer.batch_dim_of(x)
        if not -x.dim() <= cut < x.dim():
            return  # the layer tells
        cut %= x.dim()
        found = (
            f"batch_dim: expected the batch of {batch} (dimension {dim} of the data) in dimension "
            f"{cut} of the input of layer {name!r}, where it is cut into groups, got shape "
            f"{tuple(x.shape)}; time-major data say batch_dim=1 to mask_model and to learn_masks"
        )
        if x.shape[cut] % batch:
            raise ValueError(found)
        others = [n for d, n in enumerate(x.shape[:-1]) if d != cut]
        if x.shape[cut] != batch and batch in others:
            warnings.warn(f"maybe something else than the batch is cut. {found}", stacklevel=2)

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(functools.partial(check, name, layer))
            stack.callback(hook.remove)
        yield
