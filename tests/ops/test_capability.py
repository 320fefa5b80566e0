"""The choice of the CPU capability and of the backend, and the kernels compiled on their own."""

import ctypes
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fresh import run_python
from native_build import (
    Draw,
    Gradients,
    Linear,
    capabilities,
    compile_kernels,
    lanes16_source,
    load,
)
from tolerance import check_close

from modmask_kernels import _native
from modmask_kernels.ops.masked_linear import reference
from modmask_kernels.ops.sample_mask import reference as mask_reference

needs_kernels = pytest.mark.skipif(not _native.available(), reason="tests the compiled kernels")

# ---- the choice ----


def test_kernels_are_loaded():
    """Without them the tests of the kernels are skipped: that must not go unnoticed."""
    assert _native.available(), f"the compiled kernels are {_native.LOAD_ERROR}"


@needs_kernels
def test_capabilities_end_with_plain():
    names = _native.capabilities()
    assert names[-1] == "plain"
    assert len(set(names)) == len(names)
    assert set(names) <= {"avx512", "avx2", "plain"}
    assert _native.capability() in names


@needs_kernels
@pytest.mark.parametrize("name", ["", "sse9", "AVX2", "plain "])
def test_unknown_capability(name):
    before = _native.capability()
    with pytest.raises(ValueError, match=r"no capability .*see capabilities"):
        _native.set_capability(name)
    assert _native.capability() == before


@needs_kernels
def test_capability_must_be_a_name():
    with pytest.raises(TypeError):
        _native.set_capability(3)


@needs_kernels
def test_set_capability(capability):
    assert _native.capability() == capability


REPORT = """
import torch
from modmask_kernels import _native, ops
x = torch.ones(8, 5)
y = ops.masked_linear(x, torch.ones(3, 5), torch.zeros(3, 5), seed=torch.tensor(4), samples=2)
print(_native.capability(), _native.FORCED_BACKEND, y.sum().item())
from modmask_kernels.ops.masked_linear import explain
print(explain(x))
"""


def run_each(script, environments):
    """The script in a fresh process per environment, several at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda e: run_python("-c", script, **e), environments))


@needs_kernels
def test_capability_by_environment():
    names = _native.capabilities()
    # what this CPU lacks is ignored: a shared job script serves unlike machines
    absent = [name for name in _native.CAPABILITIES if name not in names]
    wanted = [*names, *absent, "sse9"]
    *runs, unknown = run_each(REPORT, [{"MODMASK_CPU_CAPABILITY": name} for name in wanted])
    assert unknown.returncode != 0
    message = "MODMASK_CPU_CAPABILITY must be one of avx512, avx2, plain, not 'sse9'"
    assert message in unknown.stderr
    sums = set()
    for name, run in zip([*names, *[names[0]] * len(absent)], runs, strict=True):
        assert run.returncode == 0, run.stderr
        first, second = run.stdout.splitlines()
        assert first.startswith(f"{name} None ")
        assert f"capability {name}" in second
        sums.add(first.split()[-1])
    assert len(sums) == 1


def test_backend_by_environment():
    names = ["reference", "tpu", *(["cpu"] if _native.available() else [])]
    runs = run_each(REPORT, [{"MODMASK_BACKEND": name} for name in names])
    by_reference, unknown, *by_kernel = runs
    assert by_reference.returncode == 0, by_reference.stderr
    first, second = by_reference.stdout.splitlines()
    assert first.split()[1] == "reference"
    assert "('reference', 'MODMASK_BACKEND=reference')" in second
    assert unknown.returncode != 0
    assert (
        "MODMASK_BACKEND must be one of cpu, cuda, triton, reference, not 'tpu'" in unknown.stderr
    )
    for run in by_kernel:
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines()[0].split()[1:] == ["cpu", first.split()[-1]]


WITHOUT_KERNELS = """
import sys
sys.modules["modmask_kernels._C"] = None
import torch
from modmask_kernels import _native, ops
assert not _native.available() and _native.capability() is None and not _native.capabilities()
logits = torch.linspace(-3, 3, 40).view(5, 8).requires_grad_()
draw = dict(seed=torch.tensor(4), samples=2)
y = ops.masked_linear(torch.ones(6, 8), torch.ones(5, 8), logits, **draw)
y.sum().backward()
# the registered operations exist too, served by the reference
raw = torch.ops.modmask.masked_linear(
    torch.ones(6, 8), torch.ones(5, 8), logits[None], None, None, draw["seed"],
    0, 1, 0, 0, 2, 1.0, True, 0, 0.0, 0.0, 0.0, False, [])
