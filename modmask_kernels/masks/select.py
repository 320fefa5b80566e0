"""Whole models in which every row of the batch sees its own mask set."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.select import SelectAny, SelectConv1d, SelectConv2d, SelectLinear, SelectModule
from .convert import (
    Switch,
    close_shortcuts,
    counterpart,
    find_masked_layers,
    masked_layers,
    replace_modules,
    share_hooks,
    unmask_model,
    unwrapped,
)
from .mask_set import MaskSet, masked_places

SELECT_TYPES: dict[type[nn.Module], type[SelectModule]] = {
    nn.Linear: SelectLinear,
    nn.Conv1d: SelectConv1d,
    nn.Conv2d: SelectConv2d,
}


def select_masks(
    model: nn.Module,
    masks: Mapping[str, MaskSet] | None = None,
    *,
    batch_dim: int = 0,
    strict: bool = True,
) -> nn.Module:
    """A model for inference whose rows each choose among several mask sets.

    The new model shares all parameters and buffers with `model` and holds the masks as bits, one
    per weight and set. Masked linear layers and convolutions read them in place (`SelectLinear`,
    `SelectConv2d`); other masked modules run once per set that occurs in the batch (`SelectAny`).
    Call it inside ``with use_sets(model, row_sets):``.

    Args:
        model: a plain or masked model; it is not changed.
        masks: the sets by name, over the same parameters; None takes the threshold masks of all
            sets of a masked model.
        batch_dim: dimension of the batch in the inputs of the layers (1 for time-major models).
        strict: see `MaskSet.check`.

    Raises:
        ValueError: if there are no sets, or they are for another model or for different parameters.
        TypeError: for a model that is no module, or masks that are no MaskSets by name.

    Equivalent to, for row r of the batch::

        masks[row_sets[r]].bake(model)(x[r : r + 1])
    """
    if masks is None:
        names = next(iter(masked_layers(model).values())).set_names
        masks = {name: MaskSet.from_model(model, name) for name in names}
    given: Any = masks  # a MaskSet is a mapping too, of tensors
    if isinstance(given, MaskSet) or not isinstance(given, Mapping):
        raise TypeError(
            f"masks: expected a mapping of names to MaskSets, got {type(given).__name__}"
        )
    for name, of_set in masks.items():
        if not isinstance(of_set, MaskSet):
            raise TypeError(f"masks[{name!r}]: expected a MaskSet, got {type(of_set).__name__}")
    if not masks:
        raise ValueError("masks: expected at least one set, got none")
    sets = list(masks.values())
    for name, of_set in masks.items():
        of_set.check(model, strict=strict)
        if of_set.shapes != sets[0].shapes:
            odd = sorted(set(of_set.names) ^ set(sets[0].names))
            raise ValueError(
                f"masks[{name!r}]: expected masks of the same parameters as in "
                f"{next(iter(masks))!r}, but only one of them has {', '.join(odd)}"
            )
    places = masked_places(model, sets[0].names)
    hosts = list(find_masked_layers(model)) or _outermost(unwrapped(model))
    flags = [(p, p.requires_grad) for p in model.parameters()]
    new = _shared_copy(unwrapped(model))
    if find_masked_layers(new):
        new = unmask_model(new)
        for parameter, flag in flags:  # the copy shares them
            parameter.requires_grad_(flag)

    of_host: dict[str, dict[str, Tensor]] = {}
    for name, at in places.items():
        bits = torch.stack([of_set.packed(name) for of_set in sets])
        for prefix, leaf in at:
            path = f"{prefix}.{leaf}" if prefix else leaf
            host = next(
                (h for h in hosts if h in ("", prefix) or prefix.startswith(f"{h}.")), prefix
            )
            below = path.removeprefix(f"{host}.") if host else path
            device = new.get_parameter(path).device
            of_host.setdefault(host, {})[below] = bits.to(device)
    replacement: dict[int, nn.Module] = {}
    for host, bits_of in of_host.items():
        module = new.get_submodule(host)
        if id(module) in replacement:
            continue
        layer = _layer_type(module, bits_of).from_dense(
            module, bits_of, sets=list(masks), batch_dim=batch_dim
        )
        share_hooks(module, layer)
        replacement[id(module)] = layer
    new = replace_modules(new, replacement)
    close_shortcuts(new, SelectModule)
    return new


def _outermost(model: nn.Module) -> list[str]:
    """Names of the layers of a plain model that are masked as a whole."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if counterpart(module) is not None and not inside:
            found.append(name)
    return found


def _layer_type(module: nn.Module, masked: Mapping[str, Tensor]) -> type[SelectModule]:
    for plain, select in SELECT_TYPES.items():
        fits = isinstance(module, plain) and type(module).forward is plain.forward
        if fits and "weight" in masked and not module._modules:
            return select
    return SelectAny


def _shared_copy(model: nn.Module) -> nn.Module:
    """New modules over the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    memo = {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, memo)


def use_sets(model: nn.Module, row_sets: Sequence[str | int] | Tensor | str | int) -> Switch:
    """Say which mask set each row of the batch sees, in all layers made by `select_masks`.

    Takes effect when called; used in a ``with`` statement it restores what was before.

    Args:
        model: a model by `select_masks`.
        row_sets: for every row the name or index of its set, or int64 [batch]; or one name or
            index for all rows.

    Raises:
        ValueError: for a model that does not come from `select_masks`, or unknown sets.
        TypeError: for a tensor that is not int64.
    """
    layers = [m for m in unwrapped(model).modules() if isinstance(m, SelectModule)]
    if not layers:
        raise ValueError("model: expected layers that select masks, found none; use select_masks")
    first = layers[0]
    if isinstance(row_sets, Tensor):
        if row_sets.dtype != torch.int64:
            raise TypeError(f"row_sets: expected an int64 tensor, got {row_sets.dtype}")
        if row_sets.dim() > 1:
            raise ValueError(f"row_sets: expected one set per row, got {list(row_sets.shape)}")
        chosen = row_sets
    elif isinstance(row_sets, (str, int)):
        chosen = torch.tensor(first.set_index(row_sets))
    else:
        chosen = torch.tensor([first.set_index(s) for s in row_sets], dtype=torch.int64)
    switch = Switch(layers, ("row_sets",))
    for layer in layers:
        layer.row_sets = chosen.to(next(layer.buffers()).device)
    return switch
