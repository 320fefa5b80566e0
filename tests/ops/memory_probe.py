"""Extra peak memory of masked products: `python memory_probe.py CASES` with CASES in JSON.

Every case runs in a fork of its own, whose high-water mark starts at what is resident. Prints the
growth in KiB during forward and backward, in the order of the cases.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from modmask_kernels import ops
from modmask_kernels.ops.masked_linear import reference


def high_water_mark() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def lstm_growth(batch: int, samples: int, size: int) -> int:
    torch.set_num_threads(2)

    def inputs(rows: int, columns: int) -> list[torch.Tensor]:
        shapes = [
            (4, rows, columns),
            *[(4 * columns, columns)] * 2,
            *[(1, 4 * columns, columns)] * 2,
        ]
        return [torch.randn(shape).requires_grad_() for shape in shapes]

    def step(x: torch.Tensor, *parameters: torch.Tensor) -> None:
        w_ih, w_hh, *logits = parameters
        frozen = (w_ih.detach(), w_hh.detach())
        y, _ = ops.masked_lstm(x, *frozen, *logits, seed=torch.tensor(1), samples=samples)
        y.backward(torch.ones_like(y))

    step(*inputs(samples, 8))
    tensors = inputs(batch, size)
    before = high_water_mark()
    step(*tensors)
    return high_water_mark() - before


@torch.no_grad()
def select_growth(batch: int, sets: int, size: int, whole: bool) -> int:
    """Of one call, or, if `whole`, of the bits of all sets too."""
    torch.set_num_threads(2)
    small = torch.zeros(2, 8, dtype=torch.uint8)
    ops.select_linear(torch.zeros(2, 8), torch.zeros(8, 8), small, torch.tensor([0, 1]))
    x, weight = torch.randn(batch, size), torch.randn(size, size)
    rows = torch.arange(batch) % sets
    before = high_water_mark()
    bits = torch.full((sets, size * size // 8), 0x5A, dtype=torch.uint8)
    if not whole:
        before = high_water_mark()
    ops.select_linear(x, weight, bits, rows)
    return high_water_mark() - before


def growth(batch: int, samples: int, size: int, operation: str) -> int:
    if operation.startswith("select"):
        return select_growth(batch, samples, size, operation == "select and bits")
    if operation == "lstm":
        return lstm_growth(batch, samples, size)
    function = ops.masked_linear if operation == "fused" else reference.masked_linear
    torch.set_num_threads(2 if operation == "fused" else 1)
    generator = torch.Generator().manual_seed(0)

    def inputs(rows: int, columns: int, outputs: int) -> list[torch.Tensor]:
        shapes = [(rows, columns), (outputs, columns), (1, outputs, columns)]
        return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]

    def step(x: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor) -> None:
        y = function(x, weight.detach(), logits, seed=torch.tensor(1), samples=samples)
        y.backward(torch.ones_like(y))

    step(*inputs(samples, 8, 8))  # loads what is loaded once
    tensors = inputs(batch, size, size)
    before = high_water_mark()
    step(*tensors)
    return high_water_mark() - before


def forked(case: dict[str, object]) -> int:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, str(growth(**case)).encode())  # type: ignore[arg-type]
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        result = int(answer.read())
    os.waitpid(child, 0)
    return result


if __name__ == "__main__":
    print(json.dumps([forked(case) for case in json.loads(sys.argv[1])]))
