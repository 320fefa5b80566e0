"""Which backend serves a model, layer or tensor, and why."""

from __future__ import annotations

from torch import Tensor, nn

from .nn import (
    MaskedAny,
    MaskedConv1d,
    MaskedConv2d,
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedHuggingFaceConv1D,
    MaskedLinear,
    MaskedModule,
    MaskedMultiheadAttention,
    SelectAny,
    SelectModule,
)
from .nn.masked_rnn import MaskedRecurrent
from .nn.masked_transposed import InsOuts
from .ops._blocks import scaled_side
from .ops.masked_conv import gpu as conv_gpu
from .ops.masked_linear import explain as explain_product
from .ops.masked_linear import gpu
from .ops.masked_rnn import gpu as rnn_gpu
from .ops.select import gpu as select_gpu

_LINEAR = (MaskedLinear, MaskedMultiheadAttention, MaskedHuggingFaceConv1D)
_CONVOLUTIONS = (MaskedConv1d, MaskedConv2d, MaskedConvTranspose1d, MaskedConvTranspose2d)


def explain(subject: nn.Module | Tensor) -> str:
    """Says which backend computes a masked product, and why.

    Args:
        subject: a model or masked layer, also one of `select_masks` (its weights' dtype and device
            decide), or an input tensor.

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
            backend, reason = _explain_layer(module)
            lines.append(f"{name or '(root)'}: {backend} ({reason})")
        elif isinstance(module, SelectAny):
            lines.append(f"{name or '(root)'}: general path (once per set that rows choose)")
        elif isinstance(module, SelectModule):
            parameter = module.get_parameter(module.masked[0])
            told = select_gpu.explain if parameter.is_cuda else explain_product
            backend, reason = told(parameter)
            lines.append(f"{name or '(root)'}: {backend} ({reason})")
    return "\n".join(lines) or "no masked layers"


def _explain_layer(module: MaskedModule) -> tuple[str, str]:
    name = module.masked[0]
    parameter, logits = module.get_parameter(name), module.logits_of(name)
    backend, reason = explain_product(parameter)
    of = (parameter, logits, module.samples, module.estimator, module.n_of_m(name))
    if parameter.is_cuda and isinstance(module, _CONVOLUTIONS):
        backend, reason = conv_gpu.explain(*of, transposed=isinstance(module, InsOuts))
    elif parameter.is_cuda and isinstance(module, _LINEAR):
        backend, reason = gpu.explain(*of)
    elif parameter.is_cuda and isinstance(module, MaskedRecurrent):
        names = [n for n in module.masked if n.startswith("weight_hh")]
        of_hidden = (
            module.get_parameter(names[0]),
            module.logits_of(names[0]),
            module.samples,
            module.estimator,
        )
        backend, reason = rnn_gpu.explain("lstm" if module.states == 2 else "gru", *of_hidden)
    if logits.shape[1:] == parameter.shape:
        return backend, reason
    if isinstance(module, InsOuts):
        weight = parameter.transpose(0, 1)
        if scaled_side(weight, weight, logits.transpose(1, 2)) is None:
            if parameter.is_cuda:
                return backend, reason
            return "reference", "no fused kernel for blocks of a weight [in, out]"
        return backend, "a plain product, scaled by the masks"
    if scaled_side(parameter, parameter, logits) is not None:
        return backend, "a plain product, scaled by the masks"
    return backend, reason
