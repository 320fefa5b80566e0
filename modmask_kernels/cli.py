"""The command line: `modmask list | run | sweep | tune-beta | test | report | show | ...`.

Standard library only, so that `modmask info` works wherever the package can be imported.
"""

from __future__ import annotations

import argparse
import operator
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    from .experiments import Experiment, Run, Settings

_PRESETS = (
    "presets: paper = the published settings, quick = the effect in minutes on two cores, smoke = "
    "at most 15 seconds, only checks that everything runs"
)
# errors whose message is meant for the person at the terminal
_SPOKEN = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    ModuleNotFoundError,
    FloatingPointError,
)


def _positive(text: str) -> int:
    number = int(text) if text.lstrip("-").isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="modmask",
        description="Learned weight masks on frozen networks: run the published studies on this "
        "machine, test and report them.",
        epilog="Start with: modmask run addmul-fnn --preset quick --out runs/demo",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    commands.add_parser("list", help="the experiments and their presets")
    _add_run(commands)
    _add_sweep(commands)
    _add_tune(commands)
    _add_test(commands)

    report = commands.add_parser(
        "report",
        help="rebuild the report of a finished run or sweep, or compare runs",
        description="Rebuild metrics.json, the figures and report.html of a finished run, or of a "
        "sweep. With several runs, of one experiment or of several: one page that compares them.",
    )
    report.add_argument("run", type=Path, metavar="RUN", nargs="+", help="results folder")
    report.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="with several runs: folder of the comparison [runs/comparison]",
    )
    report.add_argument(
        "--summary",
        type=Path,
        metavar="DIR",
        help="also write a small summary for documentation: README.md, metrics.json, key figures",
    )

    show = commands.add_parser(
        "show",
        help="a page with a picture of every masked layer: which masks keep which weights",
        description="Write a page with one picture per masked layer, a pixel per weight, to zoom "
        "into: which weights belong to one mask alone, to several, to none. The files are masks of "
        "one network, those of a run in RUN/seed-K/masks.",
        epilog="For instance: modmask show runs/demo/seed-0/masks/add.safetensors "
        "runs/demo/seed-0/masks/mul.safetensors",
    )
    show.add_argument("masks", type=Path, nargs="+", metavar="MASKFILE", help="mask file")
    show.add_argument(
        "--out", type=Path, metavar="FILE", default=Path("modules.html"), help="[modules.html]"
    )

    _add_masks(commands)

    # parses its own arguments, help included
    commands.add_parser(
        "bench", help="time the operations against plain and naive masking", add_help=False
    )
    text = "versions, processor, and which backends are there, or why not"
    commands.add_parser("info", help=text, description=f"Print {text}.")
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="run an experiment, or continue one",
        usage="modmask run EXPERIMENT [--preset PRESET] [--seeds N] [--out DIR] [SETTINGS]\n"
        "       modmask run --resume RUN [--seeds N] [--quiet]",
        description="Run an experiment and write its results folder: settings, weights, masks, "
        "metrics, figures and one HTML page. A run that was interrupted, even killed, continues "
        "with --resume and ends with the same bits.",
        epilog=_PRESETS + ". `modmask run EXPERIMENT --help` lists every setting.",
    )
    run.add_argument(
        "--resume", type=Path, metavar="RUN", help="continue the run in this results folder"
    )
    run.add_argument(
        "--seeds",
        type=_positive,
        metavar="N",
        default=argparse.SUPPRESS,
        help="with --resume: run N seeds in all",
    )
    run.add_argument("--quiet", action="store_true", help="no progress bars")
    run.add_argument(
        "--only", type=int, metavar="K", help="with --resume: run no seed but K, and no report"
    )
    _add_experiments(run, "run", "results folder")


