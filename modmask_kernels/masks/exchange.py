"""Masks from and to `torch.nn.utils.prune` and the checkpoints of other packages."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .. import ops
from .convert import unwrapped
from .mask_set import MaskSet

CONVENTIONS = (
    "bool",
    "neurosurgeon",
    "neurosurgeon-hard-concrete",
    "subnetwork-probing",
    "hidden-networks",
)

# how the keys of each convention end, and of which parameter they speak
_ENDINGS: dict[str, dict[str, str]] = {
    "neurosurgeon": {"weight_mask_params": "weight", "bias_mask_params": "bias"},
    "neurosurgeon-hard-concrete": {"weight_mask_params": "weight", "bias_mask_params": "bias"},
    "subnetwork-probing": {"mask.mask_scores": "weight"},
    "hidden-networks": {"scores": "weight"},
}
# what wrappers put in front of every name
_PREFIXES = ("module.", "_orig_mod.", "wrapped_model.")


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name; nothing in the file is executed.

    Args:
        path: a safetensors file, or one of `torch.save` (read with ``weights_only=True``) that
            holds a state dict, alone or under "state_dict", "model_state_dict" or "model".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds on damaged files
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"{path}: not a checkpoint of plain tensors ({reason})") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected a state dict, got {type(state).__name__}")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def import_masks(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    convention: str,
    *,
    model: nn.Module | None = None,
    keep: float | None = None,
) -> MaskSet:
    """Masks from a plain dictionary or from the logits of another package.

    Args:
        source: a state dict, or the file of one (see `read_state`). Prefixes of wrappers
            ("module.", "_orig_mod.", "wrapped_model.") are dropped.
        convention: what the tensors mean, by the evaluation rule of the package:

            - "bool": masks by parameter name; bool, or numbers that are 0 or 1.
            - "neurosurgeon": continuous sparsification of NeuroSurgeon (Lepori et al. 2023),
              ``<layer>.weight_mask_params`` and ``bias_mask_params``; kept where > 0.
            - "neurosurgeon-hard-concrete": the same names; kept where
              ``sigmoid(p) * 1.2 - 0.1 > 0.5``. Masks of neurons are spread over their weights.
            - "subnetwork-probing" (Cao et al. 2021): ``<layer>.mask.mask_scores``,
              [1, out / a, 1, in / b]; kept where ``sigmoid(s) * 1.2 - 0.1 > 0.5``, the package
              itself leaves values between 0 and 1. Score (i, j) stands for the weights whose
              indices are i modulo out / a and j modulo in / b.
            - "hidden-networks" (Ramanujan et al. 2020): ``<layer>.scores``; the fraction `keep` of
              each tensor with the largest ``|score|`` is kept.
        model: where the shapes come from; needed if the source holds masks smaller than their
            weights without the weights. Names and shapes are checked against it.
        keep: for "hidden-networks", the package's ``prune_rate``. None for fixed subnetworks, whose
            scores are 0 or 1.

    Returns:
        MaskSet: with logits of the same signs for the conventions that threshold them.

    Raises:
        ValueError: for an unknown convention, a source without such tensors, tensors that are not
            finite or do not fit their weight, or a missing `keep`.
        TypeError: for values that are no tensors of real numbers.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected one of {list(CONVENTIONS)}, got {convention!r}")
    if keep is not None and (convention != "hidden-networks" or not 0 <= keep <= 1):
        raise ValueError(
            f"keep: expected a fraction, for 'hidden-networks' only, got {keep} ({convention!r})"
        )
    state = source if isinstance(source, Mapping) else read_state(source)
    state = {_plain(name): value for name, value in state.items()}
    if convention == "bool":
        found, logits = {n: _as_bool(n, mask) for n, mask in state.items()}, None
    else:
        found, logits = _from_logits(state, convention, model, keep)
    if not found:
        endings = ", ".join(_ENDINGS.get(convention, ())) or "masks"
        raise ValueError(f"source: expected tensors of {convention!r} ({endings}), found none")
    masks = MaskSet.from_dict(found, metadata={"imported": convention})
    masks.logits = logits
    if model is not None:
        masks.check(model)
    return masks


