"""Fused kernels for learned weight masks, and the studies that stand on them."""

__version__ = "0.1.0"

from . import analysis, masks, nn, ops
from .explain import explain
from .masks import (
    MaskSet,
    learn_masks,
    mask_model,
    select_masks,
    set_mode,
    unmask_model,
    use_set,
    use_sets,
)
from .nn import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedGRU,
    MaskedGRUCell,
    MaskedLinear,
    MaskedLSTM,
    MaskedLSTMCell,
    MaskedMultiheadAttention,
)

__all__ = [
    "MaskSet",
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedGRU",
    "MaskedGRUCell",
    "MaskedLSTM",
    "MaskedLSTMCell",
    "MaskedLinear",
    "MaskedMultiheadAttention",
    "__version__",
    "analysis",
    "explain",
    "learn_masks",
    "mask_model",
    "masks",
    "nn",
    "ops",
    "select_masks",
    "set_mode",
    "unmask_model",
    "use_set",
    "use_sets",
]
