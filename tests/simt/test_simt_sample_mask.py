"""`sample_mask` on the device: the bits of the CPU, values and gradients of the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mask_arguments import mask_arguments
from ops.tolerance import check_close

from modmask_kernels import ops
from modmask_kernels.ops import estimators
from modmask_kernels.ops.sample_mask import reference

COUNTS = [1, 2, 3, 7, 8, 9, 31, 33, 255, 2047, 2048, 2049, 4099]
OFFSETS = [0, 1, 2, 3, 4094, 2**34 - 2, 2**40 + 1]
SEEDS = {
    "one": torch.tensor(-3),
    "per set": torch.tensor([5, 2**40]),
    "draws": torch.tensor([[1, 2], [3, -4]]),
    "none": None,
}
ESTIMATORS = {
    "gumbel_sigmoid": "gumbel_sigmoid",
    "hard_concrete": "hard_concrete",
    "hard_concrete clamped": estimators.hard_concrete((-0.2, 1.3), clamp=0.01),
    "sigmoid": "sigmoid",
    "threshold": estimators.threshold(0.5),
    "threshold inclusive": estimators.threshold(0.5, inclusive=True),
    "top_k": estimators.top_k(0.3),
}


def draw(*shape, spread=3.0, seed=0):
    """Logits, some of which are equal."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * spread * 16).round() / 16


