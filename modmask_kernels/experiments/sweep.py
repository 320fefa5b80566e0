"""A sweep: one experiment over a grid of settings, every point with the same seeds, in one folder.

The units of work are seeds of points. They run as processes of their own, on this machine or on a
Ray cluster, and every point's folder is an ordinary results folder, whatever ran it.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files import write_json
from ..progress import progress_bar
from .run import Experiment, Run, check_new_folder, read_record, say
from .settings import Settings, format_value

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..report import Page

FORMAT = 1
# how often a unit whose process was killed is started again
RESTARTS = 2


class SweepError(RuntimeError):
    """Units of a sweep failed; the others are done."""


class Unit(NamedTuple):
    """One seed of one point: the results folder and the seed."""

    path: Path
    seed: int


class Failure(NamedTuple):
    """A unit that ended with an error, and the last that it said."""

    unit: Unit
    message: str


Launcher = Callable[[Sequence[Unit], int], Iterator["Failure | None"]]
"""Runs units that need so many threads each; yields for each one that ends, failed or not."""


def points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of a grid, the last setting varying fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def point_name(point: Mapping[str, Any]) -> str:
    """Name of a point's folder: "size=small penalty=0.001" with what suits file systems."""
    text = "_".join(f"{key}={format_value(value)}" for key, value in point.items())
    return re.sub(r"[^\w.,=+-]", "-", text)


class Sweep:
    """A sweep's folder.

    sweep.json          experiment, preset, settings before the grid, grid, seeds, threads
    runs/POINT/         a results folder per point of the grid
    figures/, report.html   the points side by side
    """

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        from . import get

        self.path = path
        self.experiment: Experiment[Any] = get(record["experiment"])
        self.preset: str = record["preset"]
        self.grid: dict[str, list[Any]] = dict(record["grid"])
        self.points = points(self.grid)
        self.seeds: list[int] = list(record["seeds"])
        self.threads: int = record["threads"]
        self._base: Settings = self.experiment.settings_type.from_dict(record["settings"])

    @classmethod
    def create(
        cls,
        path: Path,
        experiment: Experiment[Any],
        preset: str,
        settings: Settings,
        grid: Mapping[str, Sequence[Any]],
        seeds: Sequence[int],
        threads: int = 1,
    ) -> Self:
        """Start a sweep.

        Args:
            path: its folder.
            experiment: what every point runs.
            preset: the preset that the settings started from.
            settings: the settings that the grid changes.
            grid: setting to values.
            seeds: of every point.
            threads: of every unit.

        Raises:
            FileExistsError: the folder holds something already.
            ValueError, TypeError: no grid, a setting that does not exist, two equal points, a value
                out of range. Nothing has been written then.
        """
        check_new_folder(path, "sweep.json", "sweep")
        if not grid or not all(grid.values()):
            raise ValueError("a sweep needs at least one setting with values, --grid NAME=A,B,...")
        known = settings.to_dict()
        for name in grid:
            if name not in known:
                raise ValueError(
                    f"grid: {experiment.name} has no setting {name!r}; it has {', '.join(known)}"
                )
        for point in points(grid):
            settings.replace(**point)
        names = [point_name(point) for point in points(grid)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"grid: the point {twice[0]} comes twice")
        record = {
            "format": FORMAT,
            "experiment": experiment.name,
            "preset": preset,
            "settings": known,
            "grid": {name: list(values) for name, values in grid.items()},
            "seeds": list(seeds),
            "threads": threads,
        }
        write_json(path / "sweep.json", record)
        return cls(path, record)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a sweep.

        Raises:
            FileNotFoundError: the folder holds none.
            ValueError: its record cannot be read.
        """
        file = path / "sweep.json"
        if not file.exists():
            raise FileNotFoundError(f"{path} is no sweep: it has no sweep.json")
        record = read_record(file, FORMAT)
        try:
            return cls(path, record)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged: {error}") from None

    def run_of(self, point: Mapping[str, Any]) -> Run:
        """The results folder of a point, started if it is not there."""
        path = self.path / "runs" / point_name(point)
        if (path / "settings.json").exists():
            return Run.open(path)
        settings = self._base.replace(**point)
        return Run.create(path, self.experiment, self.preset, settings, self.seeds, self.threads)

    @property
    def runs(self) -> list[Run]:
        """The results folders of all points, in the order of the grid."""
        return [self.run_of(point) for point in self.points]

    def missing(self) -> list[Unit]:
        """What has no results yet."""
        return [
            Unit(run.path, seed)
            for run in self.runs
            for seed in run.seeds
            if not run.folder(seed).metrics.exists()
        ]

    def execute(self, launcher: Launcher, progress: bool = True) -> None:
        """Run what is missing, then write metrics and report of every point, and the comparison.

        A unit that fails does not stop the others. Called again, also after a kill, it continues.

        Raises:
            SweepError: units failed; says which and why.
        """
        units = self.missing()
        total = len(self.points) * len(self.seeds)
        failures: list[Failure] = []
        with progress_bar(
            total, total - len(units), f"{self.experiment.name} sweep", shown=progress, unit="seed"
        ) as bar:
            for failure in launcher(units, self.threads):
                if failure is not None:
                    failures.append(failure)
                    say(f"{self._name(failure.unit)} failed: {failure.message}")
                bar.update()
        if failures:
            names = ", ".join(self._name(failure.unit) for failure in failures)
            raise SweepError(
                f"{len(failures)} of {len(units)} runs failed ({names}): "
                f"{failures[0].message}; continue with `modmask sweep --resume {self.path}`"
            )
        for run in self.runs:
            run.write_metrics()
            run.write_report()

    def _name(self, unit: Unit) -> str:
        return f"{unit.path.name} seed {unit.seed}"

    def page(self) -> Page:
        """The points side by side."""
        from .comparison import compare

        titles = [
            ", ".join(f"{key} {format_value(value)}" for key, value in point.items())
            for point in self.points
        ]
        paths = [run.path for run in self.runs]
        return compare(paths, titles, command=f"modmask sweep --resume {self.path.name}")

    def write_report(self) -> Path:
        """Draw figures and report.html of the comparison; returns the page's path."""
        from ..report import write_report

        return Path(write_report(self.page(), str(self.path)))


