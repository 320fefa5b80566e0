"""`masked_conv` through the Triton kernels in Triton's interpreter, and what chooses for them."""

import pytest
import torch
from test_masked_conv import apply, check, random_like, tensors_of

from modmask_kernels import _native, ops
from modmask_kernels.ops import _gpu, _gpu_masks, estimators
from modmask_kernels.ops.masked_conv import gpu, product, triton
from modmask_kernels.ops.sample_mask import triton as sample_mask

pytestmark = pytest.mark.usefixtures("on_triton")
SMALL = {"images": 1, "channels": 3, "outputs": 5, "size": (5, 6), "sets": 1}


# the tolerance compares largest errors, which a handful of bias gradients do not tell
MANY = ("x", "weight", "logits", "bias")


@pytest.fixture(params=_gpu.SOURCES)
def source(request, monkeypatch):
    choose = _gpu.choose
    monkeypatch.setattr(_gpu, "choose", lambda p, device: choose(p, device, request.param))
    monkeypatch.setattr(_gpu, "FORCED_SOURCE", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, source):
    check(*tensors_of(**SMALL, dtype=dtype, padding=1), MANY)


@pytest.mark.parametrize(
    "change",
    [
        {"sets": 2, "seeds": "each", "images": 2},
        {"sets": 2, "seeds": "one"},
        {"seeds": None},
        {"masked_bias": False, "samples": 1},
        {"padding": (2, 0), "element_offset": 6},
        {"stride": 2, "padding": (1, 2), "element_offset": 2**33 + 4, "channels": 4},
        {"stride": (3, 1), "dilation": (2, 1), "padding": 2, "sample_offset": 3},
        {"groups": 3, "outputs": 2, "antithetic": True},
        {"groups": 5, "channels": 1, "outputs": 1, "padding": 1, "tensor_id": 2**32 - 2},
        {"groups": 2, "channels": 4, "kernel": (1, 1), "bias_tensor_id": 17},
        {"kernel": (1, 1), "stride": 2, "tau": 0.6},
        {"kernel": (4, 2), "padding": (2, 1), "size": (2, 3)},
    ],
    ids=str,
)
def test_options(change, source):
    check(*tensors_of(**{**SMALL, **change}), MANY)


@pytest.mark.parametrize(
    "change",
    [
        # images that fill tiles, with and without neighbouring loads
        {"size": (8, 8), "kernel": (1, 1), "images": 2},
        {"size": (8, 8), "padding": 1, "images": 2, "samples": 1},
        # several tiles of outputs, of channels and of depth
        {"channels": 17, "outputs": 21, "size": (4, 3), "padding": 1, "samples": 1},
        {"channels": 40, "outputs": 33, "size": (2, 1), "kernel": (1, 1), "samples": 1},
        {"size": (1, 1), "kernel": (1, 1), "images": 35, "samples": 1},
    ],
    ids=str,
)
def test_sizes(change, source):
    check(*tensors_of(**{**SMALL, **change}), MANY)


@pytest.mark.parametrize(
    "options",
    [
        {"hard": False, "tau": 0.6, "antithetic": True},
        {"hard": False, "estimator": estimators.hard_concrete(clamp=0.05), "tau": 2 / 3},
        {"estimator": estimators.hard_concrete()},
        {"estimator": estimators.sigmoid(), "hard": False},
        {"estimator": estimators.threshold(0.1)},
    ],
    ids=str,
)
def test_soft_masks_and_estimators(options):
    check(*tensors_of(**SMALL, padding=1, samples=1, **options), MANY)


PACKED = [
    {"estimator": estimators.top_k(0.4)},
    {"estimator": estimators.top_k(0.4), "seeds": None, "masked_bias": False},
    {"n_of_m": (1, 3), "element_offset": 5},
    {"n_of_m": (2, 4), "channels": 4, "groups": 2, "outputs": 4, "stride": 2, "sets": 2},
    {"blocks": (1, 1, 3, 3), "antithetic": True, "tau": 0.6},
    {"blocks": (2, 4, 1, 3), "channels": 8, "outputs": 6, "element_offset": 7, "padding": 1},
    {"blocks": (5, 1, 1, 1), "seeds": None, "masked_bias": False},
    {"blocks": (1, 3, 1, 1), "estimator": estimators.hard_concrete(), "sets": 2, "seeds": "one"},
]


