import sys
from pathlib import Path

import pytest
import torch
from guards import within_walls

sys.path.insert(0, str(Path(__file__).parents[2] / "ops"))

from modmask_kernels import _native, ops
from modmask_kernels.ops import _blocks, _gpu, estimators
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


def mask_words(logits, seed, shape, samples, tensor_id, offset, element, *rest):
    """`mask_words_cuda` by the CPU's masks; beyond the last weight everything is set."""
    *rule, antithetic, n_of_m = rest
    seeds = [None] if seed is None else seed.expand(len(logits)).reshape(len(logits), -1).unbind(1)
    masks = [
        ops.sample_mask(
            logits,
            seed=one,
            samples=1 if seed is None else samples,
            tensor_id=tensor_id,
            sample_offset=offset,
            element_offset=element,
            estimator=estimators.of_arguments(*rule),
            antithetic=antithetic,
            n_of_m=n_of_m or None,
        )
        for one in seeds
    ]
    masks = torch.cat(masks).transpose(0, 1)  # [sets, draws * samples, ...]
    whole = [_blocks.expand_blocks(m, shape).flatten() for m in masks.flatten(0, 1)]
    bits = torch.nn.functional.pad(torch.stack(whole) > 0, (0, -len(whole[0]) % 32 + 512), value=1)
    packed = torch.stack([ops.pack_bits(row) for row in bits])
    return packed.view(torch.int32).unflatten(0, masks.shape[:2])


@pytest.fixture
def masks_of_the_library(monkeypatch):
    """Masks that only the CUDA library packs, packed by the CPU."""
    monkeypatch.setattr(_native, "cuda_loaded", lambda: True)
    monkeypatch.setattr(gpu, "runs_on", lambda device: True)
    monkeypatch.setattr(_gpu, "KINDS", ("triton",))
    with torch.library._scoped_library("modmask", "IMPL") as library:
        library.impl("mask_words_cuda", mask_words, "CPU")
        yield
