"""Peak extra memory of one masked linear layer, each figure from fresh processes.

The extra memory is the resident high-water mark of a process that runs forward and backward,
minus that of a process that does everything else: it imports, builds the inputs, and runs the
same code once on a tiny layer, so that lazily loaded code and thread stacks count in neither.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import linear
from .verify import Problem

SAMPLES = (1, 4, 8)

# the largest wanted growth of the fused layer from samples=1 to samples=8
TARGET_GROWTH = 1.10

_STEPS = 3  # the second and third meet the freed blocks of the one before
_TINY = 16


@dataclass(frozen=True)
class MemoryCase:
    """A layer `[out, in]` and its batch."""

    out_features: int
    in_features: int
    batch: int


def cases(quick: bool = False) -> list[MemoryCase]:
    """The rows of the full table, or of the short one."""
    large = MemoryCase(1024, 1024, 128)
    return [large] if quick else [large, MemoryCase(1024, 1024, 8)]


def high_water_mark() -> int:
    """Largest resident size of this process since its start or the last reset, in bytes.

    Raises:
        RuntimeError: the system has no /proc/self/status.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError as error:
        raise RuntimeError("peak memory is read from /proc/self/status, which is absent") from error
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("peak memory: /proc/self/status has no line VmHWM")


def reset_high_water_mark() -> bool:
    """Lowers the mark to the present size, so that no peak of the imports hides the operation.

    Returns:
        False where the system does not let a process do that; the mark then covers the imports.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


_MAKERS: dict[str, Callable[[Problem], Callable[[], Tensor]]] = {
    "plain": linear.plain_step,
    "fused": linear.fused_step,
    "naive": linear.naive_step,
}


def worker(implementation: str, case: MemoryCase, samples: int, *, run: bool) -> int:
    """Body of a fresh process: its high-water mark in bytes, with or without the operation."""
    make = _MAKERS[implementation]
    make(Problem.random(_TINY, _TINY, case.batch, samples))()
    step = make(Problem.random(case.out_features, case.in_features, case.batch, samples))
    reset_high_water_mark()
    if run:
        for _ in range(_STEPS):
            step()
    return high_water_mark()


def in_fresh_process(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON on the last line that `python -m module arguments` prints.

    Raises:
        RuntimeError: the process failed; the message ends with what it printed.
    """
    command = [sys.executable, "-m", module, *arguments]
    # `-m` looks in the working directory first, where another copy of the package may lie
    package = Path(__file__).parents[2]
    # large blocks come from the system and return to it at once; otherwise it is chance whether one
    # fits into a hole that the heap happens to have
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=package, env=environment
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(implementation: str, case: MemoryCase, samples: int, *, run: bool) -> int:
    """`worker` in a fresh Python process with the thread count of this one."""
    arguments = ["--implementation", implementation]
    for name, value in asdict(case).items():
        arguments += ["--" + name.replace("_", "-"), str(value)]
    arguments += ["--samples", str(samples), "--threads", str(torch.get_num_threads())]
    arguments += ["--run"] if run else []
    return int(in_fresh_process(__name__, arguments)["high_water_mark"])


def extra_memory(implementation: str, case: MemoryCase, samples: int, repeats: int) -> int:
    """Median over `repeats` pairs of processes of the mark with minus the mark without, bytes."""
    pairs = [
        measure(implementation, case, samples, run=True)
        - measure(implementation, case, samples, run=False)
        for _ in range(repeats)
    ]
    return int(statistics.median(pairs))


def run(
    *, quick: bool = False, progress: bool = True, samples: Sequence[int] = SAMPLES
) -> list[dict[str, object]]:
    """Extra bytes of every implementation, case and number of samples.

    Returns:
        one JSON-able dict per case.
    """
    rows: list[dict[str, object]] = []
    todo = cases(quick)
    repeats = 1 if quick else 3
    total = len(todo) * (1 + 2 * len(samples))
    with tqdm(total=total, desc="peak memory", unit="figure", disable=not progress) as bar:
        for case in todo:
            extra: dict[str, dict[str, int]] = {name: {} for name in _MAKERS}
            for implementation in _MAKERS:
                # the plain layer has no samples
                for count in samples if implementation != "plain" else samples[:1]:
                    bytes_ = extra_memory(implementation, case, count, repeats)
                    extra[implementation][str(count)] = bytes_
                    bar.update()
            fused = extra["fused"]
            growth = fused[str(samples[-1])] / max(fused[str(samples[0])], 1)
            rows.append(
                {
                    **asdict(case),
                    "dtype": "float32",
                    "weight_bytes": 4 * case.out_features * case.in_features,
                    "extra_bytes": extra,
                    "fused_growth": growth,
                    "target_growth": TARGET_GROWTH,
                    "verdict": linear.verdict(growth, TARGET_GROWTH),
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the fresh processes; prints one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m modmask_kernels.bench.memory")
    parser.add_argument("--implementation", choices=_MAKERS, required=True)
    for name in ("--out-features", "--in-features", "--batch", "--samples", "--threads"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--run", action="store_true", help="with the operation")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    case = MemoryCase(given.out_features, given.in_features, given.batch)
    mark = worker(given.implementation, case, given.samples, run=given.run)
    print(json.dumps({"high_water_mark": mark}))


if __name__ == "__main__":
    main()
