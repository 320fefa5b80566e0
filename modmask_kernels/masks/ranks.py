"""What the processes of a data-parallel job tell one another while masks are learned."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """This process among those of the default process group, or alone.

    Args:
        together: whether the processes learn together; None: if there are several of them.

    Raises:
        ValueError: to learn together without an initialised process group.
    """

    def __init__(self, together: bool | None = None) -> None:
        there = dist.is_available() and dist.is_initialized()
        if together and not there:
            raise ValueError(
                "data_parallel: expected an initialised process group, found none; call "
                "torch.distributed.init_process_group first"
            )
        alone = not there or together is False
        self.count = 1 if alone else dist.get_world_size()
        self.rank = 0 if alone else dist.get_rank()

    def average(self, tensors: Iterable[Tensor]) -> None:
        """The mean over all processes, in place; the same bits everywhere."""
        if self.count == 1:
            return
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(self.count)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """The values of the first process, in place."""
        if self.count == 1:
            return
        for tensor in tensors:
            dist.broadcast(tensor, 0)

    def check_sizes(self, sizes: list[int], step: int, device: torch.device) -> None:
        """Raise on all processes unless all have batches of these sizes."""
        if self.count == 1:
            return
        # equal exactly where the mean of the squares is the square of the mean
        own = torch.tensor(sizes, dtype=torch.float64, device=device)
        sums = torch.stack([own, own * own])
        dist.all_reduce(sums)
        if torch.equal(sums[1] * self.count, sums[0] * sums[0]):
            return
        found: list[list[int]] = [[]] * self.count
        dist.all_gather_object(found, sizes)
        raise ValueError(
            "data: the processes of a job need batches of one size, got "
            f"{', '.join(f'{n} on rank {r}' for r, n in enumerate(found))} at step {step}"
        )


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 keeps in shards, gathered from all processes; others as they are."""
    full = getattr(tensor, "full_tensor", None)
    if full is None:
        return tensor
    gathered: Tensor = full()
    return gathered


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is one process's part of a tensor of FSDP2 (a DTensor)."""
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "full_tensor")
