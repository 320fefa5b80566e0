"""Builds the compiled kernels; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# LibTorch's stable ABI as of 2.11: the extension loads on that and every later release
TORCH_TARGET_VERSION = "0x020b000000000000"
PYTHON_LIMITED_API = "0x030A0000"
SOURCES = sorted(str(p) for p in [Path("csrc/module.cpp"), *Path("csrc/cpu").glob("*.cpp")])
NO_COMPILER = (
    "modmask_kernels compiles its CPU kernels and found no C++17 compiler ({compiler!r} is not on "
    "PATH). Install one first: 'apt-get install g++' on Debian or Ubuntu, 'dnf install gcc-c++' on "
    "Fedora, 'xcode-select --install' on macOS; or set CXX to the compiler's path."
)

# A free-threaded interpreter cannot load abi3 modules
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")


class Build(BuildExtension):
    def build_extensions(self) -> None:
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler.split()[0]) is None:
            raise SystemExit(NO_COMPILER.format(compiler=compiler))
        super().build_extensions()


def main() -> None:
    extension = CppExtension(
        "modmask_kernels._C",
        SOURCES,
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            *([("Py_LIMITED_API", PYTHON_LIMITED_API)] if LIMITED else []),
        ],
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-ffp-contract=off",  # the mask decision must round alike everywhere
            "-fvisibility=hidden",
            "-g0",
        ],
        extra_link_args=["-s"],
        py_limited_api=LIMITED,
    )
    setup(
        ext_modules=[extension],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
    )


main()
