"""The Triton kernels compiled for GPUs that are not here: what the compilers made of them."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import triton

from modmask_kernels.bench import aot, instructions
from modmask_kernels.ops import _gpu, _triton

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "gpu"
# bytes of shared memory that a block may have
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10, aot.AMD: 64 << 10}
MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync", aot.AMD: "v_mfma"}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

FEW = {"source": "regenerate", "rows": 8}
CASES = [
    (target, kernel, BF16, options)
    for target in SHARED
    for kernel, options in (
        ("forward", {}),
        ("dx", {}),
        ("forward", FEW),
        ("gradients", {}),
        ("pack", {}),
    )
] + [
    (80, "forward", FP32, {"tf32": True}),
    (90, "forward", FP32, {"tf32": True}),
    (120, "forward", FP32, {"tf32": True, **FEW}),
    (90, "forward", FP32, {}),
    (90, "forward", FP16, {}),
    (90, "dx", FP32, {"tf32": True}),
    (90, "forward", BF16, {"source": "regenerate", "hard": False}),
    (80, "gradients", FP32, {"tf32": True}),
    (90, "gradients", FP32, {}),
    (90, "gradients", FP16, {}),
    (90, "gradients", BF16, {"rows": 8, "large_tiles": False}),
    (90, "gradients", BF16, {"need_weight": True}),
    (90, "gradients", BF16, {"rows": 64}),
    (90, "pack", BF16, {"inputs": 4095}),
    (90, "forward", BF16, {"inputs": 4095}),
    (90, "gradients", BF16, {"inputs": 4095}),
    (90, "bias_gradients", BF16, {}),
]


CASES += [
    (target, kernel, BF16, options)
    for target in SHARED
    for kernel, options in (
        ("conv_forward", {}),
        ("conv_dx", {}),
        ("conv_gradients", {}),
    )
] + [
    (90, "conv_forward", BF16, {"taps": 1, "size": 56}),
    (90, "conv_forward", BF16, {"source": "regenerate"}),
    (90, "conv_forward", FP16, {"stride": 2}),
    (80, "conv_forward", FP32, {"tf32": True}),
    (90, "conv_forward", FP32, {}),
    (90, "conv_dx", BF16, {"taps": 1, "size": 56}),
    (90, "conv_dx", BF16, {"stride": 2}),
    (90, "conv_dx", BF16, {"source": "regenerate", "hard": False}),
    (80, "conv_dx", FP32, {"tf32": True}),
    (90, "conv_gradients", BF16, {"taps": 1, "size": 56}),
    (90, "conv_gradients", BF16, {"need_weight": True, "channels": 3, "taps": 7, "stride": 2}),
    (90, "conv_gradients", BF16, {"channels": 3, "taps": 7, "stride": 2}),
    (90, "conv_gradients", BF16, {"need_weight": True}),
    (80, "conv_gradients", FP32, {"tf32": True}),
]


def name_of(case):
    target, kernel, dtype, options = case
    chosen = "-".join(f"{k}={v}" for k, v in options.items())
    return f"{target}-{kernel}-{str(dtype).removeprefix('torch.')}-{chosen}".rstrip("-")


def compile_case(case):
    target, kernel, dtype, options = case
    if kernel.startswith("conv"):
        return aot.compile_launch(aot.convolution_of(kernel, dtype, **options), target)
    options = {"large_tiles": target == 90, **options}
    return aot.compile_launch(aot.launch_of(kernel, dtype, **options), target)


def measured(capability):
    return instructions.measure(capability)


@pytest.fixture(scope="module")
def compiled():
    # fresh processes: this one has threads
    context = get_context("spawn")
    with ProcessPoolExecutor(min(2, os.cpu_count()), mp_context=context) as pool:
        cases = {name_of(case): pool.submit(compile_case, case) for case in CASES}
        tables = {c: pool.submit(measured, c) for c in instructions.CAPABILITIES}
        yield lambda key: (cases if key in cases else tables)[key].result()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_resources_and_instructions(case, compiled):
    target, kernel, dtype, options = case
    found = compiled(name_of(case))
    assert found.stack == 0
    assert found.local == 0
    assert found.shared <= SHARED[target]
    text = found.assembly
    ieee = dtype == FP32 and not options.get("tf32")
    if kernel not in ("bias_gradients", "pack") and not ieee:
        few = options.get("rows", 64) < 64 and kernel == "forward"
        wanted = "mma.sync" if few and target in (90, 100) else MATRIX[target]
        assert wanted in text
    gathered = kernel == "conv_dx" and options.get("taps") != 1  # a transposed weight
    odd = options.get("inputs", 16) % 16 or options.get("channels", 16) % 16
    if not odd and not gathered and kernel != "bias_gradients":
        wide = "dwordx4" if target == aot.AMD else r"ld\.global\.v4|ld\.global\..*v4|cp\.async\.cg"
        assert re.search(wide, text)
    if target != aot.AMD and not ieee and kernel != "gradients":
        # the decision is made of separately rounded products and sums
        assert not re.search(r"\bfma\.rn\S*\.f32", text)


@pytest.mark.parametrize("target", [90, aot.AMD])
def test_the_decision_is_not_fused(target, compiled):
    text = compiled(name_of((target, "pack", BF16, {}))).assembly
    assert not re.search(r"\bfma\.|v_(pk_)?(fma|fmac|mad)_f32", text)


@pytest.mark.parametrize("capability", instructions.CAPABILITIES)
def test_instructions_per_weight(capability, compiled):
    """If the committed table is old: python -m modmask_kernels.bench.instructions"""
    committed = json.loads((RESULTS / "instructions.json").read_text())
    found = compiled(capability)
    if triton.__version__ == committed["triton"]:
        assert found == committed[str(capability)]
    # unpacking is cheap, and noise costs less than its words one by one would
    total = {name: row["slots"] for name, row in found.items()}
    assert 3 * total["bits"] < total["regenerate"] < 100


def test_the_page_is_the_table():
    committed = json.loads((RESULTS / "instructions.json").read_text())
    page = (RESULTS / "instructions.md").read_text(encoding="utf-8")
    assert page == instructions.table(committed)


def test_the_chooser_knows_the_table():
    row = json.loads((RESULTS / "instructions.json").read_text())["90"]
    names = ("bits", "regenerate", "pack", "pack_once")
    counted = [math.ceil(row[name]["slots"]) for name in names]
    assert counted == [_gpu.UNPACK, _gpu.REGENERATE, _gpu.PACK, _gpu.PACK_ONCE]


@pytest.mark.parametrize("target", [90, 100])
@pytest.mark.parametrize("kernel", ["forward", "dx"])
def test_two_programs_fit_a_processor(target, kernel, compiled):
    """As the model supposes of products with packed masks."""
    found = compiled(name_of((target, kernel, BF16, {})))
    assert 2 * found.threads * found.registers <= 65536
    assert 2 * (found.shared + 1024) <= 228 << 10


def test_two_gradients_of_few_rows_fit_a_processor(compiled):
    found = compiled(name_of((90, "gradients", BF16, {"rows": 64})))
    assert 2 * found.threads * found.registers <= 65536
    assert 2 * (found.shared + 1024) <= 228 << 10


def permuted(a, b, selector):
    """PTX's `prmt.b32` in its default mode."""
    octets = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    digits = [selector >> 4 * i & 15 for i in range(4)]
    chosen = [octets[d & 7] for d in digits]
    signs = [255 * (byte >> 7) if d & 8 else byte for d, byte in zip(digits, chosen, strict=True)]
    return int.from_bytes(bytes(signs), "little")


