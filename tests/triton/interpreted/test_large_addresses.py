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


@pytest.fixture
def only_the_last_steps(monkeypatch):
    """Of long loops in kernels."""

    def steps(*limits):
        full = range(*(int(n) for n in limits))
        return full if len(full) < 1000 else full[-1:]

    for module in (linear, conv):
        monkeypatch.setattr(module, "range", steps, raising=False)


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


def last_words(m, kept):
    """Packed masks of a large weight of which only the last outputs, `kept`, are written."""
    count = m.logits[0].numel()
    first = count - kept.numel()
    assert first % 32 == 0
    words = torch.empty(1, 1, count // 32 + 16, dtype=torch.int32)
    bits = kept.flatten().to(torch.int64).view(-1, 32) << torch.arange(32)
    words[0, 0, first // 32 : count // 32] = bits.sum(1).to(torch.int32)
    return words


@pytest.mark.usefixtures("only_the_last_program", "only_the_last_steps")
@pytest.mark.parametrize("source", ["bits", "regenerate"])
@pytest.mark.parametrize("kernel", [None, (1, 1), (4, 2)], ids=["linear", "1x1", "4x2"])
def test_large_weights_of_gradients(kernel, source):
    """dx, and of a convolution y, dweight and dlogits, where the last output alone counts."""
    outputs, depth = 2**20 + 5, 2080
    inputs = depth if kernel is None else depth // (kernel[0] * kernel[1])
    weight, logits = virtual(outputs, depth), virtual(1, outputs, depth, dtype=torch.float32)
    weight[-40:] = 1.0
    logits[0, -40:] = torch.linspace(-2, 2, 40 * depth).view(40, depth)
    kept = ops.sample_mask(logits[:, -4:], seed=SEED, element_offset=(outputs - 4) * depth)[0, 0]
    dy = torch.zeros(1, outputs, dtype=torch.float16)
    dy[0, -1] = 2.0
    if kernel is None:
        m = masks(logits)
        words = last_words(m, kept) if source == "bits" else None
        dx = linear.product(dy, weight, m, None, words, backward=True)
        assert torch.equal(dx[0], 2 * kept[-1].half())
        return
    shape = (inputs, *kernel)
    weight, m = weight.view(outputs, *shape), masks(logits.view(1, outputs, *shape))
    words = last_words(m, kept) if source == "bits" else None
    geometry = conv.Geometry(
        1, 1, inputs, outputs, kernel, (1, 1), kernel, (1, 1), (0,) * 4, (1, 1)
    )
    dy = dy.view(1, outputs, 1, 1)
    dx = conv.product(dy, weight, m, geometry, None, words, backward=True)
    assert torch.equal(dx[0].flatten(), 2 * kept[-1].half())
    x = torch.zeros(1, *shape, dtype=torch.float16)
    x[0, -1, -1, -1] = 1.0
    y = conv.product(x, weight, m, geometry, None, words)
    assert torch.equal(y[0, -4:, 0, 0], kept[:, -1].half())
    if source == "bits":
        dweight, _ = conv.gradients(
            dy, x, weight, m, geometry, need_weight=True, need_logits=False, words=words
        )
        assert torch.equal(dweight[-1].flatten()[-1:], 2 * kept[-1, -1:].half())
        return
    _, dlogits = conv.gradients(dy, x, weight, m, geometry)
    leaf = logits[:, -1:].clone().requires_grad_()
    ops.sample_mask(leaf, seed=SEED, element_offset=(outputs - 1) * depth).sum().backward()
    torch.testing.assert_close(dlogits.flatten()[-1], 2 * leaf.grad.flatten()[-1])


@pytest.mark.usefixtures("only_the_last_program")
@pytest.mark.parametrize("columns", [16, 2048])
def test_large_batches_of_dx(columns):
    """dy of 2^31 elements, and dx of as many."""
    outputs = 2048 if columns == 16 else 16
    rows = 2**20 + 3
    dy = torch.empty(rows, outputs, dtype=torch.float16)
    dy[-40:] = 0.0
    dy[-1, -2:] = 3.0
    weight = torch.ones(outputs, columns, dtype=torch.float16)
    dx = linear.product(dy, weight, masks(torch.full((1, *weight.shape), 100.0)), backward=True)
    assert max(dy.numel(), dx.numel()) > 2**31
    assert torch.equal(dx[-1, -16:], 6 * ONE.expand(16))


@pytest.mark.usefixtures("only_the_last_steps")
@pytest.mark.parametrize("need", ["need_weight", "need_logits"])
@pytest.mark.parametrize("size", [None, (32, 32), (5, 7)], ids=str)
def test_large_batches_of_weight_gradients(size, need, monkeypatch):
    """Both factors of products over 2^31 elements and more."""
    monkeypatch.setattr(conv, "splits", lambda *_: 2)
    wanted = {"need_weight": False, "need_logits": False, need: True}
    area = 1 if size is None else size[0] * size[1]
    count = 2**31 // (32 * area) + 2
    x, dy = (virtual(count, 32, *(size or ())) for _ in range(2))
    last = (-1, slice(-2, None)) if size is None else (-1, slice(-2, None), -1, -1)
    for t in (x, dy):
        t[-70:] = 0.0
        t[last] = 3.0
    weight = torch.ones(32, 32, *([] if size is None else [1, 1]), dtype=torch.float16)
    m = masks(torch.zeros(1, *weight.shape) + 1e-30, seed=None)  # kept, with a slope of 1/4
    if size is None:
        found = linear.gradients(dy, x, weight, m, **wanted)
    else:
        geometry = conv.Geometry(count, 1, 32, 32, size, size, (1, 1), (1, 1), (0,) * 4, (1, 1))
        found = conv.gradients(dy, x, weight, m, geometry, **wanted)
    expected = torch.zeros(32, 32)
    expected[-2:, -2:] = 9.0 if need == "need_weight" else 9.0 / 4
    gradient = found[0] if need == "need_weight" else found[1][0]
    assert torch.equal(gradient.float().view(32, 32), expected)


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
