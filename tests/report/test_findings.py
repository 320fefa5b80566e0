"""The sentences follow from the numbers, with a qualifier where the numbers ask for one."""

import copy

import pytest

from modmask_kernels.analysis import mean_std
from modmask_kernels.experiments import get
from modmask_kernels.experiments.addmul_fnn import PAPER, QUICK, AddMulFNNReport


def stat(*values):
    return mean_std(values)._asdict()


@pytest.fixture
def reader(results):
    """A run with the clear outcome of the calibrated setting."""
    rates = {
        "unmasked": (100, 100),
        "control": (100, 99.5),
        "add": (100, 4),
        "mul": (4, 100),
        "not_control": (30, 50),
        "not_add": (20, 45),
        "not_mul": (55, 38),
        "early": (99, 98),
        "late": (98, 99),
    }
    summary = results.summary
    summary["accuracy"] = {
        key: {"add": stat(a, a), "mul": stat(m, m)} for key, (a, m) in rates.items()
    }
    summary["confusion"]["add"]["counts"] = [
        [stat(100, 100)] * 2,
        [stat(4, 4)] * 2,
        [stat(0, 0)] * 2,
    ]
    summary["confusion"]["mul"]["counts"] = [
        [stat(4, 4)] * 2,
        [stat(100, 100)] * 2,
        [stat(0, 0)] * 2,
    ]
    for half in ("early", "late"):
        summary["half_mask"][half]["drop"] = {"add": stat(1, 1), "mul": stat(1, 1)}
    summary["hidden"]["pairs"]["add & mul"] |= {
        "iou": stat(0.2, 0.21),
        "chance_iou": stat(0.02, 0.02),
    }
    summary["hidden"]["kept_percent"] = {key: stat(4, 5) for key in ("control", "add", "mul")}
    summary["all"]["kept_percent"] = {key: stat(6, 7) for key in ("control", "add", "mul")}
    summary["all"]["shared_percent"] = {"add": stat(40, 41), "mul": stat(52, 57)}
    summary["undecided_percent"] = {key: stat(2, 2) for key in ("control", "add", "mul")}
    return AddMulFNNReport(get("addmul-fnn"), results)


def rates(reader, condition, add=None, mul=None):
    if add is not None:
        reader.accuracy[condition]["add"] = stat(*add)
    if mul is not None:
        reader.accuracy[condition]["mul"] = stat(*mul)


def test_clear_outcome(reader):
    findings = {f.headline: f for f in reader.findings()}
    assert "The network has learned the task." in findings
    assert "For both operations a small part of the weights is enough." in findings
    assert "Each mask keeps its own operation and loses the other." in findings
    assert "The wrong answers are the other operation's right answers." in findings
    assert "The operations share weights, 10 times chance in the hidden layers." in findings
    assert "Masked and unmasked layers still fit together." in findings
    assert "The masks are close to binary." in findings
    assert f"a perfect network shows {reader.perfect():.1f} % there" in reader.mechanism().text
    assert reader.network().text == (
        "Without any mask it answers 100 % of the additions and 100 % of the multiplications "
        "correctly."
    )


def test_an_untrained_network_is_said_so(reader):
    rates(reader, "unmasked", add=(60, 99))
    finding = reader.network()
    assert not finding.sure
    assert finding.headline == "The network itself does not solve the task."


@pytest.mark.parametrize(("control", "word"), [((97, 99), "a little"), ((60, 99), "much")])
def test_costs_of_masking(reader, control, word):
    rates(reader, "control", add=control)
    finding = reader.control()
    assert not finding.sure
    assert finding.headline == f"Masking alone costs {word} accuracy."
    assert f"up to {100 - min(control):.1f} points" in finding.text


def test_one_bad_seed_is_enough_for_a_qualifier(reader):
    rates(reader, "add", add=(100, 90))
    assert not reader.specialisation().sure
    assert "does not fully keep its own" in reader.specialisation().headline


def test_specialisation_is_relative_to_the_control(reader):
    """Where the control itself is weak, losing all of the other operation is still a loss."""
    rates(reader, "control", mul=(28, 28))
    rates(reader, "mul", mul=(28, 29))
    rates(reader, "add", mul=(0.4, 0.4))
    assert "keeps its own operation and loses the other" in reader.specialisation().headline


def test_weak_and_absent_specialisation(reader):
    rates(reader, "add", mul=(80, 85))
    assert "weaken" in reader.specialisation().headline
    rates(reader, "add", mul=(99, 99))
    finding = reader.specialisation()
    assert finding.headline == "No clear specialisation is visible."
    assert not finding.sure


def test_other_wrong_answers(reader):
    reader.summary["confusion"]["add"]["counts"][0] = [stat(30, 40)] * 2
    assert not reader.mechanism().sure
    assert "35.0 ± 7.1 %" in reader.mechanism().text


def test_sharing_is_judged_by_chance_and_density(reader):
    reader.hidden["pairs"]["add & mul"]["iou"] = stat(0.021, 0.025)
    assert "hardly more than by chance" in reader.sharing().headline
    reader.hidden["kept_percent"]["add"] = stat(70, 80)
    finding = reader.sharing()
    assert not finding.sure
    assert "too dense" in finding.headline


