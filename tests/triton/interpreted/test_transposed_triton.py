"""Transposed products through the Triton kernels of the plain ones, in Triton's interpreter."""

import pytest
import torch
from test_transposed import check as check_by_name
from test_transposed import conv_case, matmul_case

from modmask_kernels.ops import _transposed, estimators

pytestmark = pytest.mark.usefixtures("on_triton")
MANY = ("x", "weight", "logits", "bias")  # of a handful of logits of biases errors tell little


def check(name, case, wanted=MANY):
    check_by_name(name, *case, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    check("conv", conv_case(dtype=dtype, stride=2, padding=1))
    check("matmul", matmul_case(dtype=dtype))


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": None, "stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2)},
        {"groups": 3, "outputs": 2, "padding": 1, "sample_offset": 9, "bias_tensor_id": 17},
        {"stride": 2, "padding": 2, "output_padding": 1, "dilation": 2, "masked_bias": False},
        {"kernel": (1, 1), "stride": 3, "element_offset": 5},
        {"kernel": (1, 1), "seeds": "one", "sets": 3},
        {"hard": False, "tau": 0.6},
        {"estimator": estimators.threshold(0.1), "antithetic": True},
    ],
    ids=str,
)
def test_options_of_the_convolution(change):
    check("conv", conv_case(**{"x": (1, 6, 4, 3), "samples": 1, **change}))


@pytest.mark.parametrize(
    "change",
    [
        {"sets": 3, "samples": 3},
        {"seeds": None, "masked_bias": False},
        {"hard": False, "tau": 0.6},
        {"element_offset": 5, "sample_offset": 9, "bias_tensor_id": 17},
        {"x": (2, 3, 2, 33), "outputs": 65, "sets": 1},
    ],
    ids=str,
)
def test_options_of_the_product(change):
    check("matmul", matmul_case(**change))


@pytest.mark.usefixtures("masks_of_the_library")
@pytest.mark.parametrize("name", ["conv", "matmul"])
@pytest.mark.parametrize("masks", ["top_k", "blocks"])
def test_masks_packed_by_the_library(name, masks, monkeypatch):
    # as on a GPU: on the CPU the reference serves blocks of such weights
    monkeypatch.setattr(_transposed, "uses_kernel", lambda x: False)
    case = {"x": (1, 6, 4, 3), "stride": 2} if name == "conv" else {"x": (3, 12), "outputs": 8}
    if masks == "top_k":
        case["estimator"] = estimators.top_k(0.4)
    tensors, options = (conv_case if name == "conv" else matmul_case)(**case)
    if masks == "blocks":
        tensors["logits"] = tensors["logits"][:, ::3, ::2].contiguous()
    # the weight of a product gets its gradient from the CUDA library
    check(name, (tensors, options), MANY if name == "conv" else ("x", "logits", "bias"))
