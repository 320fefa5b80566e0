"""Which backend serves a model, layer or tensor, and why."""

from __future__ import annotations

from torch import Tensor, nn

from .nn import MaskedAny, MaskedModule
from .ops.masked_linear import explain as explain_product


def explain(subject: nn.Module | Tensor) -> str:
    """Says which backend computes a masked product, and why.

    Args:
        subject: a model or masked layer (its weights' dtype and device decide), or an input
            tensor.

    Returns:
        One line per masked layer, `name: backend (reason)`; for a tensor `backend (reason)`.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(subject, Tensor):
        backend, reason = explain_product(subject)
        return f"{backend} ({reason})"
    if not isinstance(subject, nn.Module):
        raise TypeError(f"subject must be a module or a tensor, not {type(subject).__name__}")
    lines = []
    for name, module in subject.named_modules():
        if isinstance(module, MaskedAny):
            lines.append(f"{name or '(root)'}: general path ({module.cost()})")
        elif isinstance(module, MaskedModule) and not getattr(module, "fused", True):
            lines.append(f"{name or '(root)'}: general path (the plain layer once per group)")
        elif isinstance(module, MaskedModule):
            backend, reason = explain_product(module.get_parameter(module.masked[0]))
            lines.append(f"{name or '(root)'}: {backend} ({reason})")
    return "\n".join(lines) or "no masked layers"
