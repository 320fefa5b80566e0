"""What training loops do around a layer holds for the masked ones: mixed precision, accumulation,
checkpointing, compilation, functional transforms."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import modmask_kernels as mm
from modmask_kernels import _native

needs_kernels = pytest.mark.skipif(not _native.available(), reason="tests the compiled kernels")
KINDS = ["linear", "conv2d"]
SAMPLES = 2


def build(kind):
    """A masked network with fixed seeds, and its input for a number of rows."""
    torch.manual_seed(0)
    if kind == "linear":
        model = nn.Sequential(nn.Linear(10, 24), nn.GELU(), nn.Linear(24, 5))
    else:
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 5, 3, stride=2)
        )
    mm.mask_model(model, samples=SAMPLES, init=0.4)
    seeds(model, 0)
    return model


def seeds(model, step):
    for layer in mm.masks.masked_layers(model).values():
        layer.seed = torch.tensor([step])


def batch(kind, rows, seed=1):
    shape = (rows, 10) if kind == "linear" else (rows, 3, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model, loss):
    return torch.autograd.grad(loss, logits_of(model))


@pytest.mark.parametrize("kind", KINDS)
class TestMixedPrecision:
    def test_bfloat16_autocast(self, kind):
        model, x = build(kind), batch(kind, 8)
        exact = gradients(model, model(x).square().mean())
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            assert y.dtype == torch.bfloat16
            loss = y.float().square().mean()
        found = gradients(model, loss)
        for got, expected in zip(found, exact, strict=True):
            assert got.dtype == torch.float32
            assert torch.allclose(got, expected, atol=0.05 * float(expected.abs().max()))

    def test_float16_with_a_scaler_takes_the_steps_of_float32(self, kind):
        steps = {}
        for dtype in (torch.float32, torch.float16):
            model = build(kind)
            optimizer = torch.optim.SGD(logits_of(model), lr=5.0)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
            for step in range(3):
                seeds(model, step)
                with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
                    y = model(batch(kind, 8, step))
                assert y.dtype == dtype
                optimizer.zero_grad()
                scaler.scale(y.float().square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
            assert scaler.get_scale() == 2.0**12  # no step was skipped
            steps[dtype] = torch.cat([p.detach().flatten() - 0.4 for p in logits_of(model)])
        exact, low = steps.values()
        assert float((exact - low).abs().max()) < 0.05 * float(exact.abs().max())

    def test_a_scaler_skips_steps_that_overflow(self, kind):
        model = build(kind)
        before = [p.detach().clone() for p in logits_of(model)]
        optimizer = torch.optim.SGD(logits_of(model), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        with torch.autocast("cpu", torch.float16):
            loss = model(batch(kind, 8)).float().mean()
        scaler.scale(loss * 1e30 * 1e30).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**15
        assert all(torch.equal(a, b) for a, b in zip(before, logits_of(model), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_are_those_of_the_joint_batch(kind):
    """Part r of the batch draws the samples r * samples and on, as rank r of a job does."""
    model, x = build(kind), batch(kind, 16)
    layers = mm.masks.masked_layers(model).values()
    for layer in layers:
        layer.samples = 4
    expected = gradients(model, model(x).square().mean())
    for layer in layers:
        layer.samples = 2
    for part, rows in enumerate(x.chunk(2)):
        for layer in layers:
            layer.sample_offset = 2 * part
        (model(rows).square().mean() / 2).backward()
    for parameter, wanted in zip(logits_of(model), expected, strict=True):
        assert torch.allclose(parameter.grad, wanted, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_nothing(kind, reentrant):
    model, x = build(kind), batch(kind, 8).requires_grad_()
    expected = torch.autograd.grad(model(x).square().mean(), [x, *logits_of(model)])
    for parameter in logits_of(model):
        parameter.grad = None
    checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
    for tensor, wanted in zip([x, *logits_of(model)], expected, strict=True):
        assert torch.equal(tensor.grad, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_recomputes_masks_that_a_layer_drew_itself(kind):
    """Without a seed of its own a layer draws one, and PyTorch restores the generator."""
    model, x = build(kind), batch(kind, 8)
    for layer in mm.masks.masked_layers(model).values():
        layer.seed = None
    found = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(5)
        found.append(gradients(model, call(x).square().mean()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_kernels
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_once_for_all_batch_sizes(kind, backend):
    model = build(kind)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for step, rows in enumerate((4, 8, 18, 32)):
        seeds(model, step)
        x = batch(kind, rows, rows)
        y = compiled(x)
        expected = model(x)
        assert torch.allclose(y, expected, atol=1e-5)
        pairs = zip(
            gradients(model, y.square().mean()),
            gradients(model, expected.square().mean()),
            strict=True,
        )
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], f"compiled anew for another batch: {counts}"


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
class TestFunctionalTransforms:
    def call(self, model, x):
        def loss(logits, seed):
            for layer in mm.masks.masked_layers(model).values():
                layer.seed = seed
            y = torch.func.functional_call(model, logits, (x,))
            return y.square().mean()

        return loss

    def test_gradients_over_seeds(self, kind):
        model, x = build(kind), batch(kind, 4)
        loss = self.call(model, x)
        logits = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        chosen = torch.arange(3)[:, None]
        found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(logits, chosen)
        for n, seed in enumerate(chosen):
            seeds(model, int(seed))
            expected = gradients(model, model(x).square().mean())
            for got, wanted in zip(found.values(), expected, strict=True):
                assert torch.allclose(got[n], wanted, atol=1e-6)

    def test_gradients_over_logits(self, kind):
        model, x = build(kind), batch(kind, 4)
        loss = self.call(model, x)
        named = [(n, p.detach()) for n, p in model.named_parameters() if p.requires_grad]
        several = {n: torch.stack([p, p + 0.5]) for n, p in named}
        found = torch.vmap(torch.func.grad(loss), in_dims=(0, None))(several, torch.tensor([7]))
        for n in range(2):
            alone = torch.func.grad(loss)({k: v[n] for k, v in several.items()}, torch.tensor([7]))
            assert all(torch.allclose(found[k][n], alone[k], atol=1e-6) for k in several)