@pytest.mark.parametrize("change", PACKED, ids=str)
@pytest.mark.usefixtures("masks_of_the_library")
def test_masks_packed_by_the_library(change):
    change = {**SMALL, **change}
    blocks = change.pop("blocks", (1, 1, 1, 1))
    tensors, options = tensors_of(**change)
    small = tuple(slice(None, None, n) for n in blocks)
    tensors["logits"] = tensors["logits"][(slice(None), *small)].contiguous()
    check(tensors, options, MANY)
    check(tensors, options, ("weight",))


@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("options", [{}, {"estimator": estimators.threshold(0.1)}], ids=str)
def test_gradients_pack_the_masks(options, count, monkeypatch):
    """The bits that dx reads are those of the kernel that packs alone."""
    monkeypatch.setattr(triton, "splits", lambda *_: count)
    tensors, draw = tensors_of(
        channels=8, outputs=7, kernel=(2, 4), size=(5, 6), samples=2, groups=2, **options
    )
    rule = estimators.arguments(draw.get("estimator", "gumbel_sigmoid"), False)
    masks = _gpu_masks.masks_of(
        tensors["logits"], None, draw["seed"], 4, (3, 4, 0, 0, 2, 1.0, True, *rule, [])
    )
    x, weight = tensors["x"], tensors["weight"]
    geometry = triton.Geometry(2, 2, 8, 7, (5, 6), (4, 3), (2, 4), (1, 1), (0, 0, 0, 0), (1, 1))
    dy = random_like(torch.empty(x.shape[0], 14, 4, 3))
    assert triton.packs(masks, geometry, False, True)
    words = sample_mask.empty_words(masks)
    _, dlogits = triton.gradients(dy, x, weight, masks, geometry, words=words)
    used = weight.numel() // 32
    assert torch.equal(words[..., :used], sample_mask.pack(masks)[..., :used])
    assert torch.equal(dlogits, triton.gradients(dy, x, weight, masks, geometry)[1])


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_sums_in_several_parts(count, monkeypatch):
    monkeypatch.setattr(triton, "splits", lambda *_: count)
    check(*tensors_of(**SMALL, samples=2, padding=1), wanted=("weight", "logits"))


def test_how_many_parts():
    assert triton.splits(1000, 4, 100) == 1
    assert triton.splits(100, 4, 100) == 2
    assert triton.splits(10, 4, 1000) == 24
    assert triton.splits(10, 4, 20) == 8
    assert triton.splits(1, 4, 3) == 4
    for tiles in range(1, 300, 7):
        for samples in (1, 3, 8):
            assert triton.splits(tiles, samples, 10_000) * tiles <= max(triton.PROGRAMS, tiles)


@pytest.mark.parametrize("name", MANY)
def test_each_gradient_alone(name):
    check(*tensors_of(**SMALL), wanted=(name,))


@pytest.mark.parametrize("sets", [1, 2])
def test_the_gradients_of_many_biases(sets):
    small = {**SMALL, "outputs": 77, "sets": sets, "kernel": (1, 1)}
    check(*tensors_of(**small), wanted=("bias", "bias_logits"))


def test_an_empty_batch():
    tensors, options = tensors_of(**SMALL)
    tensors["x"] = tensors["x"][:0]
    result = apply(ops.masked_conv2d, tensors, options, torch.empty(0, 5, 3, 4))
    assert result["y"].shape == (0, 5, 3, 4)
    for name, t in tensors.items():
        assert torch.equal(result[name], torch.zeros_like(t)), name


