"""A mask-learning step of a ResNet-18 and of a small decoder against an ordinary training step.

Ordinary training runs in training mode, mask learning in evaluation mode (stored batch statistics),
as their users run them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..experiments.training import train
from ..masks import learn_masks, mask_model, masked_layers
from .baselines import naive_masked_model
from .linear import verdict
from .memory import high_water_mark, in_fresh_process, reset_high_water_mark
from .step import Batch, Data, naive_loop, visitor_of
from .timing import interleaved, keep_freed_memory, ratio, summary
from .verify import GateError

# the largest wanted ratios to an ordinary step, at samples=4
TARGET = 1.5
TARGET_MEMORY = 1.3

NETWORKS = ("resnet18", "decoder")
IMPLEMENTATIONS = ("plain", "fused", "naive")
_CLASSES = 10
_MEMORY_STEPS = 3
_PENALTY = 1e-4
# no noise takes such a mask away
_ALWAYS = 1000.0


@dataclass(frozen=True)
class NetworkCase:
    """A network, its width, the batch, and the masks drawn per step."""

    network: str
    width: int
    batch: int
    samples: int = 4
    context: int = 128  # tokens of the decoder; the images are 32x32


def cases(quick: bool = False) -> list[NetworkCase]:
    """The rows of the full table, or of the short one."""
    rows = [
        NetworkCase(network, width, batch, samples)
        for network, width, batch in (("resnet18", 64, 16), ("decoder", 256, 8))
        for samples in (1, 4)
    ]
    return rows[-1:] if quick else rows


class _Block(nn.Module):
    """Two 3x3 convolutions and the way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.around = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.around(x))


def _resnet18(width: int) -> nn.Module:
    """ResNet-18 (He et al. 2015) with the 3x3 stem of small images, no pooling after it."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    inputs = width
    for stage in range(4):
        for block in range(2):
            outputs = width << stage
            layers.append(_Block(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, _CLASSES)]
    return nn.Sequential(*layers, *head)


class _DecoderLayer(nn.Module):
    """Causal attention and a feed-forward part, each after its LayerNorm."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, tokens, width))
        y = F.gelu(self.up(self.norm2(x)), approximate="tanh")
        result: Tensor = x + self.down(y)
        return result


