"""Tests on a CUDA device: all are skipped where there is none.

MODMASK_TEST_DEVICE=cpu runs those that need no CUDA by their nature on the CPU, which shows that
the tests themselves work.
"""

import os
from pathlib import Path

import pytest
import torch

DEVICE = os.environ.get("MODMASK_TEST_DEVICE", "cuda")
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    absent = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        needed = DEVICE == "cuda" or item.get_closest_marker("gpu") is not None
        if HERE in item.path.parents and needed:
            item.add_marker(absent)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
