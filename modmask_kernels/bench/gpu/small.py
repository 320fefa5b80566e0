"""Every kernel on small shapes, for compute-sanitizer, under which nothing is quick.

`compute-sanitizer --tool memcheck python -m modmask_kernels.bench.gpu.small` runs the kernels that
are chosen where nothing is forced. The others need a process each, with the variables of `WAYS`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _native, ops
from ...nn import MaskedAny
from ...ops import _gpu
from ...ops.masked_linear.gpu import LEAST_SAVED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETS, SAMPLES = 2, 2
GROUPS = SETS * SAMPLES

Call = Callable[[], object]


class Way(NamedTuple):
    """MODMASK_BACKEND and MODMASK_GPU_MASKS of a process, which are read with the package."""

    backend: str = ""
    masks: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """What to set; empty is as unset."""
        return {"MODMASK_BACKEND": self.backend, "MODMASK_GPU_MASKS": self.masks}

    def __str__(self) -> str:
        return ", ".join(word for word in self if word) or "as chosen"


WAYS = (
    Way("cuda", "bits"),
    Way("cuda", "regenerate"),
    Way("triton", "bits"),
    Way("triton", "regenerate"),
    Way(),
)
"""All that run together every kernel from every source of masks."""


def here() -> Way:
    """The way of this process."""
    return Way(_native.FORCED_BACKEND or "", _gpu.FORCED_SOURCE or "")


def absent(way: Way) -> str | None:
    """Why a way cannot be taken on this machine, or None."""
    if way.backend == "cuda" and _native.cuda_load_error() is not None:
        return f"the CUDA kernels are {_native.cuda_load_error()}"
    return _gpu.TRITON_ERROR if way.backend == "triton" else None


def _normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


def _backward(call: Callable[..., Tensor], tensors: dict[str, Tensor], **options: Any) -> None:
    y = call(**tensors, samples=SAMPLES, **options)
    leaves = [t for t in tensors.values() if t.requires_grad]
    torch.autograd.grad(y.float().square().sum(), leaves)


def calls(device: torch.device, way: Way | None = None) -> Iterator[tuple[str, Call]]:
    """Names and what they run; `way`: that of this process unless given."""
    way = here() if way is None else way
    # Triton compiles for half precision of either kind alike, and long
    for dtype in DTYPES[:2] if way.backend == "triton" else DTYPES:
        yield from _plain_products(device, dtype, way)
    yield from _other_products(device, torch.bfloat16, way)
    # no kernels of Triton, and nothing to choose
    if way.backend != "triton" and way.masks != "regenerate":
        yield from _masks(device)
        for dtype in DTYPES:
            yield from _others(device, dtype)


def _product(
    device: torch.device,
    operation: Callable[..., Tensor],
    x: tuple[int, ...],
    weight: tuple[int, ...],
    dtype: torch.dtype,
    *,
    frozen: bool = False,
    logits: tuple[int, ...] | None = None,
    **options: Any,
) -> Call:
    of = functools.partial(_normal, device)
    tensors = {
        "x": of(dtype, *x),
        "weight": of(dtype, *weight),
        "logits": of(torch.float32, SETS, *(logits or weight)),
        "bias": of(dtype, weight[0]),
        "bias_logits": of(torch.float32, SETS, weight[0]),
    }
    for name in ("weight", "bias") if frozen else ():
        tensors[name].requires_grad_(False)
    seed = torch.arange(SETS, device=device)
    return functools.partial(_backward, operation, tensors, seed=seed, **options)


def _name(operation: str, dtype: torch.dtype, *more: str) -> str:
    return ", ".join((operation, str(dtype).removeprefix("torch."), *more))


def _plain_products(
    device: torch.device, dtype: torch.dtype, way: Way
) -> Iterator[tuple[str, Call]]:
    """Hard masks of Gumbel noise, in every dtype."""
    product = functools.partial(_product, device, dtype=dtype)
    for rows, inputs, frozen in ((1, 70, False), (3, 70, False), (17, 64, True)):
        name = _name("masked_linear", dtype, f"{rows} rows of {inputs}{', frozen' * frozen}")
        x, weight = (GROUPS * rows, inputs), (37, inputs)
        yield name, product(ops.masked_linear, x, weight, frozen=frozen)
    if way.backend == "cuda":
        return  # has no convolutions
    for frozen in (False, True):
        name = _name("masked_conv2d", dtype, *(["frozen"] * frozen))
        yield name, product(ops.masked_conv2d, (4, 3, 7, 6), (5, 3, 3, 3), frozen=frozen)


def _other_products(
    device: torch.device, dtype: torch.dtype, way: Way
) -> Iterator[tuple[str, Call]]:
    """Masks of all other kinds; those that the CUDA library packs need it."""
    shapes: dict[str, Any] = {"masked_linear": (ops.masked_linear, (12, 70), (36, 70))}
    blocks = {"masked_linear": (18, 35), "masked_conv2d": (3, 3, 3, 3)}
    if way.backend != "cuda":
        shapes["masked_conv2d"] = (ops.masked_conv2d, (4, 3, 7, 6), (6, 3, 3, 3))
    kinds: dict[str, dict[str, Any]] = {}
    if way.masks != "bits":
        kinds |= {"soft": {"hard": False}, "soft, cold": {"hard": False, "tau": 0.7}}
        kinds["hard_concrete, soft"] = {"hard": False, "estimator": "hard_concrete"}
    if way.backend != "triton" and way.masks != "regenerate":
        kinds |= {"top_k": {"estimator": "top_k"}, "n of m": {}, "blocks": {}}
    for estimator in ("threshold", "hard_concrete"):
        kinds[estimator] = {"estimator": estimator}
    for name, (operation, x, weight) in shapes.items():
        for kind, options in kinds.items():
            given = dict(options)
            if kind == "n of m":
                given["n_of_m"] = (1, 3) if name == "masked_conv2d" else (2, 5)
            elif kind == "blocks":
                given["logits"] = blocks[name]
            call = _product(device, operation, x, weight, dtype, **given)
            yield _name(name, dtype, kind), call
    if way.backend == "cuda" or way.masks == "regenerate":
        return
    # rows of 32 weights: their gradient packs the masks for that of x
    packs = _product(device, ops.masked_conv2d, (4, 8, 5, 4), (5, 8, 2, 2), dtype, frozen=True)
    yield _name("masked_conv2d", dtype, "masks packed by the gradient"), packs
    inputs = 1024
    weight = (LEAST_SAVED // inputs, inputs)
    kept = _product(device, ops.masked_linear, (8, inputs), weight, dtype, frozen=True)
    yield _name("masked_linear", dtype, "masks kept"), kept


def _masks(device: torch.device) -> Iterator[tuple[str, Call]]:
    """Masks by themselves."""
    seed = torch.arange(SETS, device=device)
    logits = _normal(device, torch.float32, SETS, 37, 70)
    for estimator in ("gumbel_sigmoid", "hard_concrete", "sigmoid", "top_k"):
        draw: dict[str, Any] = {"seed": seed, "estimator": estimator}
        for hard in (True, False):
            yield (
                f"sample_mask, {estimator}{'' if hard else ', soft'}",
                functools.partial(
                    _backward, ops.sample_mask, {"logits": logits}, hard=hard, **draw
                ),
            )
        yield (
            f"sample_mask_packed, {estimator}",
            functools.partial(ops.sample_mask_packed, logits, samples=3, **draw),
        )
    yield "n of m", lambda: ops.sample_mask_packed(logits, seed=seed, n_of_m=(2, 5))
    yield (
        "n of m, values",
        functools.partial(_backward, ops.sample_mask, {"logits": logits}, seed=seed, n_of_m=(2, 5)),
    )
    yield "pack_bits", lambda: ops.pack_bits(logits > 0)


def _recurrent(device: torch.device, cell: str, dtype: torch.dtype, samples: int) -> None:
    of = functools.partial(_normal, device)
    operation: Callable[..., Any] = ops.masked_lstm if cell == "lstm" else ops.masked_gru
    hidden, inputs = 18, 7
    outputs = hidden * (4 if cell == "lstm" else 3)
    tensors = {"x": of(dtype, 3, 2 * SETS * samples, inputs)}
    tensors |= {"weight_ih": of(dtype, outputs, inputs), "weight_hh": of(dtype, outputs, hidden)}
    tensors |= {
        f"logits_{n}": of(torch.float32, SETS, outputs, c)
        for n, c in (("ih", inputs), ("hh", hidden))
    }
    seed = torch.arange(SETS, device=device)
    y = operation(**tensors, seed=seed, samples=samples)[0]
    torch.autograd.grad(y.float().square().sum(), list(tensors.values()))


def _norm(device: torch.device, dtype: torch.dtype, module: torch.nn.Module, *shape: int) -> None:
    layer = MaskedAny.from_dense(module, sets=SETS, samples=SAMPLES, mask_bias=True)
    layer.to(device, dtype).train()
    x = _normal(device, dtype, *shape)
    leaves = (x, layer.weight_logits, layer.bias_logits)
    torch.autograd.grad(layer(x).float().square().sum(), leaves)


def _others(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """What is neither a mask nor a product with one."""
    for cell in ("lstm", "gru"):
        loop = functools.partial(_recurrent, device, cell, dtype)
        yield _name(f"masked_{cell}", dtype), functools.partial(loop, SAMPLES)
        # more groups than multiprocessors
        yield _name(f"masked_{cell}", dtype, "step by step"), functools.partial(loop, 80)
    norm = functools.partial(_norm, device, dtype)
    yield _name("normalisation", dtype), lambda: norm(torch.nn.LayerNorm(37), 8, 37)
    images = _name("normalisation", dtype, "of images")
    yield images, lambda: norm(torch.nn.BatchNorm2d(3), 4, 3, 5, 7)
    scores = _normal(device, dtype, 3001).detach()
    for packed in (False, True):
        name = _name("top_k_mask", dtype, *(["packed"] * packed))
        yield name, functools.partial(ops.top_k_mask, scores, 777, packed=packed)
    logits = _normal(device, torch.float32, SETS, 37, 70)
    bits = ops.sample_mask_packed(logits, seed=torch.arange(SETS, device=device))[0]
    for rows, more in ((5, []), (70, ["many rows"])):
        rows_of = torch.arange(rows, device=device) % SETS
        x, weight = (_normal(device, dtype, *s).detach() for s in ((rows, 70), (37, 70)))
        yield (
            _name("select_linear", dtype, *more),
            functools.partial(ops.select_linear, x, weight, bits, rows_of),
        )
    rows_of = torch.arange(70, device=device) % SETS
    x, weight = (_normal(device, dtype, *s).detach() for s in ((70, 2, 5, 4), (37, 2, 5, 7)))
    yield (
        _name("select_conv2d", dtype),
        functools.partial(ops.select_conv2d, x, weight, bits, rows_of, padding=3),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs them, each to its end before the next."""
    parser = argparse.ArgumentParser(prog="python -m modmask_kernels.bench.gpu.small")
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(argv).device)
    print(f"way: {here()}")
    for name, call in calls(device):
        print(name, flush=True)
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