def _plain(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _check_real(name: str, value: object) -> None:
    if not isinstance(value, Tensor) or value.is_complex() or value.is_meta:
        got = type(value).__name__
        if isinstance(value, Tensor):
            got = "a meta tensor" if value.is_meta else f"{value.dtype}"
        raise TypeError(f"source: expected a tensor of real numbers for {name!r}, got {got}")


def _as_bool(name: str, mask: Tensor) -> Tensor:
    _check_real(name, mask)
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"source: expected 0 and 1 in {name!r}, got other values ({mask.dtype})")
    return mask != 0


def _from_logits(
    state: Mapping[str, Tensor], convention: str, model: nn.Module | None, keep: float | None
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Masks and, where a threshold makes them, logits of the shape of their weights."""
    masks: dict[str, Tensor] = {}
    logits: dict[str, Tensor] = {}
    for name, values in state.items():
        leaf = next((k for k in _ENDINGS[convention] if name == k or name.endswith(f".{k}")), None)
        if leaf is None:
            continue
        parameter = name.removesuffix(leaf) + _ENDINGS[convention][leaf]
        _check_real(name, values)
        values = values.detach().to("cpu", torch.float32)
        if not bool(values.isfinite().all()):
            raise ValueError(f"source: {name!r} holds values that are not finite")
        if convention == "hidden-networks":
            masks[parameter] = _largest(name, values.abs(), keep)
            continue
        shape = _shape_of(parameter, values, state, model)
        if convention == "subnetwork-probing":
            values = _tiled(name, values, shape)
        elif not _broadcasts(values.shape, shape):
            raise ValueError(
                f"source: {name!r} of shape {list(values.shape)} does not fit the weight "
                f"{list(shape)}"
            )
        values = values.expand(shape).contiguous()
        if convention == "neurosurgeon":
            kept = values > 0
        else:
            kept = torch.sigmoid(values) * 1.2 - 0.1 > 0.5
        masks[parameter] = kept
        # where rounding decides next to 0, the logit gets the sign of the mask
        edge = torch.where(kept, torch.finfo(torch.float32).tiny, 0.0)
        logits[parameter] = torch.where(kept == (values > 0), values, edge)
    return masks, logits or None


def _largest(name: str, scores: Tensor, keep: float | None) -> Tensor:
    if keep is None:
        if bool(((scores == 0) | (scores == 1)).all()):
            return scores == 1
        raise ValueError(f"keep: the scores of {name!r} need the fraction to keep (prune_rate)")
    removed = int((1 - keep) * scores.numel())  # the package's own rounding
    return ops.top_k_mask([scores], scores.numel() - removed)[0]


def _shape_of(
    parameter: str, values: Tensor, state: Mapping[str, Tensor], model: nn.Module | None
) -> torch.Size:
    """The shape of a weight: the model's, that of the checkpoint, or that of the values."""
    if model is not None:
        own = dict(unwrapped(model).named_parameters(remove_duplicate=False))
        if parameter not in own:
            raise ValueError(f"model: expected a parameter {parameter!r}, found none")
        return own[parameter].shape
    if parameter in state:
        return state[parameter].shape
    if 1 in values.shape:
        raise ValueError(
            f"model: the shape of {parameter!r} is not in the source, whose values have shape "
            f"{list(values.shape)}; give the model"
        )
    return values.shape


def _broadcasts(small: torch.Size, shape: torch.Size) -> bool:
    return len(small) == len(shape) and all(a in (1, b) for a, b in zip(small, shape, strict=True))


def _tiled(name: str, scores: Tensor, shape: torch.Size) -> Tensor:
    fits = scores.dim() == 4 and scores.shape[0] == scores.shape[2] == 1 and len(shape) == 2
    if not fits or shape[0] % scores.shape[1] or shape[1] % scores.shape[3]:
        raise ValueError(
            f"source: expected {name!r} of shape [1, out / a, 1, in / b] for the weight "
            f"{list(shape)}, got {list(scores.shape)}"
        )
    return scores[0, :, 0].repeat(shape[0] // scores.shape[1], shape[1] // scores.shape[3])


def export_masks(
    masks: Mapping[str, Tensor], convention: str, *, magnitude: float = 1.0
) -> dict[str, Tensor]:
    """The inverse of `import_masks`: tensors that another package reads as these masks.

    Args:
        masks: a `MaskSet`, or bool tensors by parameter name.
        convention: see `import_masks`. For "hidden-networks" the scores are 0 and 1, those of the
            package's fixed subnetworks.
        magnitude: without stored logits, kept weights get this logit, others its negative.

    Raises:
        ValueError: for an unknown convention, or a mask that it has no name for.

    Equivalent to, for "bool"::

        dict(masks)
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected one of {list(CONVENTIONS)}, got {convention!r}")
    if convention == "bool":
        return {name: mask.clone() for name, mask in masks.items()}
    stored = masks.logits if isinstance(masks, MaskSet) else None
    leaf_of = {leaf: ending for ending, leaf in _ENDINGS[convention].items()}
    found = {}
    for name, mask in masks.items():
        prefix, dot, leaf = name.rpartition(".")
        if leaf not in leaf_of:
            raise ValueError(f"masks: {convention!r} has no name for the mask of {name!r}")
        if convention == "hidden-networks":
            values = mask.float()
        elif stored is not None and stored[name].shape == mask.shape:
            values = stored[name].clone()
        else:
            values = torch.full(mask.shape, -magnitude).masked_fill_(mask, magnitude)
        if convention == "subnetwork-probing":
            values = values[None, :, None, :]
        found[f"{prefix}{dot}{leaf_of[leaf]}"] = values
    return found


def from_prune(model: nn.Module) -> MaskSet:
    """The masks of a model pruned with `torch.nn.utils.prune`.

    Raises:
        ValueError: if no parameter of it is pruned.
    """
    found: dict[str, Tensor] = {}
    for prefix, module in unwrapped(model).named_modules():
        for name, mask in module.named_buffers(recurse=False):
            leaf = name.removesuffix("_mask")
            if name.endswith("_mask") and f"{leaf}_orig" in module._parameters:
                found[f"{prefix}.{leaf}" if prefix else leaf] = mask != 0
    if not found:
        raise ValueError("model: expected parameters pruned by torch.nn.utils.prune, found none")
    return MaskSet.from_dict(found, metadata={"imported": "torch.nn.utils.prune"})


def to_prune(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Prune a plain model with these masks, in place, by `torch.nn.utils.prune`.

    Its parameters become ``<name>_orig`` and stay trainable; ``<name>_mask`` are the masks. Masks
    of a model that is pruned already are combined, as the module does it.

    Args:
        model: a plain model.
        masks: a `MaskSet`, or bool tensors by parameter name.

    Returns:
        The model.

    Raises:
        ValueError: if the model lacks a parameter, or it has another shape.
        TypeError: if a mask is not a bool tensor.

    Equivalent to::

        for name, mask in masks.items():
            prefix, _, leaf = name.rpartition(".")
            prune.custom_from_mask(model.get_submodule(prefix), leaf, mask)
    """
    custom_from_mask: Callable[..., Any] = prune.custom_from_mask
    pruned: dict[str, tuple[nn.Module, str]] = {}
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"masks[{name!r}]: expected a bool tensor, got {kind}")
        prefix, _, leaf = name.rpartition(".")
        try:
            module = unwrapped(model).get_submodule(prefix)
        except AttributeError:
            module = nn.Module()
        parameter = module._parameters.get(leaf, module._parameters.get(f"{leaf}_orig"))
        if parameter is None or parameter.shape != mask.shape:
            got = "none" if parameter is None else f"shape {list(parameter.shape)}"
            raise ValueError(
                f"masks: expected a parameter {name!r} of shape {list(mask.shape)} in the model, "
                f"found {got}"
            )
        pruned[name] = (module, leaf)
    for name, (module, leaf) in pruned.items():
        custom_from_mask(module, leaf, masks[name])
    return model
