"""The fingerprint of frozen weights."""

from __future__ import annotations

import ctypes
import hashlib

import torch
from torch import Tensor, nn

from .convert import find_masked_layers, unwrapped
from .ranks import whole


def _bytes_of(tensor: Tensor) -> ctypes.Array[ctypes.c_char] | bytes:
    """The memory of a contiguous CPU tensor, not copied."""
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""


def weight_hash(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of all parameters except mask logits.

    It is the same for a model before `mask_model`, after it, and after `unmask_model`.

    Raises:
        ValueError: if a parameter is on the meta device and so has no values.
    """
    logits = {
        id(layer.logits_of(name))
        for layer in find_masked_layers(model).values()
        for name in layer.masked
    }
    digest = hashlib.sha256()
    for name, parameter in unwrapped(model).named_parameters():
        if id(parameter) in logits:
            continue
        if parameter.is_meta:
            raise ValueError(f"model: parameter {name!r} is on the meta device, it has no values")
        digest.update(f"{name}\0{parameter.dtype}\0{tuple(parameter.shape)}\0".encode())
        values = whole(parameter.detach()).to(torch.device("cpu")).contiguous()
        digest.update(_bytes_of(values))
    return digest.hexdigest()
