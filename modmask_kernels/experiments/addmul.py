"""Addition / multiplication: do the operations use different weights?

The task and its report, for every kind of network.
"""

# ruff: noqa: RUF001 - the multiplication sign and dashes belong to the text

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .. import analysis
from ..report import Figure, Finding, Table, format_percent, format_statistic
from ..tasks import OPERATIONS, AddMul, digit_loss
from .arithmetic import CHUNK, ArithmeticReport, ArithmeticSettings, ArithmeticStudy
from .study import CONTROL, UNMASKED, Function, Loss, inverse_name
from .study_report import Statistic, every, short

SETS: dict[str, tuple[str, ...]] = {CONTROL: OPERATIONS, "add": ("add",), "mul": ("mul",)}

A = TypeVar("A", bound=ArithmeticSettings)


class AddMulStudy(ArithmeticStudy[A]):
    """Learn the masks of both operations and of either, compare them."""

    summary = "does a network use different weights for addition and for multiplication?"
    question = "Does a network use different weights for addition and for multiplication?"
    noun, nouns = "operation", "operations"
    functions: ClassVar[Mapping[str, Function]] = {
        "add": Function("+", "addition", "additions", "first"),
        "mul": Function("×", "multiplication", "multiplications", "second"),
    }
    network_name = "network"

    @property
    def method(self) -> list[str]:  # type: ignore[override]
        """The method in three sentences."""
        return [
            f"{self.network_name} learns both operations, then its weights are frozen.",
            "For every weight a probability of being kept is learned, three times from the same "
            "start: on questions of both operations (the control mask), on additions alone (the + "
            "mask) and on multiplications alone (the × mask), while a constant pressure removes "
            "what is not needed.",
            "Comparing what the masks keep, and what the network can still do with them or without "
            "their weights, shows which weights serve which operation.",
        ]

    @property
    def report_type(self) -> type[AddMulReport]:
        """With confusion matrices and what is known of the published results."""
        return AddMulReport

    def features(self, settings: A) -> tuple[int, int]:
        """Sizes of an input and of an output."""
        task = AddMul(settings.digits)
        return task.in_features, task.out_features

    def sources(self, settings: A) -> dict[str, AddMul]:
        """The control sees both operations, the others their own only."""
        return {
            name: AddMul(settings.digits, operations, settings.batch, settings.device)
            for name, operations in SETS.items()
        }

    def loss(self, settings: A) -> Loss:
        """Cross-entropy of every digit."""
        return digit_loss

    def measure(self, model: nn.Module, settings: A) -> dict[str, Any]:
        """Accuracy and confusion over all argument pairs of both operations."""
        task = AddMul(settings.digits, device=settings.device)
        counts = answer_counts(model, task)
        return {
            "accuracy": accuracy(counts, task),
            "confusion": {
                "counts": counts.tolist(),
                "percent": analysis.confusion_percent(counts).tolist(),
            },
        }

    def facts(self, settings: A) -> dict[str, Any]:
        """How often sum and product are the same number."""
        return {"coinciding_percent": coinciding(AddMul(settings.digits))}


@torch.no_grad()
def answer_counts(model: nn.Module, task: AddMul) -> Tensor:
    """Confusion counts over *all* argument pairs of both operations.

    Args:
        model: a plain network; it is evaluated as it is.
        task: a task with both operations.

    Returns:
        int64 [3, 2] on the CPU: outcome (sum, product, neither) by requested operation. The
        diagonal holds the right answers.
    """
    counts = torch.zeros(len(OPERATIONS) + 1, len(OPERATIONS), dtype=torch.int64)
    for start in range(0, len(task), CHUNK):
        index = torch.arange(start, min(start + CHUNK, len(task)), device=task.device)
        first, second, operation = task.arguments(index)
        predictions = task.predictions(model(task.rows(index)[0]))
        counts += analysis.confusion_counts(
            predictions, task.results(first, second), operation
        ).cpu()
    return counts


