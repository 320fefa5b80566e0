import sys
from pathlib import Path

import pytest
import torch
from guards import within_walls

sys.path.insert(0, str(Path(__file__).parents[2] / "ops"))

from modmask_kernels import _native
from modmask_kernels.ops._triton import Config
from modmask_kernels.ops.masked_conv import gpu as conv_gpu
from modmask_kernels.ops.masked_conv import triton as conv
from modmask_kernels.ops.masked_linear import gpu, triton


@pytest.fixture(autouse=True, scope="session")
def small_tiles():
    """One tile is not enough for the shapes of these tests."""
    for module, small in ((triton, Config(16, 32, 64, 4, 1)), (conv, Config(32, 32, 32, 4, 1))):
        module.product_config = lambda *_, small=small, **__: small
        module.gradients_config = lambda *_, small=small, **__: small


@pytest.fixture(scope="session")
def on_triton():
    """The operations on CPU tensors go through the Triton kernels, all tensors between walls."""
    assert _native.enabled(), "without the compiled kernels the reference would be tested"
    library = torch.library.Library("modmask", "IMPL")
    for name, function in (
        ("masked_linear", gpu.forward),
        ("masked_linear_backward", gpu.backward),
        ("masked_conv", conv_gpu.forward),
        ("masked_conv_backward", conv_gpu.backward),
    ):
        library.impl(name, within_walls(function), "CPU", allow_override=True)
    yield
    library._destroy()
