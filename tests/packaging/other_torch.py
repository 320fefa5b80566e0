"""`python tests/packaging/other_torch.py VERSION [WHEEL]`: the wheel beside another PyTorch.

Installs torch==VERSION into a temporary folder, beside the packages of this Python, and runs the
kernels of the wheel, or of the installed package, on it: the masks must be those of the PyTorch
here. A PyTorch without CUDA must keep the load error of the CUDA library and work all the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CODE = """
import torch, modmask_kernels as mm
from modmask_kernels import _native
assert _native.available(), _native.LOAD_ERROR
x, logits = torch.ones(8, 5), torch.linspace(-2, 2, 15).view(3, 5).requires_grad_()
y = mm.ops.masked_linear(x, torch.ones(3, 5), logits, seed=torch.tensor(4), samples=2)
y.sum().backward()
bits = mm.ops.sample_mask_packed(logits, seed=torch.tensor(4), samples=2)
cuda = _native.cuda_load_error()
assert (torch.version.cuda is None) == (cuda is not None), cuda
print(torch.__version__, "CUDA library:", cuda or "loaded")
print(bits.tolist(), y.sum().item(), f"{logits.grad.sum().item():.5f}")
"""


def run(*folders: str | Path) -> list[str]:
    """Two lines: what was loaded, and what was computed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MODMASK_")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tempfile.gettempdir(),  # the checkout need not be built
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.splitlines()


def main() -> None:
    version, *wheel = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        other, package = Path(folder, "torch"), Path(folder, "package")
        if wheel:
            with zipfile.ZipFile(wheel[0]) as archive:
                archive.extractall(package)
        install = ("-m", "pip", "install", "--quiet", "--no-deps", f"--target={other}")
        subprocess.run([sys.executable, *install, f"torch=={version}"], check=True)
        here, there = run(package), run(other, package)
    for told, computed in (here, there):
        print(told, computed, sep="\n")
    if here[1] != there[1]:
        raise SystemExit("the results differ")


if __name__ == "__main__":
    main()