def test_sharing_when_most_is_own(reader):
    reader.whole["shared_percent"] = {"add": stat(30, 31), "mul": stat(32, 37)}
    assert "most of each mask is its own" in reader.sharing().headline


def test_empty_masks_do_not_break_the_page(reader):
    both = reader.hidden["pairs"]["add & mul"]
    both["iou"] = both["chance_iou"] = stat(1.0, 1.0)
    reader.hidden["kept_percent"] = {key: stat(0, 0) for key in ("control", "add", "mul")}
    assert reader.sharing()
    both["chance_iou"] = stat(0.0, 0.0)
    both["iou"] = stat(0.0, 0.0)
    assert "hardly more" in reader.sharing().headline


@pytest.mark.parametrize(
    ("not_add", "not_mul", "words"),
    [
        (((20, 20), (99, 99)), ((98, 98), (30, 30)), "spares the other"),
        (((20, 20), (45, 45)), ((55, 55), (38, 38)), "hurts its own operation most"),
        (((40, 40), (38, 38)), ((38, 38), (40, 40)), "and the other one as well"),
        (((99, 98), (99, 98)), ((99, 98), (99, 98)), "does not break its operation"),
    ],
)
def test_inverse(reader, not_add, not_mul, words):
    rates(reader, "not_add", *not_add)
    rates(reader, "not_mul", *not_mul)
    assert words in reader.inverse().headline


def test_half_masks(reader):
    reader.summary["half_mask"]["early"]["drop"]["add"] = stat(40, 45)
    assert reader.halves().headline == "Half a control mask is worse than a whole one."
    reader.summary["half_mask"]["early"]["drop"]["add"] = stat(3, 8)
    assert not reader.halves().sure
    assert "at some cost" in reader.halves().headline
    reader.summary["half_mask"]["early"]["drop"]["add"] = stat(-3, -3)
    text = reader.halves().text
    assert "+3.0 ± 0.0 points (additions) and \N{MINUS SIGN}1.0 ± 0.0 points" in text


def test_unsettled_masks(reader):
    reader.summary["undecided_percent"]["mul"] = stat(30, 40)
    finding = reader.decided()
    assert finding.headline == "The masks are not settled."
    assert not finding.sure


def test_stability_is_told_when_it_was_measured(reader):
    assert "second time" not in reader.sharing().text
    assert reader.stability_tables() == []
    again = {key: stat(0.6, 0.65) for key in ("control", "add", "mul")}
    reader.summary["tests"] = {"stability": {"hidden": again, "all": again}}
    assert "a second time" in reader.sharing().text
    assert "far fewer than two masks learned for one operation" in reader.sharing().headline
    (table,) = reader.stability_tables()
    assert table.rows[0][1] == "0.625 ± 0.035"
    again["mul"] = stat(0.3, 0.65)
    assert "far fewer" not in reader.sharing().headline


def test_limits_say_what_was_run(results):
    def limits(preset, settings, seeds=(0, 1)):
        changed = copy.deepcopy(results)
        object.__setattr__(changed, "preset", preset)
        object.__setattr__(changed, "settings", settings.to_dict())
        object.__setattr__(changed, "seeds", list(seeds))
        return " ".join(AddMulFNNReport(get("addmul-fnn"), changed).limits())

    assert "its numbers mean nothing" in limits("smoke", QUICK)
    assert "calibrated small setting" in limits("quick", QUICK)
    text = limits("quick", QUICK.replace(steps=100, penalty=1e-4))
    assert "changed are steps (now 100) and penalty (now 0.0001)" in text
    assert "preset paper" not in limits("paper", PAPER.replace(size="small"))
    assert "One seed was run" in limits("paper", PAPER, seeds=(0,))
    assert "One seed" not in limits("paper", PAPER)


def test_calibration_table_is_shown_for_its_settings_only(results):
    def captions(settings):
        changed = copy.deepcopy(results)
        object.__setattr__(changed, "settings", settings.to_dict())
        page = get("addmul-fnn").page(changed)
        return [table.caption for section in page.sections for table in section.tables]

    assert any("independent implementation" in c for c in captions(QUICK))
    assert not any("independent implementation" in c for c in captions(QUICK.replace(steps=9)))
    assert any("What is known of the published results" in c for c in captions(QUICK))


def test_the_command_gives_the_settings(results):
    changed = copy.deepcopy(results)
    object.__setattr__(changed, "preset", "paper")
    settings = PAPER.replace(size="small", hidden=(5, 6), stability=True, penalty=2e-4)
    object.__setattr__(changed, "settings", settings.to_dict())
    assert AddMulFNNReport(get("addmul-fnn"), changed).command() == (
        "modmask run addmul-fnn --preset paper --size small --hidden 5,6 --penalty 0.0002 "
        "--stability --seeds 2"
    )


def test_layer_names_of_a_deep_network():
    names = list("abcde")
    assert [get("addmul-fnn").layer_title(name, names) for name in names] == [
        "input",
        "hidden 1",
        "hidden 2",
        "hidden 3",
        "output",
    ]