@pytest.mark.parametrize("channels", [3, 4])
def test_the_masks_of_the_cpu(channels, source):
    """Patches that are unit vectors show the masks of a weight of ones; so does dx of such a dy."""
    tensors, options = tensors_of(channels=channels, outputs=18, kernel=(3, 2), sets=1, samples=2)
    options["element_offset"] = 4
    depth = 6 * channels
    x = torch.eye(depth).view(depth, channels, 3, 2).repeat(2, 1, 1, 1).requires_grad_()
    ones = torch.ones_like(tensors["weight"])
    y = ops.masked_conv2d(x, ones, tensors["logits"], **options)
    masks = ops.sample_mask(tensors["logits"], **options).transpose(0, 1).reshape(2, 18, -1)
    assert torch.equal(y.view(2, depth, 18).transpose(1, 2), masks)
    dy = torch.eye(18).repeat(2, depth // 18 + 1, 1)[:, :depth]
    (dx,) = torch.autograd.grad(y, x, dy.reshape(y.shape))
    assert torch.equal(dx.view(2, depth, depth)[:, :18], masks)


def test_sets_that_share_logits():
    tensors, options = tensors_of(**{**SMALL, "sets": 2})
    for name in ("logits", "bias_logits"):
        tensors[name] = tensors[name][:1].expand(2, *tensors[name].shape[1:])
    check(tensors, options, MANY)


def test_one_dimension_is_a_row_of_two():
    tensors, options = tensors_of(**{**SMALL, "size": (1, 20), "kernel": (1, 4)})
    y = ops.masked_conv2d(**tensors, **options, stride=(1, 2), padding=(0, 3))
    rows = {n: t.squeeze(-2) if n in ("x", "weight", "logits") else t for n, t in tensors.items()}
    flat = ops.masked_conv1d(**rows, **options, stride=2, padding=3)
    assert torch.equal(flat, y.squeeze(2))


def test_layout_changes_nothing():
    tensors, options = tensors_of(**SMALL, padding=1)
    dy = random_like(ops.masked_conv2d(**tensors, **options))
    first = apply(ops.masked_conv2d, tensors, options, dy)
    turned = {
        **tensors,
        "x": tensors["x"].to(memory_format=torch.channels_last),
        "weight": tensors["weight"].transpose(0, 3).contiguous().transpose(0, 3),
        "bias": tensors["bias"].repeat_interleave(2)[::2],
    }
    again = apply(ops.masked_conv2d, turned, options, dy.transpose(2, 3).contiguous().mT)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_several_seeds_of_a_set():
    """vmap over seeds: draws of a set."""
    tensors, options = tensors_of(**SMALL)
    options.pop("seed")
    seeds = torch.tensor([3, 4])

    def of(seed):
        return ops.masked_conv2d(**tensors, **options, seed=seed)

    assert torch.equal(torch.vmap(of)(seeds), torch.stack([of(s) for s in seeds]))


def test_the_gradient_of_x_takes_bits():
    p = gpu.sizes(*(torch.empty(1, 8, 3, 3),) * 2, fake_masks(), 64)
    assert _gpu.choose(p, _gpu.DEVICES[1]).source == "regenerate"
    assert gpu.choose(p, _gpu.DEVICES[1], 9, backward=True).source == "bits"
    assert gpu.choose(p, _gpu.DEVICES[1], 1, backward=True).source == "regenerate"
    soft = p._replace(hard=False)
    assert gpu.choose(soft, _gpu.DEVICES[1], 9, backward=True).source == "regenerate"


def fake_masks():
    logits = torch.empty(1, 1, 8, 3, 3)
    plain = estimators.arguments("gumbel_sigmoid", False)
    return _gpu_masks.masks_of(
        logits, None, torch.tensor(0), 4, (0, 1, 0, 0, 1, 1.0, True, *plain, None)
    )


def test_what_is_not_served(monkeypatch):
    monkeypatch.setattr(_native, "cuda_loaded", lambda: False)
    tensors, _ = tensors_of(**SMALL)
    x, weight, logits = (tensors[n] for n in ("x", "weight", "logits"))
    options = ([1, 1], [0] * 4, [1, 1], 1)
    draw = (0, 1, 0, 0, 2, 1.0, True)
    plain = estimators.arguments("gumbel_sigmoid", False)

    def unserved(x, weight, logits, *of):
        return gpu.unserved(x, weight, logits, None, None, None, *options, *draw, *of)

    assert unserved(x, weight, logits, *plain, []) is None
    assert "n_of_m" in unserved(x, weight, logits, *plain, [1, 3])
    assert "top_k" in unserved(x, weight, logits, *estimators.arguments("top_k", False), [])
    assert "float64" in unserved(x.double(), weight, logits, *plain, [])
    assert "smaller" in unserved(x, weight, logits[:, :1], *plain, [])

    def meta(*shape):
        return torch.empty(shape, device="meta")

    large = meta(1, 2**11, 2**10, 2**10)
    few = meta(1, 2**11, 3, 3)
    assert "images of this size" in unserved(large, few, few, *plain, [])
    deep = meta(2, 2**20, 3, 3)
    assert "weights of a channel" in unserved(meta(1, 2**20, 3, 3), deep, deep, *plain, [])
    # the reference serves then
    operands = (x, weight, logits, None, None, None, *options, *draw, *plain, [1, 3])
    assert torch.equal(gpu.forward(*operands), product.reference(*operands))