def test_the_assembly_keeps_weights_by_their_top_bits():
    """What the interpreter cannot run."""
    pair = int(re.search(r"prmt\.b32 mask, \$2, \$3, (0x\w+)", _triton.KEEP_PAIR.value)[1], 16)
    one = int(re.search(r"prmt\.b32 mask, \$2, \$2, (0x\w+)", _triton.KEEP_ONE.value)[1], 16)
    for a, b in itertools.product((0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678), repeat=2):
        expected = 0xFFFF * (a >> 31) + 0xFFFF0000 * (b >> 31)
        assert permuted(a, b, pair) == expected
        assert permuted(a, a, one) == 0xFFFFFFFF * (a >> 31)
    for text in (_triton.KEEP_PAIR.value, _triton.KEEP_ONE.value):
        assert text.endswith("and.b32 $0, $1, mask; }")


def spread_place(weight):
    return 31 - (weight & 1 | weight >> 2 & 6 | weight << 1 & 8 | weight << 3 & 16)


def test_the_assembly_keeps_quads_of_spread_words():
    names = {"even": 0, "odd": 1}
    for text, per_mask in ((_triton.KEEP_QUAD_OF_PAIRS.value, 2), (_triton.KEEP_QUAD.value, 1)):
        masks = re.findall(
            r"prmt\.b32 mask, (\w+), (\w+), (0x\w+);\nand\.b32 \$(\d), \$(\d+)", text
        )
        assert [int(to) for *_, to, _ in masks] == list(range(4 // per_mask))
        assert [int(of) for *_, of in masks] == [4 // per_mask + i for i in range(4 // per_mask)]
        for weight in range(32):
            word, quad = 1 << spread_place(weight), weight // 4
            for other in range(8):
                even = word << (other & 6 | other << 3 & 8) & 0xFFFFFFFF
                words = (even, even << 1 & 0xFFFFFFFF)
                kept = [
                    permuted(words[names[a]], words[names[b]], int(selector, 16))
                    for a, b, selector, *_ in masks
                ]
                bits = 32 // per_mask
                parts = [m >> bits * i & (1 << bits) - 1 for m in kept for i in range(per_mask)]
                expected = [(1 << bits) - 1 if 4 * other + i == weight else 0 for i in range(4)]
                assert parts == expected, (weight, quad, other)


@pytest.mark.parametrize("target", [80, 90, 100, 120])
def test_pairs_of_weights_are_masked_together(target, compiled):
    text = compiled(name_of((target, "forward", BF16, {}))).assembly
    config = aot.launch_of("forward", large_tiles=target == 90)
    weights = config.arguments["N"] * config.arguments["K"] // (32 * config.options["num_warps"])
    assert len(re.findall(r"prmt\.b32 mask", text)) % (weights // 2) == 0


def test_nothing_of_it_needs_a_driver():
    code = "import modmask_kernels.bench.aot as a; print(a.launch_of('pack').options['num_warps'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "4", done.stderr
