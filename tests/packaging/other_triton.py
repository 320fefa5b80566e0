"""`python tests/packaging/other_triton.py VERSION...`: the Triton kernels under other Tritons.

Installs triton==VERSION into a temporary folder, beside the packages of this Python, and runs
tests/triton with it: the interpreter's tests and those of the compiled kernels. NumPy below 2.4
comes with it, since the interpreter of Triton 3.6 takes arrays of one element for numbers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run(version: str) -> bool:
    """Whether all tests pass."""
    with tempfile.TemporaryDirectory() as folder:
        install = ("-m", "pip", "install", "--quiet", "--no-deps", f"--target={folder}")
        packages = (f"triton=={version}", "numpy<2.4")
        subprocess.run([sys.executable, *install, *packages], check=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MODMASK_")}
        environment["PYTHONPATH"] = os.pathsep.join([folder, str(REPOSITORY)])
        show = "import triton; print('Triton', triton.__version__, flush=True)"
        subprocess.run([sys.executable, "-c", show], env=environment, check=True)
        tests = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton"],
            cwd=REPOSITORY,
            env=environment,
            check=False,
        )
    return tests.returncode == 0


def main() -> None:
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    failed = [version for version in sys.argv[1:] if not run(version)]
    if failed:
        raise SystemExit(f"failed under Triton {', '.join(failed)}")


if __name__ == "__main__":
    main()
