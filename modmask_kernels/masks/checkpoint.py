"""Checkpoints of a learning run: written whole, read without executing anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import atomic

FORMAT = "modmask-learn-checkpoint"
FORMAT_VERSION = 1

_PLAIN = (Tensor, str, bytes, bool, int, float, type(None))


def check_storable(value: Any, where: str) -> None:
    """Raise TypeError, naming the place, for values that a checkpoint cannot bring back."""
    if type(value) in _PLAIN:
        return
    if type(value) is dict:
        for key, item in value.items():
            if not isinstance(key, (str, int)):
                raise TypeError(f"{where}: expected keys of type str or int, got {key!r}")
            check_storable(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for n, item in enumerate(value):
            check_storable(item, f"{where}[{n}]")
    else:
        raise TypeError(
            f"{where}: a checkpoint holds tensors, numbers, strings, lists and dicts, "
            f"got {type(value).__name__}"
        )


def save_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Replace the checkpoint at `path` by `state`: write, fsync, rename."""
    whole = {"format": FORMAT, "format_version": FORMAT_VERSION, **state}
    with atomic(Path(path)) as temporary:
        torch.save(whole, temporary)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, tensors on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or not a checkpoint of this library.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many kinds on damaged files
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of learn_masks")
    if state.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: checkpoint of format version {state.get('format_version')!r}, "
            f"expected {FORMAT_VERSION}"
        )
    step, seconds, metrics = (state.get(key) for key in ("step", "time", "metrics"))
    if type(step) is not int or type(seconds) is not float or type(metrics) is not list:
        raise ValueError(f"{path}: the checkpoint is damaged (step, time or metrics)")
    return state
