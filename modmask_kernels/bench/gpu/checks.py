"""The tests of `tests/gpu`, and compute-sanitizer over every kernel, in processes of their own."""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import small

Found = dict[str, Any]

TOOLS = ("memcheck", "racecheck", "synccheck")
_KEPT = 600  # characters of a message
_ALONE = 20  # failed tests that are run again by themselves


def _run(command: Sequence[str], log: Path, seconds: float, **environment: str) -> int | None:
    """The exit status, output appended to a file; None where time was up."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        try:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                timeout=max(seconds, 1.0),
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None
    return done.returncode


def find_tests(start: Path) -> Path | None:
    """`tests/gpu` of the checkout at or above a folder, or around this package."""
    package = Path(__file__).resolve().parents[3]
    for folder in (start.resolve(), *start.resolve().parents, package):
        if (folder / "tests" / "gpu" / "operations.py").is_file():
            return folder / "tests" / "gpu"
    return None


def _node_of(case: ET.Element) -> str:
    """The name by which pytest runs a test again."""
    file, module = case.get("file", ""), case.get("classname", "").split(".")
    stem = Path(file).stem
    classes = module[module.index(stem) + 1 :] if stem in module else []
    return "::".join([file, *classes, case.get("name", "")])


def read_junit(path: Path) -> Found:
    """Counts, failed tests with their message, and why tests were skipped."""
    cases = list(ET.parse(path).getroot().iter("testcase"))
    failed = []
    skipped: collections.Counter[str] = collections.Counter()
    for case in cases:
        for outcome in case:
            message = (outcome.get("message") or outcome.text or "").strip()
            if outcome.tag in ("failure", "error"):
                failed.append({"test": _node_of(case), "message": message[:_KEPT]})
            elif outcome.tag == "skipped":
                skipped[message[:_KEPT]] += 1
    return {
        "passed": len(cases) - len(failed) - sum(skipped.values()),
        "failed": failed,
        "skipped": dict(sorted(skipped.items())),
    }


def run_tests(
    folder: Path | None, device: str, log: Path, *, seconds: float, select: str = ""
) -> Found:
    """Runs pytest over `tests/gpu`; failed tests once more, each alone, since a kernel that goes
    astray fails all tests after it.

    Args:
        folder: of the tests; None: there is no checkout here.
        device: `cuda`, or `cpu` for a rehearsal.
        log: for all that pytest says.
        seconds: after which they are stopped.
        select: as pytest's `-k`.
    """
    if folder is None:
        return {"status": "absent", "reason": "there is no checkout with tests/gpu here"}
    start, junit = time.monotonic(), log.with_suffix(".xml")
    junit.unlink(missing_ok=True)
    kind = device.split(":")[0]
    command = [sys.executable, "-m", "pytest", str(folder), "-v", "-p", "no:cacheprovider"]
    command += ["-o", "junit_family=xunit1", f"--rootdir={folder.parents[1]}"]
    whole = [*command, f"--junitxml={junit}", *(["-k", select] if select else [])]
    status = _run(whole, log, seconds, MODMASK_TEST_DEVICE=kind)
    found: Found = {"status": "passed"}
    if junit.exists():
        found |= read_junit(junit)
    if status is None:
        found |= {"status": "stopped", "reason": f"not done after {seconds:.0f} seconds"}
    elif status:
        found |= {"status": "failed", "reason": f"pytest ended with status {status}"}
    for failure in found.get("failed", [])[:_ALONE]:
        left = seconds - (time.monotonic() - start)
        if left <= 0:
            break
        path, _, rest = failure["test"].partition("::")
        alone = [*command[:3], f"{folder.parents[1] / path}::{rest}", *command[4:]]
        status = _run(alone, log, left, MODMASK_TEST_DEVICE=kind)
        failure["alone"] = "passed" if status == 0 else "failed"
    junit.unlink(missing_ok=True)
    found["seconds"] = round(time.monotonic() - start, 1)
    return found


def find_sanitizer(environment: Mapping[str, str] = os.environ) -> str | None:
    """compute-sanitizer on PATH, in the toolkit, or among this Python's packages."""
    found = shutil.which("compute-sanitizer", path=environment.get("PATH", ""))
    homes = [environment.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [Path(home) for home in homes if home]
    places += [place for entry in sys.path for place in sorted(Path(entry or ".").glob("nvidia/*"))]
    for place in places:
        for folder in ("bin", "compute-sanitizer"):
            program = place / folder / "compute-sanitizer"
            if found is None and os.access(program, os.X_OK) and program.is_file():
                found = str(program)
    return found


def run_sanitizer(device: str, log: Path, *, seconds: float, tools: Sequence[str] = TOOLS) -> Found:
    """Runs `bench.gpu.small` under the tools, a process for each of its ways; on the CPU, without
    one, as it is.

    Args:
        device: `cuda`, or `cpu` for a rehearsal.
        log: for all that they say.
        seconds: for all tools together.
        tools: of compute-sanitizer.
    """
    start = time.monotonic()
    command = [sys.executable, "-m", f"{__package__}.small", "--device", device]
    program = find_sanitizer()
    if not device.startswith("cuda"):
        status = _run(command, log, seconds)
        state = "passed" if status == 0 else "failed"
        return {"status": state, "reason": "a rehearsal on the CPU, under no tool", "tools": {}}
    if program is None:
        return {"status": "absent", "reason": "compute-sanitizer was not found"}
    found: Found = {"status": "passed", "tools": {}, "absent": {}}
    ways = []
    for way in small.WAYS:
        reason = small.absent(way)
        if reason is None:
            ways.append(way)
        else:
            found["absent"][str(way)] = reason
    for tool in tools:
        options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "10"]
        outcomes: list[tuple[str, str]] = []
        for way in ways:
            left = seconds - (time.monotonic() - start)
            begin = log.stat().st_size if log.exists() else 0
            # blocks of their own, so that an access beyond one is seen
            given = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **way.environment}
            status = _run([program, *options, *command], log, left, **given)
            text = log.read_text(encoding="utf-8", errors="replace")[begin:]
            said = [line for line in text.splitlines() if "SUMMARY" in line or "Error" in line]
            state = {0: "passed", None: "stopped"}.get(status, "failed")
            last = said[-1].strip("= ") if said else f"ended with status {status}"
            outcomes.append((state, last if state == "passed" else f"{way}: {last}"))
            if state == "stopped":
                break
        # of several ways the first that did not pass
        state, last = next((o for o in outcomes if o[0] != "passed"), outcomes[-1])
        found["tools"][tool] = {"status": state, "said": last[:_KEPT]}
        if state != "passed":
            found["status"] = "failed"
    found["seconds"] = round(time.monotonic() - start, 1)
    return found
