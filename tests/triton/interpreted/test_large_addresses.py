"""Tensors of more than 2^31 elements, of which only the pages that are touched exist."""

import pytest
import torch
from triton.runtime import interpreter

from modmask_kernels import ops
from modmask_kernels.ops import _triton, estimators
from modmask_kernels.ops.masked_conv import triton as conv
from modmask_kernels.ops.masked_linear import triton as linear
from modmask_kernels.ops.sample_mask.triton import pack

SEED = torch.tensor([5])
ONE = torch.ones((), dtype=torch.float16)


@pytest.fixture
def only_the_last_program(monkeypatch):
    def programs(*limits):
        full = range(*limits)
        return full if len(full) < 1000 else full[-1:]

    monkeypatch.setattr(interpreter, "range", programs, raising=False)


def masks(logits, samples=1, seed=SEED):
    plain = estimators.arguments("gumbel_sigmoid", False)
    return _triton.Masks(logits, None, seed, 0, 1, 0, 0, samples, 1.0, True, *plain)


def virtual(*shape, dtype=torch.float16):
    t = torch.empty(shape, dtype=dtype)
    assert t.numel() > 2**31
    return t


def test_sets_far_apart():
    logits = torch.empty_strided((2, 6, 8), (2**31 + 64, 8, 1))
    logits[:] = torch.linspace(-2, 2, 96).view(2, 6, 8)
    m = masks(logits, seed=torch.tensor([3, 4]))
    near = m._replace(logits=logits.contiguous())
    assert torch.equal(pack(m)[..., :2], pack(near)[..., :2])
    x, weight = torch.eye(8).repeat(2, 1), torch.ones(6, 8)
    assert torch.equal(linear.product(x, weight, m), linear.product(x, weight, near))
    _, far = linear.gradients(x[:, :6].contiguous(), x, weight, m)
    assert torch.equal(far, linear.gradients(x[:, :6].contiguous(), x, weight, near)[1])
    geometry = conv.Geometry(8, 1, 8, 6, (1, 1), (1, 1), (1, 1), (1, 1), (0,) * 4, (1, 1))
    m, near = (n._replace(logits=n.logits[..., None, None]) for n in (m, near))
    arguments = (x.view(16, 8, 1, 1), weight.view(6, 8, 1, 1))
    y = conv.product(*arguments, m, geometry)
    assert torch.equal(y, conv.product(*arguments, near, geometry))


@pytest.mark.usefixtures("only_the_last_program")
@pytest.mark.parametrize("source", ["bits", "regenerate"])
def test_large_weights(source):
    outputs, inputs = 2**20 + 5, 2080
    weight, logits = virtual(outputs, inputs), virtual(1, outputs, inputs, dtype=torch.float32)
    weight[-40:] = 1.0
    logits[0, -40:] = torch.linspace(-2, 2, 40 * inputs).view(40, inputs)
    m = masks(logits)
    kept = ops.sample_mask(logits[:, -4:], seed=SEED, element_offset=(outputs - 4) * inputs)[0, 0]
    words = None
    if source == "bits":
        words = pack(m)
        # only the end was packed: the rest is written here as the last tile needs it
        first = (outputs - 4) * inputs
        bits = kept.flatten().to(torch.int64).view(-1, 32) << torch.arange(32)
        end = words[0, 0, first // 32 :][: bits.shape[0]]
        packed = bits.sum(1).to(torch.int32)
        written = outputs * inputs % 1024 // 32  # by the last program
        assert torch.equal(end[-written:], packed[-written:])
        end.copy_(packed)
    x = torch.zeros(1, inputs, dtype=torch.float16)
    x[0, -1] = 1.0
    y = linear.product(x, weight, m, words=words)
    assert torch.equal(y[0, -4:], kept[:, -1].half())
    dy = torch.zeros(1, outputs, dtype=torch.float16)
    dy[0, -1] = 2.0
    _, dlogits = linear.gradients(dy, x, weight, m)
    leaf = logits[:, -1:].clone().requires_grad_()
    ops.sample_mask(leaf, seed=SEED, element_offset=(outputs - 1) * inputs).sum().backward()
    torch.testing.assert_close(dlogits[0, -1, -1], 2 * leaf.grad[0, 0, -1])


@pytest.mark.usefixtures("only_the_last_program")
def test_large_batches():
    logits = torch.full((1, 16, 2048), 100.0)
    x = virtual(2**20 + 3, 2048)
    x[-40:] = 0.0
    x[-1, -2:] = 3.0
    weight = torch.ones(16, 2048, dtype=torch.float16)
    y = linear.product(x, weight, masks(logits))
    assert torch.equal(y[-1], 6 * ONE.expand(16))


@pytest.mark.usefixtures("only_the_last_program")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (5, 7)])
def test_large_batches_of_images(size, backward):
    channels = 32 * 1024 // (size[0] * size[1])
    count = 2**31 // (channels * size[0] * size[1]) + 2
    a = virtual(count, channels, *size)
    a[-8:] = 0.0
    a[-1, :, -1, -1] = 3.0
    weight = torch.ones(channels, channels, 1, 1, dtype=torch.float16)[:32, :]
    geometry = conv.Geometry(count, 1, channels, 32, size, size, (1, 1), (1, 1), (0,) * 4, (1, 1))
    if backward:
        weight = weight.transpose(0, 1).contiguous()
        geometry = geometry._replace(inputs=32, outputs=channels)
    m = masks(torch.full((1, *weight.shape), 100.0))
    y = conv.product(a, weight, m, geometry, backward=backward)
    assert torch.equal(y[-1, :, -1, -1], 3 * channels * ONE.expand(32))
