"""The header that runs CUDA kernels on the CPU: right kernels run, mistakes are reported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simt_build
import torch

SIMT_TESTS = str(Path(__file__).parent)
SOURCE = (Path(__file__).parent / "examples.cpp").read_text(encoding="utf-8").splitlines()


def line_of(marker: str) -> int:
    (line,) = (i for i, text in enumerate(SOURCE, 1) if text.rstrip().endswith(f"// {marker}"))
    return line


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).random(shape, dtype=np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_shared_memory_and_barriers(simt, seed):
    x, y = random(3 * 96), np.zeros(3 * 96, np.float32)
    simt.Device(seed).run("reverse", x=x, y=y, block=96, barrier=True)
    np.testing.assert_array_equal(y, x.reshape(3, 96)[:, ::-1].reshape(-1))


@pytest.mark.parametrize("block", [32, 128, 1024])
def test_dynamic_shared_memory_and_shuffles(simt, block):
    x, sums = random(2 * block - 5), np.zeros(2, np.float32)
    simt.Device().run("block_sums", x=x, sums=sums, block=block)
    np.testing.assert_allclose(sums, [x[:block].sum(), x[block:].sum()], rtol=1e-5)


def test_warp_operations(simt):
    out = np.zeros((64, 16), np.uint32)
    simt.Device(5).run("warp_operations", out=out)
    thread = np.arange(64)
    lane = thread % 32

    def reversed_bits(v: int) -> int:
        return int(f"{v:032b}"[::-1], 2)

    expected = np.stack(
        [
            np.full(64, sum(1 << i for i in range(0, 32, 3))),
            np.ones(64),
            np.zeros(64),
            np.full(64, 50),
            (lane // 8 * 8 + 5) * 10,
            lane ^ 3,
            np.where(lane >= 4, lane - 4, lane),
            np.where(lane % 16 + 4 < 16, lane + 4, lane),
            np.full(64, 10),
            np.ones(64),
            np.ones(64),
            [int(v).bit_count() for v in lane],
            [(int(v) & -int(v)).bit_length() for v in lane],
            32 - np.array([int(v).bit_length() for v in lane]),
            [(((int(v) << 28) & 0xFFFFFFFF) * 0xD2511F53) >> 32 for v in lane],
            [reversed_bits(int(v)) for v in lane],
        ],
        axis=1,
    )
    np.testing.assert_array_equal(out, expected.astype(np.uint32))


def test_atomics(simt):
    counts, total = np.zeros(3, np.int32), np.zeros(1, np.uint64)
    sums, bits = np.zeros(1, np.float32), np.zeros(5, np.uint32)
    bits[4] = 50
    simt.Device(2).run("atomics", counts=counts, total=total, sum=sums, bits=bits)
    assert counts.tolist() == [64] * 3
    assert total[0] == 3 * 63 * 32
    assert sums[0] == 96.0
    assert bits[0] == 0xFFFFFFFF
    assert bits[1] == 63
    assert bits[2] in (1, 2, 3)
    assert bits[3:].tolist() == [9, 3]


def test_blocks_that_wait_for_each_other(simt):
    values, turn = np.zeros(5, np.float32), np.zeros(1, np.uint32)
    simt.Device(3).run("chain", values=values, turn=turn)
    assert values.tolist() == [1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)]
)
def test_16_bit_storage(simt, dtype, torch_dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch_dtype).float()
    between = torch.cat(
        [every, every * 1.0003, every * 0.9998, torch.tensor([65519.9, 65520.0, 3.4e38])]
    )
    x = between.numpy()
    y, bits = np.zeros_like(x), np.zeros(x.size, np.uint16)
    simt.Device().run("convert", dtype=dtype, x=x, y=y, bits=bits)
    expected = between.to(torch_dtype)
    number = ~between.isnan().numpy()
    np.testing.assert_array_equal(bits[number], expected.view(torch.uint16).numpy()[number])
    np.testing.assert_array_equal(y, expected.float().numpy())  # NaN where NaN


@pytest.mark.parametrize("vector", [1, 4])
def test_traffic(simt, vector):
    x, y = random(256), np.zeros(256, np.float32)
    device = simt.Device()
    for _ in range(2):
        device.run("copy", x=x, y=y, vector=vector)
    sectors = len({a // 32 for a in range(x.ctypes.data, x.ctypes.data + 1024)})
    traffic = device.traffic()
    assert traffic["x"] == {
        "read_bytes": 2048,
        "written_bytes": 0,
        "read_sectors": 2 * sectors,
        "written_sectors": 0,
        "accesses": 512 // vector,
    }
    assert traffic["y"]["written_bytes"] == 2048
    assert traffic["y"]["read_bytes"] == 0
    device.reset_traffic()
    assert device.traffic()["x"]["read_bytes"] == 0


def mistaken(simt, mistake: str, seed: int) -> str:
    x, y = random(64), np.zeros(64, np.float32)
    with pytest.raises(simt.Error) as error:
        simt.Device(seed).run("mistaken", mistake=mistake, x=x, y=y)
    return str(error.value)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("mistake", "says", "places"),
    [
        ("racing writes", "race on tile", ["racing writes", "racing writes"]),
        ("racing read", "(race on|unwritten: .* reads) tile", ["racing read"]),
        ("warp race", "race on tile", ["racing writes", "warp race"]),
        ("global race", "race on y", ["global race", "global race"]),
        ("unwritten", "unwritten: .* dynamic shared memory", ["unwritten"]),
        ("past static", "out of bounds: .* reaches bytes 256 to 260 of tile", ["past static"]),
        ("past dynamic", "bytes 256 to 260 of dynamic shared memory", ["past dynamic"]),
        ("past global", "out of bounds: .* outside of every buffer", ["past global"]),
        ("misaligned", "misaligned: .* of x", ["misaligned"]),
        ("exit before barrier", "40 threads .* at __syncthreads .*, 24 threads .* exited", []),
        ("different barriers", "divergent barrier", ["one barrier", "the other barrier"]),
        ("missing lane", "divergent barrier", ["missing lane"]),
        ("other lane", "reads lane 9, which takes no part", ["other lane"]),
        ("endless wait", "no progress", ["endless wait"]),
    ],
)
def test_mistakes_are_reported_with_their_places(simt, mistake, says, places, seed):
    message = mistaken(simt, mistake, seed)
    if mistake != "past static":  # which races too, where the neighbour comes first
        assert re.search(says, message), message
    elif "race" in message:
        return
    reported = [int(n) for n in re.findall(r"examples\.cpp:(\d+)", message)]
    for place in places:
        assert line_of(place) in reported, message


def test_a_missing_barrier_is_reported_and_shows_in_the_result(simt):
    x, y = random(64), np.zeros(64, np.float32)
    with pytest.raises(simt.Error, match=r"(race|unwritten).*tile"):
        simt.Device().run("reverse", x=x, y=y, block=64, barrier=False)


def test_launches_that_no_device_would_take(simt):
    x, y = random(4096), np.zeros(4096, np.float32)
    with pytest.raises(simt.Error, match="block of 2048 threads"):
        simt.Device().run("reverse", x=x, y=y, block=2048, barrier=True)


@pytest.fixture(scope="module")
def sanitizer() -> dict[str, str]:
    """The environment of a process that loads the sanitized module."""
    # the C++ library too: Python itself does not load what the sanitizer asks for its exceptions
    libraries = [
        subprocess.run(
            [*simt_build.COMPILER, f"-print-file-name={name}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


@pytest.mark.parametrize("shared", [False, True], ids=["global", "shared"])
def test_address_sanitizer_sees_plain_pointers(sanitized, sanitizer, shared):
    program = f"""
