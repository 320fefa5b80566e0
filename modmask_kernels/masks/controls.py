"""Masks by count: controls of the same size, which nobody learned, and the expected one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from .convert import (
    find_masked_layers,
    maskable_parameters,
    masked_layers,
    masked_tensors,
    unwrapped,
)
from .fingerprint import weight_hash
from .mask_set import MaskSet
from .penalties import expected_l0


def _weights(model: nn.Module, density: float | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters to mask, by name: those of the masks, of masked layers, or plain weights."""
    if isinstance(density, Mapping):
        parameters = dict(unwrapped(model).named_parameters(remove_duplicate=False))
        missing = [name for name in density if name not in parameters]
        if missing:
            raise ValueError(f"density: the model has no parameter {missing[0]!r}")
        return {name: parameters[name].detach() for name in density}
    layers = find_masked_layers(model)
    if layers:
        return {n: t.parameter.detach() for n, t in masked_tensors(layers).items()}
    return {n: p.detach() for n, p in maskable_parameters(unwrapped(model)).items()}


def _select(
    scores: Mapping[str, Tensor], density: float | Mapping[str, Tensor], scope: str
) -> dict[str, Tensor]:
    if scope not in ("tensor", "model"):
        raise ValueError(f"scope: expected 'tensor' or 'model', got {scope!r}")
    if isinstance(density, Mapping):
        kept = {name: int(torch.count_nonzero(density[name])) for name in scores}
        total = sum(kept.values())
    elif not 0.0 <= density <= 1.0:
        raise ValueError(f"density: expected masks or a number in [0, 1], got {density!r}")
    else:
        kept = {name: round(density * t.numel()) for name, t in scores.items()}
        total = round(density * sum(t.numel() for t in scores.values()))
    if not scores:
        return {}
    if scope == "model":
        whole: Sequence[Tensor] = [t.float() for t in scores.values()]
        return dict(zip(scores, ops.top_k_mask(whole, total), strict=True))
    return {name: ops.top_k_mask(t.float(), kept[name]) for name, t in scores.items()}


def _mask_set(model: nn.Module, masks: Mapping[str, Tensor], **origin: object) -> MaskSet:
    return MaskSet.from_dict(masks, metadata={"weight_hash": weight_hash(model), **origin})


def magnitude_masks(
    model: nn.Module, density: float | Mapping[str, Tensor], *, scope: str = "tensor"
) -> MaskSet:
    """Masks that keep the weights of largest magnitude.

    Args:
        model: a plain or masked model.
        density: which share to keep, or masks, a `MaskSet` for instance, whose tensors and counts
            are matched.
        scope: "tensor" keeps that share (or count) in every tensor, "model" the largest weights of
            all tensors together.

    Returns:
        A `MaskSet` without logits: over the masked parameters of a masked model, else over the
        weights that `mask_model` masks unless told otherwise.

    Raises:
        ValueError: for a wrong density or scope, or masks of another model.

    Equivalent to, for a density and the scope "tensor"::

        {name: top_k_mask(w.abs(), round(density * w.numel())) for name, w in weights.items()}
    """
    scores = {name: w.abs() for name, w in _weights(model, density).items()}
    return _mask_set(model, _select(scores, density, scope), control="magnitude")


def random_masks(
    model: nn.Module,
    density: float | Mapping[str, Tensor],
    *,
    seed: int = 0,
    scope: str = "tensor",
) -> MaskSet:
    """Masks that keep weights drawn at random, exactly as many as asked for.

    Args:
        model, density, scope: as in `magnitude_masks`.
        seed: of the draw; masks do not depend on the device.

    Returns, Raises:
        as `magnitude_masks`.

    Equivalent to, for a density and the scope "tensor"::

        scores = torch.rand(w.shape, generator=generator)
        mask = top_k_mask(scores, round(density * w.numel()))
    """
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(w.shape, generator=generator)
        for name, w in _weights(model, density).items()
    }
    return _mask_set(model, _select(scores, density, scope), control="random", seed=seed)


def expected_count_masks(model: nn.Module, set: int | str = 0) -> MaskSet:
    """Masks that keep the largest logits of each tensor, as many as are expected not to be 0.

    The rule by which Edge Pruning (Bhaskar et al. 2024) and CoFi (Xia et al. 2022) end.

    Args:
        model: a masked model whose estimator has such an expectation; see `expected_l0`.
        set: index or name.

    Returns:
        A `MaskSet` without logits.

    Raises:
        ValueError: for an unknown set, other estimators, or n:m masks.

    Equivalent to, for each tensor::

        zeros = round(float((1 - expected_l0(logits, estimator, tau)).sum()))
        mask = top_k_mask(logits, logits.numel() - zeros)
    """
    result = MaskSet.from_model(model, set)
    layers = masked_layers(model)
    index = next(iter(layers.values())).set_index(set)
    packed: dict[str, Tensor] = {}
    for name, tensor in masked_tensors(layers).items():
        if tensor.n_of_m is not None:
            raise ValueError(f"model: {name} has n:m masks, whose count is fixed")
        logits = tensor.logits.detach()[index].cpu()
        zeros = 1.0 - expected_l0(logits.double(), tensor.estimator, tensor.tau)
        kept = logits.numel() - round(float(zeros.sum()))
        packed[name] = ops.pack_bits(ops.top_k_mask(logits.float(), kept))
    metadata = {**result.metadata, "rule": "expected count"}
    return MaskSet(packed, result.shapes, None, metadata, result.mask_shapes)
