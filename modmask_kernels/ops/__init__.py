"""The operations: pure functions of tensors and an explicit seed."""

from . import estimators
from .estimators import Estimator
from .masked_conv import masked_conv1d, masked_conv2d
from .masked_conv_transpose import masked_conv_transpose1d, masked_conv_transpose2d
from .masked_linear import masked_linear
from .masked_matmul import masked_matmul
from .masked_rnn import masked_gru, masked_lstm
from .sample_mask import pack_bits, sample_mask, sample_mask_packed, unpack_bits
from .select import select_conv1d, select_conv2d, select_linear
from .top_k_mask import top_k_mask

__all__ = [
    "Estimator",
    "estimators",
    "masked_conv1d",
    "masked_conv2d",
    "masked_conv_transpose1d",
    "masked_conv_transpose2d",
    "masked_gru",
    "masked_linear",
    "masked_lstm",
    "masked_matmul",
    "pack_bits",
    "sample_mask",
    "sample_mask_packed",
    "select_conv1d",
    "select_conv2d",
    "select_linear",
    "top_k_mask",
    "unpack_bits",
]
