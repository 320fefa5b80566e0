"""Everything that a machine with a GPU has to say, unattended, by one command.

`python -m modmask_kernels.bench.gpu`, or `modmask bench --gpu`: the tests of `tests/gpu`,
compute-sanitizer, and the speed of every operation, in one JSON file and one page.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for; see `modmask bench --gpu --help`."""
    from .command import main as run

    return run(argv)
