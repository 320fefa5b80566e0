"""CUDA kernels on operands of more than 2^31 elements, of which only what is touched exists.

The blocks at both ends of each grid run, and what they compute is compared with the same kernel on
the last rows by themselves.
"""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from mask_arguments import mask_arguments

from modmask_kernels import ops

MANY = 2**31
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def virtual(*shape, dtype=np.float32):
    """Zeros; a page of them takes memory when it is written."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return np.frombuffer(memory, dtype).reshape(shape)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).numpy()


@pytest.fixture
def device(simt):
    device = simt.Device()
    device.only_ends(2)
    return device


@pytest.fixture
def near(simt):
    """For the same kernel on operands of usual sizes."""
    return simt.Device()


COUNT, LAST = MANY + 4104, 4104  # of elements; of those at the end
DRAW = {"samples": 1, "tensor_id": 3, "tau": 0.7}
SEED = torch.tensor([5])


def test_masks(device, near):
    logits, values, dvalues, dlogits = (virtual(COUNT) for _ in range(4))
    bits = virtual(COUNT // 8, dtype=np.uint8)
    logits[-LAST:], dvalues[-LAST:] = random(LAST), random(LAST)
    far = {
        **mask_arguments(torch.zeros(1, 1), SEED, **DRAW),
        **{"count": COUNT, "logits": logits, "hard": True},
    }
    device.run("sample_bits", **far, bits=bits)
    device.run("sample_values", **far, values=values)
    device.run("sample_backward", **far, dvalues=dvalues, dlogits=dlogits)
    end = torch.from_numpy(logits[-LAST:].copy()).unsqueeze(0)
    draw = {"seed": SEED, **DRAW, "element_offset": COUNT - LAST}
    leaf = end.requires_grad_()
    expected = ops.sample_mask(leaf, **draw)
    where = COUNT - LAST + 4096  # of the last block
    own = slice(where - COUNT, None)
    assert np.array_equal(values[own], expected.detach().flatten()[own].numpy())
    packed = ops.pack_bits(expected.detach().flatten()[own] > 0)
    assert np.array_equal(bits[own.start // 8 :], packed.numpy())
    arguments = mask_arguments(end, SEED, **DRAW, element_offset=COUNT - LAST)
    slopes = np.zeros(LAST, np.float32)
    near.run(
        "sample_backward",
        **{**arguments, "count": LAST, "logits": end.detach().numpy()},
        dvalues=np.ascontiguousarray(dvalues[-LAST:]),
        dlogits=slopes,
    )
    assert np.array_equal(dlogits[own], slopes[own])
    assert slopes[own].any()


def test_packing(device):
    count = 2**32 + 77
    mask, bits = virtual(count, dtype=np.uint8), virtual(count // 8 + 1, dtype=np.uint8)
    mask[-77:] = random(77) > 0
    device.run("pack_bits", mask=mask, count=count, bits=bits)
    expected = ops.pack_bits(torch.from_numpy(mask[-77:].copy()))
    assert np.array_equal(bits[-10:], expected.numpy())


def test_blocks(device, near):
    """A mask of blocks of 2 x 4 weights."""

    def expand(device, rows, columns, small):
        to = virtual(rows * columns // 8 + 64, dtype=np.uint8)
        device.run(
            "expand_bits",
            whole=np.array([1, 1, rows, columns]),
            small=np.array([1, 1, rows // 2, columns // 4]),
            **{"from": small, "from_stride": small.size, "to": to, "to_stride": to.size},
            masks=1,
        )
        return to[: rows * columns // 8]

    rows, columns = 2**16 + 2, 2**15 * 2
    small = virtual(rows // 2 * (columns // 4) // 8, dtype=np.uint8)
    of_row = columns // 4 // 8
    small[-of_row:] = np.arange(of_row) % 251
    found = expand(device, rows, columns, small)
    expected = expand(near, 2, columns, np.ascontiguousarray(small[-of_row:]))
    assert np.array_equal(found[-1024:], expected[-1024:])
    assert expected[-1024:].any()


def linear(device, dims, operands, **more):
    inputs, outputs, rows, samples = dims
    arguments = mask_arguments(torch.zeros(1, 1), SEED, **{**DRAW, "samples": samples})
    arguments |= {"in": inputs, "out": outputs, "rows": rows, "dtype": "float32"}
    return {**arguments, **operands, **more}


class TestProducts:
    """A weight of 2^31 elements and more, each of whose ends is multiplied."""

    INPUTS, OUTPUTS = 1024, 2**21 + 5

    def near_operands(self, weight, logits, tile):
        """The last tile of outputs by itself, with the noise of its places."""
        begin = (self.OUTPUTS - 1) // tile * tile
        of_end = {"weight": weight[begin:], "logits": logits[begin:].reshape(-1)}
        of_end = {name: np.ascontiguousarray(t) for name, t in of_end.items()}
        return begin, of_end, {"element_offset": begin * self.INPUTS}

    @pytest.fixture
    def operands(self):
        shape = (self.OUTPUTS, self.INPUTS)
        weight, logits = virtual(*shape), virtual(*shape)
        weight[-32:], logits[-32:] = random(32, shape[1]), random(32, shape[1])
        return weight, logits

    def test_forward(self, device, near, operands):
        weight, logits = operands
        begin, of_end, offset = self.near_operands(weight, logits, 32)
        x = random(2, self.INPUTS)
        y, expected = virtual(2, self.OUTPUTS), np.zeros((2, self.OUTPUTS - begin), np.float32)
        dims = (self.INPUTS, self.OUTPUTS, 1, 2)
        far = linear(device, dims, {"weight": weight, "logits": logits}, x=x, y=y)
        device.run("masked_linear", **far)
        dims = (self.INPUTS, self.OUTPUTS - begin, 1, 2)
        near.run("masked_linear", **linear(near, dims, of_end, x=x, y=expected) | offset)
        # sums of one split against those of several
        np.testing.assert_allclose(y[1, begin:], expected[1], rtol=1e-4, atol=1e-4)
        assert expected.any()

    def test_gradients(self, device, near, operands):
        weight, logits = operands
        begin, of_end, offset = self.near_operands(weight, logits, 16)
        x, dy = random(2, self.INPUTS), virtual(2, self.OUTPUTS)
        dy[:, -32:] = random(2, 32)
        dlogits, dweight = virtual(*weight.shape), virtual(*weight.shape)
        dims = (self.INPUTS, self.OUTPUTS, 1, 2)
        given = {"weight": weight, "logits": logits, "x": x, "dy": dy}
        device.run(
            "masked_linear_gradients",
            **linear(device, dims, given, dlogits=dlogits, dweight=dweight),
        )
        dims = (self.INPUTS, self.OUTPUTS - begin, 1, 2)
        expected = [np.zeros((dims[1], dims[0]), np.float32) for _ in range(2)]
        given = {**of_end, "x": x, "dy": np.ascontiguousarray(dy[:, begin:])}
        near.run(
            "masked_linear_gradients",
            **linear(near, dims, given, dlogits=expected[0], dweight=expected[1]) | offset,
        )
        for found, exact in zip((dlogits, dweight), expected, strict=True):
            assert np.array_equal(found[begin:, -256:], exact[:, -256:])
            assert exact[:, -256:].any()

    def test_the_gradient_of_x(self, device, near):
        """The weight as wide as it was high."""
        inputs, outputs = 2**21 + 8, 1024
        weight, logits = virtual(outputs, inputs), virtual(outputs, inputs)
        weight[:, -8:] = random(outputs, 8)
        dy, dx = random(2, outputs), virtual(2, inputs)
        dims = (inputs, outputs, 1, 2)
        far = linear(device, dims, {"weight": weight, "logits": logits}, dy=dy, dx=dx)
        device.run("masked_linear_dx", **far)
        # by packed bits of the same noise, of the last columns alone
        rows = [
            ops.sample_mask(
                torch.zeros(1, 8),
                **{"seed": SEED, **DRAW, "samples": 2},
                element_offset=row * inputs + inputs - 8,
            )
            for row in range(outputs)
        ]
        kept = torch.cat(rows, 1).view(2, outputs, 8).double()
        columns = torch.from_numpy(weight[:, -8:].copy()).double()
        expected = torch.einsum("ko,oi,koi->ki", torch.from_numpy(dy).double(), columns, kept)
        np.testing.assert_allclose(dx[1, -8:], expected[1].numpy(), rtol=1e-4, atol=1e-4)

    def test_batches(self, device, near):
        """x, y and the parts of the product of 2^31 elements and more."""
        rows, inputs, outputs = 2**21 + 8, 8, 1032
        x, y = virtual(rows, inputs), virtual(rows, outputs)
        x[-8:] = random(8, inputs)
        given = {"weight": random(outputs, inputs), "logits": random(outputs, inputs)}
        device.run("masked_linear", **linear(device, (inputs, outputs, rows, 1), given, x=x, y=y))
        expected = np.zeros((8, outputs), np.float32)
        of_end = np.ascontiguousarray(x[-8:])
        dims = (inputs, outputs, 8, 1)
        near.run("masked_linear", **linear(near, dims, given, x=of_end, y=expected))
        # the last tile of outputs, which the last blocks have
        assert np.array_equal(y[-1, -8:], expected[-1, -8:])
        assert expected[-1, -8:].any()


@pytest.mark.parametrize("inner", [1, 16])
def test_affine(device, near, inner):
    rows, channels = 257, 2**23 // inner + 3
    shape = (rows, channels, inner)
    x, dy, y, dx = (virtual(*shape) for _ in range(4))
    scale, shift = random(1, channels), random(1, channels)
    for end in (slice(None, 8), slice(-8, None)):
        x[-1, end], dy[-1, end] = random(8, inner), random(8, inner) + 1
    sizes = {"groups": 1, "rows": rows, "channels": channels, "inner": inner, "dtype": "float32"}
    device.run("group_affine", **sizes, scale=scale, shift=shift, x=x, y=y)
    last = (scale[0, -8:, None], shift[0, -8:, None])
    if inner == 1:
        assert np.array_equal(y[-1, -8:], x[-1, -8:] * last[0] + last[1])
    dscale, dshift = np.zeros((2, channels), np.float32)
    device.run(
        "group_affine_backward",
        **sizes,
        scale=scale,
        **{"dy": dy, "x": x, "dx": dx, "dscale": dscale, "dshift": dshift},
    )
    tail = slice(-3, None) if inner == 1 else slice(-1, None)  # of the last block
    assert np.array_equal(dx[-1, tail], (dy[-1, -8:] * last[0])[tail])
    np.testing.assert_allclose(dshift[tail], dy[-1, tail].sum(-1), rtol=1e-5)
    # its sums over rows come from the first blocks
    sums = (dy[-1, :2] * x[-1, :2]).sum(-1)
    np.testing.assert_allclose(dscale[:2], sums, rtol=1e-4, atol=1e-5)


def test_selections(device):
    batch, places, inputs, outputs = 2**11 + 1, 1024, 1024, 8
    x, y = virtual(batch, places, inputs), virtual(batch, places, outputs)
    x[-1, -4:] = random(4, inputs)
    weight = random(outputs, inputs)
    bits = ops.pack_bits(torch.ones(outputs, inputs)[None] > 0).numpy()[None]
    device.run(
        "selected_product",
        **{"dtype": "float32", "convolution": False, "groups": 1, "sets": 1},
        **{"batch": batch, "places": places, "out": outputs, "depth": inputs},
        tiles=batch * places // 64 + 1,
        order=np.arange(batch),
        first_example=np.array([0, batch]),
        first_tile=np.array([0, batch * places // 64]),
        **{"x": x, "y": y, "weight": weight, "bits": bits},
    )
    np.testing.assert_allclose(y[-1, -4:], x[-1, -4:] @ weight.T, rtol=1e-4, atol=1e-4)


def test_selected_convolutions(device):
    """A kernel of one place; the last ones of the last image."""
    batch, channels, side, outputs = 2**11 + 1, 4, 512, 8
    places = side * side
    x, y = virtual(batch, channels, places), virtual(batch, outputs, places)
    x[-1, :, -64:] = random(channels, 64)
    weight = random(outputs, channels)
    bits = ops.pack_bits(torch.ones(outputs, channels) > 0).numpy()[None]
    device.run(
        "selected_product",
        **{"dtype": "float32", "convolution": True, "groups": 1, "sets": 1},
        **{"batch": batch, "places": places, "out": outputs, "depth": channels},
        sizes=np.array([channels, side, side, 1, 1, 1, 1, 0, 0, 1, 1, side]),
        tiles=batch * places // 64 + 1,
        order=np.arange(batch),
        first_example=np.array([0, batch]),
        first_tile=np.array([0, batch * places // 64]),
        **{"x": x, "y": y, "weight": weight, "bits": bits},
    )
    np.testing.assert_allclose(y[-1, :, -64:], weight @ x[-1, :, -64:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_cells(device, near, cell):
    """One step of 2^29 units: 5 values each are saved."""
    gates, hidden = (4, 512) if cell == "lstm" else (3, 512)
    batch = 2**20 + 1

    def run(device, batch, of_input, h, c):
        y, saved = virtual(1, batch, hidden), virtual(1, batch, 5, hidden)
        device.run(
            "rnn_cell_forward",
            **{"cell": cell, "steps": 1, "rows": batch, "groups": 1, "hidden": hidden},
            **{"gates": of_input, "y": y, "saved": saved, "h": h},
            **({"c": c} if cell == "lstm" else {}),
        )
        return y, saved

    of_input, h, c = virtual(batch, gates * hidden), virtual(batch, hidden), virtual(batch, hidden)
    for t in (of_input, h, c):
        t[-1] = random(t.shape[1])
    ends = [t[-1:].copy() for t in (of_input, h, c)]
    found, expected = run(device, batch, of_input, h, c), run(near, 1, *ends)
    for far, exact in zip(found, expected, strict=True):
        assert np.array_equal(far[0, -1], exact[0, 0])
        assert exact.any()

    def backward(device, batch, saved, dh):
        dgates, recurrent = virtual(batch, 4, hidden), virtual(batch, gates, hidden)
        dc = virtual(batch, hidden)
        device.run(
            "rnn_cell_backward",
            **{"cell": cell, "steps": 1, "rows": batch, "groups": 1, "hidden": hidden},
            **{"saved": saved, "dgates": dgates, "recurrent": recurrent, "dh": dh, "dc": dc},
        )
        return dgates, recurrent, dh, dc

    dh = virtual(batch, hidden)
    dh[-1] = random(hidden)
    end = (expected[1][0].copy(), dh[-1:].copy())
    found, expected = backward(device, batch, found[1][0], dh), backward(near, 1, *end)
    for far, exact in zip(found, expected, strict=True):
        assert np.array_equal(far[-1], exact[0])
    assert expected[0].any()
