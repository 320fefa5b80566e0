"""A process that measures rows, one after the other, and writes each down at once.

A kernel that goes astray takes its process with it: `supervise` sees that, says so in the row, and
starts another process for the rows that are left.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import cases, rows
from .events import Device

_LOST = 3
PATIENCE = 240.0  # seconds without a row after which a process is taken for dead


def read(path: Path) -> tuple[list[rows.Row], str | None]:
    """The rows of a file, and the key of one that was begun but not finished."""
    found: dict[str, rows.Row] = {}
    begun = None
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off while it was written
        if "begin" in entry:
            begun = entry["begin"]
        else:
            found[f"{entry['suite']}: {entry['label']}"] = entry
            begun = None
    return list(found.values()), begun


def append(path: Path, entry: dict[str, Any]) -> None:
    """One more line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def wanted(which: str, suites: Sequence[str]) -> list[cases.Case]:
    """The rows of `rehearsal`, `quick` or `full` that belong to the suites."""
    makers = {"rehearsal": cases.rehearsal, "quick": cases.quick, "full": cases.full}
    return [case for case in makers[which]() if case.suite in suites]


def empty_row(case: cases.Case, status: str, reason: str) -> rows.Row:
    """A row that was not measured."""
    return {
        "suite": case.suite,
        "label": case.label,
        "dtype": case.dtype,
        "status": status,
        "reason": reason,
    }


def supervise(
    command: Sequence[str],
    path: Path,
    todo: Sequence[cases.Case],
    *,
    deadline: float,
    patience: float = PATIENCE,
) -> None:
    """Runs the command until every row is in the file, measured or with what became of it.

    Args:
        command: a process that measures the rows that the file does not have.
        path: the file.
        todo: the rows.
        deadline: of `time.time`; rows that are begun before it may end after it.
        patience: seconds without a row after which a process is killed.
    """
    by_key = {rows.key_of(case): case for case in todo}
    attempts = 0
    while True:
        before, _ = read(path)
        rest = [
            c for k, c in by_key.items() if k not in {f"{r['suite']}: {r['label']}" for r in before}
        ]
        if not rest:
            return
        if time.time() > deadline:
            for case in rest:
                append(path, empty_row(case, "not reached", "the time was up"))
            return
        ended = _watch(command, path, patience)
        after, begun = read(path)
        if begun in by_key:
            append(path, empty_row(by_key[begun], "failed", f"the process {ended}"))
        elif len(after) == len(before):
            attempts += 1
            if attempts == 2:
                for case in rest:
                    append(path, empty_row(case, "failed", f"the process {ended} before any row"))
                return


def _watch(command: Sequence[str], path: Path, patience: float) -> str:
    """How a process ended."""
    process = subprocess.Popen(command)
    size, since = -1, time.monotonic()
    try:
        while process.poll() is None:
            now = path.stat().st_size if path.exists() else 0
            if now != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > patience:
                return f"did not answer for {patience:.0f} seconds"
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return f"ended with status {process.returncode}"


def command_of(
    path: Path, which: str, suites: Sequence[str], device: str, deadline: float, *more: str
) -> list[str]:
    """What `supervise` runs."""
    options = ["--rows", str(path), "--which", which, "--suites", *suites]
    options += ["--device", device, "--deadline", str(deadline), *more]
    return [sys.executable, "-m", __name__, *options]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what the file does not have; `_LOST` where another process must go on."""
    parser = argparse.ArgumentParser(prog="python -m modmask_kernels.bench.gpu.worker")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--which", required=True)
    parser.add_argument("--suites", nargs="+", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--leave-out", nargs="*", default=[])
    given = parser.parse_args(argv)
    device = torch.device(given.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    there = {f"{row['suite']}: {row['label']}" for row in read(given.rows)[0]}
    place = Device(device)
    for case in wanted(given.which, given.suites):
        if rows.key_of(case) in there:
            continue
        if time.time() > given.deadline:
            return 0
        append(given.rows, {"begin": rows.key_of(case)})
        print(rows.key_of(case), end="", flush=True)
        start = time.monotonic()
        try:
            row = rows.measure(case, place, rounds=given.rounds, leave_out=tuple(given.leave_out))
        except rows.LostDeviceError as error:
            append(given.rows, error.args[0])
            print(": the device is lost, a new process goes on", flush=True)
            return _LOST
        append(given.rows, row)
        print(f": {_told(row)} [{time.monotonic() - start:.1f} s]", flush=True)
    return 0


def _told(row: rows.Row) -> str:
    if row["status"] != "measured":
        return f"{row['status']}: {row['reason']}"
    seconds = rows.median(row, "fused" if row["suite"] != "ceilings" else "plain")
    if seconds is None:
        return "measured"
    how = rows.best(row)
    times = row["ratio_to_plain"].get(how, {}).get("fused")
    return f"{1e6 * seconds:.1f} us" + (f", {times['value']:.2f} times plain" if times else "")


if __name__ == "__main__":
    sys.exit(main())
