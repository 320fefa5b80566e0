"""What a finished run of a study says: sentences, tables, figures, for any set of functions."""

# ruff: noqa: RUF001 - the multiplication sign and dashes belong to the text

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..analysis import mean_std
from ..report import (
    Figure,
    Finding,
    Page,
    Results,
    Section,
    Table,
    Tile,
    format_count,
    format_percent,
    format_statistic,
)
from .settings import format_value
from .study import CONTROL, UNMASKED, Function, Study, StudySettings, inverse_name, pair_name

Statistic = Mapping[str, Any]

# accuracies this close count as equal (percentage points)
CLOSE = 1.0
# above this share of keep probabilities between 0.1 and 0.9 a mask is not settled (per cent)
UNSETTLED = 10.0
VARIANTS = {"none": "", "fullmask": ", ends as control", "ones": ", ends whole"}

SOURCE = (
    "Study: R. Csordás, S. van Steenkiste, J. Schmidhuber, Are Neural Nets Modular? Inspecting "
    "Functional Modularity Through Differentiable Weight Masks, ICLR 2021, arXiv 2010.02066."
)


def short(statistic: Statistic) -> str:
    """The mean with as few digits as say something: 100, 99.6, 4, 0.08."""
    mean = float(statistic["mean"])
    digits = 0 if mean == round(mean) or 10 <= mean < 99 else 1 if mean >= 1 else 2
    return f"{mean:.{digits}f}"


def constant(statistic: Statistic) -> str:
    """A whole number that is the same in all runs."""
    return f"{statistic['mean']:,.0f}"


def every(statistic: Statistic, low: float = float("-inf"), high: float = float("inf")) -> bool:
    """Whether all runs lie in [low, high]."""
    return all(low <= value <= high for value in statistic["values"])


def difference(a: Statistic, b: Statistic) -> Statistic:
    """Statistic of a - b over the runs."""
    pairs = zip(a["values"], b["values"], strict=True)
    return mean_std([x - y for x, y in pairs])._asdict()


def listed(words: Iterable[str]) -> str:
    """ "a, b and c" """
    words = list(words)
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def capital(text: str) -> str:
    """With a capital letter in front."""
    return text[:1].upper() + text[1:]