assert torch.equal(raw, y)
packed = ops.sample_mask_packed(logits, **draw)
print(y.sum().item(), packed.sum().item())
print(_native.LOAD_ERROR)
try:
    _native.set_capability("plain")
except RuntimeError as error:
    print(error)
"""


def test_without_the_compiled_kernels():
    run, forced = run_each(WITHOUT_KERNELS, [{}, {"MODMASK_BACKEND": "cpu"}])
    assert run.returncode == 0, run.stderr
    numbers, why, refusal = run.stdout.splitlines()
    assert "not built" in why
    assert "computes with its slow reference" in run.stderr
    assert "the compiled kernels are absent" in refusal
    logits = torch.linspace(-3, 3, 40).view(5, 8)
    masks = mask_reference.sample_mask(logits, seed=torch.tensor(4), samples=2)
    assert float(numbers.split()[0]) == 3 * float(masks.sum())
    assert forced.returncode != 0
    assert "MODMASK_BACKEND=cpu, but the compiled kernels are not built" in forced.stderr


# ---- the kernels on their own ----


def test_kernels_under_sanitizers(tmp_path):
    names = [*capabilities(), "lanes16"]
    executable = compile_kernels(
        tmp_path,
        names,
        ["bridge", "sanitized"],
        *("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    )
    # leak detection needs ptrace, which containers may forbid
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run(
        [str(executable)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    assert run.stdout.splitlines() == [f"checked {name}" for name in names]


def test_lanes16_is_the_avx512_source_without_its_instructions():
    source = lanes16_source()
    assert "#define MODMASK_LANES 16" in source
    assert "avx512" not in source.lower().replace("kernels_avx512", "")
    assert "immintrin" not in source
    assert "target" not in source


@pytest.fixture(scope="module")
def lanes16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lanes16")
    library = load(compile_kernels(folder, ["lanes16"], ["bridge"], "-O1", link=("-shared",)))
    assert library.table_count() == 1
    assert library.table_name(0) == b"lanes16"
    return library


def pointer(t):
    return None if t is None else t.data_ptr()


def draw_of(seeds, samples, tau=1.0, hard=True, element_offset=0, sample_offset=2, sets=None):
    return Draw(
        seeds=pointer(seeds),
        sets=sets or len(seeds),
        samples=samples,
        sample_offset=sample_offset,
        element_offset=element_offset,
        tensor_id=5,
        tau=tau,
        hard=hard,
    )


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


SEEDS = torch.tensor([6, -6])


@pytest.mark.parametrize("count", [1, 7, 15, 16, 17, 31, 32, 33, 47, 257, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 2**34 - 20])
def test_16_lanes_sample_the_same_bits(lanes16, count, offset):
    logits = normal(2, count, scale=3.0)
    draw = draw_of(SEEDS, 2, element_offset=offset)
    values, bits = torch.full((2, 2, count), 9.0), torch.full((2, 2, -(-count // 8)), 9).byte()
    lanes16.sample_values(0, 3, draw, pointer(logits), count, pointer(values))
    lanes16.sample_bits(0, 3, draw, pointer(logits), count, pointer(bits))
    options = {"samples": 2, "tensor_id": 5, "sample_offset": 2, "element_offset": offset}
    expected = mask_reference.sample_mask(logits, seed=SEEDS, **options)
    assert torch.equal(values, expected)
    packed = torch.nn.functional.pad(expected, (0, -count % 8)).view(2, 2, -1, 8)
    assert torch.equal(bits, (packed * 2.0 ** torch.arange(8)).sum(-1).byte())


@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_16_lanes_soft_values_and_gradients(lanes16, tau):
    logits, dvalues = normal(2, 4099, scale=3.0), normal(3, 2, 4099, seed=1)
    values, dlogits = torch.empty(3, 2, 4099), torch.empty(2, 4099)
    draw = draw_of(SEEDS, 3, tau=tau, hard=False)
    lanes16.sample_values(0, 2, draw, pointer(logits), 4099, pointer(values))
    lanes16.sample_backward(0, 2, draw, pointer(logits), pointer(dvalues), 4099, pointer(dlogits))

    def run(dtype):
        leaf = logits.to(dtype).requires_grad_()
        soft = mask_reference.sample_mask(
            leaf, seed=SEEDS, samples=3, tau=tau, hard=False, tensor_id=5, sample_offset=2
        )
        return soft.detach(), torch.autograd.grad(soft, leaf, dvalues.to(dtype))[0]

    plain, exact = run(torch.float32), run(torch.float64)
    check_close([("values", values, plain[0], exact[0]), ("dlogits", dlogits, plain[1], exact[1])])


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 1, 1), (3, 17, 25), (33, 31, 7), (7, 257, 24), (16, 600, 50), (2, 8, 26), (4, 0, 30)],
)
def test_16_lanes_products(lanes16, rows, inputs, outputs, dtype):
    for seeds, hard, tau in [
        (SEEDS, True, 1.0),
        (SEEDS, False, 1.0),
        (SEEDS, True, 0.6),
        (None,) * 3,
    ]:
        threshold = seeds is None
        hard, tau, samples = (True, 1.0, 1) if threshold else (hard, tau, 2)
        groups = 2 * samples
        tensors = {
            "x": normal(groups * rows, inputs, seed=1).to(dtype),
            "weight": (normal(outputs, inputs, seed=2) / max(inputs, 1) ** 0.5).to(dtype),
            "logits": normal(2, outputs, inputs, seed=3, scale=2.0),
            "bias": normal(outputs, seed=4).to(dtype),
            "bias_logits": normal(2, outputs, seed=5, scale=2.0),
        }
        dy = normal(groups * rows, outputs, seed=6).to(dtype)
        draw = draw_of(seeds, samples, tau=tau, hard=hard, element_offset=3, sets=2)
        linear = Linear(
            dtype=DTYPES.index(dtype),
            rows=rows,
            inputs=inputs,
            outputs=outputs,
            **{name: pointer(t) for name, t in tensors.items()},
        )
        ours = {"y": torch.full((groups * rows, outputs), 9.0, dtype=dtype)}
        lanes16.linear_forward(0, 3, draw, linear, pointer(ours["y"]))
        grads = {name: torch.zeros_like(t) for name, t in tensors.items()}
        asked = {name: pointer(t) if t.numel() else None for name, t in grads.items()}
        gradients = Gradients(dy=pointer(dy), **asked)
        lanes16.linear_backward(0, 3, draw, linear, ctypes.byref(gradients))
        ours |= grads

        def run(dtype_, tensors=tensors, dy=dy, seeds=seeds, hard=hard, tau=tau, samples=samples):
            leaves = {
                name: t.to(dtype_ or t.dtype).detach().requires_grad_()
                for name, t in tensors.items()
            }
            y = reference.masked_linear(
                **leaves,
                seed=seeds,
                samples=samples,
                tensor_id=5,
                bias_tensor_id=6,
                sample_offset=2,
                element_offset=3,
                tau=tau,
                hard=hard,
            )
            grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
            return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

        plain, exact = run(None), run(torch.float64)
        check_close((name, ours[name], plain[name], exact[name]) for name in ours)


def test_16_lanes_see_the_bits_of_the_reference(lanes16):
    inputs, outputs = 300, 50
    x, ones = torch.eye(inputs).repeat(4, 1), torch.ones(outputs, inputs)
    logits = normal(2, outputs, inputs, scale=3.0)
    linear = Linear(
        dtype=0,
        rows=inputs,
        inputs=inputs,
        outputs=outputs,
        x=pointer(x),
        weight=pointer(ones),
        logits=pointer(logits),
    )
    y = torch.empty(4 * inputs, outputs)
    lanes16.linear_forward(0, 2, draw_of(SEEDS, 2), linear, pointer(y))
    masks = mask_reference.sample_mask(logits, seed=SEEDS, samples=2, tensor_id=5, sample_offset=2)
    seen = y.view(2, 2, inputs, outputs).permute(1, 0, 3, 2)
    assert torch.equal(seen, masks)
