"""Every kernel once on a small shape, for compute-sanitizer, under which nothing is quick.

`compute-sanitizer --tool memcheck python -m modmask_kernels.bench.gpu.small`
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ... import ops
from ...nn import MaskedAny
from ...ops import _gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETS, SAMPLES = 2, 2


def _normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


def _backward(call: Callable[..., Tensor], tensors: dict[str, Tensor], **options: Any) -> None:
    y = call(**tensors, samples=SAMPLES, **options)
    leaves = [t for t in tensors.values() if t.requires_grad]
    torch.autograd.grad(y.float().square().sum(), leaves)


def calls(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Names and what they run."""
    seed = torch.arange(SETS, device=device)
    logits = _normal(device, torch.float32, SETS, 37, 70)
    for estimator in ("gumbel_sigmoid", "hard_concrete", "sigmoid"):
        draw: dict[str, Any] = {"seed": seed, "estimator": estimator}
        yield (
            f"sample_mask, {estimator}",
            functools.partial(_backward, ops.sample_mask, {"logits": logits}, **draw),
        )
        yield (
            f"sample_mask_packed, {estimator}",
            functools.partial(ops.sample_mask_packed, logits, samples=3, **draw),
        )
    yield "n of m", lambda: ops.sample_mask_packed(logits, seed=seed, n_of_m=(2, 5))
    yield "pack_bits", lambda: ops.pack_bits(logits > 0)

    def product(
        operation: Callable[..., Tensor],
        x: tuple[int, ...],
        weight: tuple[int, ...],
        dtype: torch.dtype,
        frozen: bool,
    ) -> Callable[[], object]:
        of = functools.partial(_normal, device)
        tensors = {
            "x": of(dtype, *x),
            "weight": of(dtype, *weight),
            "logits": of(torch.float32, SETS, *weight),
            "bias": of(dtype, weight[0]),
            "bias_logits": of(torch.float32, SETS, weight[0]),
        }
        for name in ("weight", "bias") if frozen else ():
            tensors[name].requires_grad_(False)
        return functools.partial(_backward, operation, tensors, seed=seed)

    def recurrent(dtype: torch.dtype, samples: int = SAMPLES) -> None:
        of = functools.partial(_normal, device)
        tensors = {"x": of(dtype, 3, 2 * SETS * samples, 7)}
        tensors |= {"weight_ih": of(dtype, 72, 7), "weight_hh": of(dtype, 72, 18)}
        tensors |= {
            f"logits_{n}": of(torch.float32, SETS, 72, c) for n, c in (("ih", 7), ("hh", 18))
        }
        operation: Callable[..., Any] = ops.masked_lstm
        y = operation(**tensors, seed=seed, samples=samples)[0]
        torch.autograd.grad(y.float().square().sum(), list(tensors.values()))

    def norm(dtype: torch.dtype, module: torch.nn.Module, *shape: int) -> None:
        layer = MaskedAny.from_dense(module, sets=SETS, samples=SAMPLES, mask_bias=True)
        layer.to(device, dtype).train()
        x = _normal(device, dtype, *shape)
        leaves = (x, layer.weight_logits, layer.bias_logits)
        torch.autograd.grad(layer(x).float().square().sum(), leaves)

    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for source in _gpu.SOURCES:
            choose = functools.partial(_gpu.choose, forced=source)
            chosen = mock.patch.object(_gpu, "choose", choose)
            for frozen in (False, True):
                rows, inputs = (17, 64) if frozen else (3, 70)
                how = f"{name}, {source}{', frozen' * frozen}"
                step = product(ops.masked_linear, (4 * rows, inputs), (37, inputs), dtype, frozen)
                yield f"masked_linear, {how}", chosen(step)
                step = product(ops.masked_conv2d, (4, 3, 7, 6), (5, 3, 3, 3), dtype, frozen)
                yield f"masked_conv2d, {how}", chosen(step)
        yield f"masked_lstm, {name}", functools.partial(recurrent, dtype)
        # more groups than multiprocessors
        yield f"masked_lstm, {name}, step by step", functools.partial(recurrent, dtype, 80)
        lines = torch.nn.BatchNorm2d(3), 4, 3, 5, 7
        yield (
            f"normalisation, {name}",
            functools.partial(norm, dtype, torch.nn.LayerNorm(37), 8, 37),
        )
        yield f"normalisation, {name}, of images", functools.partial(norm, dtype, *lines)
        scores = _normal(device, dtype, 3001).detach()
        yield f"top_k_mask, {name}", functools.partial(ops.top_k_mask, scores, 777)
        bits = ops.sample_mask_packed(logits, seed=seed)[0]
        rows_of = torch.arange(5, device=device) % SETS
        x, weight = (_normal(device, dtype, *shape).detach() for shape in ((5, 70), (37, 70)))
        yield (
            f"select_linear, {name}",
            functools.partial(ops.select_linear, x, weight, bits, rows_of),
        )
        rows_of = torch.arange(70, device=device) % SETS
        x = _normal(device, dtype, 70, 70).detach()
        yield (
            f"select_linear, {name}, many rows",
            functools.partial(ops.select_linear, x, weight, bits, rows_of),
        )
        x, weight = (_normal(device, dtype, *s).detach() for s in ((70, 2, 5, 4), (37, 2, 5, 7)))
        yield (
            f"select_conv2d, {name}",
            functools.partial(ops.select_conv2d, x, weight, bits, rows_of, padding=3),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs them, each to its end before the next."""
    parser = argparse.ArgumentParser(prog="python -m modmask_kernels.bench.gpu.small")
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(argv).device)
    for name, call in calls(device):
        print(name, flush=True)
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