def on_this_machine(jobs: int) -> Launcher:
    """Runs `jobs` units at a time, each in a process of its own.

    One whose process is killed is started again, `RESTARTS` times, and continues where it was.
    """

    def launch(units: Sequence[Unit], threads: int) -> Iterator[Failure | None]:
        running: set[subprocess.Popen[str]] = set()

        def work(unit: Unit) -> Failure | None:
            message = ""
            for _ in range(1 + RESTARTS):
                process = subprocess.Popen(
                    _command(unit),
                    env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                running.add(process)
                _, said = process.communicate()
                running.discard(process)
                if process.returncode == 0:
                    return None
                lines = said.strip().splitlines()
                message = lines[-1] if lines else ""
                if process.returncode > 0:
                    return Failure(unit, message)
                message = f"killed by signal {-process.returncode}"
            return Failure(unit, f"{message}, {1 + RESTARTS} times")

        pool = ThreadPoolExecutor(jobs)
        pending: set[Future[Failure | None]] = {pool.submit(work, unit) for unit in units}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            pool.shutdown()

    return launch


def _command(unit: Unit) -> list[str]:
    words = ["run", "--resume", str(unit.path), "--only", str(unit.seed), "--quiet"]
    return [sys.executable, "-m", "modmask_kernels", *words]


def execute_unit(path: str, seed: int) -> None:
    """Run one seed of a results folder in this process."""
    Run.open(Path(path)).execute_seeds([seed], progress=False)


def on_ray(address: str | None = None) -> Launcher:
    """Runs units as tasks of a Ray cluster, all of whose machines see the sweep's folder.

    Ray starts a unit again whose worker dies, `RESTARTS` times; it continues where it was.

    Args:
        address: of a running cluster; None: the one that RAY_ADDRESS names, or else one of this
            machine's cores, for the sweep alone.

    Raises:
        ModuleNotFoundError: Ray is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "a sweep on a cluster needs Ray: pip install 'modmask-kernels[ray]'"
        ) from None

    def launch(units: Sequence[Unit], threads: int) -> Iterator[Failure | None]:
        ours = not ray.is_initialized()
        if ours:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        remote = ray.remote(num_cpus=threads, max_retries=RESTARTS)(execute_unit)
        waiting = {remote.remote(str(unit.path.resolve()), unit.seed): unit for unit in units}
        try:
            while waiting:
                done, _ = ray.wait(list(waiting))
                unit = waiting.pop(done[0])
                try:
                    ray.get(done[0])
                except ray.exceptions.RayTaskError as error:
                    yield Failure(unit, str(error.cause))
                except ray.exceptions.RayError as error:
                    yield Failure(unit, str(error).strip().splitlines()[0])
                else:
                    yield None
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
            if ours:
                ray.shutdown()

    return launch
