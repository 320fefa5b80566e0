"""Speed and memory of the fused kernels, against plain, naive and published code.

`modmask bench`, or `python -m modmask_kernels.bench`.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; see `modmask bench --help`."""
    # here, so that the processes of the memory suite load nothing that they do not measure
    from .cli import main as run

    return run(argv)
