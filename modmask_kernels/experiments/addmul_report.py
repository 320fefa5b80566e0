"""What a finished addition / multiplication run says: sentences, tables, figures."""

# ruff: noqa: RUF001 - the multiplication sign and dashes belong to the text

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
from .addmul_fnn import PRESETS, QUICK, SIZES, AddMulSettings
from .settings import format_value

Statistic = Mapping[str, Any]

OPERATION = {"add": "addition", "mul": "multiplication"}
OPERATIONS = {"add": "additions", "mul": "multiplications"}
SIGN = {"add": "+", "mul": "×"}
MASK = {"control": "control", "add": "+", "mul": "×"}
ROLE = {"control": "third", "add": "first", "mul": "second"}
CONDITION = {
    "unmasked": "no mask",
    "control": "control mask",
    "add": "+ mask",
    "mul": "× mask",
    "not_control": "control inverted",
    "not_add": "+ inverted",
    "not_mul": "× inverted",
}
# accuracies this close count as equal (percentage points)
CLOSE = 1.0
# above this share of keep probabilities between 0.1 and 0.9 a mask is not settled (per cent)
UNSETTLED = 10.0

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
    from ..analysis import mean_std

    pairs = zip(a["values"], b["values"], strict=True)
    return mean_std([x - y for x, y in pairs])._asdict()


