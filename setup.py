"""Builds the compiled kernels; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.errors import ExecError
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths

# LibTorch's stable ABI as of 2.11: the extension loads on that and every later release
TORCH_TARGET_VERSION = "0x020b000000000000"
PYTHON_LIMITED_API = "0x030A0000"
CPU = "modmask_kernels._C"
CUDA = "modmask_kernels._cuda"
SOURCES = {
    CPU: ["csrc/module.cpp", *map(str, Path("csrc/cpu").glob("*.cpp"))],
    CUDA: [str(p) for kind in ("cu", "cpp") for p in Path("csrc/cuda").glob(f"*.{kind}")],
}
ARCHITECTURES = ["80", "90", "100", "120"]
NO_COMPILER = (
    "modmask_kernels compiles its CPU kernels and found no C++17 compiler ({compiler!r} is not on "
    "PATH). Install one first: 'apt-get install g++' on Debian or Ubuntu, 'dnf install gcc-c++' on "
    "Fedora, 'xcode-select --install' on macOS; or set CXX to the compiler's path."
)
NO_NVCC = (
    "MODMASK_CUDA=1 asks for the CUDA kernels, and there is no nvcc: not in CUDA_HOME ({home}), "
    "not in this Python's packages, not on PATH. Install the CUDA toolkit and set CUDA_HOME, or "
    "'pip install cuda-toolkit[nvcc,cccl]'; or leave MODMASK_CUDA unset to go without."
)
OLD_NVCC = (
    "{nvcc} compiles for none of sm_{names}, which the CUDA kernels need. Set CUDA_HOME to a newer "
    "CUDA toolkit, or MODMASK_CUDA=0 to install without them."
)
BROKEN_NVCC = (
    "{nvcc} did not compile the CUDA kernels: the lines above say why. Set CUDA_HOME to another "
    "CUDA toolkit, or MODMASK_CUDA=0 to install without them."
)

# A free-threaded interpreter cannot load abi3 modules
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")
MACROS = [
    ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
    *([("Py_LIMITED_API", PYTHON_LIMITED_API)] if LIMITED else []),
]
HOST_FLAGS = [
    "-O3",
    "-ffp-contract=off",  # the mask decision must round alike everywhere
    "-fvisibility=hidden",
]


def find_nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, of this Python's packages, on PATH; or None."""
    wanted = os.environ.get("MODMASK_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"MODMASK_CUDA must be 0 or 1, not {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    packages = [str(p) for entry in sys.path for p in Path(entry).glob("nvidia/cu*/bin/nvcc")]
    candidates = [*([f"{home}/bin/nvcc"] if home else []), *packages, "nvcc"]
    found = next(filter(None, map(shutil.which, candidates)), None)
    if found is None and wanted == "1":
        raise SystemExit(NO_NVCC.format(home=home or "not set"))
    return found


def architecture_flags(nvcc: str) -> list[str]:
    """`-gencode` for every architecture, and PTX of the last one for those to come."""
    asked = re.findall(r"[^;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if not asked:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        known = re.findall(r"compute_(\d+)", listed)
        names = [name for name in ARCHITECTURES if name in known]
        ptx = names[-1:]
        if not names:
            raise SystemExit(OLD_NVCC.format(nvcc=nvcc, names=", sm_".join(ARCHITECTURES)))
    else:
        for name in asked:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                raise SystemExit(
                    f"TORCH_CUDA_ARCH_LIST must hold numbers like 9.0 or 9.0+PTX, not {name!r}"
                )
        names = [name.removesuffix("+PTX").replace(".", "") for name in asked]
        ptx = [n for n, name in zip(names, asked, strict=True) if name.endswith("+PTX")]
    return [
        *(f"-gencode=arch=compute_{name},code=sm_{name}" for name in names),
        *(f"-gencode=arch=compute_{name},code=compute_{name}" for name in ptx),
    ]


class Build(BuildExtension):
    def finalize_options(self) -> None:
        self.anew = bool(self.force)  # below, torch says so wherever it has ninja decide
        super().finalize_options()

    def build_extensions(self) -> None:
        self.cxx = shlex.split(os.environ.get("CXX", "c++"))
        if shutil.which(self.cxx[0]) is None:
            raise SystemExit(NO_COMPILER.format(compiler=os.environ.get("CXX", "c++")))
        everything = self.extensions
        self.extensions = [e for e in everything if e.name != CUDA]
        super().build_extensions()
        self.extensions = everything
        for extension in everything:
            if extension.name == CUDA:
                nvcc = find_nvcc()
                assert nvcc is not None
                try:
                    self.build_cuda(extension, nvcc)
                except ExecError as error:
                    raise SystemExit(f"{error}\n{BROKEN_NVCC.format(nvcc=nvcc)}") from None

    def build_cuda(self, extension: Extension, nvcc: str) -> None:
        """Without torch's own rules, which want a torch with CUDA, of the toolkit's version."""
        macros = [f"-D{name}={value}" for name, value in MACROS]
        device = [
            *(nvcc, "-std=c++17", "-O3", "-ccbin", self.cxx[0], *architecture_flags(nvcc)),
            *("-Xcompiler", ",".join([*HOST_FLAGS, "-fPIC"])),
        ]
        includes = [f"-isystem{path}" for path in include_paths()]
        includes.append(f"-isystem{sysconfig.get_paths()['include']}")
        host = [*self.cxx, "-std=c++17", *HOST_FLAGS, "-fPIC", "-DUSE_CUDA", *macros, *includes]
        # objects are good for these commands only
        commands = hashlib.sha256(repr((device, host)).encode()).hexdigest()
        folder = Path(self.build_temp) / f"cuda-{commands[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        headers = [p for kind in (".", "common", "cuda") for p in Path("csrc", kind).glob("*.*h")]
        changed = max(path.stat().st_mtime for path in [*headers, Path(__file__)])

        def compiled(source: str) -> str:
            target = folder / f"{Path(source).name}.o"
            newest = max(changed, Path(source).stat().st_mtime)
            if self.anew or not target.exists() or target.stat().st_mtime < newest:
                command = device if source.endswith(".cu") else host
                self.spawn([*command, "-c", source, "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compiled, extension.sources))
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # The CUDA runtime is inside, so that the library needs nothing but LibTorch. Symbols of
        # libtorch_cuda are found through libtorch, which a PyTorch without CUDA has as well.
        link = [nvcc, "-shared", "--no-device-link", "-ccbin", self.cxx[0], "-cudart", "static"]
        # where the toolkit is Python packages nvcc looks for its own libraries elsewhere
        folders = [f"-L{path}" for path in (Path(nvcc).parents[1] / "lib", *library_paths())]
        more = ["--no-as-needed", "--exclude-libs,ALL", "-s"]
        passed = [word for flag in more for word in ("-Xlinker", flag)]
        self.spawn([*link, *passed, *objects, *folders, "-ltorch", "-o", str(target)])


def main() -> None:
    extensions: list[Extension] = [
        CppExtension(
            CPU,
            sorted(SOURCES[CPU]),
            define_macros=MACROS,
            extra_compile_args=["-std=c++17", *HOST_FLAGS, "-g0"],
            extra_link_args=["-s"],
            py_limited_api=LIMITED,
        )
    ]
    if find_nvcc() is not None:
        extensions.append(Extension(CUDA, sorted(SOURCES[CUDA]), py_limited_api=LIMITED))
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
    )


if __name__ == "__main__":
    main()
