"""Selected masks for many rows and for convolutions, by the CUDA kernel on the CPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mask_arguments import bytes_of
from ops.tolerance import check_close

from modmask_kernels import ops
from modmask_kernels.ops import _gpu
from modmask_kernels.ops._convolution import shape_of_result
from modmask_kernels.ops.select import gpu, reference

SETS = 3


@pytest.fixture(params=[0, 1])
def kernel(simt, request, monkeypatch):
    """`selected_product_cuda` for CPU tensors."""

    def product(x, weight, masks, bias, bias_masks, order, examples, tiles, *options):
        stride, padding, dilation, groups = options
        convolution = weight.dim() == 4
        batch, out = x.shape[0], weight.shape[0]
        shape, sizes = (batch, x.shape[1], out), None
        places = x.shape[1]
        if convolution:
            shape = shape_of_result(x, weight, stride, padding, dilation)
            places = math.prod(shape[2:])
            of_x, kernel = x.shape[1:], weight.shape[2:]
            before = (padding[0], padding[2])
            sizes = np.array([*of_x, *kernel, *stride, *before, *dilation, shape[3]])
        y = torch.full(shape, 9.0, dtype=x.dtype)
        simt.Device(request.param).run(
            "selected_product",
            **{"dtype": str(x.dtype).removeprefix("torch."), "convolution": convolution},
            **{"batch": batch, "sets": SETS, "places": places, "out": out, "groups": groups},
            tiles=-(-batch * places // gpu.TILE) + min(SETS, batch),
            depth=weight[0].numel(),
            x=bytes_of(x.contiguous()),
            weight=bytes_of(weight),
            bits=masks.numpy(),
            bias=bytes_of(bias),
            bias_bits=bytes_of(bias_masks),
            order=order.numpy(),
            first_example=examples.numpy(),
            first_tile=tiles.numpy(),
            sizes=sizes,
            y=bytes_of(y),
        )
        return y

    monkeypatch.setattr(gpu, "unserved", lambda x: None)
    with torch.library._scoped_library("modmask", "IMPL") as library:
        library.impl("selected_product_cuda", product, "CPU")
        yield


def check(call, x_shape, weight_shape, dtype, masked_bias, options=()):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(x_shape, generator=g).to(dtype)
    weight = torch.randn(weight_shape, generator=g) / math.sqrt(math.prod(weight_shape[1:]))
    weight, bias = weight.to(dtype), torch.randn(weight_shape[0], generator=g).to(dtype)
    masks = [torch.rand(weight_shape, generator=g) < 0.6 for _ in range(SETS)]
    bits = torch.stack([ops.pack_bits(m) for m in masks])
    bias_bits = None
    if masked_bias:
        bias_bits = torch.stack([ops.pack_bits(m.flatten(1)[:, 0]) for m in masks])
    row_sets = torch.randint(0, SETS, x_shape[:1], generator=g)
    row_sets[row_sets == 1] = 2  # a set that no row has
    plain = reference.select_linear if len(weight_shape) == 2 else reference.select_conv2d

    def never(*arguments):
        raise AssertionError("the reference was taken")

    ours = call(never, x, weight, bits, row_sets, bias, bias_bits, *options)
    arguments = (bits, row_sets)
    of_dtype = plain(x, weight, *arguments, bias, bias_bits, *options)
    exact = plain(x.double(), weight.double(), *arguments, bias.double(), bias_bits, *options)
    check_close([("y", ours, of_dtype, exact)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked_bias", [False, True])
@pytest.mark.parametrize(
    ("x", "outputs"), [((65, 7), 5), ((150, 40), 70), ((3, 2, 9), 4), ((2, 130, 19), 65)], ids=str
)
def test_rows(kernel, x, outputs, masked_bias, dtype):
    check(gpu.select_linear, x, (outputs, x[-1]), dtype, masked_bias)


CONVOLUTIONS = [
    ((5, 3, 6, 7), (4, 3, 3, 3), ([1, 1], [1, 1, 1, 1], [1, 1], 1)),
    ((4, 2, 1, 30), (70, 2, 1, 5), ([1, 2], [0, 0, 2, 3], [1, 1], 1)),
    ((7, 4, 5, 5), (6, 2, 2, 3), ([2, 1], [1, 0, 0, 2], [2, 1], 2)),
    ((2, 1, 12, 11), (1, 1, 1, 1), ([1, 1], [0, 0, 0, 0], [1, 1], 1)),
    ((3, 4, 4, 4), (8, 1, 3, 3), ([1, 1], [1, 1, 1, 1], [1, 1], 4)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("x", "weight", "options"), CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("masked_bias", [False, True])
def test_convolutions(kernel, x, weight, options, masked_bias, dtype):
    check(gpu.select_conv, x, weight, dtype, masked_bias, options)


def test_no_rows_and_no_outputs(monkeypatch):
    monkeypatch.setattr(gpu, "unserved", lambda x: None)
    order, examples, tiles = gpu.sorted_examples(torch.zeros(0, dtype=torch.int64), 2, 5)
    assert order.shape == (0,)
    assert examples.tolist() == tiles.tolist() == [0, 0, 0]


def test_examples_are_sorted_by_set():
    order, examples, tiles = gpu.sorted_examples(torch.tensor([2, 0, 2, 0, 2]), 4, 40)
    assert order.tolist() == [1, 3, 0, 2, 4]
    assert examples.tolist() == [0, 2, 2, 5, 5]
    assert tiles.tolist() == [0, 2, 2, 4, 4]


def test_sets_that_do_not_exist_are_named(monkeypatch):
    monkeypatch.setattr(gpu, "unserved", lambda x: None)
    x, weight = torch.ones(70, 8), torch.ones(8, 8)
    masks, rows = torch.zeros(2, 8, dtype=torch.uint8), torch.full((70,), 2)
    with pytest.raises(RuntimeError, match="below 2, the number of sets, but has 2"):
        gpu.select_linear(reference.select_linear, x, weight, masks, rows, None, None)


def test_matrix_units_serve_many_rows_of_few_sets():
    """By the model; few rows of a set, or float32, are for the kernel."""
    h100 = next(d for d in _gpu.DEVICES if d.name == "H100")

    def quicker(columns, sets, element_size):
        seconds = gpu.predict(columns, sets, 4096 * 4096, element_size, False, h100)
        return min(seconds, key=seconds.get)

    assert quicker(65536, 4, 2) == "reference"
    assert quicker(256, 64, 2) == "cuda"
    assert quicker(128, 128, 4) == "cuda"


def test_explain(monkeypatch):
    monkeypatch.setattr(gpu, "unserved", lambda x: None)
    assert gpu.explain(torch.ones(2, 3))[1].startswith("masks applied in the product, up to 64 row")
    monkeypatch.setattr(gpu, "unserved", lambda x: "no kernel")
    assert gpu.explain(torch.ones(2, 3)) == ("reference", "no kernel")