def _add_experiments(
    command: argparse.ArgumentParser,
    verb: str,
    folder: str,
    more: Callable[[argparse.ArgumentParser], None] | None = None,
    *,
    suffix: str = "",
    grid: str = "",
    threads: str = "all cores",
) -> None:
    """One parser per experiment with the arguments that a new run of it takes."""
    from .experiments import EXPERIMENTS

    names = command.add_subparsers(dest="experiment", metavar="EXPERIMENT", prog=f"modmask {verb}")
    for experiment in EXPERIMENTS.values():
        parser = names.add_parser(
            experiment.name,
            help=experiment.summary,
            description=f"{experiment.title}: {experiment.summary}",
            epilog=_PRESETS + ".",
            # a mistyped setting must not start a run with another one
            allow_abbrev=False,
            usage=f"modmask {verb} {experiment.name} {grid}[--preset PRESET] [--seeds N] "
            "[--out DIR] [SETTINGS]",
        )
        parser.add_argument(
            "--preset",
            choices=list(experiment.presets),
            default="quick",
            help="the settings to start from [quick]",
        )
        parser.add_argument(
            "--seeds",
            type=_positive,
            default=argparse.SUPPRESS,
            metavar="N",
            help="number of seeds [1]",
        )
        parser.add_argument(
            "--first-seed", type=int, default=0, metavar="K", help="the first of them [0]"
        )
        parser.add_argument(
            "--out",
            type=Path,
            metavar="DIR",
            help=f"{folder} [runs/{experiment.name}-PRESET{suffix}]",
        )
        parser.add_argument(
            "--threads",
            type=_positive,
            metavar="N",
            help=f"threads to compute with [{threads}]",
        )
        # not to overwrite a --quiet before the experiment's name
        parser.add_argument(
            "--quiet", action="store_true", default=argparse.SUPPRESS, help="no progress bars"
        )
        if more is not None:
            more(parser)
        settings = parser.add_argument_group(
            "settings", "each overrides the preset; its values are in square brackets"
        )
        experiment.settings_type.add_arguments(settings, experiment.presets)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="run an experiment over a grid of settings and seeds, or continue that",
        usage="modmask sweep EXPERIMENT --grid NAME=A,B ... [--preset PRESET] [--seeds N] "
        "[--launcher local|ray] [--out DIR] [SETTINGS]\n"
        "       modmask sweep --resume SWEEP [--launcher local|ray] [--quiet]",
        description="Run an experiment at every point of a grid of settings, each with the same "
        "seeds, as processes beside each other on this machine or on a Ray cluster. Every point "
        "gets an ordinary results folder, the sweep a page that compares them. What was "
        "interrupted, even killed, continues with --resume.",
        epilog="For instance: modmask sweep addmul-fnn --grid penalty=0.001,0.005,0.025 --seeds 3",
    )
    sweep.add_argument(
        "--resume", type=Path, metavar="SWEEP", help="continue the sweep in this folder"
    )

    def launching(parser: argparse.ArgumentParser, **default: Any) -> None:
        parser.add_argument(
            "--launcher",
            choices=("local", "ray"),
            help="where the seeds run: processes on this machine, or a Ray cluster [local]",
            **default,
        )
        parser.add_argument(
            "--jobs",
            type=_positive,
            metavar="N",
            help="seeds at a time with the local launcher [cores / threads]",
            **default,
        )
        parser.add_argument(
            "--address",
            metavar="HOST:PORT",
            help="of the Ray cluster, all of whose machines see the folder [RAY_ADDRESS, or a "
            "cluster of this machine's cores for the sweep alone]",
            **default,
        )

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--grid",
            nargs="+",
            action="extend",
            required=True,
            metavar="NAME=A,B",
            help="settings and their values; widths with semicolons between them",
        )
        launching(parser, default=argparse.SUPPRESS)

    launching(sweep)
    sweep.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_experiments(
        sweep,
        "sweep",
        "folder of the sweep",
        more,
        suffix="-sweep",
        grid="--grid NAME=A,B ... ",
        threads="1 per seed",
    )


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune-beta",
        help="find the largest penalty at which the control mask holds",
        usage="modmask tune-beta EXPERIMENT [--preset PRESET] [--out DIR] [--tolerance POINTS] "
        "[SETTINGS]\n"
        "       modmask tune-beta --resume DIR [--tolerance POINTS]",
        description="Train the network of an experiment and search for the largest penalty at "
        "which the mask on its whole task costs at most so many points of accuracy, of the worst "
        "function. A new network, size or number of steps needs a penalty of its own; overlaps "
        "can be compared only where the control mask holds.",
    )
    tune.add_argument("--resume", type=Path, metavar="DIR", help="continue the search in DIR")
    tune.add_argument("--quiet", action="store_true", help="no progress bars")

    def tolerance(parser: argparse.ArgumentParser, **default: Any) -> None:
        parser.add_argument(
            "--tolerance",
            type=float,
            metavar="POINTS",
            help="how much less than without a mask may be right, in points [1]",
            **default,
        )

    tolerance(tune, default=1.0)
    _add_experiments(
        tune,
        "tune-beta",
        "folder of network and search",
        lambda parser: tolerance(parser, default=argparse.SUPPRESS),
        suffix="-penalty",
    )


