"""Packing a mask on the GPU, on the CPU."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.mark.parametrize("count", [1, 7, 8, 9, 15, 16, 17, 31, 4096, 4101, 20001])
def test_bits(simt, count: int) -> None:
    mask = np.random.default_rng(count).integers(0, 2, count, dtype=np.uint8)
    bits = np.full((count + 7) // 8, 0xAA, np.uint8)
    # fewer blocks than there is work for: each takes several turns
    simt.Device(1).run("pack_bits", mask=mask, count=count, bits=bits, blocks=1)
    assert np.array_equal(bits, np.packbits(mask, bitorder="little"))


def test_each_byte_once(simt) -> None:
    count = 65536
    mask, bits = np.ones(count, np.uint8), np.zeros(count // 8, np.uint8)
    device = simt.Device()
    device.run("pack_bits", mask=mask, count=count, bits=bits)
    assert (bits == 255).all()
    traffic = device.traffic()
    assert count // 32 <= traffic["mask"]["read_sectors"] <= count // 32 + 1
    least = count // 8 // 32
    assert least <= traffic["bits"]["written_sectors"] <= least + 1  # NumPy aligns less
