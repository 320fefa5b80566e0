"""Every configuration in which the launch functions use the Triton kernels, for compilers."""

import itertools

import torch

from modmask_kernels.bench import aot
from modmask_kernels.ops import estimators

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARITHMETIC = ((BF16, {}), (FP32, {"tf32": True}), (FP32, {}))
SOURCES = ({}, {"source": "regenerate"})
NAMES = estimators.NAMES
# rows of a group by which tiles differ
ROWS = ({}, {"rows": 64}, {"rows": 8})
# masks that are not hard ones of Gumbel noise at temperature 1
DRAWS = (
    {"hard": False},
    {"hard": False, "tau": 0.7},
    {"hard": False, "estimator": NAMES.index("hard_concrete"), "antithetic": True},
    {"estimator": NAMES.index("sigmoid"), "hard": False},
    {"estimator": NAMES.index("threshold"), "noise": False},
)
IMAGES = (
    {},
    {"taps": 1, "size": 56},
    {"stride": 2},
    {"size": 7},
    {"channels": 3, "taps": 7, "stride": 2},
)
BOTH, ALONE = {"need_weight": True}, {"need_weight": True, "need_logits": False}


def product(*lists):
    """Options out of one of each list, of a kernel and a dtype."""
    for chosen in itertools.product(*lists):
        merged = {}
        for options in chosen:
            merged |= options
        yield merged


def _all():
    for dtype, exact in ARITHMETIC:
        for options in product([exact], SOURCES, ROWS):
            yield from (("forward", dtype, options), ("dx", dtype, options))
        for options in product([exact], ({}, BOTH, ALONE), (*ROWS, {"rows": 32})):
            yield "gradients", dtype, options
        for options in product([exact], SOURCES, IMAGES):
            yield from (("conv_forward", dtype, options), ("conv_dx", dtype, options))
        for options in product([exact], ({}, BOTH, ALONE, {**ALONE, "packed": True}), IMAGES):
            yield "conv_gradients", dtype, options
        for options in IMAGES[:-1]:
            yield "conv_gradients", dtype, {**exact, **options, "packs": True}
        for options in product([exact], DRAWS):
            of_product = {"source": "regenerate", **options}
            for kernel in ("forward", "dx", "conv_forward", "conv_dx"):
                yield kernel, dtype, of_product
            for kernel in ("gradients", "conv_gradients"):
                yield kernel, dtype, options
                yield kernel, dtype, {**options, **BOTH}
        for options in product([exact], SOURCES):
            yield from ((k, dtype, {**options, "inputs": 4095}) for k in ("forward", "dx"))
        for options in product([exact], ({}, BOTH)):
            yield "gradients", dtype, {**options, "inputs": 4095}
    for options in ({}, *DRAWS):
        yield "bias_gradients", BF16, options
        yield "pack", BF16, {k: v for k, v in options.items() if k != "hard"}


def compile_case(case):
    target, kernel, dtype, options = case
    if kernel.startswith("conv"):
        return aot.compile_launch(aot.convolution_of(kernel, dtype, **options), target)
    options = {"large_tiles": target == 90, **options}
    return aot.compile_launch(aot.launch_of(kernel, dtype, **options), target)


ALL = list(_all())
