"""The data of the studies, generated in whole batches on PyTorch generators."""

from .arithmetic import OPERATIONS, AddMul, decode_digits, digit_loss, encode_digits
from .pairs import IO_MODES, PAIRS, AddPairsApart, AddPairsInTime, IOMode

__all__ = [
    "IO_MODES",
    "OPERATIONS",
    "PAIRS",
    "AddMul",
    "AddPairsApart",
    "AddPairsInTime",
    "IOMode",
    "decode_digits",
    "digit_loss",
    "encode_digits",
]
