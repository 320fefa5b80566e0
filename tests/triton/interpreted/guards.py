"""Memory between walls: the interpreter does not notice accesses beyond a tensor."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

WALL = 4096  # bytes on either side, more than a tile may stray in these tests
POISON = 0x7FC0  # NaN of bfloat16, and as two of them of float32; large numbers of integers
ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
)


class Walled(TorchDispatchMode):
    """New tensors lie between walls, poisoned; `check` finds what was written beyond them."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, int]] = []

    def allocate(self, shape, dtype) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        buffer = torch.full(((2 * WALL + count + 1) // 2,), POISON, dtype=torch.int16)
        self.buffers.append((buffer, count))
        inner = buffer.view(torch.uint8)[WALL : WALL + count]
        return inner.view(dtype).view(shape)

    def copy(self, t: Tensor) -> Tensor:
        """`t` between walls, with its strides; gaps are poisoned."""
        if t.dim() and t.stride(0) == 0 and t.shape[0]:
            return self.copy(t[0]).expand(t.shape)
        if not t.is_contiguous():
            span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
            return self.allocate((span,), t.dtype).as_strided(t.shape, t.stride()).copy_(t)
        return self.allocate(t.shape, t.dtype).copy_(t)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in ALLOCATIONS:
            return result
        return self.allocate(result.shape, result.dtype)

    def check(self) -> None:
        for buffer, count in self.buffers:
            octets = buffer.view(torch.uint8)
            poison = torch.full((1,), POISON, dtype=torch.int16).view(torch.uint8)
            walls = octets[:WALL].view(-1, 2), octets[-(WALL // 2 * 2 - 2) :].view(-1, 2)
            assert bool((walls[0] == poison).all()), "written before a tensor"
            tail = octets[WALL + count + count % 2 :].view(-1, 2)
            assert bool((tail == poison).all()), "written beyond a tensor"


def within_walls(function):
    """`function` with its tensors, and those that it makes, between walls."""

    def call(*arguments):
        walls = Walled()
        inside = tree_map_only(Tensor, walls.copy, arguments)
        with walls:
            result = function(*inside)
        walls.check()
        return tree_map_only(Tensor, lambda t: t.clone(), result)

    return call
