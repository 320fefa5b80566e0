"""`modmask bench --gpu`: part after part; one that fails does not stop the others."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ... import _native
from ...files import read_json, write_json, write_text
from .. import machine
from . import cases, checks, page, worker

PARTS = ("tests", "sanitizer", "bench")
JSON, PAGE = "gpu.json", "README.md"
_FORMAT = 1
# of the minutes asked for; what a part leaves goes to the next
_SHARES = {"tests": 0.5, "sanitizer": 0.35, "bench": 1.0}


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="modmask bench --gpu",
        description="Everything that a GPU has to say: the tests of tests/gpu, compute-sanitizer "
        "over every kernel, and the time of every operation against plain layers, naive masking "
        "and the prediction. Leaves one JSON file and one page. The exit status is 1 if a part "
        "went wrong, 2 if nothing could be run.",
    )
    out.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs/gpu"), help="results [runs/gpu]"
    )
    out.add_argument("--quick", action="store_true", help="the most telling rows")
    out.add_argument(
        "--leave-out", nargs="+", choices=PARTS, default=[], metavar="PART", help="of: %(choices)s"
    )
    out.add_argument(
        "--suites",
        nargs="+",
        choices=cases.SUITES,
        default=list(cases.SUITES),
        metavar="SUITE",
        help="of: %(choices)s",
    )
    out.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="for all parts together; rows that are not reached are named [9, full: 60]",
    )
    out.add_argument(
        "--resume",
        action="store_true",
        help="keep what DIR holds, from the same device and versions, and do the rest",
    )
    out.add_argument("--without", nargs="+", default=[], metavar="CANDIDATE", help="as: compiled")
    out.add_argument("--test-select", default="", metavar="WORDS", help="as pytest's -k")
    out.add_argument(
        "--device",
        default="cuda",
        help="cpu: a rehearsal on tiny shapes, of no other use [cuda]",
    )
    return out


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and, where there is one, its GPU."""
    gpu: dict[str, Any] | None = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        cudnn: Any = torch.backends.cudnn
        gpu = {
            "name": properties.name,
            "capability": f"{properties.major}{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cache": properties.L2_cache_size,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": cudnn.version(),
        }
    error = _native.cuda_load_error()
    if error is None and device.type == "cuda":
        error = _native.cuda_problem(device.index or 0)
    return {
        **machine.describe(),
        "gpu": gpu,
        "cuda_kernels": error or f"built with CUDA {_native.cuda_toolkit()}",
        "triton": machine.version_of("triton") or "absent",
        "backend": _native.FORCED_BACKEND,
    }


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        return next(word for word in text.split() if word.count(".") >= 1 and word[0].isdigit())
    except (OSError, StopIteration):
        pass
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.split()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return "unknown"


def kept(folder: Path, described: dict[str, Any]) -> dict[str, Any]:
    """What a folder holds from the same device and versions.

    Raises:
        ValueError: it comes from another device or version.
    """
    path = folder / JSON
    if not path.exists():
        return {}
    former: dict[str, Any] = read_json(path)
    if former.get("format") != _FORMAT or former.get("machine") != described:
        raise ValueError(
            f"{path} holds results of another device or version; run without --resume or choose "
            "another --out"
        )
    return former


def write(results: dict[str, Any], folder: Path, command: str) -> list[Path]:
    """The JSON file, then the page and its figure as far as they can be made."""
    paths = [folder / JSON]
    write_json(paths[0], results)
    if not page.can_draw():
        print("no page: it needs matplotlib; the JSON file has everything", file=sys.stderr)
        return paths
    from ...report.style import THEMES, render_svg

    figure = page.figure_of(results)
    for theme in THEMES if figure is not None else ():
        assert figure is not None
        paths.append(folder / f"{figure.name}-{theme.name}.svg")
        write_text(paths[-1], render_svg(figure, theme))
    paths.append(folder / PAGE)
    write_text(paths[-1], page.markdown(results, command, figure))
    return paths


def _bench(
    results: dict[str, Any], given: argparse.Namespace, device: str, deadline: float
) -> None:
    """Rows that are not there yet; those of other suites are kept."""
    which = "rehearsal" if results["rehearsal"] else "quick" if given.quick else "full"
    todo = worker.wanted(which, given.suites)
    path = given.out / "rows.jsonl"
    if not given.resume:
        path.unlink(missing_ok=True)
    there = {f"{row['suite']}: {row['label']}" for row in worker.read(path)[0]}
    for row in results["rows"]:
        if row["status"] == "measured" and f"{row['suite']}: {row['label']}" not in there:
            worker.append(path, row)
    more = ["--leave-out", *given.without] if given.without else []
    command = worker.command_of(path, which, given.suites, device, deadline, *more)
    worker.supervise(command, path, todo, deadline=deadline)
    order = {f"{suite}": place for place, suite in enumerate(cases.SUITES)}
    results["rows"] = sorted(worker.read(path)[0], key=lambda row: order[row["suite"]])
    path.unlink()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is asked for; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    given = parser().parse_args(words)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "modmask bench --gpu: there is no CUDA device here; --device cpu rehearses the command",
            file=sys.stderr,
        )
        return 2
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    start = time.time()
    minutes = given.minutes or (9.0 if given.quick else 60.0)
    described = describe(device)
    results: dict[str, Any] = {
        "format": _FORMAT,
        "rehearsal": device.type != "cuda",
        "machine": described,
        "rows": [],
    }
    try:
        if given.resume:
            results |= kept(given.out, described)
    except ValueError as error:
        print(f"modmask bench --gpu: {error}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    print(page.headline(results) + "\n", flush=True)
    command = shlex.join(["modmask", "bench", "--gpu", *(w for w in words if w != "--gpu")])
    wanted = [part for part in PARTS if part not in given.leave_out]
    for part in wanted:
        left = 60.0 * minutes - (time.time() - start)
        seconds, log = left * _SHARES[part], given.out / f"{part}.log"
        log.unlink(missing_ok=True)
        try:
            if part == "tests":
                folder = checks.find_tests(Path.cwd())
                select = given.test_select
                results[part] = checks.run_tests(
                    folder, device.type, log, seconds=seconds, select=select
                )
            elif part == "sanitizer":
                tools = checks.TOOLS[:1] if given.quick else checks.TOOLS
                results[part] = checks.run_sanitizer(str(device), log, seconds=seconds, tools=tools)
            else:
                _bench(results, given, str(device), time.time() + seconds)
        except Exception as error:  # the others may have more to say
            results[part] = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        if part != "bench":
            print(f"{part}: {results[part]['status']}", flush=True)
        write_json(given.out / JSON, results)  # whatever happens to the next part
    print("\n" + page.text(results) + "\n")
    for written in write(results, given.out, command):
        print(written)
    wrong = page.problems(results, wanted)
    for problem in wrong:
        print(f"wrong: {problem}", file=sys.stderr)
    return 1 if wrong else 0