import sys
sys.path.insert(0, {str(simt_build.SIMT)!r})
import numpy as np, simt_build
from pathlib import Path
simt = simt_build.load(Path({str(sanitized)!r}))
x, y = np.ones(64, np.float32), np.zeros(64, np.float32)
simt.Device(1).run("reverse", x=x, y=y, block=32, barrier=True)
try:
    simt.Device(1).run("mistaken", mistake="past global", x=x, y=y)
except simt.Error:
    simt.Device(1).run("reverse", x=x, y=y, block=32, barrier=True)
print("a right kernel ran", flush=True)
simt.Device(1).run("unchecked", x=x, y=y, shared={shared})
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=sanitizer, capture_output=True, text=True, check=False
    )
    assert "a right kernel ran" in done.stdout, done.stderr[-3000:]
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert re.search(r"unchecked.*examples\.cpp", done.stderr), done.stderr[-3000:]


def test_kernels_under_address_sanitizer(sanitized, sanitizer):
    """One odd-sized test of each kind, whose kernels may reach memory past the checks."""
    names = ("counts", "n_of_m_of_any_m", "rows and 5", "selected_masks", "nan_is_found", "cut")
    names += ("only_what_is_needed", "order_of_threads", "convolutions and 12")
    chosen = " or ".join(f"(test_{name})" for name in names)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, SIMT_TESTS],
        env={**sanitizer, "MODMASK_SIMT": str(sanitized)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"\b\d{2,} passed", done.stdout), done.stdout
