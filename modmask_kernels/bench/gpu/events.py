"""Time and memory of functions on a device; on the CPU, for rehearsals, by the wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ..timing import Visitor, calls_of

Step = Callable[[], object]

_WARM = 3


class Device:
    """Where functions run: warms, records, times and weighs them.

    The level 2 cache is overwritten before every timed call, so that each finds its operands in
    device memory. Clocks are as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if self.is_cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            size = max(2 * cache, 64 * 2**20)
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU, or else stands for one."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Waits for the device; raises what went wrong there."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def visitor(self, function: Step) -> Visitor:
        """Seconds of calls as `timing.interleaved` wants them, between two events each."""
        if not self.is_cuda:
            return calls_of(function, time.perf_counter)

        def visit(count: int) -> list[float]:
            function()
            pairs = [(_event(), _event()) for _ in range(count)]
            for start, end in pairs:
                if self._flush is not None:
                    self._flush.zero_()
                start.record()
                function()
                end.record()
            self.synchronize()
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]

        return visit

    def warm(self, function: Step) -> None:
        """Calls often enough that nothing is compiled, loaded or tuned any more."""
        for _ in range(_WARM if self.is_cuda else 1):
            function()
        self.synchronize()

    def recorded(self, function: Step) -> Step:
        """The function as a CUDA graph, without the time that Python and launches take.

        Raises:
            RuntimeError: it cannot be recorded, since it waits for the device for instance.
        """
        if not self.is_cuda:
            return function
        cuda: Any = torch.cuda
        current, side = cuda.current_stream(), cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                function()
        current.wait_stream(side)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        graph.replay()
        self.synchronize()
        replay: Step = graph.replay
        return replay

    def peak_bytes(self, function: Step) -> int | None:
        """The most memory that a call takes beyond what is there; None on the CPU."""
        if not self.is_cuda:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        self.synchronize()
        return int(torch.cuda.max_memory_allocated(self.device)) - before

    def release(self) -> None:
        """Gives memory back that nothing uses."""
        if self.is_cuda:
            torch.cuda.empty_cache()


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
