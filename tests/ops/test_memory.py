"""Nothing of the size samples * weight is ever allocated."""

import json
from pathlib import Path

import pytest
import torch
from fresh import run_python
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modmask_kernels import _native, ops

pytestmark = pytest.mark.skipif(not _native.available(), reason="tests the compiled kernels")

WEIGHT = 1024 * 1024 * 4 // 1024  # KiB
CASES = [(8, 1), (8, 8), (128, 1), (128, 8), (1, 1)]  # batch, samples
SELECT = {"batch": 100, "samples": 100, "size": 1024}  # samples: sets
NAIVE = {"batch": 8, "samples": 8, "size": 512, "operation": "reference"}


@pytest.fixture(scope="module")
def growth():
    """Peak memory in KiB beyond the inputs, by (batch, samples), and of the naive way."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to read the high-water mark")
    cases = [{"batch": b, "samples": s, "size": 1024, "operation": "fused"} for b, s in CASES]
    cases += [{"batch": 64, "samples": s, "size": 512, "operation": "lstm"} for s in (1, 8)]
    cases += [{**SELECT, "operation": name} for name in ("select", "select and bits")]
    probe = Path(__file__).with_name("memory_probe.py")
    # large blocks come from the system and go back to it: what the allocator keeps is chance
    run = run_python(str(probe), json.dumps([*cases, NAIVE]), MALLOC_MMAP_THRESHOLD_="65536")
    assert run.returncode == 0, run.stderr
    names = [*CASES, ("lstm", 1), ("lstm", 8), "select", "select and bits", "naive"]
    return dict(zip(names, json.loads(run.stdout), strict=True))


@pytest.mark.parametrize("batch", [8, 128, "lstm"])
def test_more_samples_need_no_more_memory(growth, batch):
    one, eight = growth[batch, 1], growth[batch, 8]
    assert eight <= 1.1 * one + 1024, f"{one} KiB at samples=1, {eight} KiB at samples=8"


@pytest.mark.parametrize(("batch", "samples"), CASES)
def test_memory_is_that_of_the_gradient(growth, batch, samples):
    """dlogits has the size of the weight; scratch and the rows stay below one more."""
    assert WEIGHT <= growth[batch, samples] < 2 * WEIGHT


def test_a_hundred_selected_sets_need_their_bits_and_little_more(growth):
    """12.5 MiB and 1% of bits; a call has its rows, twice, and tiles, but no mask unpacked."""
    bits, rows = 12.5 * 1024, 2 * 100 * 1024 * 4 / 1024
    assert growth["select"] <= rows + 512
    assert bits <= growth["select and bits"] <= 1.01 * bits + rows + 512


def test_the_probe_sees_the_naive_way(growth):
    assert growth["naive"] > 8 * WEIGHT / 4


class Largest(TorchDispatchMode):
    """Notes the sizes in bytes of all that operations return."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.sizes += [t.untyped_storage().nbytes() for t in tensors if not t.is_meta]
        return out


@pytest.mark.parametrize("batch", [8, 64])
@pytest.mark.parametrize("seed", [torch.tensor(1), torch.tensor([1, 2]), None], ids=str)
def test_no_operation_returns_a_masked_weight(batch, seed):
    sets, out, inputs = 2, 90, 110
    x = torch.randn(batch, inputs, requires_grad=True)
    weight = torch.randn(out, inputs)
    logits = torch.randn(sets, out, inputs, requires_grad=True)
    with Largest() as largest:
        y = ops.masked_linear(x, weight, logits, seed=seed, samples=4)
        y.backward(torch.ones_like(y))
    gradient = logits.numel() * 4
    assert max(largest.sizes) == gradient
    assert sum(size == gradient for size in largest.sizes) <= 2  # dlogits, and seen as logits.grad
    others = [size for size in largest.sizes if size != gradient]
    assert max(others) <= batch * max(out, inputs) * 4


def test_sample_mask_packed_returns_bits_only():
    logits = torch.randn(100, 80)
    with Largest() as largest:
        ops.sample_mask_packed(logits, seed=torch.tensor(1), samples=4)
    bits = 4 * 100 * 80 // 8
    assert bits in largest.sizes
    # the only other tensor of more than a few bytes is a view of the logits
    assert {s for s in largest.sizes if s > 64} <= {bits, logits.numel() * 4}
