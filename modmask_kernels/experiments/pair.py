"""Double addition: does a network that needs one function twice use the same weights for both?

The task and its report, for every kind of network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

from ..report import Finding, Table, format_statistic
from ..tasks import PAIRS
from .arithmetic import ArithmeticReport, ArithmeticSettings, ArithmeticStudy
from .settings import option
from .study import CONTROL, Function, inverse_name
from .study_report import VARIANTS, listed, short

SETS: dict[str, tuple[str, ...]] = {CONTROL: PAIRS, "first": ("first",), "second": ("second",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSettings(ArithmeticSettings):
    """Settings of both double additions."""

    inverse_io: str = option(
        "none",
        "what the input and output layers have in the inverse-mask test that the findings tell of "
        "first: the inverse like all others, the control's mask, or no mask; all three are "
        "evaluated",
        choices=("none", "fullmask", "ones"),
    )

    @property
    def largest(self) -> int:
        """The most digits that can be evaluated exactly."""
        return 2


A = TypeVar("A", bound=PairSettings)


class PairStudy(ArithmeticStudy[A]):
    """Learn the masks of both additions and of either, compare them."""

    summary = "does a network that adds two pairs of numbers use the same weights for both?"
    question = "Does a network that needs one function twice use the same weights for both?"
    noun, nouns = "pair", "pairs"
    functions: ClassVar[Mapping[str, Function]] = {
        "first": Function("pair 1", "first pair", "first sums", "first"),
        "second": Function("pair 2", "second pair", "second sums", "second"),
    }
    inverse_io = ("none", "fullmask", "ones")
    network_name = "network"

    @property
    def method(self) -> list[str]:  # type: ignore[override]
        """The method in three sentences."""
        return [
            f"{self.network_name} learns to add two pairs of numbers, which have inputs and "
            "outputs of their own, then its weights are frozen.",
            "For every weight a probability of being kept is learned, three times from the same "
            "start: for both sums (the control mask), for the first alone (the pair 1 mask) and "
            "for the second alone (the pair 2 mask), while a constant pressure removes what is "
            "not needed.",
            "Since both are the same function, a network that reuses what it knows would keep the "
            "same hidden weights for both.",
        ]

    @property
    def report_type(self) -> type[PairReport]:
        """With the variants of the inverse-mask test."""
        return PairReport

    def halves(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The study's halves: the first two of five layers, and the others."""
        early = list(names[: max(len(names) // 2, 1)])
        return {"early": early, "late": [name for name in names if name not in early]}


class PairReport(ArithmeticReport):
    """Judges sharing as reuse, and tells all variants of the inverse-mask test."""

    neutral = (*ArithmeticReport.neutral, "inverse_io")

    def accuracy_note(self) -> str:
        """Chance."""
        chance = 100 / 10**self.settings.digits
        return f"A guess is right in {chance:g} % of the cases."

    def sharing(self) -> Finding:
        """Whether both additions run through the same weights."""
        dense = self.too_dense()
        if dense is not None:
            return dense
        text = self.sharing_text()
        found = self.pair(self.hidden, "first", "second")
        again = self.again()
        if again is None:
            return super().sharing()
        lowest = [
            min(values)
            for values in zip(*(again[key]["values"] for key in self.functions), strict=True)
        ]
        ratios = [x / max(y, 1e-9) for x, y in zip(found["iou"]["values"], lowest, strict=True)]
        chance = zip(found["iou"]["values"], found["chance_iou"]["values"], strict=True)
        if all(ratio >= 0.8 for ratio in ratios):
            return Finding(
                "Both additions use the same hidden weights: their masks agree as two masks of one "
                "addition do.",
                text,
            )
        if all(ratio <= 0.5 for ratio in ratios):
            more = all(x > 1.5 * y for x, y in chance)
            return Finding(
                "The network has learned the same function twice, with different hidden weights.",
                text + (" What overlap there is, is more than chance." if more else ""),
            )
        return Finding(
            "The hidden weights of both additions overlap in part.",
            text,
            sure=False,
        )

    def inverses(self) -> list[Finding]:
        """That of the chosen variant, and how the others agree."""
        where = {
            "none": "",
            "fullmask": " between the ends (which have the control's mask)",
            "ones": " between the ends (which are whole)",
        }
        chosen = self.settings.inverse_io
        found = self.inverse(chosen, where[chosen])
        rest = [variant for variant in self.study.inverse_io if variant != chosen]
        told = "; ".join(
            f"{self.label[key]} inverted{VARIANTS[v] or ', ends too'}: "
            + " and ".join(
                f"{short(self.accuracy[inverse_name(key, v)][o])} % of the {one.many}"
                for o, one in self.measured.items()
            )
            for v in rest
            for key in self.functions
        )
        text = f"{found.text} With other ends, {told}."
        agree = {self.inverse(v).headline for v in self.study.inverse_io} == {
            self.inverse(chosen).headline
        }
        if not agree:
            text += (
                " The variants do not agree, so what is lost depends on the input and output "
                "layers as well as on the hidden ones."
            )
        return [Finding(found.headline, text, found.sure and agree)]

    def accuracy_tables(self) -> list[Table]:
        """With the share of the examples in which both sums are right."""
        rows = [
            [label, format_statistic(self.summary["both_percent"][key])]
            for key, label in self.condition.items()
        ]
        both = Table("Both sums of an example right, per cent", ["", "both"], rows)
        return [*super().accuracy_tables(), both]

    def published(self) -> list[list[str]]:
        """Rows of the table of published results."""
        own = [self.accuracy[key][key] for key in self.functions]
        spared = [self.accuracy[inverse_name(a)][b] for a in self.functions for b in self.others(a)]
        lost = [self.accuracy[inverse_name(key)][key] for key in self.functions]
        found = self.pair(self.hidden, "first", "second")
        shared = [p["shared_percent"][f]["mean"] for p in self.layers for f in self.functions]
        return [
            [
                "The module of one addition is not reused for the other.",
                "abstract and independent summaries of the paper",
                f"hidden IoU {format_statistic(found['iou'], 3)} (chance "
                f"{format_statistic(found['chance_iou'], 3)})",
            ],
            [
                "Each mask keeps its own pair.",
                "expected of a faithful run, no published number",
                f"own pair {listed(short(s) + ' %' for s in own)}",
            ],
            [
                "The inverse of one pair's mask spares the other pair more than its own.",
                "expected of a faithful run, no published number",
                f"own pair {listed(short(s) + ' %' for s in lost)}, other pair "
                f"{listed(short(s) + ' %' for s in spared)}",
            ],
            [
                "The shared fraction per layer lies below 25 %.",
                "axis limit of the workshop version's plot script (feed-forward)",
                f"at most {max(shared):.1f} %",
            ],
            [
                "Exact accuracies and overlaps.",
                "not available for comparison",
                "see the tables",
            ],
        ]

    def beside_the_study(self) -> list[Table]:
        """What is known of the published results."""
        return [
            Table(
                "What is known of the published results, and this run",
                ["statement", "how sure", "here"],
                self.published(),
                words=True,
            )
        ]
