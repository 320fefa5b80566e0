"""`modmask bench`: the command line of the benchmarks."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import _native, report
from ..files import read_json, write_json, write_text
from . import antithetic, conv, linear, lstm, machine, memory, network, select, step, tables, top_k
from .figure import figure_of
from .verify import GateError

SUITES: dict[str, Callable[..., list[Any]]] = {
    "linear": linear.run,
    "memory": memory.run,
    "step": step.run,
    "conv": conv.run,
    "lstm": lstm.run,
    "network": network.run,
    "select": select.run,
    "top_k": top_k.run,
    "antithetic": antithetic.run,
}

_FORMAT = 1


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="modmask bench",
        description="Time the masked layers, their memory and a whole mask-learning step "
        "against plain layers, naive masking (eager and compiled) and NeuroSurgeon. Every "
        "candidate is checked before it is timed; all are timed turn by turn in one process.",
        epilog="The full table takes about twenty minutes on two cores. Close other "
        "programs first.",
    )
    out.add_argument(
        "--suite",
        choices=(*SUITES, "all"),
        default="all",
        help="linear: the linear layer; memory: its peak extra memory; step: a learning step; "
        "conv: the convolution; lstm: the LSTM; "
        "network: a learning step of large networks; select: a mask set for every row; "
        "top_k: the k largest of many scores; "
        "antithetic: what a pair of antithetic samples is worth [all]",
    )
    out.add_argument(
        "--gpu",
        action="store_true",
        help="tests, compute-sanitizer and times of a GPU instead, with options of their own: "
        "modmask bench --gpu --help",
    )
    out.add_argument("--quick", action="store_true", help="few rows and rounds, a few minutes")
    out.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs/bench"),
        help="folder for bench.json, README.md and the figure [runs/bench]",
    )
    out.add_argument(
        "--keep",
        action="store_true",
        help="keep the other suites that DIR holds, if they come from this machine and version",
    )
    out.add_argument("--threads", type=int, metavar="N", help="threads to compute with [all cores]")
    out.add_argument("--quiet", action="store_true", help="no progress bars")
    return out


def kept(path: Path, settings: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
    """Suites of an earlier result that may stand beside new ones.

    Raises:
        ValueError: the earlier result comes from another machine, version or length.
    """
    if not path.exists():
        return {}
    former = read_json(path)
    for name, now in (("machine", described), ("settings", settings)):
        if former.get(name) != now:
            raise ValueError(
                f"{path} holds results with another {name}; "
                "run without --keep or choose another --out"
            )
    return {suite: former[suite] for suite in SUITES if suite in former}


def write(results: dict[str, Any], folder: Path, command: str) -> list[Path]:
    """Writes bench.json and, if matplotlib is there, README.md and the figure.

    Returns:
        the paths written.
    """
    paths = [folder / "bench.json"]
    write_json(paths[0], results)
    try:
        report.require()
    except ModuleNotFoundError as error:
        print(f"no Markdown page and no figure: {error}", file=sys.stderr)
        return paths
    from ..report.style import THEMES, render_svg

    figure = figure_of(results)
    if figure is not None:
        for theme in THEMES:
            paths.append(folder / f"{figure.name}-{theme.name}.svg")
            write_text(paths[-1], render_svg(figure, theme))
    paths.append(folder / "README.md")
    write_text(paths[-1], tables.markdown(results, command, figure))
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmarks; returns the exit status, 1 if a candidate computes wrong values.

    Args:
        argv: arguments without the program's name (default: those of the process).
    """
    arguments = parser().parse_args(argv)
    former_threads = torch.get_num_threads()
    if arguments.threads is not None:
        if arguments.threads < 1:
            parser().error(f"--threads: expected at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    try:
        if _native.FORCED_BACKEND == "reference":
            print("MODMASK_BACKEND=reference: this times the reference", file=sys.stderr)
        elif not _native.available():
            print(
                "the compiled kernels are absent, so this times the reference: "
                f"{_native.LOAD_ERROR}",
                file=sys.stderr,
            )
        described = machine.describe()
        settings = {"format": _FORMAT, "quick": arguments.quick}
        path = arguments.out / "bench.json"
        results: dict[str, Any] = {"settings": settings, "machine": described}
        if arguments.keep:
            results.update(kept(path, settings, described))
        suites = list(SUITES) if arguments.suite == "all" else [arguments.suite]
        for suite in suites:
            results[suite] = SUITES[suite](quick=arguments.quick, progress=not arguments.quiet)
    except (GateError, RuntimeError, ValueError) as error:
        print(f"modmask bench: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(former_threads)
    print(tables.text(results) + "\n")
    command = "modmask bench" + (" --quick" if arguments.quick else "")
    if arguments.out != Path("runs/bench"):
        command += f" --out {shlex.quote(str(arguments.out))}"
    for written in write(results, arguments.out, command):
        print(written)
    return 0