class StudyReport(ABC):
    """The summary of a run with the questions that a report asks it.

    An experiment overrides or adds findings, figures and tables: `own_findings`,
    `accuracy_figures`, `accuracy_tables`, `beside_the_study`, or any other part.
    """

    def __init__(self, study: Study[Any], results: Results) -> None:
        self.study = study
        self.results = results
        self.settings: Any = study.settings_type.from_dict(results.settings)
        self.summary = results.summary
        self.accuracy: dict[str, dict[str, Statistic]] = results.summary["accuracy"]
        self.hidden: dict[str, Any] = results.summary["hidden"]
        self.whole: dict[str, Any] = results.summary["all"]
        self.layers: list[dict[str, Any]] = results.summary["layers"]
        self.functions: Mapping[str, Function] = study.functions
        self.measured: Mapping[str, Function] = study.measured
        self.label = {CONTROL: "control", **{k: f.label for k, f in self.functions.items()}}
        self.role = {CONTROL: "third", **{k: f.role for k, f in self.functions.items()}}
        self.condition = {
            UNMASKED: "no mask",
            **{key: f"{label} mask" for key, label in self.label.items()},
            **{inverse_name(key): f"{label} inverted" for key, label in self.label.items()},
        }
        self.pairs = list(itertools.combinations(self.functions, 2))

    def pair(self, part: Mapping[str, Any], first: str, second: str) -> Mapping[str, Statistic]:
        """Overlap of two masks in a part of the network."""
        found: Mapping[str, Statistic] = part["pairs"][pair_name(first, second)]
        return found

    def others(self, function: str) -> list[str]:
        """What is measured beside the function itself."""
        return [name for name in self.measured if name != function]

    # --- findings -------------------------------------------------------------------------------

    def all_of(self, condition: str) -> str:
        """ "100 % of the additions and 99.6 ± 0.2 % of the multiplications" """
        rates = self.accuracy[condition]
        return listed(
            f"{format_percent(rates[key])} of the {one.many}" for key, one in self.measured.items()
        )

    def network(self) -> Finding:
        """Whether the network has learned the task."""
        rates = self.accuracy[UNMASKED]
        good = all(every(rates[key], low=99) for key in self.measured)
        text = f"Without any mask it answers {self.all_of(UNMASKED)} correctly."
        if good:
            return Finding("The network has learned the task.", text)
        return Finding(
            "The network itself does not solve the task.",
            text + " What the masks lose must be read against this.",
            sure=False,
        )

    def control(self) -> Finding:
        """What masking itself costs."""
        kept = self.whole["kept_percent"][CONTROL]
        number = "both" if len(self.functions) == 2 else "all"
        text = (
            f"The control mask, learned on {number} {self.study.nouns}, keeps "
            f"{format_count(self.whole['kept'][CONTROL])} of {constant(self.whole['size'])} "
            f"weights ({format_percent(kept)}) and answers {self.all_of(CONTROL)}."
        )
        lost = [
            difference(self.accuracy[UNMASKED][key], self.accuracy[CONTROL][key])
            for key in self.measured
        ]
        if all(every(s, high=CLOSE) for s in lost):
            share = "a small part" if kept["mean"] < 20 else "a part"
            return Finding(
                f"For {number} {self.study.nouns} {share} of the weights is enough.", text
            )
        worst = max(value for s in lost for value in s["values"])
        return Finding(
            f"Masking alone costs {'a little' if worst <= 5 else 'much'} accuracy.",
            f"{text} That is up to {worst:.1f} points below the network without a mask; every "
            "other mask is to be compared with the control, not with the network.",
            sure=False,
        )

    def specialisation(self) -> Finding:
        """Whether every mask keeps its own function and loses the others."""
        sentences: list[str] = []
        for key, one in self.functions.items():
            rest = listed(
                f"{format_percent(self.accuracy[key][o])} of the {self.measured[o].many}"
                for o in self.others(key)
            )
            sentences.append(
                f"{'The' if not sentences else 'the'} {one.label} mask, learned on the {one.many} "
                f"alone, answers {format_percent(self.accuracy[key][key])} of the {one.many} and "
                f"{rest}"
            )
        text = "; ".join(sentences) + "."
        control = self.accuracy[CONTROL]
        keeps = all(
            every(difference(control[key], self.accuracy[key][key]), high=CLOSE)
            for key in self.functions
        )
        # what is left of the other functions, as a fraction of what the control mask leaves
        left = [
            x / max(y, 1e-9)
            for key in self.functions
            for o in self.others(key)
            for x, y in zip(self.accuracy[key][o]["values"], control[o]["values"], strict=True)
        ]
        ruined = all(fraction <= 0.5 for fraction in left)
        weaker = all(fraction <= 0.9 for fraction in left)
        noun, other = self.study.noun, "other" if len(self.functions) == 2 else "others"
        if keeps and ruined:
            return Finding(f"Each mask keeps its own {noun} and loses the {other}.", text)
        noun = noun if other == "other" else self.study.nouns
        if ruined:
            return Finding(
                f"Each mask loses the other {noun}, but does not fully keep its own.",
                text + " The masks may be too sparse; a smaller penalty would tell.",
                sure=False,
            )
        if weaker:
            return Finding(
                f"The masks weaken the other {noun} without ruining it.", text, sure=False
            )
        return Finding("No clear specialisation is visible.", text, sure=False)

    def own_findings(self) -> list[Finding]:
        """Findings of the experiment alone, told after those of specialisation."""
        return []

    def sharing_text(self) -> str:
        """The numbers behind `sharing`."""
        overlaps = listed(
            f"{format_statistic(self.pair(self.hidden, a, b)['iou'], 3)} ({self.label[a]} with "
            f"{self.label[b]}; two independent masks of their sizes: "
            f"{format_statistic(self.pair(self.hidden, a, b)['chance_iou'], 3)})"
            for a, b in self.pairs
        )
        shared = listed(
            f"{format_percent(self.whole['shared_percent'][key])} of the {one.label} mask's weights"
            for key, one in self.functions.items()
        )
        text = (
            "Between hidden units the masks overlap with an IoU (weights in both over weights in "
            f"either) of {overlaps}. Over all layers, {shared} are in another mask too."
        )
        again = self.again()
        if again is not None:
            agrees = listed(
                f"{format_statistic(again[key], 3)} ({one.label})"
                for key, one in self.functions.items()
            )
            text += (
                f" For comparison, a mask learned a second time for the same {self.study.noun} "
                f"agrees with the first to {agrees}."
            )
        return text

    def sharing(self) -> Finding:
        """How much the masks share, against chance and against repeated masks."""
        text, nouns = self.sharing_text(), self.study.nouns
        dense = self.too_dense()
        if dense is not None:
            return dense
        found = [self.pair(self.hidden, a, b) for a, b in self.pairs]
        again = self.again()
        if all(
            x > 1.5 * y
            for s in found
            for x, y in zip(s["iou"]["values"], s["chance_iou"]["values"], strict=True)
        ):
            highest = max(value for s in found for value in s["iou"]["values"])
            if again is not None and all(
                every(again[key], low=2 * highest) for key in self.functions
            ):
                return Finding(
                    f"The {nouns} share weights: more than by chance, far fewer than two masks "
                    f"learned for one {self.study.noun} do.",
                    text,
                )
            ratios = [
                s["iou"]["mean"] / s["chance_iou"]["mean"] if s["chance_iou"]["mean"] else 1e9
                for s in found
            ]
            most = all(every(self.whole["shared_percent"][f], high=50) for f in self.functions)
            times = f"{min(ratios):.0f} times" if min(ratios) >= 3 else f"{min(ratios):.1f} times"
            more = " or more" if len(ratios) > 1 else ""
            return Finding(
                f"The {nouns} share weights, {times} chance{more} in the hidden layers"
                + (", but most of each mask is its own." if most else "."),
                text,
            )
        return Finding(
            "In the hidden layers the masks overlap hardly more than by chance.", text, sure=False
        )

    def too_dense(self) -> Finding | None:
        """That masks are too dense to say anything about sharing, if they are."""
        densest = max(self.hidden["kept_percent"][f]["mean"] for f in self.functions)
        if densest <= 50:
            return None
        return Finding(
            "The masks are too dense to say anything about sharing.",
            f"{self.sharing_text()} They keep up to {densest:.0f} % of the hidden weights, so that "
            "they overlap whatever they serve.",
            sure=False,
        )

    def again(self) -> dict[str, Statistic] | None:
        """IoU of every mask with its repetition in the hidden layers, if that was measured."""
        stability = self.summary.get("tests", {}).get("stability")
        return None if stability is None else stability["hidden"]

    def inverse(self, variant: str = "none", where: str = "") -> Finding:
        """What the network does without the weights of a mask.

        Args:
            variant: what the input and output layers have.
            where: said in the headline.
        """
        inverted = {key: self.accuracy[inverse_name(key, variant)] for key in self.functions}
        sentences = [
            f"{'without the weights of' if not n else 'without those of'} the {self.label[key]} "
            f"mask{' the network answers' if not n else ','} "
            f"{self.all_of(inverse_name(key, variant))}"
            for n, key in enumerate([*self.functions, CONTROL])
        ]
        text = capital("; ".join(sentences)) + "."
        clean = self.accuracy[UNMASKED]
        lost = {
            key: {o: difference(clean[o], rates[o]) for o in self.measured}
            for key, rates in inverted.items()
        }
        cases = [(key, o) for key in self.functions for o in self.others(key)]
        own = all(every(lost[key][key], low=10) for key in self.functions)
        specific = all(
            x - y >= 10
            for key, o in cases
            for x, y in zip(lost[key][key]["values"], lost[key][o]["values"], strict=True)
        )
        spared = all(every(lost[key][o], high=10) for key, o in cases)
        noun = self.study.noun
        two = len(self.functions) == 2
        other, it = ("other", "the other one") if two else ("others", "others")
        weights = f"Removing a mask's weights{where}"
        if own and spared:
            return Finding(f"{weights} breaks its own {noun} and spares the {other}.", text)
        if own and specific:
            return Finding(
                f"{weights} hurts its own {noun} most, but {it} as well.",
                text
                + " So part of what is removed serves both, or the network as a whole does not "
                "bear the loss.",
                sure=False,
            )
        if own:
            return Finding(
                f"{weights} breaks its own {noun}, and {it} as well.",
                text
                + " So the removed weights serve both to some degree, or the network as a whole "
                "does not bear the loss; the test cannot tell these apart.",
                sure=False,
            )
        return Finding(
            f"{weights} does not break its {noun}.",
            text + f" The network holds the {noun} more than once, or the mask missed part of it.",
            sure=False,
        )

    def inverses(self) -> list[Finding]:
        """Findings of the inverse-mask test."""
        return [self.inverse()]

    def halves(self) -> Finding:
        """Whether masked and unmasked layers fit together."""
        half = self.summary["half_mask"]
        if self.early_and_late:
            text = (
                f"With the control mask on the first {len(half['early']['layers'])} of "
                f"{len(self.layers)} layers only, accuracy changes by "
                f"{self.change(half['early']['drop'])} against the whole mask; with the mask on "
                f"the other layers only, by {self.change(half['late']['drop'])}."
            )
        else:
            each = "; ".join(
                f"{self.titles(part['layers'])}: {self.change(part['drop'])}"
                for part in half.values()
            )
            text = (
                "With the control mask on some of the weight matrices only, accuracy changes "
                f"against the whole mask. {each}."
            )
        drops = [s for part in half.values() for s in part["drop"].values()]
        if all(every(s, high=5) for s in drops):
            return Finding("Masked and unmasked layers still fit together.", text)
        if max(s["mean"] for s in drops) < 20:
            return Finding(
                "Masked and unmasked layers fit together, at some cost.", text, sure=False
            )
        return Finding("Half a control mask is worse than a whole one.", text)

    @property
    def early_and_late(self) -> bool:
        """Whether the halves are the first layers and the last ones."""
        return list(self.summary["half_mask"]) == ["early", "late"]

    def titles(self, names: Sequence[str]) -> str:
        """The layers of these parameters."""
        return listed([layer["title"] for layer in self.layers if layer["name"] in names])

    def change(self, drops: Mapping[str, Statistic]) -> str:
        """ "-3.0 points (additions) and +1.0 points (multiplications)" """
        words = []
        for key, one in self.measured.items():
            s = drops[key]
            spread = "" if s["std"] is None else f" ± {s['std']:.1f}"
            value = f"{0.0 - s['mean']:+.1f}".replace("-", "\N{MINUS SIGN}")
            words.append(f"{value}{spread} points ({one.many})")
        return listed(words)

    def decided(self) -> Finding:
        """Whether the masks are close to binary."""
        shares = self.summary["undecided_percent"]
        each = ", ".join(
            f"{format_percent(shares[key])} ({label})" for key, label in self.label.items()
        )
        text = f"Keep probabilities between 0.1 and 0.9: {each} of all weights."
        if max(s["mean"] for s in shares.values()) <= UNSETTLED:
            return Finding("The masks are close to binary.", text)
        return Finding(
            "The masks are not settled.",
            text + " Counts and overlaps would still move with more steps or another threshold.",
            sure=False,
        )

    def findings(self) -> list[Finding]:
        """All findings, in the order of the argument."""
        return [
            self.network(),
            self.control(),
            self.specialisation(),
            *self.own_findings(),
            self.sharing(),
            *self.inverses(),
            self.halves(),
            self.decided(),
        ]

    def limits(self) -> list[str]:
        """What a reader must not conclude."""
        limits = []
        changed = self.changed()
        if self.results.preset == "smoke":
            limits.append(
                "The preset smoke only checks that everything runs; its numbers mean nothing."
            )
        elif changed:
            limits.append(
                f"These are not the settings of the preset {self.results.preset}: changed "
                f"{'is' if len(changed) == 1 else 'are'} {listed(changed)}."
            )
        elif self.results.preset == "quick":
            limits.append(
                "The preset quick is a calibrated small setting, not the published one: compare "
                "directions with the study, not numbers."
            )
        if len(self.results.seeds) == 1:
            limits.append("One seed was run, so nothing is said about the spread between runs.")
        limits += [
            "A mask is one set of weights that suffices, neither the only one nor the smallest. A "
            "wide network may hold a function several times, which can hide sharing or feign it.",
            "How much is shared depends on penalty, learning rate and number of steps; overlaps "
            "can be compared only at equal settings, and only beside accuracy and kept weights.",
            self.accuracy_limit(),
        ]
        return limits

    @abstractmethod
    def accuracy_limit(self) -> str:
        """What the accuracies are taken over."""

    # settings that do not bear on the result
    neutral: tuple[str, ...] = ("checkpoint_every", "device", "learning", "stability")

    def changed(self) -> list[str]:
        """Settings that differ from the preset and bear on the result."""
        base = self.study.presets[self.results.preset]
        return [
            f"{name.replace('_', ' ')} (now {format_value(value)})"
            for name, value in self.settings.to_dict().items()
            if value != getattr(base, name) and name not in self.neutral
        ]

    # --- tables ---------------------------------------------------------------------------------

    def accuracy_table(self) -> Table:
        """Accuracies of all conditions."""
        conditions = dict(self.condition)
        for variant in self.study.inverse_io[1:]:
            conditions |= {
                inverse_name(key, variant): f"{label} inverted{VARIANTS[variant]}"
                for key, label in self.label.items()
            }
        ends = self.titles(self.study.io([layer["name"] for layer in self.layers]))
        note = "“Inverted” keeps exactly the weights that the mask removes."
        if len(self.study.inverse_io) > 1:
            note += (
                f" The ends are the layers {ends}: “ends as control” leaves them the control's "
                "mask, “ends whole” no mask, so that what is lost was lost in between."
            )
        return Table(
            f"Right answers in per cent, {self.accuracy_over()}",
            ["", *(one.title for one in self.measured.values())],
            [
                [text, *(format_statistic(self.accuracy[key][o]) for o in self.measured)]
                for key, text in conditions.items()
            ],
            note=f"{self.accuracy_note()} {note}".strip(),
        )

    @abstractmethod
    def accuracy_over(self) -> str:
        """What an accuracy counts: "over all argument pairs"."""

    def accuracy_note(self) -> str:
        """What an accuracy without knowledge would be."""
        return ""

    def kept_table(self) -> Table:
        """Kept weights per layer."""

        def cells(part: Mapping[str, Any]) -> list[str]:
            kept, share = part["kept"], part["kept_percent"]
            counts = (f"{format_count(kept[k])} ({format_percent(share[k], 2)})" for k in kept)
            return [constant(part["size"]), *counts]

        ratios = " ".join(
            f"The {self.label[b]} mask keeps "
            f"{format_statistic(self.pair(self.whole, a, b)['kept_ratio'], 2)} times as many "
            f"weights as the {self.label[a]} mask."
            for a, b in self.pairs
        )
        return Table(
            "Kept weights per layer",
            ["", "weights", *(f"{label} mask" for label in self.label.values())],
            self.rows(cells),
            note=ratios,
        )

    def rows(self, cells: Callable[[Mapping[str, Any]], list[str]]) -> list[list[str]]:
        """A row per layer, one for the hidden layers if there are several, one for all."""
        rows = [[self.layer_label(layer), *cells(layer)] for layer in self.layers]
        if len(self.layers) > 3:
            rows.append(["hidden together", *cells(self.hidden)])
        return [*rows, ["all", *cells(self.whole)]]

    def overlap_tables(self) -> list[Table]:
        """IoU and IoMin of every pair of masks."""
        names = ("iou", "chance_iou", "io_min", "chance_io_min")
        return [
            Table(
                f"Overlap of the {self.label[a]} and the {self.label[b]} mask",
                ["", "IoU", "by chance", "IoMin", "by chance"],
                self.rows(
                    lambda part, a=a, b=b: [  # type: ignore[misc]
                        format_statistic(self.pair(part, a, b)[name], 3) for name in names
                    ]
                ),
                note="IoU: weights in both masks over weights in either. IoMin: weights in both "
                "over the smaller mask. By chance: for independent masks that keep as many weights "
                "per layer.",
            )
            for a, b in self.pairs
        ]

    def shared_table(self) -> Table:
        """Weights in several masks."""

        def cells(part: Mapping[str, Any]) -> list[str]:
            kinds = ("shared_percent", "chance_shared_percent")
            return [format_statistic(part[kind][f]) for f in self.functions for kind in kinds]

        other = "the other" if len(self.functions) == 2 else "any other"
        heads = [(f"of the {one.label} mask", "by chance") for one in self.functions.values()]
        return Table(
            f"Weights of one mask that are in {other} too, per cent",
            ["", *itertools.chain(*heads)],
            self.rows(cells),
            note="The first column of the last row is the study's total shared %.",
        )

    def stability_tables(self) -> list[Table]:
        """How far repeated masks agree, if that was measured."""
        stability = self.summary.get("tests", {}).get("stability")
        if stability is None:
            return []
        rows = [
            [
                title,
                *(format_statistic(stability[part][key], 3) for key in self.label),
                *(format_statistic(self.pair(of, a, b)["iou"], 3) for a, b in self.pairs),
            ]
            for part, title, of in (
                ("hidden", "hidden layers", self.hidden),
                ("all", "all layers", self.whole),
            )
        ]
        pairs = [f"{self.label[a]} with {self.label[b]}" for a, b in self.pairs]
        last = "The last column, for comparison, is" if len(pairs) == 1 else "Beside it is"
        return [
            Table(
                "How far a mask agrees with its repetition, IoU",
                ["", *self.label.values(), *pairs],
                rows,
                note="Every mask was learned a second time over the same network, with other data "
                f"order and noise. {last} the overlap of different {self.study.nouns}.",
            )
        ]

    def remaining_table(self) -> Table:
        """How much of the control mask is in the others."""
        return Table(
            "How much of the control mask is in the other masks, per cent of its weights",
            ["", *(f"{one.label} mask" for one in self.functions.values())],
            self.rows(
                lambda part: [
                    format_statistic(part["remaining_percent"][f]) for f in self.functions
                ]
            ),
        )

    def half_table(self) -> Table:
        """Accuracies and drops of the half-mask test."""
        half = self.summary["half_mask"]

        def cells(rates: Mapping[str, Statistic]) -> list[str]:
            return [format_statistic(rates[key]) for key in self.measured]

        rows = [
            ["whole control mask", *cells(self.accuracy[CONTROL])],
            *([f"{name} masked", *cells(self.accuracy[name])] for name in half),
            *([f"drop, {name} masked", *cells(part["drop"])] for name, part in half.items()),
        ]
        if self.early_and_late:
            which = f"Early: the first {len(half['early']['layers'])} of {len(self.layers)} layers."
        else:
            which = "; ".join(f"{n}: {self.titles(part['layers'])}" for n, part in half.items())
            which = capital(which) + "."
        return Table(
            "Right answers in per cent with half of the control mask",
            ["", *(one.title for one in self.measured.values())],
            rows,
            note=f"{which} A drop is the accuracy with the whole mask minus that with the half.",
        )

    def seeds_table(self) -> Table:
        """The main numbers of every seed."""
        rows = []
        for metrics, provenance in zip(self.results.per_seed, self.results.provenance, strict=True):
            a = metrics["accuracy"]
            hidden, whole = metrics["hidden"], metrics["all"]
            rows.append(
                [
                    f"seed {metrics['seed']}",
                    *(f"{a[mask][o]:.1f}" for mask in self.label for o in self.measured),
                    *(f"{hidden['pairs'][pair_name(*pair)]['iou']:.3f}" for pair in self.pairs),
                    f"{whole['shared_percent'][next(iter(self.functions))]:.1f}",
                    f"{sum(provenance.get('seconds', {}).values()):,.0f}",
                ]
            )
        heads = []
        for mask, label in self.label.items():
            first, *rest = (one.label for one in self.measured.values())
            heads += [f"{label if mask == CONTROL else label + ' mask'}: {first}", *rest]
        ious = [
            "hidden IoU"
            if len(self.pairs) == 1
            else f"hidden IoU, {self.label[a]} with {self.label[b]}"
            for a, b in self.pairs
        ]
        return Table("Every seed", ["", *heads, *ious, "total shared, %", "seconds"], rows)

    def layer_label(self, layer: Mapping[str, Any]) -> str:
        """ "hidden 1, 200 × 200" """
        return f"{layer['title']}, {layer['rows']['mean']:.0f} × {layer['columns']['mean']:.0f}"

    # --- figures --------------------------------------------------------------------------------

    def accuracy_figure(self) -> Figure:
        """Accuracies without, with and under inverted masks."""

        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import grouped_bars

            grouped_bars(
                canvas,
                theme,
                list(self.condition.values()),
                {
                    one.title: (one.role, [self.accuracy[key][o] for key in self.condition])
                    for o, one in self.measured.items()
                },
                xlabel="right answers, %",
                limit=100,
                breaks=(1, 1 + len(self.label)),
            )

        bars = len(self.condition) * len(self.measured)
        return Figure(
            "accuracy",
            f"Right answers per {self.study.noun} without a mask, with each mask, and with each "
            f"mask inverted (only the weights that it removes).{self.whiskers()}",
            "Bar chart of accuracies: " + self.spoken(UNMASKED, *self.functions),
            draw,
            (4.4, 1.2 + 0.243 * bars),
            key=True,
        )

    def inverse_figure(self) -> Figure:
        """The variants of the inverse-mask test side by side."""

        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import grouped_bars

            rows = [(key, v) for key in self.functions for v in self.study.inverse_io]
            grouped_bars(
                canvas,
                theme,
                [f"{self.label[key]} inverted{VARIANTS[v]}" for key, v in rows],
                {
                    one.title: (one.role, [self.accuracy[inverse_name(*row)][o] for row in rows])
                    for o, one in self.measured.items()
                },
                xlabel="right answers, %",
                limit=100,
                breaks=range(len(self.study.inverse_io), len(rows), len(self.study.inverse_io)),
            )

        bars = len(self.functions) * len(self.study.inverse_io) * len(self.measured)
        return Figure(
            "inverse",
            "The inverse-mask test with the ends of the network inverted too, with the control's "
            f"mask on the ends, and with whole ends.{self.whiskers()}",
            "Bar chart of accuracies under inverted masks; the numbers are in the table below.",
            draw,
            (4.4, 1.2 + 0.243 * bars),
            key=True,
        )

    def spoken(self, *conditions: str) -> str:
        """Accuracies as a sentence for the alternative text."""
        return "; ".join(
            f"{self.condition[key]}: "
            + ", ".join(
                f"{one.title} {short(self.accuracy[key][o])} %" for o, one in self.measured.items()
            )
            for key in conditions
        )

    def whiskers(self) -> str:
        """How spread is drawn."""
        if len(self.results.seeds) == 1:
            return ""
        return " Whiskers: sample standard deviation over seeds; rings: single seeds."

    def kept_figure(self) -> Figure:
        """Kept weights per layer and mask."""

        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import grouped_bars

            grouped_bars(
                canvas,
                theme,
                [layer["title"] for layer in self.layers],
                {
                    f"{label} mask": (self.role[key], [layer["kept"][key] for layer in self.layers])
                    for key, label in self.label.items()
                },
                xlabel="kept weights",
            )

        return Figure(
            "kept",
            "Weights that each mask keeps, per layer. The layers have "
            f"{listed(constant(layer['size']) for layer in self.layers)} "
            f"weights.{self.whiskers()}",
            "Bar chart of kept weights per layer and mask; the numbers are in the table below.",
            draw,
            (4.4, 1.2 + 0.25 * len(self.label) * len(self.layers)),
            key=True,
        )

    def overlap_figures(self) -> list[Figure]:
        """Overlap per layer with chance levels, one figure per pair of masks."""
        return [self._overlap_figure(a, b) for a, b in self.pairs]

    def _overlap_figure(self, a: str, b: str) -> Figure:
        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import grouped_bars

            of = [self.pair(layer, a, b) for layer in self.layers]
            grouped_bars(
                canvas,
                theme,
                [layer["title"] for layer in self.layers],
                {
                    "IoU": ("fourth", [s["iou"] for s in of]),
                    "IoMin": ("plain", [s["io_min"] for s in of]),
                },
                xlabel=f"overlap of the {self.label[a]} and the {self.label[b]} mask",
                limit=1,
                digits=2,
                markers={
                    "IoU": ("chance level", [s["chance_iou"]["mean"] for s in of]),
                    "IoMin": ("chance level", [s["chance_io_min"]["mean"] for s in of]),
                },
            )

        which = "two masks" if len(self.pairs) == 1 else f"{self.label[a]} and {self.label[b]} mask"
        return Figure(
            "overlap" if len(self.pairs) == 1 else f"overlap-{a}-{b}",
            f"Overlap of the {which} per layer. The dashed marks say where two independent masks "
            f"that keep as many weights would lie.{self.whiskers()}",
            "Bar chart of IoU and IoMin per layer with chance levels; the numbers are in the table "
            "below.",
            draw,
            (4.4, 1.2 + 0.6 * len(self.layers)),
            key=True,
        )

    def histogram_figure(self) -> Figure:
        """Keep probabilities of every mask."""

        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import histograms

            histograms(
                canvas,
                theme,
                {
                    f"{label} mask": (self.role[key], self.summary["histogram"][key])
                    for key, label in self.label.items()
                },
                xlabel="probability of keeping a weight",
                ylabel="weights per bin (logarithmic)",
                band=(0.1, 0.9),
                band_label="undecided",
            )

        bins = len(self.summary["histogram"][CONTROL])
        return Figure(
            "histogram",
            f"Keep probabilities of all weights after learning, in {bins} bins. Learned masks are "
            "decided where nearly all weights lie at 0 or 1.",
            "Histograms of keep probabilities: "
            + ", ".join(
                f"{format_percent(s)} of the {self.label[key]} mask undecided"
                for key, s in self.summary["undecided_percent"].items()
            ),
            draw,
            (4.4, 0.6 + 1.2 * len(self.label)),
            key=True,
        )

    def half_figure(self) -> Figure:
        """Drops of the half-mask test."""
        half = self.summary["half_mask"]

        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import grouped_bars

            grouped_bars(
                canvas,
                theme,
                [f"{name} masked" for name in half],
                {
                    one.title: (one.role, [part["drop"][key] for part in half.values()])
                    for key, one in self.measured.items()
                },
                xlabel="drop against the whole control mask, points",
                digits=1,
                signed=True,
            )

        if self.early_and_late:
            where = (
                f"on the first {len(half['early']['layers'])} of {len(self.layers)} layers only "
                "(early), or on the others only (late)"
            )
        else:
            where = "on some of the weight matrices only; which, is in the table below"
        return Figure(
            "half-mask",
            f"Loss of accuracy when the control mask lies {where}.{self.whiskers()}",
            "Bar chart of the half-mask test; the numbers are in the table below.",
            draw,
            (4.4, 1.2 + 0.25 * len(half) * len(self.measured)),
            key=True,
        )

    def network_figure(self) -> Figure:
        """Learning curve of the network."""
        rows = self.summary["network_loss"]

        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import curves

            steps = [row["step"]["mean"] for row in rows]
            losses = [row["loss"] for row in rows]
            curves(
                canvas,
                theme,
                [(self.loss_title(), {"network": ("plain", losses, steps)})],
                xlabel="training step of the network",
                logarithmic=[True],
            )

        return Figure(
            "network-learning",
            "Training loss of the network, cross-entropy of a batch.",
            "Curve of the network's training loss.",
            draw,
            (4.4, 2.4),
        )

    def loss_title(self) -> str:
        """What the loss is averaged over."""
        return "loss"

    def learning_figure(self) -> Figure:
        """Learning curves of the masks."""
        learning = self.summary["learning"]

        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import curves

            def lines(column: str) -> dict[str, Any]:
                return {
                    f"{self.label[key]} mask": (
                        self.role[key],
                        [row[column] for row in rows],
                        [row["step"]["mean"] for row in rows],
                    )
                    for key, rows in learning.items()
                }

            curves(
                canvas,
                theme,
                [
                    ("loss of the masked network", lines("loss")),
                    ("kept weights, %", lines("kept_percent")),
                ],
                xlabel="learning step of the masks",
                logarithmic=[True, True],
            )

        return Figure(
            "mask-learning",
            "Loss and kept weights while the masks were learned.",
            "Curves of loss and kept weights per mask over the learning steps.",
            draw,
            (4.4, 4.0),
        )

    # --- the page -------------------------------------------------------------------------------

    def tiles(self) -> list[Tile]:
        """The numbers to take away."""
        control = self.accuracy[CONTROL]
        tiles = [
            Tile(
                f"{' / '.join(short(control[key]) for key in self.measured)} %",
                f"{' / '.join(one.many for one in self.measured.values())} right under the "
                "control mask",
            ),
            Tile(
                f"{short(self.whole['kept_percent'][CONTROL])} %",
                "of all weights in the control mask",
            ),
        ]
        for key in list(self.functions)[:2]:
            for o in self.others(key)[:1]:
                tiles.append(
                    Tile(
                        f"{short(control[o])} → {short(self.accuracy[key][o])} %",
                        f"{self.measured[o].many} right: control mask → {self.label[key]} mask",
                    )
                )
        for a, b in self.pairs[:1]:
            found = self.pair(self.hidden, a, b)
            tiles.append(
                Tile(
                    f"{found['iou']['mean']:.2f}",
                    f"IoU of {self.label[a]} and {self.label[b]} between hidden units (chance "
                    f"{found['chance_iou']['mean']:.2f})",
                )
            )
            tiles.append(
                Tile(
                    f"{short(self.whole['shared_percent'][a])} %",
                    f"of the {self.label[a]} mask's weights also in "
                    + (f"the {self.label[b]} mask" if len(self.pairs) == 1 else "another mask"),
                )
            )
        return tiles

    def accuracy_figures(self) -> list[Figure]:
        """Figures of the first section."""
        variants = [self.inverse_figure()] if len(self.study.inverse_io) > 1 else []
        return [self.accuracy_figure(), *variants]

    def accuracy_tables(self) -> list[Table]:
        """Tables of the first section."""
        return [self.accuracy_table()]

    def beside_the_study(self) -> list[Table]:
        """Tables that compare the run with what is known of the published one."""
        return []

    def sections(self) -> list[Section]:
        """The parts of the page below the findings."""
        beside = self.beside_the_study()
        return [
            Section(
                "What each mask can do",
                [
                    f"A mask that serves one {self.study.noun} should keep that {self.study.noun} "
                    "and lose the other. The inverse of a mask, the network without the mask's "
                    "weights, shows the same from the other side."
                ],
                self.accuracy_figures(),
                self.accuracy_tables(),
            ),
            Section(
                "How large the masks are, and what they share",
                [
                    "Sharing means something only where masks are sparse, and only against what "
                    "masks of that size would share by chance."
                ],
                [self.kept_figure(), *self.overlap_figures()],
                [
                    self.kept_table(),
                    *self.overlap_tables(),
                    self.shared_table(),
                    *self.stability_tables(),
                    self.remaining_table(),
                ],
            ),
            Section(
                "How decided the masks are, and half a mask",
                [
                    "A weight is kept if its probability exceeds one half. Where many "
                    "probabilities are near one half, the masks and everything computed from them "
                    "are not settled. The half-mask test lays the control mask over a half of the "
                    "layers."
                ],
                [self.histogram_figure(), self.half_figure()],
                [self.half_table()],
            ),
            *(
                [
                    Section(
                        "Beside the published study",
                        [
                            "The tables of the paper were not available; what its text, summaries "
                            "and plot scripts tell stands here with its certainty."
                        ],
                        [],
                        beside,
                    )
                ]
                if beside
                else []
            ),
            Section(
                "Learning",
                [],
                [self.network_figure(), self.learning_figure()],
                [self.seeds_table()],
            ),
        ]

    def setting(self) -> str:
        """One sentence about what was run."""
        s: StudySettings = self.settings
        seeds = "one seed" if len(self.results.seeds) == 1 else f"{len(self.results.seeds)} seeds"
        return (
            f"Preset {self.results.preset}, {seeds}: {self.task_text()} "
            f"({constant(self.whole['size'])} masked weights), {s.steps:,} steps of training and "
            f"{s.mask_steps:,} steps per mask."
        )

    @abstractmethod
    def task_text(self) -> str:
        """Data and network in half a sentence."""

    def settings_table(self) -> Table:
        """All settings with their meaning."""
        rows = [
            [name.replace("_", " "), format_value(value), self.study.settings_type.help_of(name)]
            for name, value in self.settings.to_dict().items()
        ]
        rows.append(["alpha", f"{self.settings.alpha:.3g}", "penalty per logit, beta / batch"])
        return Table("Settings", ["setting", "value", "meaning"], rows, words=True)

    def provenance_tables(self) -> list[Table]:
        """Versions, machine and times."""
        seeds, records = self.results.seeds, self.results.provenance
        keys = [k for k in records[0] if k != "seconds"] if records and records[0] else []
        stages = list(dict.fromkeys(k for r in records for k in r.get("seconds", {})))
        return [
            Table(
                "Provenance",
                ["", *(f"seed {seed}" for seed in seeds)],
                [[key, *(str(r.get(key, "")) for r in records)] for key in keys],
                words=True,
            ),
            Table(
                "Seconds per stage",
                ["", *(f"seed {seed}" for seed in seeds)],
                [
                    [stage, *(f"{r.get('seconds', {}).get(stage, 0):,.1f}" for r in records)]
                    for stage in stages
                ],
                note="Some sessions were interrupted; what a killed one spent on its last stage is "
                "not included."
                if any(r.get("sessions", 1) > 1 for r in records)
                else "",
            ),
        ]

    def command(self) -> str:
        """The command line that gives this run."""
        base = self.study.presets[self.results.preset]
        parts = [f"modmask run {self.study.name} --preset {self.results.preset}"]
        for name, value in self.settings.to_dict().items():
            if value != getattr(base, name):
                flag = name.replace("_", "-")
                if isinstance(value, bool):
                    parts.append(f"--{flag}" if value else f"--no-{flag}")
                else:
                    parts.append(f"--{flag} {format_value(value)}")
        parts.append(f"--seeds {len(self.results.seeds)}")
        return " ".join(parts)

    def page(self) -> Page:
        """The whole report."""
        count = len(self.results.seeds)
        return Page(
            title=self.study.title,
            experiment=f"{self.study.name} · {self.results.preset} · {count} "
            f"seed{'s' if count > 1 else ''}",
            question=self.study.question,
            method=list(self.study.method),
            setting=self.setting(),
            tiles=self.tiles(),
            findings=self.findings(),
            limits=self.limits(),
            sections=self.sections(),
            settings=self.settings_table(),
            provenance=self.provenance_tables(),
            source=SOURCE,
            command=self.command(),
        )
