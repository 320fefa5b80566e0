"""Masked recurrent layers by Triton's products, step by step, in Triton's interpreter."""

import functools

import pytest
from ops.recurrent import WHOLE, check_whole

from modmask_kernels.ops.masked_rnn import gpu
from modmask_kernels.ops.masked_rnn.reference import CELLS

pytestmark = pytest.mark.usefixtures("on_triton")


@pytest.mark.parametrize("options", WHOLE, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_step_by_step(cell, options):
    by_triton = (functools.partial(f, kind="triton") for f in (gpu.forward, gpu.backward))
    # of a few hundred gradients of logits the largest error is a matter of chance
    check_whole(cell, options | {"inputs": 40}, *by_triton)
