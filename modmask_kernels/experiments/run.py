"""A run: one experiment with its settings and seeds in one results folder."""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch

if sys.platform != "win32":
    import fcntl

from ..analysis import summarise
from ..files import read_json, write_json
from .settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..report import Page, Results

FORMAT = 2
S = TypeVar("S", bound=Settings)


class Experiment(ABC, Generic[S]):
    """One experiment: its settings, its run for one seed, its page.

    `run_seed` is called again after a kill and must then continue from what the folder holds; what
    it returns must depend on nothing but settings and seed.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    settings_type: type[S]
    presets: Mapping[str, S]
    tests: Mapping[str, Callable[..., str]]

    @abstractmethod
    def describe(self, settings: S) -> str:
        """What is about to be run, in a line."""

    @abstractmethod
    def run_seed(self, settings: S, seed: int, folder: SeedFolder) -> dict[str, Any]:
        """Run one seed, or the rest of it, and return its metrics (JSON values)."""

    @abstractmethod
    def page(self, results: Results) -> Page:
        """The report of a finished run."""


@dataclass
class SeedFolder:
    """The part of a results folder that belongs to one seed."""

    path: Path
    seed: int
    progress: bool = True
    label: str = ""
    _seconds: dict[str, float] = field(default_factory=dict)
    _record: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        """The trained network (safetensors)."""
        return self.path / "weights.safetensors"

    @property
    def metrics(self) -> Path:
        """The results of the seed; there once it is finished."""
        return self.path / "metrics.json"

    def mask(self, name: str) -> Path:
        """A learned mask (safetensors)."""
        return self.path / "masks" / f"{name}.safetensors"

    def checkpoint(self, name: str) -> Path:
        """A checkpoint of an unfinished stage."""
        return self.path / "checkpoints" / f"{name}.pt"

    @contextmanager
    def stage(self, name: str) -> Iterator[str]:
        """Time a stage; yields its description for a progress bar.

        Seconds of repeated and continued stages add up in provenance.json, which holds everything
        that may differ between two runs with equal results.
        """
        start = time.perf_counter()
        try:
            yield f"{self.label}{name}"
        finally:
            seconds = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
            self._write_provenance()

    def begin(self) -> None:
        """Open a session of work on this seed."""
        old, now = self._read_provenance(), environment()
        changed = [f"{k} {old[k]} to {now[k]}" for k in now if k in old and old[k] != now[k]]
        if changed:
            say(f"the bits may differ from those of an unbroken run: {', '.join(changed)}")
        self._seconds = dict(old.get("seconds", {}))
        self._record = {
            "sessions": old.get("sessions", 0) + 1,
            "started": old.get("started", _now()),
            **now,
        }
        self._write_provenance()

    def _read_provenance(self) -> dict[str, Any]:
        path = self.path / "provenance.json"
        return dict(read_json(path)) if path.exists() else {}

    def _write_provenance(self) -> None:
        record = {**self._record, "ended": _now(), "seconds": self._seconds}
        write_json(self.path / "provenance.json", record)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they can change bits or speed."""
    from .. import __version__, _native

    return {
        "modmask_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "kernels": f"cpu, {_native.capability()}" if _native.enabled() else "reference",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def check_device(settings: Settings) -> None:
    """ValueError unless the device of the settings, if they name one, computes here."""
    name = getattr(settings, "device", "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"setting device: {name!r} cannot be used here: {reason}") from None


def check_new_folder(path: Path, record: str, command: str) -> None:
    """FileExistsError if something is in a folder already; names the command that continues it.

    Args:
        path: the folder, which may not be there.
        record: the file that such a folder holds.
        command: "run" or "sweep".
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        continuing = (
            f"continue it with `modmask {command} --resume {path}` or name"
            if (path / record).exists()
            else "name"
        )
        raise FileExistsError(
            f"{path} exists and is not empty: {continuing} another folder by --out"
        )


def read_record(file: Path, format: int) -> dict[str, Any]:
    """The record of a folder; ValueError unless it has the format."""
    record = read_json(file)
    if not isinstance(record, dict) or record.get("format") != format:
        raise ValueError(
            f"{file} has not the format {format} that this version reads: it is of another version"
        )
    return record


class Run:
    """A results folder.

    settings.json       experiment, preset, settings, seeds, threads
    metrics.json        results of every seed, and mean and sample standard deviation over seeds
    seed-K/             weights.safetensors, masks/, metrics.json, provenance.json, checkpoints/
    figures/, report.html
    """

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        from . import get

        self.path = path
        self.record = dict(record)
        self.experiment: Experiment[Any] = get(record["experiment"])
        self.preset: str = record["preset"]
        self.settings: Settings = self.experiment.settings_type.from_dict(record["settings"])
        self.seeds: list[int] = list(record["seeds"])
        self.threads: int = record["threads"]

    @classmethod
    def create(
        cls,
        path: Path,
        experiment: Experiment[Any],
        preset: str,
        settings: Settings,
        seeds: list[int],
        threads: int | None = None,
    ) -> Self:
        """Start a results folder.

        Raises:
            FileExistsError: the folder holds something already.
        """
        check_new_folder(path, "settings.json", "run")
        check_device(settings)
        record = {
            "format": FORMAT,
            "experiment": experiment.name,
            "preset": preset,
            "seeds": seeds,
            "threads": threads or torch.get_num_threads(),
            "settings": settings.to_dict(),
        }
        write_json(path / "settings.json", record)
        return cls(path, record)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a results folder.

        Raises:
            FileNotFoundError: it is none.
            ValueError: its settings cannot be read.
        """
        file = path / "settings.json"
        if not file.exists():
            raise FileNotFoundError(f"{path} is no results folder: it has no settings.json")
        record = read_record(file, FORMAT)
        try:
            return cls(path, record)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged: {error}") from None

    def extend(self, seeds: list[int]) -> None:
        """Run these seeds too."""
        self.seeds = sorted({*self.seeds, *seeds})
        self.record["seeds"] = self.seeds
        write_json(self.path / "settings.json", self.record)

    def folder(self, seed: int, progress: bool = True) -> SeedFolder:
        """The folder of one seed."""
        position = f"seed {seed} ({self.seeds.index(seed) + 1}/{len(self.seeds)}) "
        return SeedFolder(self.path / f"seed-{seed}", seed, progress, position)

    @property
    def finished(self) -> bool:
        """Whether all seeds have their results."""
        return all(self.folder(seed).metrics.exists() for seed in self.seeds)

    def execute(self, progress: bool = True) -> None:
        """Run what is missing, in the order of the seeds, and write metrics.json.

        Interrupted at any moment, by a kill too, it can be called again and ends with the same
        bits in weights, masks and metrics (same machine and versions; the number of threads is
        restored).
        """
        self.execute_seeds(self.seeds, progress)
        self.write_metrics()

    def execute_seeds(self, seeds: Sequence[int], progress: bool = True) -> None:
        """Run what is missing of these seeds of the run.

        Other seeds of the run may be executed by other processes meanwhile.

        Raises:
            ValueError: a seed is none of the run, or is being run by another process.
        """
        strange = sorted(set(seeds) - set(self.seeds))
        if strange:
            raise ValueError(
                f"seed {strange[0]} is none of {self.path}, whose seeds are "
                f"{', '.join(map(str, self.seeds))}"
            )
        for seed, folder in self.sessions(progress, [s for s in seeds if not self._done(s)]):
            if not folder.metrics.exists():  # by a process that had it meanwhile
                write_json(folder.metrics, self.experiment.run_seed(self.settings, seed, folder))

    def _done(self, seed: int) -> bool:
        return self.folder(seed).metrics.exists()

    def sessions(
        self, progress: bool = True, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[int, SeedFolder]]:
        """Every seed with its folder, alone with it and with the threads of the run."""
        check_device(self.settings)
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            for seed in self.seeds if seeds is None else seeds:
                folder = self.folder(seed, progress)
                with self._alone(folder):
                    folder.begin()
                    yield seed, folder
        finally:
            torch.set_num_threads(threads)

    @contextmanager
    def _alone(self, folder: SeedFolder) -> Iterator[None]:
        """Keep a second process out of a seed; the system lifts it from a killed one."""
        if sys.platform == "win32":
            yield
            return
        folder.path.mkdir(parents=True, exist_ok=True)
        path = folder.path / ".lock"
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ValueError(
                    f"{folder.path} is being run by another process, {file.read()}"
                ) from None
            except OSError:  # a file system without locks
                pass
            # one that ended meanwhile took its file with it, and a third may have made a new one
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise ValueError(f"{folder.path} was being run by another process until now")
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def write_metrics(self) -> None:
        """Collect the seeds' results into metrics.json.

        Raises:
            FileNotFoundError: a seed is not finished.
        """
        missing = [seed for seed in self.seeds if not self.folder(seed).metrics.exists()]
        if missing:
            raise FileNotFoundError(
                f"{self.path} is not finished: seed {', '.join(map(str, missing))} has no results; "
                f"continue it with `modmask run --resume {self.path}`"
            )
        per_seed = [read_json(self.folder(seed).metrics) for seed in self.seeds]
        extra = [self._test_results(seed) for seed in self.seeds]
        for metrics, tests in zip(per_seed, extra, strict=True):
            metrics["tests"] = {k: v for k, v in tests.items() if all(k in e for e in extra)}
        write_json(
            self.path / "metrics.json",
            {
                "format": FORMAT,
                "experiment": self.experiment.name,
                "seeds": self.seeds,
                "summary": summarise(per_seed),
                "per_seed": per_seed,
            },
        )

    def write_report(self) -> Path:
        """Draw figures and report.html from the results; returns the page's path."""
        from ..report import Results, write_report

        page = self.experiment.page(Results.load(self.path))
        return Path(write_report(page, str(self.path)))

    def write_summary(self, folder: Path) -> Path:
        """Write the small summary for documentation; returns the path of its README.md."""
        from ..report import Results, write_summary

        results = Results.load(self.path)
        return Path(write_summary(self.experiment.page(results), results, str(folder)))

    def _test_results(self, seed: int) -> dict[str, Any]:
        """Results of tests that were run on the seed and left a record."""
        files = sorted((self.folder(seed).path / "tests").glob("*.json"))
        return {file.stem: read_json(file) for file in files}


def say(text: str) -> None:
    """A line beside the progress bars, on standard error."""
    print(text, file=sys.stderr, flush=True)
