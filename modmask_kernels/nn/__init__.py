"""Layers whose weights stand under learned masks."""

from .mask_options import MaskOptions
from .masked_any import MaskedAny
from .masked_attention import MaskedMultiheadAttention
from .masked_conv import MaskedConv1d, MaskedConv2d
from .masked_linear import MaskedLinear
from .masked_module import MaskedModule, Mode
from .masked_rnn import MaskedGRU, MaskedGRUCell, MaskedLSTM, MaskedLSTMCell
from .masked_transposed import (
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedHuggingFaceConv1D,
)
from .select import SelectAny, SelectConv1d, SelectConv2d, SelectLinear, SelectModule

__all__ = [
    "MaskOptions",
    "MaskedAny",
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConvTranspose1d",
    "MaskedConvTranspose2d",
    "MaskedGRU",
    "MaskedGRUCell",
    "MaskedHuggingFaceConv1D",
    "MaskedLSTM",
    "MaskedLSTMCell",
    "MaskedLinear",
    "MaskedModule",
    "MaskedMultiheadAttention",
    "Mode",
    "SelectAny",
    "SelectConv1d",
    "SelectConv2d",
    "SelectLinear",
    "SelectModule",
]