def accuracy(counts: Tensor, task: AddMul) -> dict[str, float]:
    """Percentage of right answers per operation."""
    return {op: 100 * int(counts[i, i]) / task.pairs for i, op in enumerate(OPERATIONS)}


def coinciding(task: AddMul) -> float:
    """Percentage of argument pairs whose sum equals their product, so that one answer is both."""
    first, second, _ = task.arguments(torch.arange(task.pairs, device=task.device))
    add, mul = task.results(first, second)
    return 100 * int(torch.count_nonzero(add == mul)) / task.pairs


class AddMulReport(ArithmeticReport):
    """Adds what is answered in place of the right result."""

    def answered(self, condition: str, asked: str, answer: int) -> Statistic:
        """Percentage of the questions `asked` that outcome `answer` met (0 sum, 1 product)."""
        column = OPERATIONS.index(asked)
        counts = self.summary["confusion"][condition]["counts"][answer][column]
        scale = 100 / 100**self.settings.digits
        return {
            "mean": counts["mean"] * scale,
            "std": None if counts["std"] is None else counts["std"] * scale,
            "values": [value * scale for value in counts["values"]],
        }

    def own_findings(self) -> list[Finding]:
        """What the wrong answers are."""
        return [self.mechanism()]

    def mechanism(self) -> Finding:
        """Whether the wrong answers are the other operation's right ones."""
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

    def accuracy_note(self) -> str:
        """What a network scores that always answers with the other operation."""
        return (
            f"For {self.chance():.1f} % of the pairs sum and product coincide: a network that "
            "always answers with the other operation scores that much."
        )

    def chance(self) -> float:
        """Percentage of pairs whose sum equals the product."""
        return float(self.summary["coinciding_percent"]["mean"])

    def perfect(self) -> float:
        """The diagonal of the confusion matrix of a perfect network."""
        return 100 * 100 / (100 + self.chance())

    def confusion_table(self) -> Table:
        """What was answered when which operation was asked."""
        rows = []
        for key, label in self.condition.items():
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

    def confusion_figure(self) -> Figure:
        """The confusion matrices of every mask and its inverse."""
        keys = [key for name in self.label for key in (name, inverse_name(name))]

        def draw(canvas: Any, theme: Any) -> None:
            from ..report.figures import matrices

            matrices(
                canvas,
                theme,
                [(self.condition[k], self.summary["confusion"][k]["percent"]) for k in keys],
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

    def accuracy_figures(self) -> list[Figure]:
        """With the confusion matrices."""
        return [*super().accuracy_figures(), self.confusion_figure()]

    def accuracy_tables(self) -> list[Table]:
        """With the confusion table."""
        return [*super().accuracy_tables(), self.confusion_table()]

    def beside_the_study(self) -> list[Table]:
        """What is known of the published results."""
        return [self.published_table()]

    def published_table(self) -> Table:
        """Statement, how sure, and this run."""
        own = self.accuracy["add"]["add"], self.accuracy["mul"]["mul"]
        other = self.accuracy["add"]["mul"], self.accuracy["mul"]["add"]
        most = max(
            (layer["kept"][op]["mean"] for layer in self.layers for op in OPERATIONS), default=0
        )
        control, clean = self.accuracy[CONTROL], self.accuracy[UNMASKED]
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
                    f"{short(control['add'])} % and {short(control['mul'])} %, network "
                    f"{short(clean['add'])} % and {short(clean['mul'])} %",
                ],
                [
                    "Total shared lies between 25 % and 55 % over all penalties tried "
                    "(feed-forward, sizes medium and big, 2 digits).",
                    "colour scale of the published plot script, which bounds what it shows",
                    f"{short(self.whole['shared_percent']['add'])} %",
                ],
                [
                    "At most about 22,000 kept weights per layer for + and × (feed-forward of size "
                    "big, and LSTM).",
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
