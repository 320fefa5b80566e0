"""Several runs side by side: what differs between them, and what it changes."""

# ruff: noqa: RUF001 - the multiplication sign and dashes belong to the text

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..analysis import mean_std
from ..report import Figure, Finding, Page, Results, Section, Table, Tile, format_statistic
from .settings import format_value
from .study import CONTROL, UNMASKED, Study
from .study_report import CLOSE, SOURCE, Statistic, difference, every, listed

# the most runs that are drawn as bars and named in sentences
MANY = 12


def compare(paths: Sequence[Path], titles: Sequence[str] | None, command: str) -> Page:
    """The comparison of finished runs of studies, of one experiment or of several.

    Args:
        paths: their results folders, at least two.
        titles: what the page calls them; by default the names of their folders.
        command: the command line that makes the page.

    Raises:
        ValueError: fewer than two runs, or one of an experiment without masks of functions.
        FileNotFoundError: a run is not finished.
    """
    return Comparison([Results.load(path) for path in paths], titles or _names(paths)).page(command)


def _names(paths: Sequence[Path]) -> list[str]:
    names = [path.resolve().name for path in paths]
    if len(set(names)) == len(names):
        return names
    return [str(path) for path in paths]


class _One:
    """A run as the comparison sees it: numbers that every study has."""

    def __init__(self, title: str, results: Results, study: Study[Any]) -> None:
        self.title = title
        self.results = results
        self.study = study
        self.settings = study.settings_type.from_dict(results.settings)
        summary = results.summary
        self.accuracy: Mapping[str, Mapping[str, Statistic]] = summary["accuracy"]
        self.hidden: Mapping[str, Any] = summary["hidden"]
        self.whole: Mapping[str, Any] = summary["all"]
        stability = summary.get("tests", {}).get("stability")
        self.again: Mapping[str, Statistic] | None = stability["hidden"] if stability else None

    def _over(
        self, statistics: Sequence[Statistic], choose: Callable[[Sequence[float]], float]
    ) -> Statistic:
        columns = zip(*(s["values"] for s in statistics), strict=True)
        return mean_std([choose(column) for column in columns])._asdict()

    def lowest(self, condition: str) -> Statistic:
        """The worst function's accuracy under a condition, seed by seed."""
        return self._over([self.accuracy[condition][key] for key in self.study.measured], min)

    def own(self) -> Statistic:
        """The worst function's accuracy under its own mask."""
        return self._over([self.accuracy[key][key] for key in self._measured_functions()], min)

    def others(self) -> Statistic | None:
        """Accuracy under the masks of other functions, averaged over all such cases."""
        cases = [
            self.accuracy[mask][key]
            for mask in self.study.functions
            for key in self.study.measured
            if mask != key
        ]
        return self._over(cases, _mean) if cases else None

    def _measured_functions(self) -> list[str]:
        return [key for key in self.study.functions if key in self.study.measured]

    def pairs(self, quantity: str) -> Statistic:
        """An overlap in the hidden layers, averaged over the pairs of masks."""
        return self._over([pair[quantity] for pair in self.hidden["pairs"].values()], _mean)

    def kept(self, part: Mapping[str, Any]) -> Statistic:
        """Kept weights of the functions' masks in per cent, averaged over the masks."""
        return self._over([part["kept_percent"][key] for key in self.study.functions], _mean)

    def shared(self) -> Statistic:
        """Weights of a mask that another one keeps too, in per cent, averaged over the masks."""
        return self._over(list(self.whole["shared_percent"].values()), _mean)

    def repeated(self) -> Statistic | None:
        """IoU of a mask with its repetition in the hidden layers, averaged over the masks."""
        if self.again is None:
            return None
        return self._over([self.again[key] for key in self.study.functions], _mean)

    def holds(self) -> bool:
        """Whether the control mask costs nothing, for every function and seed."""
        return all(
            every(difference(self.accuracy[UNMASKED][key], self.accuracy[CONTROL][key]), high=CLOSE)
            for key in self.study.measured
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _cell(statistic: Statistic | None, digits: int = 1) -> str:
    return "–" if statistic is None else format_statistic(statistic, digits)


class Comparison:
    """The page of several runs."""

    def __init__(self, results: Sequence[Results], titles: Sequence[str]) -> None:
        from . import get

        if len(results) < 2:
            raise ValueError(f"a comparison needs at least two runs, got {len(results)}")
        self.runs: list[_One] = []
        for title, one in zip(titles, results, strict=True):
            study = get(one.experiment)
            if not isinstance(study, Study):
                raise ValueError(
                    f"{title}: {one.experiment} has no masks of functions to be compared"
                )
            self.runs.append(_One(title, one, study))
        self.varied = self._varied()
        self.axis = self._axis()

    def _varied(self) -> dict[str, list[Any]]:
        """What differs: name to the value of every run; None where a run lacks the setting."""
        columns = {"experiment": [run.results.experiment for run in self.runs]}
        dicts = [run.settings.to_dict() for run in self.runs]
        for name in dict.fromkeys(key for values in dicts for key in values):
            columns[name] = [values.get(name) for values in dicts]
        return {
            name: values
            for name, values in columns.items()
            if any(value != values[0] for value in values)
        }

    def _axis(self) -> str | None:
        """The one number that differs, where there are enough values of it for a curve."""
        if len(self.varied) != 1:
            return None
        (name, values), *_ = self.varied.items()
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        return name if numbers and len(set(values)) == len(values) >= 3 else None

    @property
    def ordered(self) -> list[_One]:
        """The runs, along the axis if there is one."""
        if self.axis is None:
            return self.runs
        return sorted(self.runs, key=lambda run: float(getattr(run.settings, str(self.axis))))

    # --- words ------------------------------------------------------------------------------------

    def _held(self) -> Finding:
        """Where the control mask answers as well as the network."""
        good = [run.title for run in self.ordered if run.holds()]
        bad = [run.title for run in self.ordered if not run.holds()]
        numbers = "; ".join(
            f"{run.title}: {_cell(run.lowest(CONTROL))} % of {_cell(run.lowest(UNMASKED))} %"
            for run in self.ordered[:MANY]
        )
        text = f"Worst function under the control mask, of that without a mask: {numbers}."
        if len(self.runs) > MANY:
            text = "The table gives every run's."
        if not bad:
            return Finding("The control mask holds in every run.", text)
        if not good:
            return Finding("The control mask costs accuracy in every run.", text, sure=False)
        which = listed(good) if len(good) <= MANY else f"{len(good)} of {len(self.runs)} runs"
        return Finding(
            f"The control mask holds, within {CLOSE:g} point, only at {which}.",
            text + " The other runs' masks are too sparse to be compared with these.",
            sure=False,
        )

    def _overlaps(self) -> Finding:
        """Where masks overlap least and most."""
        found = sorted(self.ordered, key=lambda run: float(run.pairs("iou")["mean"]))
        low, high = found[0], found[-1]
        text = (
            "IoU of the masks between hidden units, averaged over pairs: "
            f"{format_statistic(low.pairs('iou'), 3)} at {low.title} (by chance "
            f"{format_statistic(low.pairs('chance_iou'), 3)}) to "
            f"{format_statistic(high.pairs('iou'), 3)} at {high.title} (by chance "
            f"{format_statistic(high.pairs('chance_iou'), 3)})."
        )
        least, most = low.pairs("iou"), high.pairs("iou")
        if least["std"] is None or most["std"] is None:
            return Finding(
                "Overlaps differ between the runs; single seeds do not tell whether by chance.",
                text,
                sure=False,
            )
        if max(least["values"]) >= min(most["values"]):
            return Finding(
                "The overlaps do not differ more between the runs than between seeds.", text
            )
        return Finding(f"The masks overlap least at {low.title}, most at {high.title}.", text)

    def _limits(self) -> list[str]:
        limits = []
        presets = {run.results.preset for run in self.runs}
        if "smoke" in presets:
            limits.append(
                "The preset smoke only checks that everything runs; its numbers mean nothing."
            )
        if any(len(run.results.seeds) == 1 for run in self.runs):
            limits.append("Runs of one seed say nothing about the spread between seeds.")
        if "experiment" in self.varied:
            limits.append(
                "The runs are of several experiments: averages over their functions stand side by "
                "side, which are not the same functions."
            )
        limits += [
            "Overlap depends on how many weights masks keep: read it beside the level of chance, "
            "and only where the control mask holds.",
            "Where several settings differ at once, their effects are not separated.",
        ]
        return limits

    # --- tables and figures -----------------------------------------------------------------------

    def _table(
        self,
        caption: str,
        columns: Mapping[str, Callable[[_One], Statistic | None]],
        digits: int,
        note: str,
    ) -> Table:
        rows = [
            [run.title, *(_cell(column(run), digits) for column in columns.values())]
            for run in self.ordered
        ]
        return Table(caption, ["", *columns], rows, note)

    def _accuracy_table(self) -> Table:
        return self._table(
            "Right answers in per cent",
            {
                "no mask": lambda run: run.lowest(UNMASKED),
                "control mask": lambda run: run.lowest(CONTROL),
                "own mask": _One.own,
                "masks of others": _One.others,
            },
            1,
            "No mask, control mask, own mask: the worst function of every seed. Masks of others: "
            "the mean over all functions under masks that were not learned for them.",
        )

    def _each_table(self) -> Table | None:
        """Every function, where all runs have the same ones."""
        first = self.runs[0].study
        if any(run.results.experiment != self.runs[0].results.experiment for run in self.runs):
            return None
        conditions = {
            UNMASKED: "no mask",
            CONTROL: "control",
            **{key: f"{one.label} mask" for key, one in first.functions.items()},
        }
        columns = [(mask, key) for mask in conditions for key in first.measured]
        if len(columns) > MANY:
            return None
        return Table(
            "Right answers in per cent, by mask and function",
            ["", *(f"{conditions[m]}: {first.measured[key].title}" for m, key in columns)],
            [
                [run.title, *(_cell(run.accuracy[mask][key]) for mask, key in columns)]
                for run in self.ordered
            ],
        )

    def _kept_table(self) -> Table:
        return self._table(
            "Kept weights in per cent",
            {
                "control mask": lambda run: run.whole["kept_percent"][CONTROL],
                "masks of functions": lambda run: run.kept(run.whole),
                "control, hidden": lambda run: run.hidden["kept_percent"][CONTROL],
                "functions, hidden": lambda run: run.kept(run.hidden),
                "shared": _One.shared,
            },
            2,
            "Of all weights, and of those between hidden units. Shared: weights of a mask that "
            "another mask keeps too. Means over the masks of the functions.",
        )

    def _overlap_table(self) -> Table:
        return self._table(
            "Overlap between hidden units, mean over pairs of masks",
            {
                "IoU": lambda run: run.pairs("iou"),
                "by chance": lambda run: run.pairs("chance_iou"),
                "IoMin": lambda run: run.pairs("io_min"),
                "by chance ": lambda run: run.pairs("chance_io_min"),
                "IoU of a mask learned again": _One.repeated,
            },
            3,
            "By chance: of independent masks that keep as many weights per layer. Learned again: "
            "with other data order and noise, where that was measured.",
        )

    def _varied_table(self) -> Table:
        names = {name: name.replace("_", " ") for name in self.varied}
        rows = [
            [
                run.title,
                *(
                    "–" if values[i] is None else format_value(values[i])
                    for values in self.varied.values()
                ),
                ", ".join(map(str, run.results.seeds)),
                run.results.preset,
            ]
            for i, run in enumerate(self.runs)
        ]
        return Table(
            "What differs between the runs",
            ["", *names.values(), "seeds", "preset"],
            rows,
            words=True,
        )

    def _figure(
        self,
        name: str,
        caption: str,
        xlabel: str,
        series: Mapping[str, tuple[str, Callable[[_One], Statistic]]],
        limit: float | None = None,
        digits: int = 0,
    ) -> Figure:
        runs = self.ordered
        roles = {key: role for key, (role, _) in series.items()}
        statistics = {key: [column(run) for run in runs] for key, (_, column) in series.items()}
        spoken = "; ".join(
            f"{run.title}: "
            + ", ".join(f"{key} {_cell(s[i], digits)}" for key, s in statistics.items())
            for i, run in enumerate(runs)
        )
        alt = f"{caption} {spoken}."
        if self.axis is not None:
            axis = self.axis
            places = [float(getattr(run.settings, axis)) for run in runs]
            lines = {key: (roles[key], s, places) for key, s in statistics.items()}

            def draw_curves(canvas: Any, theme: Any) -> None:
                from ..report import figures

                figures.curves(
                    canvas,
                    theme,
                    [(xlabel, lines)],
                    xlabel=axis.replace("_", " "),
                    points=True,
                    logarithmic_steps=min(places) > 0 and max(places) > 20 * min(places),
                )

            return Figure(name, caption, alt, draw_curves, size=(4.4, 3.0), key=True)

        def draw_bars(canvas: Any, theme: Any) -> None:
            from ..report import figures

            figures.grouped_bars(
                canvas,
                theme,
                [run.title for run in runs],
                {key: (roles[key], s) for key, s in statistics.items()},
                xlabel=xlabel,
                limit=limit,
                digits=digits,
            )

        height = 1.0 + 0.22 * len(series) * len(runs)
        return Figure(name, caption, alt, draw_bars, size=(4.4, height), key=True)

    def _figures(self) -> list[Figure]:
        whiskers = (
            " Bands show the standard deviation over seeds."
            if self.axis is not None
            else " Whiskers show the standard deviation over seeds, rings the seeds."
        )
        return [
            self._figure(
                "accuracy",
                "Right answers of the worst function without a mask, with the control mask, and "
                "with its own mask." + whiskers,
                "right answers, %",
                {
                    "no mask": ("plain", lambda run: run.lowest(UNMASKED)),
                    "control mask": ("third", lambda run: run.lowest(CONTROL)),
                    "own mask": ("first", _One.own),
                },
                100.0,
            ),
            self._figure(
                "kept",
                "Kept weights." + whiskers,
                "kept weights, %",
                {
                    "control mask": ("third", lambda run: run.whole["kept_percent"][CONTROL]),
                    "masks of functions": ("first", lambda run: run.kept(run.whole)),
                },
                digits=1,
            ),
            self._figure(
                "overlap",
                "IoU of the masks of two functions between hidden units, mean over pairs, and of "
                "independent masks of their sizes." + whiskers,
                "IoU",
                {
                    "masks": ("second", lambda run: run.pairs("iou")),
                    "by chance": ("plain", lambda run: run.pairs("chance_iou")),
                },
                digits=2,
            ),
        ]

    def page(self, command: str) -> Page:
        """The whole comparison."""
        names = list(dict.fromkeys(run.results.experiment for run in self.runs))
        what = [name.replace("_", " ") for name in self.varied if name != "experiment"]
        seeds = sum(len(run.results.seeds) for run in self.runs)
        accuracy, kept, overlap = self._figures()
        each = self._each_table()
        held = sum(run.holds() for run in self.runs)
        ious = [run.pairs("iou")["mean"] for run in self.runs]
        question = (
            f"What does the {listed(what)} change?"
            if len(names) == 1 and what
            else f"How do {listed(names)} compare?"
            if len(names) > 1
            else "Do the runs agree?"
        )
        provenance = Table(
            "Where the runs were made",
            ["", "versions", "machine", "seconds"],
            [self._provenance(run) for run in self.ordered],
            words=True,
        )
        return Page(
            title="Comparison",
            experiment=f"{' · '.join(names)} · {len(self.runs)} runs",
            question=question,
            method=[
                "Every run trained a network, froze it, and learned one mask on all of its task "
                "(the control) and one per function.",
                "The runs stand here side by side with what differs between their settings.",
                "All numbers are means over the seeds of a run with the sample standard deviation.",
            ],
            setting=f"{len(self.runs)} runs, {seeds} seeds in all; what differs: "
            + (listed(name.replace("_", " ") for name in self.varied) or "nothing")
            + "."
            if self.varied
            else f"{len(self.runs)} runs of equal settings, {seeds} seeds in all.",
            tiles=[
                Tile(f"{held} of {len(self.runs)}", "runs whose control mask holds"),
                Tile(f"{min(ious):.2f}–{max(ious):.2f}", "IoU between hidden units"),
            ],
            findings=[self._held(), self._overlaps()],
            limits=self._limits(),
            sections=[
                Section(
                    "Accuracy",
                    [],
                    [accuracy],
                    [self._accuracy_table(), *([each] if each is not None else [])],
                ),
                Section("Kept weights", [], [kept], [self._kept_table()]),
                Section("Overlap", [], [overlap], [self._overlap_table()]),
            ],
            settings=self._varied_table(),
            provenance=[provenance],
            source=SOURCE,
            command=command,
        )

    def _provenance(self, run: _One) -> list[str]:
        records = [record for record in run.results.provenance if record]

        def of(*keys: str) -> str:
            values = [" ".join(str(record.get(key, "")) for key in keys) for record in records]
            return "; ".join(dict.fromkeys(values))

        spent = sum(sum(record.get("seconds", {}).values()) for record in records)
        return [run.title, of("modmask_kernels", "torch"), of("processor"), f"{spent:,.0f}"]
