"""The predictions for convolutions: what they count, and that the page is what they say."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from modmask_kernels.bench import roofline_conv as roofline
from modmask_kernels.ops import _gpu

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "gpu"
COMMITTED = json.loads((RESULTS / "roofline_conv.json").read_text())
MASKS = json.loads((RESULTS / "instructions.json").read_text())
H100 = _gpu.DEVICES[1]


def test_they_are_the_convolutions_of_resnet_18():
    assert sum(c.times for c in roofline.RESNET18) == 20
    assert sum(c.times * c.weights for c in roofline.RESNET18) == 11_166_912
    assert [c.out_size for c in roofline.RESNET18] == [112, 56, 28, 28, 28, 14, 14, 14, 7, 7, 7]


def test_the_page_is_made_from_the_numbers():
    """If they are old: python -m modmask_kernels.bench.roofline_conv"""
    rows = roofline.predict_all(COMMITTED, MASKS)
    assert json.loads(json.dumps(rows)) == COMMITTED["rows"]
    page = (RESULTS / "roofline_conv.md").read_text(encoding="utf-8")
    assert page == roofline.page(rows, COMMITTED["triton"])


@pytest.mark.parametrize("kernel", roofline.KERNELS)
def test_the_numbers_are_those_of_the_kernels(kernel):
    if triton.__version__ != COMMITTED["triton"]:
        pytest.xfail("counted with another Triton")
    convolution = roofline.RESNET18[4]
    code = roofline.measure(convolution, kernel, 90)._asdict()
    assert code == COMMITTED["codes"]["90"][convolution.name][kernel]


def test_what_is_counted():
    c = roofline.Convolution("", 64, 128, 16, 3, 1)
    codes = {k: {"step": 7, "sample": 5, "once": 3, "resident": 2} for k in roofline.KERNELS}
    masks = {"pack": {"slots": 11}, "pack_once": {"slots": 13}}
    works = {work.name: work for work in roofline.masked_step(c, codes, masks, 8, 2)}
    assert list(works) == ["masks of forward", "forward", "dlogits", "sum of dlogits", "dx"]
    weights, bits = 128 * 64 * 9, 2 * 128 * 64 * 9 / 8
    data = 2 * (8 * 64 * 256 + 8 * 128 * 256 + weights)
    assert works["masks of forward"].bytes == 4 * weights + bits
    assert works["masks of forward"].instructions == (2 * 11 + 13) * weights
    assert works["forward"].bytes == works["dx"].bytes == data + bits
    # 2 groups of 4 images of 256 pixels: tiles of 128 outputs, 64 pixels and a depth of 32
    programs, steps = 2 * 16, 2 * 16 * 18
    assert works["forward"].operations == 2.0 * 8 * 256 * weights
    assert works["forward"].instructions == 7 * steps + 3 * programs
    # tiles of 128 outputs and 32 of depth, 18 of them; blocks of 64 pixels, 16 of a group
    parts = 2 * (16 // 8)
    dlogits = works["dlogits"]
    assert dlogits.operations == works["forward"].operations
    assert dlogits.instructions == 7 * (18 * 2 * 16) + 5 * (18 * 2 * 2) + 3 * 18 * parts
    assert dlogits.bytes == data + 4 * weights * (1 + parts) + bits
    assert works["sum of dlogits"].bytes == 4 * weights * (parts + 1)


def test_plain_convolutions_are_bound_by_products_or_memory():
    for c in roofline.RESNET18:
        forward = roofline.plain_step(c)[0]
        pixels = 256 * c.out_size**2
        assert forward.operations == 2 * pixels * c.weights
        assert forward.bytes == 2 * (256 * c.channels * c.size**2 + pixels * c.outputs + c.weights)
        assert len(roofline.plain_step(c)) == (2 if c.first else 3)


@pytest.mark.parametrize("samples", [1, 2, 4, 8])
def test_a_step_moves_at_most_seven_words_per_weight(samples):
    """Each launch touching weights once; partial sums of small weights fit the cache."""
    for c in roofline.RESNET18:
        for size in (2, 4):
            found = roofline.words_per_weight(c, samples, size)
            assert found["unique"] <= 7.0, (c.name, size)
            assert found["unique"] < found["compiled"] < found["naive"]
            assert found["parts"] * 4 * c.weights <= 16 * 2**20
    largest = roofline.words_per_weight(roofline.RESNET18[-1], samples)
    assert largest["parts"] <= 2.0 * samples


def test_dlogits_writes_the_masks_of_dx_as_the_operation_has_it():
    from modmask_kernels.bench.aot import convolution_of

    for c in roofline.RESNET18:
        launch = convolution_of("conv_gradients", torch.bfloat16, **c.options("conv_gradients"))
        assert launch.arguments["PACK"] == c.packs
