"""Argument checks: every error names the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor


def shape_of(t: Tensor) -> str:
    """The shape as a list, for messages."""
    return str(list(t.shape))


def check_tensors(**given: object) -> None:
    """Every argument is a tensor."""
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(t).__name__}")


def check_optional_tensors(**given: object) -> None:
    """Every argument is a tensor or None."""
    check_tensors(**{name: t for name, t in given.items() if t is not None})


def check_seed(seed: object, sets: int | None, like: Tensor, like_name: str) -> None:
    """`seed` is None or an int64 tensor of shape [] or [sets] on the device of `like`."""
    if seed is None:
        return
    if not isinstance(seed, Tensor):
        hint = ": use torch.tensor(seed)" if type(seed) is int else ""
        raise TypeError(f"seed must be an int64 tensor, not {type(seed).__name__}{hint}")
    if seed.dtype is not torch.int64:
        raise TypeError(f"seed must be int64, not {seed.dtype}")
    if seed.dim() > 1 or (seed.dim() == 1 and sets is not None and seed.shape[0] != sets):
        expected = "[]" if sets is None else f"[] or [{sets}] (one per set)"
        raise ValueError(f"seed must have shape {expected}, not {shape_of(seed)}")
    if seed.device != like.device:
        raise ValueError(
            f"seed is on {seed.device}, but {like_name} is on {like.device}: move it there"
        )


def check_draw(samples: int, tau: float, tensor_id: int, sample_offset: int, offset: int) -> None:
    """The scalar arguments that say which masks are drawn."""
    if not isinstance(samples, int):
        raise TypeError(f"samples must be an integer, not {samples!r}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    if not tau > 0 or tau == float("inf"):
        raise ValueError(f"tau must be positive and finite, not {tau}")
    if not 0 <= tensor_id < 2**32:
        raise ValueError(f"tensor_id must be in [0, 2**32), not {tensor_id}")
    if not 0 <= sample_offset < 2**32:
        raise ValueError(f"sample_offset must be in [0, 2**32), not {sample_offset}")
    if offset < 0:
        raise ValueError(f"element_offset must not be negative, not {offset}")


def check_device(t: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Two tensors share a device."""
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, but {like_name} is on {like.device}")
