"""Channels scaled and shifted group by group, by the CUDA kernels on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mask_arguments import bytes_of
from ops.tolerance import check_close

import modmask_kernels as mm
from modmask_kernels import _native
from modmask_kernels.nn import MaskedAny
from modmask_kernels.ops import _group_affine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backward_on(simt, seed=0):
    def backward(dy, x, scale, need_x, need_scale, need_shift):
        groups, rows, channels, inner = dy.shape
        none = dy.new_empty(0)
        dx = torch.full_like(dy, 9.0) if need_x else none
        dscale = torch.full_like(scale, 9.0) if need_scale else none
        dshift = torch.full_like(scale, 9.0) if need_shift else none
        assert need_scale or need_shift  # else it is a product by itself
        simt.Device(seed).run(
            "group_affine_backward",
            dtype=str(dy.dtype).removeprefix("torch."),
            **{"groups": groups, "rows": rows, "channels": channels, "inner": inner},
            scale=scale.contiguous().numpy(),
            dy=bytes_of(dy.contiguous()),
            x=bytes_of(x.contiguous()) if need_scale else None,
            dx=bytes_of(dx) if need_x else None,
            dscale=dscale.numpy() if need_scale else None,
            dshift=dshift.numpy() if need_shift else None,
        )
        return dx, dscale, dshift

    return backward


@pytest.fixture
def kernels(simt, monkeypatch):
    """The operations, for CPU tensors."""

    def affine(x, scale, shift):
        groups, rows, channels, inner = x.shape
        y = torch.full(x.shape, 9.0, dtype=x.dtype)
        simt.Device().run(
            "group_affine",
            dtype=str(x.dtype).removeprefix("torch."),
            **{"groups": groups, "rows": rows, "channels": channels, "inner": inner},
            scale=scale.contiguous().numpy(),
            shift=None if shift is None else shift.contiguous().numpy(),
            x=bytes_of(x.contiguous()),
            y=bytes_of(y),
        )
        return y

    monkeypatch.setattr(
        _group_affine, "unserved", lambda dtype, device: None if dtype in DTYPES else "float64"
    )
    with torch.library._scoped_library("modmask", "IMPL") as library:
        library.impl("group_affine", affine, "CPU")
        library.impl("group_affine_backward", backward_on(simt), "CPU")
        yield


# x, the dimension where channels begin, how many of its dimensions are channels
SHAPES = [
    ((4, 1), 1, 1),
    ((12, 37), 1, 1),
    ((4, 3, 5), 2, 1),
    ((4, 3, 2, 5), 2, 2),
    ((72, 128), 1, 1),
    ((300, 130), 1, 1),
    ((8, 3, 7), 1, 1),
    ((8, 3, 5, 7), 1, 1),
    ((4, 2, 33, 40), 1, 1),
    ((140, 1, 2), 1, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim", "dims"), SHAPES, ids=str)
@pytest.mark.parametrize("shifted", [True, False])
def test_against_pytorch(kernels, shape, dim, dims, shifted, dtype):
    g = torch.Generator().manual_seed(1)
    groups, channels = 4 if shape[0] % 4 == 0 else 3, int(np.prod(shape[dim : dim + dims]))
    x, dy = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    scale, shift = (torch.randn(groups, channels, generator=g) for _ in range(2))

    def results(call, wide):
        leaves = {"x": x.to(wide or dtype), "scale": scale.to(wide or torch.float32)}
        if shifted:
            leaves["shift"] = shift.to(wide or torch.float32)
        leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
        y = call(leaves["x"], leaves["scale"], leaves.get("shift"), dim)
        found = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
        return [y.detach(), *found]

    def plain(x, scale, shift, dim):
        parts, rest = [], [1] * (x.dim() - dim - dims)
        for g, part in enumerate(x.chunk(groups)):
            y = part * scale[g].view(*shape[dim : dim + dims], *rest).to(x.dtype)
            if shift is not None:
                y = y + shift[g].view(*shape[dim : dim + dims], *rest).to(x.dtype)
            parts.append(y)
        return torch.cat(parts)

    ours = results(_group_affine.group_affine, None)
    names = ("y", "dx", "dscale", "dshift")
    exact = results(plain, torch.float64)
    assert torch.equal(ours[1], results(plain, None)[1]) or dtype != torch.float32
    check_close(zip(names, ours, results(plain, None), exact, strict=False))


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
def test_devices_without_kernels(simt, monkeypatch, needs):
    """What the operations do there is what the kernels do."""
    monkeypatch.setattr(_native, "cuda_unserved", lambda device: "too old")
    x, dy = torch.randn(2, 2, 5, 3, 4)
    scale, shift = torch.randn(2, 2, 3)
    plain = x * scale[:, None, :, None]
    assert torch.equal(_group_affine._forward(x, scale, None), plain)
    assert torch.equal(_group_affine._forward(x, scale, shift), plain + shift[:, None, :, None])
    found = _group_affine._gradients(dy, x, scale, *needs)
    for ours, exact in zip(backward_on(simt)(dy, x, scale, *needs), found, strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("inner", [1, 5])
def test_the_order_of_threads_changes_nothing(simt, inner):
    dy, x = torch.randn(2, 2, 70, 3, inner)
    scale = torch.randn(2, 3)
    first, second = (backward_on(simt, seed)(dy, x, scale, True, True, True) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("needs", [(True, True, False), (False, False, True), (False, True, True)])
@pytest.mark.parametrize("inner", [1, 5])
def test_only_what_is_needed(simt, inner, needs):
    dy, x = torch.randn(2, 2, 5, 3, inner)
    scale = torch.randn(2, 3)
    whole = backward_on(simt)(dy, x, scale, True, True, True)
    for all_, one, need in zip(whole, backward_on(simt)(dy, x, scale, *needs), needs, strict=True):
        assert torch.equal(one, all_ if need else dy.new_empty(0))


NORMS = {
    "layer": (lambda: torch.nn.LayerNorm(6), (12, 5, 6)),
    "layer of two dimensions": (lambda: torch.nn.LayerNorm((5, 6)), (12, 5, 6)),
    "rms": (lambda: torch.nn.RMSNorm(6), (12, 6)),
    "batch": (lambda: torch.nn.BatchNorm2d(6), (12, 6, 3, 3)),
    "group": (lambda: torch.nn.GroupNorm(2, 6), (12, 6, 3)),
}


@pytest.mark.parametrize("granularity", ["weight", "row"])
@pytest.mark.parametrize("name", NORMS)
def test_masked_normalisations(kernels, name, granularity):
    """The layer as on a GPU: gradients of the logits and of x."""
    torch.manual_seed(0)
    make, shape = NORMS[name]
    layer = MaskedAny.from_dense(
        make(), sets=["a", "b"], samples=3, mask_bias=True, granularity=granularity
    )
    for parameter in layer.train().parameters():
        torch.nn.init.normal_(parameter)
    names = [f"{n}_logits" for n in layer.masked]
    layer.seed = torch.tensor([3, 4])
    x, dy = torch.randn(2, *shape)

    def results(dtype):
        layer.to(dtype)
        leaf = x.to(dtype).requires_grad_()
        y = layer(leaf)
        leaves = (leaf, *(getattr(layer, n) for n in names))
        found = torch.autograd.grad(y, leaves, dy.to(dtype))
        return [y.detach(), *(t.to(dtype) for t in found)]

    ours = results(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_group_affine, "unserved", lambda dtype, device: "plain PyTorch")
        plain, exact = results(torch.float32), results(torch.float64)
    check_close(zip(("y", "dx", *names), ours, plain, exact, strict=True))


def test_explain_names_the_kernel(monkeypatch):
    layer = MaskedAny.from_dense(torch.nn.LayerNorm(6), samples=4)
    assert "plain PyTorch on this device" in mm.explain(layer)
    monkeypatch.setattr(_group_affine, "unserved", lambda dtype, device: None)
    assert "the cuda kernels" in mm.explain(layer)