def _add_test(commands: Any) -> None:
    test = commands.add_parser(
        "test",
        help="test the masks of a finished run",
        description="Test the masks of a finished run.",
    )
    names = test.add_subparsers(dest="test", metavar="NAME", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = names.add_parser(name, help=text, description=text)
        parser.add_argument("run", type=Path, metavar="RUN", help="results folder")
        return parser

    inverse = add("inverse", "accuracy with every mask and without the weights that it keeps")
    inverse.add_argument(
        "--exclude-io",
        choices=("none", "fullmask", "ones"),
        default="none",
        help="what the first and the last layer get instead of the inverse: the control's mask "
        "(fullmask) or no mask (ones) [none]",
    )
    half = add("half-mask", "accuracy with the control mask on a half of the layers")
    half.add_argument(
        "--early",
        type=_positive,
        metavar="N",
        help="how many layers count as early [half, rounded up]",
    )
    histogram = add("histogram", "how decided the masks are: histogram of the keep probabilities")
    histogram.add_argument(
        "--bins", type=_positive, default=10, metavar="N", help="number of bins [10]"
    )
    add("stability", "learn every mask again with other data order and noise, and compare")


def _add_masks(commands: Any) -> None:
    masks = commands.add_parser(
        "masks",
        help="count the weights that a mask file keeps, or combine two files",
        description="Count the weights that a mask file (written by MaskSet.save) keeps, or "
        "combine it with a second mask file of the same network, weight by weight.",
        epilog="For instance: modmask masks add.safetensors --minus mul.safetensors "
        "--out only-add.safetensors",
    )
    masks.add_argument("first", type=Path, metavar="FILE", help="mask file")
    which = masks.add_mutually_exclusive_group()
    for name, text in (
        ("and", "the weights that both keep"),
        ("or", "the weights that one of them keeps, or both"),
        ("minus", "the weights that FILE keeps and OTHER does not"),
    ):
        which.add_argument(f"--{name}", type=Path, metavar="OTHER", help=text)
    masks.add_argument(
        "--out", type=Path, metavar="RESULT", help="write the result here; replaces the file"
    )


def _list() -> None:
    from .experiments import EXPERIMENTS

    for experiment in EXPERIMENTS.values():
        print(f"{experiment.name}\n  {experiment.title}: {experiment.summary}")
        print(f"  presets: {', '.join(experiment.presets)}; tests: {', '.join(experiment.tests)}")
    print(f"\n{_PRESETS}.")


def _info() -> None:
    from . import info

    info.main()


def _run(arguments: argparse.Namespace) -> None:
    from . import report
    from .experiments import Run
    from .experiments.run import say

    report.require()
    if arguments.only is not None and arguments.resume is None:
        raise ValueError("--only continues a run: modmask run --resume RUN --only K")
    if arguments.resume is not None:
        if arguments.experiment is not None:
            raise ValueError("--resume takes no experiment: the run knows its own settings")
        run = Run.open(arguments.resume)
        if "seeds" in arguments:
            if arguments.seeds < len(run.seeds):
                raise ValueError(
                    f"--seeds {arguments.seeds} is fewer than the {len(run.seeds)} of the run"
                )
            run.extend(list(range(run.seeds[0], run.seeds[0] + arguments.seeds)))
    elif arguments.experiment is None:
        raise ValueError("name an experiment (see `modmask list`) or a run with --resume")
    else:
        path, experiment, settings, seeds = _new(arguments, "")
        run = Run.create(path, experiment, arguments.preset, settings, seeds, arguments.threads)
    if arguments.only is not None:
        run.execute_seeds([arguments.only], progress=not arguments.quiet)
        return
    say(
        f"{run.experiment.name}, preset {run.preset}, {len(run.seeds)} "
        f"seed{'s' if len(run.seeds) > 1 else ''}, {run.threads} "
        f"thread{'s' if run.threads > 1 else ''}: {run.path}\n"
        f"{run.experiment.describe(run.settings)}"
    )
    try:
        run.execute(progress=not arguments.quiet)
    except KeyboardInterrupt:
        say(f"\nstopped; continue with: modmask run --resume {run.path}")
        raise
    print(run.write_report())


def _new(
    arguments: argparse.Namespace, suffix: str
) -> tuple[Path, Experiment[Any], Settings, list[int]]:
    """Folder, experiment, settings and seeds that the arguments of a new run state."""
    from .experiments import get

    experiment = get(arguments.experiment)
    overrides = experiment.settings_type.overrides(arguments)
    settings = experiment.presets[arguments.preset].replace(**overrides)
    path = arguments.out or Path("runs") / f"{experiment.name}-{arguments.preset}{suffix}"
    first, count = arguments.first_seed, getattr(arguments, "seeds", 1)
    return path, experiment, settings, list(range(first, first + count))


def _grid(words: Sequence[str], settings: Settings) -> dict[str, list[Any]]:
    """The values of every setting of a grid: ["penalty=0.001,0.01"]."""
    grid: dict[str, list[Any]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not values:
            raise ValueError(f"--grid takes NAME=A,B,..., not {word!r}")
        if name in grid:
            raise ValueError(f"--grid names {name} twice")
        several = isinstance(settings.to_dict().get(name), tuple)
        grid[name] = [settings.parse(name, text) for text in values.split(";" if several else ",")]
    return grid


def _sweep(arguments: argparse.Namespace) -> None:
    import os

    from . import report
    from .experiments.run import say
    from .experiments.sweep import Sweep, SweepError, on_ray, on_this_machine

    report.require()
    launcher = None
    if arguments.launcher == "ray":
        if arguments.jobs is not None:
            raise ValueError("--jobs is for the local launcher; a Ray cluster has its own cores")
        launcher = on_ray(arguments.address)
    elif arguments.address is not None:
        raise ValueError("--address is for --launcher ray")
    if arguments.resume is not None:
        if arguments.experiment is not None:
            raise ValueError("--resume takes no experiment: the sweep knows its own settings")
        sweep = Sweep.open(arguments.resume)
    elif arguments.experiment is None:
        raise ValueError("name an experiment (see `modmask list`) or a sweep with --resume")
    else:
        path, experiment, settings, seeds = _new(arguments, "-sweep")
        grid = _grid(arguments.grid, settings)
        sweep = Sweep.create(
            path, experiment, arguments.preset, settings, grid, seeds, arguments.threads or 1
        )
    if launcher is None:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        launcher = on_this_machine(arguments.jobs or max(cores // sweep.threads, 1))
    say(
        f"{sweep.experiment.name}, preset {sweep.preset}, {len(sweep.points)} points of "
        f"{', '.join(sweep.grid)}, {len(sweep.seeds)} seed{'s' if len(sweep.seeds) > 1 else ''} "
        f"each: {sweep.path}"
    )
    try:
        sweep.execute(launcher, progress=not arguments.quiet)
    except KeyboardInterrupt:
        say(f"\nstopped; continue with: modmask sweep --resume {sweep.path}")
        raise
    except SweepError as error:
        say(f"modmask sweep: {error}")
        raise SystemExit(1) from None
    print(sweep.write_report())


def _tune(arguments: argparse.Namespace) -> None:
    from .experiments import Run, Study
    from .experiments.run import say

    if arguments.resume is not None:
        if arguments.experiment is not None:
            raise ValueError("--resume takes no experiment: the folder knows its own settings")
        run = Run.open(arguments.resume)
    elif arguments.experiment is None:
        raise ValueError("name an experiment (see `modmask list`) or a folder with --resume")
    else:
        path, experiment, settings, seeds = _new(arguments, "-penalty")
        run = Run.create(path, experiment, arguments.preset, settings, seeds, arguments.threads)
    if not isinstance(run.experiment, Study):
        raise ValueError(f"{run.experiment.name} has no control mask")
    say(f"{run.experiment.name}, preset {run.preset}: {run.path}")
    try:
        text, beta = run.experiment.tune_text(run, arguments.tolerance, not arguments.quiet)
    except KeyboardInterrupt:
        say(f"\nstopped; continue with: modmask tune-beta --resume {run.path}")
        raise
    print(text)
    if beta is None:
        raise ValueError(
            "no penalty held: more steps for the masks, or a larger tolerance, may be needed"
        )
    print(f"\nmodmask run {run.experiment.name} --preset {run.preset} --penalty {beta:.3g} ...")


def _test(arguments: argparse.Namespace) -> None:
    run = _open(arguments.run)
    options = {
        key: value
        for key, value in vars(arguments).items()
        if key not in ("command", "test", "run")
    }
    function: Callable[..., str] | None = run.experiment.tests.get(arguments.test)
    if function is None:
        raise ValueError(
            f"{run.experiment.name} has no test {arguments.test!r}; it has "
            f"{', '.join(run.experiment.tests)}"
        )
    print(function(run, **options))


def _report(arguments: argparse.Namespace) -> None:
    if len(arguments.run) > 1:
        if arguments.summary is not None:
            raise ValueError("--summary is of one run")
        _compare(arguments.run, arguments.out or Path("runs") / "comparison")
        return
    (path,) = arguments.run
    if arguments.out is not None:
        raise ValueError("--out is for the comparison of several runs; a run keeps its own report")
    if (path / "sweep.json").exists():
        from .experiments.sweep import Sweep

        print(Sweep.open(path).write_report())
        return
    run = _open(path)
    run.write_metrics()
    print(run.write_report())
    if arguments.summary is not None:
        print(run.write_summary(arguments.summary))


def _compare(paths: Sequence[Path], out: Path) -> None:
    from .experiments.comparison import compare
    from .report import write_report

    if (out / "settings.json").exists() or (out / "sweep.json").exists():
        raise ValueError(f"--out: {out} is a run itself, whose report would be overwritten")
    for path in paths:
        _open(path).write_metrics()
    names = " ".join(str(path) for path in paths)
    print(write_report(compare(paths, None, f"modmask report {names} --out {out}"), str(out)))


def _show(arguments: argparse.Namespace) -> None:
    from . import MaskSet, report

    report.require()
    from .report.modules import write_modules

    names = [path.stem for path in arguments.masks]
    if len(set(names)) < len(names):
        names = [str(path) for path in arguments.masks]
    masks = {n: MaskSet.load(path) for n, path in zip(names, arguments.masks, strict=True)}
    if len(masks) < len(names):
        raise ValueError("a mask file comes twice")
    hashes = {mask.metadata.get("weight_hash") for mask in masks.values()} - {None}
    if len(hashes) > 1:
        raise ValueError("the mask files are of different networks (their weight hashes differ)")
    write = {name: dict(mask.items()) for name, mask in masks.items()}
    print(write_modules(write, arguments.out, ", ".join(names)))


def _masks(arguments: argparse.Namespace) -> None:
    from . import MaskSet

    result = MaskSet.load(arguments.first)
    operations: dict[str, Callable[[MaskSet, MaskSet], MaskSet]] = {
        "and": operator.and_,
        "or": operator.or_,
        "minus": operator.sub,
    }
    given = [name for name in operations if getattr(arguments, name) is not None]
    if arguments.out is not None and not given:
        raise ValueError("--out needs one of --and, --or, --minus")
    for name in given:
        result = operations[name](result, MaskSet.load(getattr(arguments, name)))
    rows = [(name, *counts) for name, counts in result.counts().items()]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    width = max(len(name) for name, *_ in rows)
    for name, kept, total in rows:
        print(f"{name:{width}}  {kept} of {total} kept ({kept / max(total, 1):.1%})")
    if arguments.out is not None:
        result.save(arguments.out)
        print(arguments.out)


def _open(path: Path) -> Run:
    from .experiments import Run

    return Run.open(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        argv: arguments without the program's name (default: those of the process).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"]:
        from . import bench

        return bench.main(words[1:])
    parser = _parser()
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        command = " ".join(["modmask", *words[:1]])
        if words[:1] == ["run"] and "--resume" in unknown:
            hint = "--resume takes no experiment: modmask run --resume RUN"
        elif words[:1] == ["masks"] and not unknown[0].startswith("-"):
            hint = "a second file comes with --and, --or or --minus"
        else:
            hint = f"`{command} --help` lists what there is"
        text = f"{command}: error: unrecognized arguments: {' '.join(unknown)}; {hint}"
        parser.exit(2, f"usage: {command} --help\n{text}\n")
    commands: dict[str, Callable[[argparse.Namespace], None]] = {
        "list": lambda _: _list(),
        "run": _run,
        "sweep": _sweep,
        "tune-beta": _tune,
        "test": _test,
        "report": _report,
        "show": _show,
        "masks": _masks,
        "info": lambda _: _info(),
    }
    try:
        commands[arguments.command](arguments)
    except KeyboardInterrupt:
        return 130
    except _SPOKEN as error:
        print(f"modmask {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0
