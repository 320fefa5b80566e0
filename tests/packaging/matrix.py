"""What is tested with what; run it to write docs/matrix.md to the standard output."""

from __future__ import annotations

from typing import NamedTuple

FILE = "tests/nn/test_every_layer.py"
OUTPUTS_LAST = ("ConvTranspose1d", "ConvTranspose2d", "HuggingFaceConv1D")
LAYERS = {
    "Linear": "`nn.Linear`",
    "Conv1d": "`nn.Conv1d`",
    "Conv2d": "`nn.Conv2d`",
    "ConvTranspose1d": "`nn.ConvTranspose1d`",
    "ConvTranspose2d": "`nn.ConvTranspose2d`",
    "HuggingFaceConv1D": "Hugging Face `Conv1D`",
    "LSTM": "`nn.LSTM`",
    "GRU": "`nn.GRU`",
    "LSTMCell": "`nn.LSTMCell`",
    "GRUCell": "`nn.GRUCell`",
    "MultiheadAttention": "`nn.MultiheadAttention`",
    "also": "others, by `also=[...]` (`nn.Conv3d`)",
}
ESTIMATORS = ["gumbel_sigmoid", "hard_concrete", "sigmoid", "threshold", "top_k"]
GRANULARITIES = ["weight", "row", "column", "kernel", "head", "block", "n:m"]
FEATURES = {
    "`torch.compile(fullgraph=True)`": "test_compiles",
    "autocast": "test_autocast",
    "checkpointing": "test_checkpointing",
    "`torch.func.grad`, `vmap`": "test_functional_transforms",
    "`bake`, `torch.export`": "test_bakes_and_exports",
    "`deepcopy`, `pickle`": "test_copies",
    "`state_dict` both ways": "test_state_dicts_both_ways",
    "learning, resuming": "test_learns_and_resumes",
    "`select_masks`": "test_rows_choose_their_sets",
    "`unmask_model`": "test_is_restored",
}
RECURRENT = "tests/nn/test_masked_rnn_layers.py::test_packed_sequences"


class Cell(NamedTuple):
    """A test that covers it, or the reason why there is nothing to cover."""

    test: str | None = None
    reason: str | None = None


Table = dict[str, dict[str, Cell]]


def granularity(name: str, layer: str) -> Cell:
    if name == "n:m" and layer in OUTPUTS_LAST:
        return Cell(
            f"{FILE}::test_n_of_m_needs_outputs_first[{layer}]", "refused: [in, out] weight"
        )
    return Cell(f"{FILE}::test_granularities[{name}-{layer}]")


def packed(layer: str) -> Cell:
    if layer in ("LSTM", "GRU"):
        return Cell(f"{RECURRENT}[False-False-{layer.lower()}]")
    if layer == "also":
        test = "TestRecurrent::test_packed_sequences_are_for_one_group"
        return Cell(f"tests/nn/test_masked_any.py::{test}", "refused for more than one group")
    return Cell(None, "takes none")


def tables() -> dict[str, Table]:
    """By title, layer and column."""
    return {
        "Estimators": {
            layer: {f"`{e}`": Cell(f"{FILE}::test_estimators[{e}-{layer}]") for e in ESTIMATORS}
            for layer in LAYERS
        },
        "Granularities": {
            layer: {f"`{g}`": granularity(g, layer) for g in GRANULARITIES} for layer in LAYERS
        },
        "Features": {
            layer: {
                **{title: Cell(f"{FILE}::{test}[{layer}]") for title, test in FEATURES.items()},
                "packed sequences": packed(layer),
            }
            for layer in LAYERS
        },
    }


def show(cell: Cell) -> str:
    name = "" if cell.test is None else f" `{cell.test.removeprefix(FILE)}`"
    return f"void: {cell.reason}{name}" if cell.reason else f"✓{name}"


def page() -> str:
    lines = [
        "# What is tested with what",
        "",
        "✓: the named test covers this cell; void: there is nothing to cover, for this reason.",
        f"Names that start with `::` are in `{FILE}`. The page is written by",
        "`python tests/packaging/matrix.py`, and compared with the tests that pytest collects.",
        "Estimators and granularities are compared, drawn and final masks, with plain PyTorch on",
        "masked weights; features, with the default estimator and one logit per weight, with the",
        "same layer without the feature. See [estimators](estimators.md), and",
        "[granularity](granularity.md). `state_dict` both ways: that of a plain layer has no",
        "logits, so it is loaded with `strict=False`. Each feature stands alone: a layer by",
        "`select_masks` takes no packed sequences.",
    ]
    for title, table in tables().items():
        columns = list(next(iter(table.values())))
        lines += ["", f"## {title}", "", f"| layer | {' | '.join(columns)} |"]
        lines.append("| --- " * (len(columns) + 1) + "|")
        for layer, cells in table.items():
            shown = (show(cell) for cell in cells.values())
            lines.append(f"| {LAYERS[layer]} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
