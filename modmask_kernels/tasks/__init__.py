"""The data of the studies, generated in whole batches on PyTorch generators."""

from .arithmetic import OPERATIONS, AddMul, decode_digits, digit_loss, encode_digits

__all__ = ["OPERATIONS", "AddMul", "decode_digits", "digit_loss", "encode_digits"]
