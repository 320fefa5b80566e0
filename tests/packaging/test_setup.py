"""What setup.py finds: the CUDA compiler and the architectures to compile for."""

from __future__ import annotations

import importlib.util
import subprocess
from types import ModuleType

import pytest
from building import ROOT


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, in an environment that says nothing and has no compiler."""
    for name in ("MODMASK_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("setup_under_test", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.sys, "path", [])
    monkeypatch.setenv("PATH", "")
    return module


def lists(monkeypatch: pytest.MonkeyPatch, setup: ModuleType, listed: str) -> None:
    """Lets every nvcc answer --list-gpu-arch so."""
    done = subprocess.CompletedProcess([], 0, stdout=listed)
    monkeypatch.setattr(setup.subprocess, "run", lambda *_, **__: done)


def executable(path) -> str:
    path.parent.mkdir(parents=True)
    path.write_text("")
    path.chmod(0o755)
    return str(path)


class TestFindNvcc:
    def test_none_is_no_error(self, setup: ModuleType) -> None:
        assert setup.find_nvcc() is None

    def test_in_the_order_that_is_documented(self, setup, monkeypatch, tmp_path) -> None:
        on_path = executable(tmp_path / "bin" / "nvcc")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        assert setup.find_nvcc() == on_path
        package = executable(tmp_path / "site-packages/nvidia/cu13/bin/nvcc")
        monkeypatch.setattr(setup.sys, "path", [str(tmp_path / "site-packages")])
        assert setup.find_nvcc() == package
        at_home = executable(tmp_path / "home/bin/nvcc")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        assert setup.find_nvcc() == at_home
        monkeypatch.setenv("MODMASK_CUDA", "0")
        assert setup.find_nvcc() is None

    def test_one_that_is_required_and_absent(self, setup, monkeypatch) -> None:
        monkeypatch.setenv("MODMASK_CUDA", "1")
        monkeypatch.setenv("CUDA_HOME", "/nowhere")
        with pytest.raises(SystemExit) as caught:
            setup.find_nvcc()
        for part in ("MODMASK_CUDA=1", "/nowhere", "cuda-toolkit[nvcc,cccl]"):
            assert part in str(caught.value)

    def test_another_value(self, setup, monkeypatch) -> None:
        monkeypatch.setenv("MODMASK_CUDA", "yes")
        with pytest.raises(SystemExit, match="MODMASK_CUDA must be 0 or 1, not 'yes'"):
            setup.find_nvcc()


class TestArchitectures:
    ALL = "compute_75\ncompute_80\ncompute_90\ncompute_100\ncompute_120\n"

    def test_four_and_ptx_of_the_last(self, setup, monkeypatch) -> None:
        lists(monkeypatch, setup, self.ALL)
        assert setup.architecture_flags("nvcc") == [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90,code=sm_90",
            "-gencode=arch=compute_100,code=sm_100",
            "-gencode=arch=compute_120,code=sm_120",
            "-gencode=arch=compute_120,code=compute_120",
        ]

    def test_those_that_an_older_toolkit_knows(self, setup, monkeypatch) -> None:
        lists(monkeypatch, setup, "compute_80\ncompute_90\n")
        assert setup.architecture_flags("nvcc") == [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90,code=sm_90",
            "-gencode=arch=compute_90,code=compute_90",
        ]

    def test_a_toolkit_too_old(self, setup, monkeypatch) -> None:
        lists(monkeypatch, setup, "compute_35\n")
        with pytest.raises(SystemExit, match="MODMASK_CUDA=0"):
            setup.architecture_flags("nvcc")

    @pytest.mark.parametrize("separator", [";", " ", "; "])
    def test_by_environment(self, setup, monkeypatch, separator) -> None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", separator.join(["8.6", "9.0a+PTX"]))
        assert setup.architecture_flags("nvcc") == [
            "-gencode=arch=compute_86,code=sm_86",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-gencode=arch=compute_90a,code=compute_90a",
        ]

    def test_names_are_refused(self, setup, monkeypatch) -> None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
        with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST .* not 'Hopper'"):
            setup.architecture_flags("nvcc")
