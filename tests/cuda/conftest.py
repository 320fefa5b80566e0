import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def library(wheel, tmp_path_factory) -> Path:
    """The CUDA library out of the wheel, compiled for all architectures."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract("modmask_kernels/_cuda.abi3.so", tmp_path_factory.mktemp("so")))