class _Reader:
    """The summary of a run with the questions that the report asks it."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.settings = AddMulSettings.from_dict(results.settings)
        self.summary = results.summary
        self.accuracy: dict[str, dict[str, Statistic]] = results.summary["accuracy"]
        self.hidden: dict[str, Any] = results.summary["hidden"]
        self.whole: dict[str, Any] = results.summary["all"]
        self.layers: list[dict[str, Any]] = results.summary["layers"]
        self.pairs = 100**self.settings.digits

    def answered(self, condition: str, asked: str, answer: int) -> Statistic:
        """Percentage of the questions `asked` that outcome `answer` met (0 sum, 1 product)."""
        column = ("add", "mul").index(asked)
        counts = self.summary["confusion"][condition]["counts"][answer][column]
        scale = 100 / self.pairs
        return {
            "mean": counts["mean"] * scale,
            "std": None if counts["std"] is None else counts["std"] * scale,
            "values": [value * scale for value in counts["values"]],
        }

    # --- findings -------------------------------------------------------------------------------

    def both(self, condition: str) -> str:
        """ "100 % of the additions and 99.6 ± 0.2 % of the multiplications" """
        rates = self.accuracy[condition]
        return " and ".join(
            f"{format_percent(rates[op])} of the {name}" for op, name in OPERATIONS.items()
        )

    def network(self) -> Finding:
        rates = self.accuracy["unmasked"]
        good = all(every(rates[op], low=99) for op in OPERATIONS)
        text = f"Without any mask it answers {self.both('unmasked')} correctly."
        if good:
            return Finding("The network has learned the task.", text)
        return Finding(
            "The network itself does not solve the task.",
            text + " What the masks lose must be read against this.",
            sure=False,
        )

    def control(self) -> Finding:
        kept = self.whole["kept_percent"]["control"]
        text = (
            "The control mask, learned on both operations, keeps "
            f"{format_count(self.whole['kept']['control'])} of {constant(self.whole['size'])} "
            f"weights ({format_percent(kept)}) and answers {self.both('control')}."
        )
        lost = [
            difference(self.accuracy["unmasked"][op], self.accuracy["control"][op])
            for op in OPERATIONS
        ]
        if all(every(s, high=CLOSE) for s in lost):
            share = "a small part" if kept["mean"] < 20 else "a part"
            return Finding(f"For both operations {share} of the weights is enough.", text)
        worst = max(value for s in lost for value in s["values"])
        return Finding(
            f"Masking alone costs {'a little' if worst <= 5 else 'much'} accuracy.",
            f"{text} That is up to {worst:.1f} points below the network without a mask; every "
            "other mask is to be compared with the control, not with the network.",
            sure=False,
        )

    def specialisation(self) -> Finding:
        own = {op: self.accuracy[op][op] for op in OPERATIONS}
        other = {
            "add": self.accuracy["add"]["mul"],
            "mul": self.accuracy["mul"]["add"],
        }
        control = self.accuracy["control"]
        text = (
            f"The + mask, learned on additions alone, answers {format_percent(own['add'])} of the "
            f"additions and {format_percent(other['add'])} of the multiplications; the × mask "
            f"{format_percent(own['mul'])} of the multiplications and "
            f"{format_percent(other['mul'])} of the additions."
        )
        keeps = all(every(difference(control[op], own[op]), high=CLOSE) for op in OPERATIONS)
        # what is left of the other operation, as a fraction of what the control mask leaves
        left = [
            x / max(y, 1e-9)
            for op, rest in (("add", "mul"), ("mul", "add"))
            for x, y in zip(other[op]["values"], control[rest]["values"], strict=True)
        ]
        ruined = all(fraction <= 0.5 for fraction in left)
        weaker = all(fraction <= 0.9 for fraction in left)
        if keeps and ruined:
            return Finding("Each mask keeps its own operation and loses the other.", text)
        if ruined:
            return Finding(
                "Each mask loses the other operation, but does not fully keep its own.",
                text + " The masks may be too sparse; a smaller penalty would tell.",
                sure=False,
            )
        if weaker:
            return Finding(
                "The masks weaken the other operation without ruining it.", text, sure=False
            )
        return Finding("No clear specialisation is visible.", text, sure=False)

    def mechanism(self) -> Finding:
        product_as_sum = self.answered("add", "mul", 0)
        sum_as_product = self.answered("mul", "add", 1)
        text = (
            "Asked to multiply, the network under the + mask answers with the sum in "
            f"{format_percent(product_as_sum)} of the cases; asked to add, under the × mask, with "
            f"the product in {format_percent(sum_as_product)} (of all questions; in the table "
            "below an answer that is both counts as both, so a perfect network shows "
            f"{self.perfect():.1f} % there)."
        )
        if every(product_as_sum, low=80) and every(sum_as_product, low=80):
            return Finding(
                "The wrong answers are the other operation's right answers.",
                text + " On questions of one operation the input that names the operation never "
                "changes, so nothing keeps the switch between the two in its mask.",
            )
        return Finding(
            "The wrong answers are only in part the other operation's right answers.",
            text,
            sure=False,
        )

    def sharing(self) -> Finding:
        hidden = self.hidden
        iou, chance = hidden["iou"], hidden["chance_iou"]
        shared = self.whole["shared_percent"]
        text = (
            "Between hidden units the + and the × mask overlap with an IoU (weights in both over "
            f"weights in either) of {format_statistic(iou, 3)}; two independent masks of their "
            f"sizes would have {format_statistic(chance, 3)}. Over all layers, "
            f"{format_percent(shared['add'])} of the + mask's weights are in the × mask too and "
            f"{format_percent(shared['mul'])} of the × mask's in the + mask."
        )
        again = self.again()
        if again is not None:
            text += (
                " For comparison, a mask learned a second time for the same operation agrees with "
                f"the first to {format_statistic(again['add'], 3)} (+) and "
                f"{format_statistic(again['mul'], 3)} (×)."
            )
        densest = max(hidden["kept_percent"][op]["mean"] for op in OPERATIONS)
        if densest > 50:
            return Finding(
                "The masks are too dense to say anything about sharing.",
                f"{text} They keep up to {densest:.0f} % of the hidden weights, so that they "
                "overlap whatever they serve.",
                sure=False,
            )
        ratio = iou["mean"] / chance["mean"] if chance["mean"] else float("inf")
        if all(x > 1.5 * y for x, y in zip(iou["values"], chance["values"], strict=True)):
            if again is not None and all(
                every(again[op], low=2 * max(iou["values"])) for op in OPERATIONS
            ):
                return Finding(
                    "The operations share weights: more than by chance, far fewer than two masks "
                    "learned for one operation do.",
                    text,
                )
            most = all(every(shared[op], high=50) for op in OPERATIONS)
            times = f"{ratio:.0f} times" if ratio >= 3 else f"{ratio:.1f} times"
            return Finding(
                f"The operations share weights, {times} chance in the hidden layers"
                + (", but most of either mask is its own." if most else "."),
                text,
            )
        return Finding(
            "In the hidden layers the masks overlap hardly more than by chance.", text, sure=False
        )

    def again(self) -> dict[str, Statistic] | None:
        """IoU of every mask with its repetition in the hidden layers, if that was measured."""
        stability = self.summary.get("tests", {}).get("stability")
        return None if stability is None else stability["hidden"]

    def inverse(self) -> Finding:
        not_add, not_mul = self.accuracy["not_add"], self.accuracy["not_mul"]
        text = (
            f"Without the weights of the + mask the network answers {self.both('not_add')}; "
            f"without those of the × mask, {self.both('not_mul')}; without those of the control "
            f"mask, {self.both('not_control')}."
        )
        clean = self.accuracy["unmasked"]
        lost = {
            name: {op: difference(clean[op], rates[op]) for op in OPERATIONS}
            for name, rates in (("add", not_add), ("mul", not_mul))
        }
        own = all(every(lost[op][op], low=10) for op in OPERATIONS)
        specific = all(
            min(
                x - y for x, y in zip(lost[op][op]["values"], lost[op][rest]["values"], strict=True)
            )
            >= 10
            for op, rest in (("add", "mul"), ("mul", "add"))
        )
        spared = all(
            every(lost[op][rest], high=10) for op, rest in (("add", "mul"), ("mul", "add"))
        )
        if own and spared:
            return Finding(
                "Removing a mask's weights breaks its own operation and spares the other.", text
            )
        if own and specific:
            return Finding(
                "Removing a mask's weights hurts its own operation most, but the other one as "
                "well.",
                text
                + " So part of what is removed serves both, or the network as a whole does not "
                "bear the loss.",
                sure=False,
            )
        if own:
            return Finding(
                "Removing a mask's weights breaks its own operation, and the other one as well.",
                text
                + " So the removed weights serve both to some degree, or the network as a whole "
                "does not bear the loss; the test cannot tell these apart.",
                sure=False,
            )
        return Finding(
            "Removing a mask's weights does not break its operation.",
            text
            + " The network holds the operation more than once, or the mask missed part of it.",
            sure=False,
        )

    def halves(self) -> Finding:
        half = self.summary["half_mask"]
        early, late = half["early_drop"], half["late_drop"]
        count = len(half["early"])
        text = (
            f"With the control mask on the first {count} of {len(self.layers)} layers only, "
            f"accuracy changes by {self.change(early)} against the whole mask; with the mask on "
            f"the other layers only, by {self.change(late)}."
        )
        drops = [s for part in (early, late) for s in part.values()]
        if all(every(s, high=5) for s in drops):
            return Finding("Masked and unmasked layers still fit together.", text)
        if max(s["mean"] for s in drops) < 20:
            return Finding(
                "Masked and unmasked layers fit together, at some cost.", text, sure=False
            )
        return Finding("Half a control mask is worse than a whole one.", text)

    @staticmethod
    def change(drops: Mapping[str, Statistic]) -> str:
        """ "-3.0 points (additions) and +1.0 points (multiplications)" """
        words = []
        for op, name in OPERATIONS.items():
            s = drops[op]
            spread = "" if s["std"] is None else f" ± {s['std']:.1f}"
            value = f"{0.0 - s['mean']:+.1f}".replace("-", "\N{MINUS SIGN}")
            words.append(f"{value}{spread} points ({name})")
        return " and ".join(words)

    def decided(self) -> Finding:
        shares = self.summary["undecided_percent"]
        listed = ", ".join(f"{format_percent(shares[key])} ({MASK[key]})" for key in MASK)
        text = f"Keep probabilities between 0.1 and 0.9: {listed} of all weights."
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
            self.mechanism(),
            self.sharing(),
            self.inverse(),
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
                f"{'is' if len(changed) == 1 else 'are'} {self.listed(changed)}."
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
            f"Accuracy is over all {self.pairs:,} argument pairs of an operation, the same ones "
            "that training draws from: it measures fit, not generalisation.",
        ]
        return limits

    def changed(self) -> list[str]:
        """Settings that differ from the preset and bear on the result."""
        base, neutral = PRESETS[self.results.preset], {"size", "checkpoint_every", "device"}
        return [
            f"{name.replace('_', ' ')} (now {format_value(value)})"
            for name, value in self.settings.to_dict().items()
            if value != getattr(base, name) and name not in {*neutral, "learning", "stability"}
        ]

    # --- tables ---------------------------------------------------------------------------------

    def accuracy_table(self) -> Table:
        return Table(
            "Right answers in per cent, over all argument pairs",
            ["", "addition", "multiplication"],
            [
                [label, *(format_statistic(self.accuracy[key][op]) for op in OPERATIONS)]
                for key, label in CONDITION.items()
            ],
            note=f"For {self.chance():.1f} % of the pairs sum and product coincide: a network that "
            "always answers with the other operation scores that much. “Inverted” keeps exactly "
            "the weights that the mask removes.",
        )

    def chance(self) -> float:
        """Percentage of pairs whose sum equals the product."""
        return float(self.summary["coinciding_percent"]["mean"])

    def confusion_table(self) -> Table:
        rows = []
        for key, label in CONDITION.items():
            percent = self.summary["confusion"][key]["percent"]
            rows.append([label, *(format_statistic(cell) for row in percent for cell in row)])
        return Table(
            "What was answered when which operation was asked, per cent",
            ["", "+ asked: sum", "product", "neither", "× asked: sum", "product", "neither"],
            rows,
            note="Per operation asked, the answers are normalised to 100 %. An answer that is both "
            f"the sum and the product counts as both; a perfect network shows {self.perfect():.1f} "
            "%, not 100 %.",
        )

    def perfect(self) -> float:
        """The diagonal of the confusion matrix of a perfect network."""
        return 100 * 100 / (100 + self.chance())

    def kept_table(self) -> Table:
        def cells(part: Mapping[str, Any]) -> list[str]:
            kept, share = part["kept"], part["kept_percent"]
            counts = (f"{format_count(kept[k])} ({format_percent(share[k], 2)})" for k in MASK)
            return [constant(part["size"]), *counts]

        return Table(
            "Kept weights per layer",
            ["", "weights", "control mask", "+ mask", "× mask"],
            self.rows(cells),
            note=f"The × mask keeps {format_statistic(self.whole['mul_to_add'], 2)} times as many "
            "weights as the + mask.",
        )

    def rows(self, cells: Callable[[Mapping[str, Any]], list[str]]) -> list[list[str]]:
        """A row per layer, one for the hidden layers if there are several, one for all."""
        rows = [[self.layer_label(layer), *cells(layer)] for layer in self.layers]
        if len(self.layers) > 3:
            rows.append(["hidden together", *cells(self.hidden)])
        return [*rows, ["all", *cells(self.whole)]]

    def overlap_table(self) -> Table:
        names = ("iou", "chance_iou", "io_min", "chance_io_min")
        return Table(
            "Overlap of the + and the × mask",
            ["", "IoU", "by chance", "IoMin", "by chance"],
            self.rows(lambda part: [format_statistic(part[name], 3) for name in names]),
            note="IoU: weights in both masks over weights in either. IoMin: weights in both over "
            "the smaller mask. By chance: for independent masks that keep as many weights per "
            "layer.",
        )

    def shared_table(self) -> Table:
        def cells(part: Mapping[str, Any]) -> list[str]:
            kinds = ("shared_percent", "chance_shared_percent")
            return [format_statistic(part[kind][op]) for op in OPERATIONS for kind in kinds]

        return Table(
            "Weights of one mask that are in the other too, per cent",
            ["", "of the + mask", "by chance", "of the × mask", "by chance"],
            self.rows(cells),
            note="The first column of the last row is the study's total shared %.",
        )

    def stability_tables(self) -> list[Table]:
        stability = self.summary.get("tests", {}).get("stability")
        if stability is None:
            return []
        rows = [
            [title, *(format_statistic(stability[part][key], 3) for key in MASK), other]
            for part, title, other in (
                ("hidden", "hidden layers", format_statistic(self.hidden["iou"], 3)),
                ("all", "all layers", format_statistic(self.whole["iou"], 3)),
            )
        ]
        return [
            Table(
                "How far a mask agrees with its repetition, IoU",
                ["", "control", "+", "×", "+ with ×"],
                rows,
                note="Every mask was learned a second time over the same network, with other data "
                "order and noise. The last column, for comparison, is the overlap of the two "
                "operations.",
            )
        ]

    def remaining_table(self) -> Table:
        return Table(
            "How much of the control mask is in the other masks, per cent of its weights",
            ["", "+ mask", "× mask"],
            self.rows(
                lambda part: [format_statistic(part["remaining_percent"][op]) for op in OPERATIONS]
            ),
        )

    def half_table(self) -> Table:
        half = self.summary["half_mask"]
        rows = [
            ["whole control mask", *(format_statistic(self.accuracy["control"][o]) for o in SIGN)],
            ["early masked", *(format_statistic(self.accuracy["early"][o]) for o in SIGN)],
            ["late masked", *(format_statistic(self.accuracy["late"][o]) for o in SIGN)],
            ["drop, early masked", *(format_statistic(half["early_drop"][o]) for o in SIGN)],
            ["drop, late masked", *(format_statistic(half["late_drop"][o]) for o in SIGN)],
        ]
        return Table(
            "Right answers in per cent with half of the control mask",
            ["", "addition", "multiplication"],
            rows,
            note=f"Early: the first {len(half['early'])} of {len(self.layers)} layers (half of "
            "them, rounded up). A drop is the accuracy with the whole mask minus that with the "
            "half.",
        )

    def seeds_table(self) -> Table:
        rows = []
        for metrics, provenance in zip(self.results.per_seed, self.results.provenance, strict=True):
            a = metrics["accuracy"]
            rows.append(
                [
                    f"seed {metrics['seed']}",
                    *(f"{a['control'][op]:.1f}" for op in OPERATIONS),
                    *(f"{a['add'][op]:.1f}" for op in OPERATIONS),
                    *(f"{a['mul'][op]:.1f}" for op in OPERATIONS),
                    f"{metrics['hidden']['iou']:.3f}",
                    f"{metrics['all']['shared_percent']['add']:.1f}",
                    f"{sum(provenance.get('seconds', {}).values()):,.0f}",
                ]
            )
        return Table(
            "Every seed",
            [
                "",
                "control: +",
                "×",
                "+ mask: +",
                "×",
                "× mask: +",
                "×",
                "hidden IoU",
                "total shared, %",
                "seconds",
            ],
            rows,
        )

    def layer_label(self, layer: Mapping[str, Any]) -> str:
        """ "hidden 1, 200 × 200" """
        return f"{layer['title']}, {layer['rows']['mean']:.0f} × {layer['columns']['mean']:.0f}"

    def published_table(self) -> Table:
        own = self.accuracy["add"]["add"], self.accuracy["mul"]["mul"]
        other = self.accuracy["add"]["mul"], self.accuracy["mul"]["add"]
        most = max(
            (layer["kept"][op]["mean"] for layer in self.layers for op in OPERATIONS), default=0
        )
        return Table(
            "What is known of the published results, and this run",
            ["statement", "how sure", "here"],
            [
                [
                    "The network specialises: the mask of one operation breaks the other.",
                    "abstract and independent summaries of the paper",
                    f"own operation {short(own[0])} % and {short(own[1])} %, other operation "
                    f"{short(other[0])} % and {short(other[1])} %",
                ],
                [
                    "Control accuracy stays within about a point of the network.",
                    "expected of a faithful run, no published number",
                    f"{short(self.accuracy['control']['add'])} % and "
                    f"{short(self.accuracy['control']['mul'])} %, network "
                    f"{short(self.accuracy['unmasked']['add'])} % and "
                    f"{short(self.accuracy['unmasked']['mul'])} %",
                ],
                [
                    "Total shared lies between 25 % and 55 % over all penalties tried (sizes "
                    "medium and big, 2 digits).",
                    "colour scale of the published plot script, which bounds what it shows",
                    f"{short(self.whole['shared_percent']['add'])} %",
                ],
                [
                    "At most about 22,000 kept weights per layer for + and × (size big).",
                    "axis limit of the published plot script",
                    f"at most {most:,.0f}",
                ],
                [
                    "Exact accuracies, overlaps and ratios.",
                    "not available for comparison",
                    "see the tables",
                ],
            ],
            words=True,
        )

    def calibration_table(self) -> Table:
        """Ranges of the independent implementation that calibrated the quick setting."""
        a, hidden, whole = self.accuracy, self.hidden, self.whole
        layers = [self.layers[0], self.layers[-1]]

        def pair(condition: str) -> str:
            return (
                f"{format_statistic(a[condition]['add'])} / {format_statistic(a[condition]['mul'])}"
            )

        rows = [
            ["control mask: + / × right, %", "100 / 100", pair("control")],
            ["+ mask: + / × right, %", "100 / 4", pair("add")],
            ["× mask: + / × right, %", "4 / 100", pair("mul")],
            ["+ inverted: + / × right, %", "21–26 / 27–48", pair("not_add")],
            ["× inverted: + / × right, %", "53–58 / 36–40", pair("not_mul")],
            ["control inverted: + / × right, %", "25–36 / 48–53", pair("not_control")],
            [
                "hidden weights kept by + / ×, %",
                "4.4–4.7 / 3.2–3.3",
                f"{format_statistic(hidden['kept_percent']['add'])} / "
                f"{format_statistic(hidden['kept_percent']['mul'])}",
            ],
            [
                "IoU input / hidden / output",
                "0.32 / 0.19–0.22 / 0.54–0.56",
                f"{format_statistic(layers[0]['iou'], 2)} / {format_statistic(hidden['iou'], 2)} / "
                f"{format_statistic(layers[1]['iou'], 2)}",
            ],
            [
                "IoMin input / hidden / output",
                "0.57–0.59 / 0.38–0.44 / 0.74–0.77",
                f"{format_statistic(layers[0]['io_min'], 2)} / "
                f"{format_statistic(hidden['io_min'], 2)} / "
                f"{format_statistic(layers[1]['io_min'], 2)}",
            ],
            [
                "shared, % of + / of ×",
                "40–41 / 52–57",
                f"{format_statistic(whole['shared_percent']['add'])} / "
                f"{format_statistic(whole['shared_percent']['mul'])}",
            ],
            [
                "undecided, %",
                "1.5–2.4",
                " / ".join(format_statistic(s) for s in self.summary["undecided_percent"].values()),
            ],
        ]
        return Table(
            "The small setting in an independent implementation (two seeds), and this run",
            ["", "calibration", "here"],
            rows,
            note="A separate program with the same settings, run with two seeds; the ranges are "
            "theirs, so that a few seeds here may well lie outside. The inverted masks vary most: "
            "nothing trains what a network does without the weights that it needs.",
            words=True,
        )

    # --- figures --------------------------------------------------------------------------------

    def accuracy_figure(self) -> Figure:
        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import grouped_bars

            grouped_bars(
                canvas,
                theme,
                list(CONDITION.values()),
                {
                    OPERATION[op]: (ROLE[op], [self.accuracy[key][op] for key in CONDITION])
                    for op in OPERATIONS
                },
                xlabel="right answers, %",
                limit=100,
                breaks=(1, 4),
            )

        return Figure(
            "accuracy",
            "Right answers per operation without a mask, with each mask, and with each mask "
            f"inverted (only the weights that it removes).{self.whiskers()}",
            "Bar chart of accuracies: " + self.spoken("unmasked", "add", "mul"),
            draw,
            (4.4, 4.6),
            key=True,
        )

    def spoken(self, *conditions: str) -> str:
        """Accuracies as a sentence for the alternative text."""
        return "; ".join(
            f"{CONDITION[key]}: addition {short(self.accuracy[key]['add'])} %, multiplication "
            f"{short(self.accuracy[key]['mul'])} %"
            for key in conditions
        )

    def whiskers(self) -> str:
        """How spread is drawn."""
        if len(self.results.seeds) == 1:
            return ""
        return " Whiskers: sample standard deviation over seeds; rings: single seeds."

    def confusion_figure(self) -> Figure:
        keys = ["control", "not_control", "add", "not_add", "mul", "not_mul"]

        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import matrices

            matrices(
                canvas,
                theme,
                [(CONDITION[k], self.summary["confusion"][k]["percent"]) for k in keys],
                rows=["+", "×"],
                columns=["sum", "product", "neither"],
                xlabel="answered, % of the row",
                ylabel="asked",
            )

        return Figure(
            "confusion",
            "What was answered (columns) when which operation was asked (rows). Left: with the "
            "mask; right: with its inverse. A full cell under “sum” in the row × means that the "
            "network adds where it should multiply.",
            "Confusion matrices of every mask and its inverse; the numbers are in the table below.",
            draw,
            (4.4, 4.6),
            key=True,
        )

    def kept_figure(self) -> Figure:
        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import grouped_bars

            grouped_bars(
                canvas,
                theme,
                [layer["title"] for layer in self.layers],
                {
                    f"{MASK[key]} mask": (ROLE[key], [layer["kept"][key] for layer in self.layers])
                    for key in MASK
                },
                xlabel="kept weights",
            )

        return Figure(
            "kept",
            "Weights that each mask keeps, per layer. The layers have "
            f"{self.listed([constant(layer['size']) for layer in self.layers])} "
            f"weights.{self.whiskers()}",
            "Bar chart of kept weights per layer and mask; the numbers are in the table below.",
            draw,
            (4.4, 1.2 + 0.75 * len(self.layers)),
            key=True,
        )

    @staticmethod
    def listed(words: Sequence[str]) -> str:
        """ "a, b and c" """
        return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]

    def overlap_figure(self) -> Figure:
        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import grouped_bars

            grouped_bars(
                canvas,
                theme,
                [layer["title"] for layer in self.layers],
                {
                    "IoU": ("fourth", [layer["iou"] for layer in self.layers]),
                    "IoMin": ("plain", [layer["io_min"] for layer in self.layers]),
                },
                xlabel="overlap of the + and the × mask",
                limit=1,
                digits=2,
                markers={
                    "IoU": (
                        "chance level",
                        [layer["chance_iou"]["mean"] for layer in self.layers],
                    ),
                    "IoMin": (
                        "chance level",
                        [layer["chance_io_min"]["mean"] for layer in self.layers],
                    ),
                },
            )

        return Figure(
            "overlap",
            "Overlap of the two masks per layer. The dashed marks say where two independent masks "
            f"that keep as many weights would lie.{self.whiskers()}",
            "Bar chart of IoU and IoMin per layer with chance levels; the numbers are in the table "
            "below.",
            draw,
            (4.4, 1.2 + 0.6 * len(self.layers)),
            key=True,
        )

    def histogram_figure(self) -> Figure:
        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import histograms

            histograms(
                canvas,
                theme,
                {f"{MASK[key]} mask": (ROLE[key], self.summary["histogram"][key]) for key in MASK},
                xlabel="probability of keeping a weight",
                ylabel="weights per bin (logarithmic)",
                band=(0.1, 0.9),
                band_label="undecided",
            )

        bins = len(self.summary["histogram"]["control"])
        return Figure(
            "histogram",
            f"Keep probabilities of all weights after learning, in {bins} bins. Learned masks are "
            "decided where nearly all weights lie at 0 or 1.",
            "Histograms of keep probabilities: "
            + ", ".join(
                f"{format_percent(s)} of the {MASK[key]} mask undecided"
                for key, s in self.summary["undecided_percent"].items()
            ),
            draw,
            (4.4, 4.2),
            key=True,
        )

    def half_figure(self) -> Figure:
        half = self.summary["half_mask"]

        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import grouped_bars

            grouped_bars(
                canvas,
                theme,
                ["early masked", "late masked"],
                {
                    OPERATION[op]: (ROLE[op], [half["early_drop"][op], half["late_drop"][op]])
                    for op in OPERATIONS
                },
                xlabel="drop against the whole control mask, points",
                digits=1,
                signed=True,
            )

        return Figure(
            "half-mask",
            f"Loss of accuracy when the control mask lies on the first {len(half['early'])} of "
            f"{len(self.layers)} layers only (early), or on the others only "
            f"(late).{self.whiskers()}",
            "Bar chart of the half-mask test; the numbers are in the table below.",
            draw,
            (4.4, 2.2),
            key=True,
        )

    def network_figure(self) -> Figure:
        rows = self.summary["network_loss"]

        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import curves

            steps = [row["step"]["mean"] for row in rows]
            losses = [row["loss"] for row in rows]
            curves(
                canvas,
                theme,
                [("loss per digit", {"network": ("plain", losses, steps)})],
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

    def learning_figure(self) -> Figure:
        learning = self.summary["learning"]

        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import curves

            def lines(column: str) -> dict[str, Any]:
                return {
                    f"{MASK[key]} mask": (
                        ROLE[key],
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
        a = self.accuracy
        return [
            Tile(
                f"{short(a['control']['add'])} / {short(a['control']['mul'])} %",
                "additions / multiplications right under the control mask",
            ),
            Tile(
                f"{short(self.whole['kept_percent']['control'])} %",
                "of all weights in the control mask",
            ),
            Tile(
                f"{short(a['control']['mul'])} → {short(a['add']['mul'])} %",
                "multiplications right: control mask → + mask",
            ),
            Tile(
                f"{short(a['control']['add'])} → {short(a['mul']['add'])} %",
                "additions right: control mask → × mask",
            ),
            Tile(
                f"{self.hidden['iou']['mean']:.2f}",
                "IoU of + and × between hidden units (chance "
                f"{self.hidden['chance_iou']['mean']:.2f})",
            ),
            Tile(
                f"{short(self.whole['shared_percent']['add'])} %",
                "of the + mask's weights also in the × mask",
            ),
        ]

    def sections(self) -> list[Section]:
        sections = [
            Section(
                "What each mask can do",
                [
                    "A mask that serves one operation should keep that operation and lose the "
                    "other. The inverse of a mask, the network without the mask's weights, shows "
                    "the same from the other side."
                ],
                [self.accuracy_figure(), self.confusion_figure()],
                [self.accuracy_table(), self.confusion_table()],
            ),
            Section(
                "How large the masks are, and what they share",
                [
                    "Sharing means something only where masks are sparse, and only against what "
                    "masks of that size would share by chance."
                ],
                [self.kept_figure(), self.overlap_figure()],
                [
                    self.kept_table(),
                    self.overlap_table(),
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
            Section(
                "Beside the published study",
                [
                    "The tables of the paper were not available; what its text, summaries and plot "
                    "scripts tell stands here with its certainty."
                ],
                [],
                [self.published_table()]
                + ([self.calibration_table()] if self.settings == QUICK else []),
            ),
            Section(
                "Learning",
                [],
                [self.network_figure(), self.learning_figure()],
                [self.seeds_table()],
            ),
        ]
        return sections

    def setting(self) -> str:
        """One sentence about what was run."""
        s = self.settings
        widths = " – ".join(str(w) for w in s.widths)
        name = f"size {s.size}, " if not s.hidden and s.size in SIZES else ""
        seeds = "one seed" if len(self.results.seeds) == 1 else f"{len(self.results.seeds)} seeds"
        digits = "one-digit" if s.digits == 1 else f"{s.digits}-digit"
        return (
            f"Preset {self.results.preset}, {seeds}: {digits} numbers, results modulo "
            f"{10**s.digits}, a network with hidden layers {widths} "
            f"({name}{constant(self.whole['size'])} masked weights), {s.steps:,} steps of "
            f"training and {s.mask_steps:,} steps per mask."
        )

    def settings_table(self) -> Table:
        rows = [
            [name.replace("_", " "), format_value(value), AddMulSettings.help_of(name)]
            for name, value in self.settings.to_dict().items()
        ]
        rows.append(["alpha", f"{self.settings.alpha:.3g}", "penalty per logit, beta / batch"])
        return Table("Settings", ["setting", "value", "meaning"], rows, words=True)

    def provenance_tables(self) -> list[Table]:
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
        base = PRESETS[self.results.preset]
        parts = [f"modmask run addmul-fnn --preset {self.results.preset}"]
        for name, value in self.settings.to_dict().items():
            if value != getattr(base, name):
                flag = name.replace("_", "-")
                if isinstance(value, bool):
                    parts.append(f"--{flag}" if value else f"--no-{flag}")
                else:
                    parts.append(f"--{flag} {format_value(value)}")
        parts.append(f"--seeds {len(self.results.seeds)}")
        return " ".join(parts)


def page(results: Results) -> Page:
    """The report of a finished run."""
    reader = _Reader(results)
    count = len(results.seeds)
    return Page(
        title="Addition / multiplication, feed-forward",
        experiment=f"addmul-fnn · {results.preset} · {count} seed{'s' if count > 1 else ''}",
        question="Does a network use different weights for addition and for multiplication?",
        method=[
            "A feed-forward network learns both operations, then its weights are frozen.",
            "For every weight a probability of being kept is learned, three times from the same "
            "start: on questions of both operations (the control mask), on additions alone (the + "
            "mask) and on multiplications alone (the × mask), while a constant pressure removes "
            "what is not needed.",
            "Comparing what the masks keep, and what the network can still do with them or without "
            "their weights, shows which weights serve which operation.",
        ],
        setting=reader.setting(),
        tiles=reader.tiles(),
        findings=reader.findings(),
        limits=reader.limits(),
        sections=reader.sections(),
        settings=reader.settings_table(),
        provenance=reader.provenance_tables(),
        source=SOURCE,
        command=reader.command(),
    )
