"""The predicted times on GPUs: what is counted, and that the committed page is what it gives."""

from pathlib import Path

import pytest

from modmask_kernels.bench import roofline
from modmask_kernels.files import read_json
from modmask_kernels.ops import _gpu

RESULTS = Path(__file__).parents[2] / "docs/results/gpu"
COUNTS = {
    name: {"slots": count}
    for name, count in {
        **{"bits": 4.0, "regenerate": 40.0, "pack": 30.0, "pack_once": 20.0},
        **{"slope": 50.0, "slope_once": 10.0},
    }.items()
}
H100 = _gpu.DEVICES[1]


def test_work_of_a_step():
    """By hand: 4096 x 2048 weights of 2 bytes, 4 samples of 64 rows, masks from bits."""
    layer = roofline.Layer(4096, 2048, 256, 4, "bfloat16")
    assert roofline.source_of(layer, H100) == "bits"
    step = {work.name: work for work in roofline.masked_step(layer, H100, COUNTS)}
    weights = 4096 * 2048
    bits = 4 * weights // 8
    rows = 256 * (4096 + 2048) * 2
    assert list(step) == ["masks", "forward", "dlogits", "dx"]
    assert step["masks"][1:] == (4 * weights + bits, 0.0, (4 * 30.0 + 20.0) * weights, 1)
    for name in ("forward", "dx"):
        # one tile of rows for each sample
        expected = (2 * weights + rows + bits, 2 * 256 * weights, 4.0 * 4 * weights, 2)
        assert step[name][1:] == expected
    assert step["dlogits"][1:] == (
        2 * weights + rows + 2 * 4 * weights,
        2 * 256 * weights,
        (4 * 50.0 + 10.0) * weights,
        2,
    )
    words = roofline.words_per_weight(list(step.values()), layer)
    assert words == pytest.approx(1 + 3 * 0.5 + 2 + 3 * 4 / 32)


def test_small_weights_are_packed_twice():
    layer = roofline.Layer(512, 1024, 4096, 4, "bfloat16")
    step = {work.name: work for work in roofline.masked_step(layer, H100, COUNTS)}
    assert step["masks of dx"][1:] == step["masks"][1:]


def test_wide_tiles_of_dlogits_fill_a_processor():
    layer = roofline.Layer(4096, 2048, 8192, 4, "bfloat16")
    step = {work.name: work for work in roofline.masked_step(layer, H100, COUNTS)}
    assert step["dlogits"].resident == 1


def test_the_page_says_what_targets_leave():
    counts = read_json(RESULTS / "instructions.json")
    rows = [row for row in roofline.predict_all(counts) if row["target"] is not None]
    table = roofline.targets_table(rows)
    by_name = {line[0]: line for line in table.rows}
    for row in rows:
        name = f"{row['device']}, {row['batch']}"
        spent, free = (by_name[f"{name}: {of}"] for of in ("all", "without instructions"))
        assert float(spent[5]) == pytest.approx(row["ratio_to_plain"], abs=0.006)
        assert float(free[5]) <= min(float(spent[5]), row["target"])
        parts = [float(by_name[f"{name}: {kernel}"][4]) for kernel in row["kernels"]]
        assert sum(parts) == pytest.approx(float(spent[4]), abs=0.3)


def test_two_programs_hide_half_of_the_shorter_time():
    assert _gpu.arithmetic(3.0, 8.0, 1) == _gpu.arithmetic(8.0, 3.0, 1) == 11.0
    assert _gpu.arithmetic(3.0, 8.0, 2) == 9.5


@pytest.mark.parametrize("dtype", roofline.DTYPES)
def test_predictions_lie_above_floors_and_grow(dtype):
    rows = [
        roofline.row_of(roofline.Layer(1024, 1024, batch, 4, dtype), H100, COUNTS)
        for batch in roofline.BATCHES
    ]
    for row in rows:
        assert 0 < row["seconds"]["floor"] < row["seconds"]["masked"]
        assert row["ratio_with_bfloat16_logits"] <= row["ratio_to_plain"]
        assert row["compiled"] < row["naive"]
    masked = [row["seconds"]["masked"] for row in rows]
    assert masked == sorted(masked)
    # many rows hide what masks cost
    assert rows[-1]["ratio_to_plain"] < rows[0]["ratio_to_plain"]


def test_committed_prediction_is_what_the_command_gives(tmp_path, monkeypatch):
    monkeypatch.chdir(RESULTS.parents[2])
    assert roofline.main(["--out", str(tmp_path)]) == 0
    found, committed = (read_json(folder / "roofline.json") for folder in (tmp_path, RESULTS))
    assert found == committed
    for name in ("roofline.md", "roofline-dark.svg", "roofline-light.svg"):
        assert (tmp_path / name).is_file()
    pages = [(folder / "roofline.md").read_text() for folder in (tmp_path, RESULTS)]
    assert pages[0] == pages[1]
