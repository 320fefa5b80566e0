import os
from pathlib import Path

import pytest
import simt_build


@pytest.fixture(scope="session")
def simt(tmp_path_factory):
    """The CUDA kernels, as functions that run them on the CPU."""
    built = os.environ.get(
        "MODMASK_SIMT"
    )  # the sanitized ones, in a process that preloads for them
    if built is not None:
        return simt_build.load(Path(built))
    return simt_build.load(simt_build.build(tmp_path_factory.mktemp("simt")))


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory) -> Path:
    """The path of the same module under AddressSanitizer, for processes that preload it."""
    return simt_build.build(tmp_path_factory.mktemp("simt_asan"), *simt_build.SANITIZE)
