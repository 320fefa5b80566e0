"""What the reports of the double addition conclude from their numbers."""

import copy

import pytest

from modmask_kernels.analysis import mean_std
from modmask_kernels.experiments import Run, get
from modmask_kernels.report import Results

EXPERIMENT = get("pair-fnn")


def stat(*values):
    return mean_std(values)._asdict()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    settings = EXPERIMENT.presets["smoke"].replace(steps=2, mask_steps=2)
    path = tmp_path_factory.mktemp("runs") / "tiny"
    run = Run.create(path, EXPERIMENT, "smoke", settings, [0, 1], threads=1)
    run.execute(progress=False)
    return Results.load(run.path)


@pytest.fixture
def reader(tiny):
    """A run with the clear outcome of the calibrated setting."""
    results = copy.deepcopy(tiny)
    found = EXPERIMENT.report_type(EXPERIMENT, results)
    for rates in found.accuracy.values():
        rates |= {"first": stat(100, 100), "second": stat(100, 100)}
    for own, other in (("first", "second"), ("second", "first")):
        found.accuracy[own][other] = stat(10, 10)
        for variant in ("", "_fullmask", "_ones"):
            found.accuracy[f"not_{own}{variant}"][own] = stat(40, 45)
    found.hidden["kept_percent"] = {key: stat(4, 5) for key in found.label}
    again = {key: stat(0.8, 0.85) for key in found.label}
    found.summary["tests"] = {"stability": {"hidden": again, "all": again}}
    overlap(found, 0.1, 0.12)
    return found


def overlap(reader, *values):
    reader.hidden["pairs"]["first & second"] |= {"iou": stat(*values), "chance_iou": stat(0.02, 0)}


def test_clear_outcome(reader):
    findings = {finding.headline: finding.sure for finding in reader.findings()}
    for headline in (
        "The network has learned the task.",
        "Each mask keeps its own pair and loses the other.",
        "The network has learned the same function twice, with different hidden weights.",
        "Removing a mask's weights breaks its own pair and spares the other.",
    ):
        assert findings[headline]


def test_sharing_is_judged_by_repeated_masks(reader):
    overlap(reader, 0.78, 0.8)
    assert "use the same hidden weights" in reader.sharing().headline
    overlap(reader, 0.78, 0.5)
    finding = reader.sharing()
    assert "overlap in part" in finding.headline
    assert not finding.sure
    reader.summary["tests"] = {}
    assert "chance in the hidden layers" in reader.sharing().headline
    reader.hidden["kept_percent"]["first"] = stat(70, 80)
    assert "too dense" in reader.sharing().headline


def test_the_positive_control(reader):
    reader.settings = reader.settings.replace(copy_weights=True)
    finding = reader.sharing()
    assert finding.headline == "The method misses sharing that is there."
    assert not finding.sure
    overlap(reader, 0.78, 0.8)
    assert reader.sharing().headline == "The method sees sharing where there is sharing."
    (finding,) = reader.own_findings()
    assert "positive control" in finding.headline


def test_variants_of_the_inverse_that_disagree_are_told(reader):
    (finding,) = reader.inverses()
    assert "do not agree" not in finding.text
    reader.accuracy["not_first_ones"]["first"] = stat(100, 100)
    (finding,) = reader.inverses()
    assert not finding.sure
    assert "depends on the input and output layers" in finding.text
    reader.settings = reader.settings.replace(inverse_io="ones")
    (finding,) = reader.inverses()
    assert finding.headline == (
        "Removing a mask's weights between the ends (which are whole) does not break its pair."
    )


def test_the_choice_of_what_is_told_first_is_no_change_of_the_setting(reader):
    reader.settings = reader.settings.replace(inverse_io="ones", steps=200, mask_steps=40)
    assert reader.changed() == []
