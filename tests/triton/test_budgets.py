"""Registers and shared memory of every Triton kernel, by dtype and source of masks.

On all targets: the kernels in bfloat16, whose tiles are the same in float16. On one each: TF32
(sm_80), float32 without it (sm_90, most shared memory), soft masks and other estimators (sm_120,
least shared memory); `configurations.ALL` has every launch there is, on any target:

    python tests/triton/test_budgets.py 90
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from configurations import ALL, ARITHMETIC, BF16, BOTH, DRAWS, FP32, SOURCES, compile_case

from modmask_kernels.bench import aot

TARGETS = (80, 90, 100, 120, aot.AMD)
TF32 = {"tf32": True}
# registers of a thread and KiB of shared memory of a block, on any target
BUDGETS = {
    ("forward", "half"): (240, 100),
    ("forward", "tf32"): (184, 80),
    ("forward", "float32"): (255, 36),
    ("dx", "half"): (240, 100),
    ("dx", "tf32"): (184, 80),
    ("dx", "float32"): (255, 36),
    ("gradients", "half"): (255, 76),
    ("gradients", "tf32"): (255, 52),
    ("gradients", "float32"): (192, 36),
    ("conv_forward", "half"): (184, 44),
    ("conv_forward", "tf32"): (160, 68),
    ("conv_forward", "float32"): (160, 36),
    ("conv_dx", "half"): (240, 44),
    ("conv_dx", "tf32"): (168, 84),
    ("conv_dx", "float32"): (160, 36),
    ("conv_gradients", "half"): (255, 44),
    ("conv_gradients", "tf32"): (255, 36),
    ("conv_gradients", "float32"): (208, 36),
    ("bias_gradients", "half"): (80, 0),
    ("pack", "half"): (176, 2),
}


def arithmetic(dtype, options):
    return "half" if dtype != FP32 else "tf32" if options.get("tf32") else "float32"


def _cases():
    products = ("forward", "dx", "conv_forward", "conv_dx")
    for target, (dtype, exact) in [
        *((target, ARITHMETIC[0]) for target in TARGETS),
        (80, ARITHMETIC[1]),
        (90, ARITHMETIC[2]),
    ]:
        for kernel in products:
            for source in SOURCES:
                yield target, kernel, dtype, {**exact, **source}
        for kernel in ("gradients", "conv_gradients"):
            for needed in ({}, BOTH):
                yield target, kernel, dtype, {**exact, **needed}
    for options in DRAWS:
        for kernel in ("forward", "conv_dx"):
            yield 120, kernel, BF16, {"source": "regenerate", **options}
        for kernel in ("gradients", "conv_gradients", "bias_gradients"):
            yield 120, kernel, BF16, options
    for target in TARGETS:
        yield target, "pack", BF16, {}
        yield target, "bias_gradients", BF16, {}


CASES = list(_cases())


def name_of(case):
    target, kernel, dtype, options = case
    words = (arithmetic(dtype, options), *(f"{k}={v}" for k, v in options.items() if k != "tf32"))
    return "-".join((str(target), kernel, *words))


@pytest.fixture(scope="module")
def compiled():
    # fresh processes: this one has threads
    with ProcessPoolExecutor(min(2, os.cpu_count()), mp_context=get_context("spawn")) as pool:
        cases = {name_of(case): pool.submit(compile_case, case) for case in CASES}
        yield lambda case: cases[name_of(case)].result()


def excess(case, found):
    """What of a case exceeds its budget."""
    _, kernel, dtype, options = case
    registers, shared = BUDGETS[kernel, arithmetic(dtype, options)]
    return [
        *(["stack"] if found.stack else []),
        *(["spills"] if found.local else []),
        *([f"{found.registers} registers"] if found.registers > registers else []),
        *([f"{found.shared} bytes"] if found.shared > shared * 1024 else []),
    ]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_budgets(case, compiled):
    beyond = excess(case, compiled(case))
    assert not beyond


def test_every_kernel_has_a_budget():
    assert {(k, arithmetic(d, o)) for k, d, o in ALL} == set(BUDGETS)


def main(targets):
    """All configurations on these targets; prints what exceeds its budget."""
    targets = [int(t) if t.isdigit() else t for t in targets or map(str, TARGETS)]
    cases = [(target, *case) for target in targets for case in ALL]
    wrong = 0
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for case, found in zip(cases, pool.map(compile_case, cases), strict=True):
            beyond = excess(case, found)
            wrong += bool(beyond)
            if beyond:
                print(name_of(case), *beyond, flush=True)
    print(f"{wrong} of {len(cases)} exceed their budget")
    return wrong > 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