class Masks:
    """The kernels of one call, beside what the CPU says."""

    def __init__(self, simt, logits, seed, **options):
        self.logits, self.seed, self.options = logits, seed, options
        self.arguments = mask_arguments(logits, seed, **options)
        self.sets, self.count = logits.shape[0], logits[0].numel()
        self.samples = self.arguments["samples"]
        self.device = simt.Device(self.count)

    def run(self, kernel, **more):
        # guards of NaN beside what the kernel may touch would not do: the header checks addresses
        self.device.run(
            kernel, logits=self.logits.numpy(), count=self.count, **self.arguments, **more
        )

    def bits(self):
        bits = np.full((self.samples, self.sets, -(-self.count // 8)), 0xAA, np.uint8)
        self.run("sample_bits", bits=bits)
        return torch.from_numpy(bits)

    def values(self, hard):
        values = torch.full((self.samples, *self.logits.shape), 7.0)
        self.run("sample_values", values=values.numpy(), hard=hard)
        return values

    def gradient(self, dvalues):
        dlogits = torch.full(self.logits.shape, 7.0)
        self.run("sample_backward", dvalues=dvalues.numpy(), dlogits=dlogits.numpy())
        return dlogits

    def expected(self, dtype, hard):
        """The reference's values in a dtype, with the logits that they come from."""
        leaf = self.logits.to(dtype, copy=True).requires_grad_()
        options = {"estimator": estimators.GUMBEL_SIGMOID, **self.options, "hard": hard}
        options["estimator"] = estimators.resolve(options["estimator"])
        seed = self.seed
        if seed is not None and seed.dim() == 0:
            seed = seed.expand(self.sets)
        if seed is None:
            # a set after the other: the sets are one tensor each
            rows = [reference.sample_mask(row, seed=None, **options) for row in leaf]
            return torch.stack(rows, 1), leaf
        return reference.sample_mask(leaf, seed=seed, **options), leaf

    def check(self, *, soft=True):
        hard, _ = self.expected(torch.float32, True)
        assert torch.equal(self.values(True), hard.detach())
        packed = [ops.pack_bits(m > 0) for m in hard.detach().reshape(-1, self.count)]
        bits = self.bits()
        assert torch.equal(bits, torch.stack(packed).view(bits.shape))
        if soft:
            values = [self.expected(d, False)[0].detach() for d in (torch.float32, torch.float64)]
            check_close([("values", self.values(False), *values)])
        dvalues = draw(self.samples, *self.logits.shape, seed=9)
        gradients = []
        for dtype in (torch.float32, torch.float64):
            values, leaf = self.expected(dtype, True)
            gradients.append(torch.autograd.grad(values, leaf, dvalues.to(dtype))[0])
        check_close([("dlogits", self.gradient(dvalues), *gradients)])


@pytest.mark.parametrize("count", COUNTS)
def test_counts(simt, count):
    Masks(simt, draw(2, count), SEEDS["per set"], samples=3, tensor_id=4, sample_offset=5).check()


@pytest.mark.parametrize("offset", OFFSETS)
def test_element_offsets(simt, offset):
    Masks(simt, draw(1, 263), SEEDS["one"], samples=2, element_offset=offset).check()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("antithetic", [False, True])
def test_seeds(simt, seed, antithetic):
    options = {"samples": 4, "sample_offset": 3, "antithetic": antithetic}
    Masks(simt, draw(2, 130), SEEDS[seed], **options).check()


@pytest.mark.parametrize(
    ("seed", "where"),
    [
        (1, {"tensor_id": 2**32 - 1}),
        (1, {"sample_offset": 2**32 - 3}),
        (-(2**63), {}),
        (2**63 - 1, {"element_offset": 2**62}),
    ],
)
def test_extreme_counters(simt, seed, where):
    Masks(simt, draw(1, 50), torch.tensor(seed), samples=2, **where).check()


@pytest.mark.parametrize("tau", [0.1, 0.5, 2 / 3, 1.0, 4.0])
def test_temperatures(simt, tau):
    Masks(simt, draw(1, 1031), SEEDS["one"], samples=2, tau=tau).check()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("seed", ["per set", "none"])
def test_estimators(simt, estimator, seed):
    options = {"samples": 2, "estimator": ESTIMATORS[estimator], "tau": 2 / 3}
    Masks(simt, draw(2, 333), SEEDS[seed], **options).check()


@pytest.mark.parametrize("shape", [(8, 12), (5, 8, 3), (3, 16, 2, 2), (7, 24)])
@pytest.mark.parametrize("n_of_m", [(2, 4), (1, 4), (1, 2), (3, 8), (4, 4)], ids=str)
@pytest.mark.parametrize("seed", ["per set", "none"])
def test_n_of_m(simt, shape, n_of_m, seed):
    if shape[1] % n_of_m[1]:
        shape = (shape[0], shape[1] * 2, *shape[2:])
    logits = draw(2, *shape)
    Masks(simt, logits, SEEDS[seed], samples=2, n_of_m=n_of_m).check(soft=False)


def test_n_of_m_of_any_m(simt):
    for among in (3, 5, 16):
        masks = Masks(simt, draw(1, 3, among * 2), SEEDS["one"], samples=2, n_of_m=(2, among))
        masks.check(soft=False)


def test_logits_that_are_no_numbers(simt):
    special = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 80.0, -80.0]
    )
    logits = special.repeat(40)[None]
    for seed in ("one", "none"):
        masks = Masks(simt, logits, SEEDS[seed], samples=2)
        assert torch.equal(masks.values(True), masks.expected(torch.float32, True)[0])
        assert torch.equal(masks.values(True)[0, :, 0], torch.zeros(1))


def test_sets_that_share_logits(simt):
    logits = draw(1, 100)
    masks = Masks(simt, logits, SEEDS["one"], samples=2)
    masks.sets = masks.arguments["sets"] = 2
    masks.arguments |= {"shared": True, "seeds": SEEDS["per set"].numpy(), "seed_stride": 1}
    alone = Masks(simt, logits.repeat(2, 1), SEEDS["per set"], samples=2)
    assert torch.equal(masks.bits(), alone.bits())


def test_the_same_twice_and_in_any_order(simt):
    masks = Masks(simt, draw(2, 3000), SEEDS["per set"], samples=5)
    dvalues = draw(5, 2, 3000)
    first = masks.gradient(dvalues)
    masks.device = simt.Device(77)  # threads and blocks in another order
    assert torch.equal(first, masks.gradient(dvalues))


@pytest.mark.parametrize("samples", [1, 8])
def test_logits_are_read_once_for_all_samples(simt, samples):
    count = 8192
    masks = Masks(simt, draw(1, count), SEEDS["one"], samples=samples)
    masks.bits()
    traffic = masks.device.traffic()
    assert traffic["logits"]["read_bytes"] == 4 * count
    assert traffic["logits"]["read_sectors"] * 32 <= 4 * count + 32
    assert traffic["logits"]["accesses"] == count // 4  # of 16 bytes
    assert traffic["bits"]["written_bytes"] == samples * count // 8
    assert traffic["bits"]["read_bytes"] == 0


def test_backward_reads_and_writes_once(simt):
    count, samples = 4096, 4
    masks = Masks(simt, draw(1, count), SEEDS["one"], samples=samples)
    masks.gradient(draw(samples, 1, count))
    traffic = masks.device.traffic()
    assert traffic["logits"]["read_bytes"] == 4 * count
    assert traffic["dvalues"]["read_bytes"] == 4 * count * samples
    assert traffic["dlogits"]["written_bytes"] == 4 * count
    assert traffic["dlogits"]["read_bytes"] == 0


@pytest.mark.parametrize("tau", [0.05, 0.3, 1.0, 3.0])
def test_surrogate(simt, tau):
    generator = torch.Generator().manual_seed(1)
    logits = torch.cat(
        [torch.randn(4000, generator=generator) * 5, torch.linspace(-40, 40, 801), torch.zeros(8)]
    )
    words = torch.randint(0, 2**23, logits.shape, generator=generator)
    words[-8:] = torch.tensor([0, 1, 2**23 - 1, 2**22, 2**22 - 1, 5, 2**23 - 2, 100])
    values, slopes = torch.zeros_like(logits), torch.zeros_like(logits)
    simt.Device().run(
        "surrogate",
        logits=logits.numpy(),
        words=words.to(torch.int32).numpy(),
        values=values.numpy(),
        slopes=slopes.numpy(),
        tau=tau,
    )
    expected = []
    for dtype in (torch.float32, torch.float64):
        leaf = logits.to(dtype).requires_grad_()
        soft = reference.soft(leaf, words, tau)
        expected.append((soft.detach(), torch.autograd.grad(soft.sum(), leaf)[0]))
    (plain, exact) = expected
    check_close([("value", values, plain[0], exact[0]), ("slope", slopes, plain[1], exact[1])])
