"""The progress bar of every loop over steps."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(
    steps: int, done: int, description: str, *, shown: bool, unit: str = "step"
) -> tqdm[Any]:
    """A bar with rate and time left; in a log file, where every refresh is a line, a rare one."""
    return tqdm(
        total=steps,
        initial=done,
        desc=description,
        unit=unit,
        disable=not shown,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )
