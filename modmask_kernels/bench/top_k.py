"""top_k_mask against `torch.topk`, `torch.kthvalue` and a sort: time and memory."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from .. import ops
from . import memory
from .timing import ratio, summary, time_functions
from .verify import GateError

SCORES = 50_000_000
QUICK_SCORES = 5_000_000
KEPT = 0.5  # of all scores
TARGET_TIME = 1.0  # of that of the quicker library function
TARGET_MEMORY = 5.0  # times less than the library function that needs less

Select = Callable[[Tensor, int], Tensor]


def _topk(scores: Tensor, k: int) -> Tensor:
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    kept[torch.topk(scores, k, sorted=False).indices] = True
    return kept


def _kthvalue(scores: Tensor, k: int) -> Tensor:
    return scores >= torch.kthvalue(scores, scores.numel() - k + 1).values


def _packed(scores: Tensor, k: int) -> Tensor:
    return ops.top_k_mask(scores, k, packed=True)


CANDIDATES: dict[str, Select] = {
    "fused": ops.top_k_mask,
    "fused, packed": _packed,
    "topk": _topk,
    "kthvalue": _kthvalue,
}
LIBRARY = ("topk", "kthvalue")


def random_scores(count: int) -> Tensor:
    """Standard normal scores without equal ones in sight: ties would split the candidates."""
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def check(count: int) -> None:
    """Raise GateError unless all candidates keep as many scores, and the same up to ties."""
    scores, k = random_scores(count), int(KEPT * count)
    expected = CANDIDATES["fused"](scores, k)
    least = scores[expected].min()
    for name, select in CANDIDATES.items():
        kept = select(scores, k)
        if name.endswith("packed"):
            kept = ops.unpack_bits(kept, (count,))
        if bool(((kept != expected) & (scores != least)).any()):
            raise GateError(f"{name}: keeps other scores than top_k_mask")


def worker(name: str, count: int, *, run: bool) -> int:
    """Body of a fresh process: its high-water mark in bytes, with or without the selection."""
    select = CANDIDATES[name]
    select(random_scores(1000), 500)
    scores = random_scores(count)
    memory.reset_high_water_mark()
    if run:
        select(scores, int(KEPT * count))
    return memory.high_water_mark()


def extra_memory(name: str, count: int) -> int:
    """Peak bytes of a selection beside its scores, its mask included."""
    arguments = ["--candidate", name, "--count", str(count)]
    arguments += ["--threads", str(torch.get_num_threads())]
    marks = [
        int(memory.in_fresh_process(__name__, [*arguments, *more])["high_water_mark"])
        for more in (["--run"], [])
    ]
    return marks[0] - marks[1]


def run(*, quick: bool = False, progress: bool = True) -> list[dict[str, object]]:
    """The one row of the table."""
    count = QUICK_SCORES if quick else SCORES
    with tqdm(total=2, desc="top_k_mask", unit="part", disable=not progress) as bar:
        check(min(count, QUICK_SCORES))
        scores, k = random_scores(count), int(KEPT * count)
        functions = {
            name: functools.partial(select, scores, k) for name, select in CANDIDATES.items()
        }
        timings = time_functions(functions, rounds=3, warmup=1, visit_seconds=0.0)
        del scores, functions
        bar.update()
        extra = {name: extra_memory(name, count) for name in CANDIDATES}
        bar.update()
    quickest = min(LIBRARY, key=lambda name: timings[name].median)
    time_ratio = ratio(timings["fused"], timings[quickest]).value
    least = min(extra[name] for name in LIBRARY)
    memory_ratio = least / max(extra["fused"], 1)
    return [
        {
            "count": count,
            "k": k,
            "dtype": "float32",
            "seconds": summary(timings),
            "extra_bytes": extra,
            "quickest": quickest,
            "ratio_to_quickest": time_ratio,
            "times_less_memory": memory_ratio,
            "verdict_time": "met" if time_ratio <= TARGET_TIME else "missed",
            "verdict_memory": "met" if memory_ratio >= TARGET_MEMORY else "missed",
        }
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the fresh processes; prints one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m modmask_kernels.bench.top_k")
    parser.add_argument("--candidate", choices=CANDIDATES, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--run", action="store_true", help="with the selection")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    mark = worker(given.candidate, given.count, run=given.run)
    print(json.dumps({"high_water_mark": mark}))


if __name__ == "__main__":
    main()
