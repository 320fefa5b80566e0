"""Speed and memory of the fused kernels, against plain, naive and published code.

`modmask bench`, or `python -m modmask_kernels.bench`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; see `modmask bench --help` and `modmask bench --gpu --help`."""
    words = sys.argv[1:] if argv is None else list(argv)
    if "--gpu" in words:
        from .gpu import main as run_on_gpu

        return run_on_gpu([word for word in words if word != "--gpu"])
    # here, so that the processes of the memory suite load nothing that they do not measure
    from .cli import main as run

    return run(words)