def build(case: NetworkCase) -> nn.Module:
    """The plain network of a row, with fixed random parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if case.network == "resnet18":
            return _resnet18(case.width)
        layers = [_DecoderLayer(case.width) for _ in range(4)]
        return nn.Sequential(*layers, nn.LayerNorm(case.width), nn.Linear(case.width, _CLASSES))


def data_of(case: NetworkCase) -> Data:
    """The same random batch at every step; the decoder gets embedded tokens."""
    generator = torch.Generator().manual_seed(0)
    images = case.network == "resnet18"
    shape = (case.batch, 3, 32, 32) if images else (case.batch, case.context, case.width)
    targets = (case.batch,) if images else (case.batch, case.context)
    batch = (
        torch.randn(shape, generator=generator),
        torch.randint(_CLASSES, targets, generator=generator),
    )
    return lambda step, generator: batch


def loss(output: Tensor, batch: Batch) -> Tensor:
    """Cross entropy over images or tokens."""
    return F.cross_entropy(output.flatten(0, -2), batch[1].flatten())


def _masked(network: nn.Module, samples: int, init: float = 2.0) -> nn.Module:
    return mask_model(
        copy.deepcopy(network),
        samples=samples,
        init=init,
        filter=lambda name, module: type(module) in (nn.Linear, nn.Conv2d),
    )


def check(case: NetworkCase) -> None:
    """Compares the masked network under masks of ones with the plain one.

    Raises:
        GateError: the outputs differ by more than rounding.
    """
    network = build(case).eval()
    masked = _masked(network, case.samples, _ALWAYS).eval()
    for layer in masked_layers(masked).values():
        layer.mode = "sample"
    x = data_of(case)(0, torch.Generator())[0]
    with torch.no_grad():
        wanted, got = network(x), masked(x)
    error = float((wanted - got).abs().max() / wanted.abs().max())
    if not error <= 1e-4:
        raise GateError(f"{case.network}: masks of ones change the output by {error:.2g} of it")


def loop_of(implementation: str, case: NetworkCase) -> Callable[[Data, int], object]:
    """The training loop of one implementation: called with a data source and a step count."""
    network = build(case)
    if implementation == "plain":
        return lambda data, steps: train(network, loss, data, steps, progress=False)
    if implementation == "naive":
        naive = naive_masked_model(network, case.samples).eval()
        return lambda data, steps: naive_loop(naive, loss, data, steps, penalty=_PENALTY)
    masked = _masked(network, case.samples)
    return lambda data, steps: learn_masks(
        masked, loss, {"0": data}, steps, penalty=_PENALTY, progress=False
    )


def worker(implementation: str, case: NetworkCase, *, run: bool) -> int:
    """Body of a fresh process: its high-water mark in bytes, with or without the steps."""
    tiny = NetworkCase(case.network, 16, case.samples, case.samples, 8)
    loop_of(implementation, tiny)(data_of(tiny), 1)
    loop, data = loop_of(implementation, case), data_of(case)
    reset_high_water_mark()
    if run:
        loop(data, _MEMORY_STEPS)
    return high_water_mark()


def extra_memory(implementation: str, case: NetworkCase, repeats: int) -> int:
    """Median over pairs of fresh processes of the mark with minus the mark without, bytes."""
    arguments = ["--implementation", implementation, "--threads", str(torch.get_num_threads())]
    for name, value in asdict(case).items():
        arguments += [f"--{name}", str(value)]

    def mark(*more: str) -> int:
        return int(in_fresh_process(__name__, [*arguments, *more])["high_water_mark"])

    return int(statistics.median(mark("--run") - mark() for _ in range(repeats)))


def _logit_bytes(case: NetworkCase) -> int:
    """What the masked networks hold beyond the plain one before the first step."""
    masked = (m for m in build(case).modules() if type(m) in (nn.Linear, nn.Conv2d))
    return sum(m.get_parameter("weight").numel() for m in masked) * torch.float32.itemsize


def run_case(case: NetworkCase, *, rounds: int, visit_seconds: float = 0.0) -> dict[str, object]:
    """Checks, times and weighs one row.

    Returns:
        a JSON-able dict.

    Raises:
        GateError: the masked network is wrong; nothing is timed then.
    """
    check(case)
    data = data_of(case)
    timings = interleaved(
        {name: visitor_of(loop_of(name, case), data) for name in IMPLEMENTATIONS},
        rounds=rounds,
        visit_seconds=visit_seconds,
        max_calls=10,
    )
    extra = {name: extra_memory(name, case, 1) for name in IMPLEMENTATIONS}
    for name in ("fused", "naive"):
        extra[name] += _logit_bytes(case)
    to_plain = ratio(timings["fused"], timings["plain"])
    memory = extra["fused"] / max(extra["plain"], 1)
    wanted = case.samples == 4
    return {
        **asdict(case),
        "ratio_to_plain": asdict(to_plain),
        "naive_ratio_to_plain": asdict(ratio(timings["naive"], timings["plain"])),
        "target": TARGET if wanted else None,
        "verdict": verdict(to_plain.value, TARGET if wanted else None),
        "extra_bytes": extra,
        "memory_ratio": memory,
        "verdict_memory": verdict(memory, TARGET_MEMORY if wanted else None),
        "seconds": summary(timings),
    }


def run(*, quick: bool = False, progress: bool = True) -> list[dict[str, object]]:
    """All rows of the table; see `run_case`."""
    keep_freed_memory()
    rows = []
    bar = tqdm(cases(quick), desc="learning step", unit="network", disable=not progress)
    for case in bar:
        bar.set_postfix_str(f"{case.network}, samples {case.samples}")
        rows.append(run_case(case, rounds=2 if quick else 5))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the fresh processes; prints one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m modmask_kernels.bench.network")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, required=True)
    parser.add_argument("--network", choices=NETWORKS, required=True)
    for name in ("--width", "--batch", "--samples", "--context", "--threads"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--run", action="store_true", help="with the steps")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    case = NetworkCase(given.network, given.width, given.batch, given.samples, given.context)
    print(json.dumps({"high_water_mark": worker(given.implementation, case, run=given.run)}))


if __name__ == "__main__":
    main()
