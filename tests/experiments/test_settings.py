import argparse
import dataclasses

import pytest

from modmask_kernels.experiments import EXPERIMENTS, Settings, get, option
from modmask_kernels.experiments.addmul_fnn import PAPER, QUICK, SMOKE, AddMulSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(Settings):
    count: int = option(3, "how many", minimum=1)
    rate: float = option(0.1, "how fast; 5 % is slow", above=0)
    kind: str = option("a", "which", choices=("a", "b"))
    widths: tuple[int, ...] = option((), "sizes", minimum=1)
    flag: bool = option(False, "whether")


def parse(*words):
    parser = argparse.ArgumentParser()
    Example.add_arguments(parser, {"one": Example(), "two": Example(rate=0.5)})
    parser.format_help()  # a percent sign in a help text must not break it
    return Example.overrides(parser.parse_args(words))


def test_flags_give_overrides_only():
    assert parse() == {}
    given = parse("--count", "5", "--rate", "1e-3", "--widths", "3,4", "--flag", "--kind", "b")
    assert given == {"count": 5, "rate": 1e-3, "widths": (3, 4), "flag": True, "kind": "b"}
    assert parse("--no-flag") == {"flag": False}


def test_round_trip():
    settings = Example(count=4, widths=(2, 3))
    assert Example.from_dict(settings.to_dict()) == settings
    assert Example.from_dict({"widths": [2, 3]}).widths == (2, 3)
    assert Example(rate=1).rate == 1.0


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"count": 0}, ValueError, "count must be at least 1, got 0"),
        ({"count": 1.5}, TypeError, "count must be int"),
        ({"count": True}, TypeError, "count must be int"),
        ({"rate": 0.0}, ValueError, "rate must be greater than 0"),
        ({"rate": float("nan")}, ValueError, "rate must be greater than 0"),
        ({"kind": "c"}, ValueError, "kind must be one of a, b"),
        ({"widths": (0,)}, ValueError, "widths must be at least 1"),
        ({"flag": 1}, TypeError, "flag must be bool"),
    ],
)
def test_bad_values_name_the_setting(values, error, message):
    with pytest.raises(error, match=message):
        Example(**values)


def test_unknown_setting():
    with pytest.raises(ValueError, match="unknown setting speed"):
        Example.from_dict({"speed": 1})


def test_published_settings():
    assert (PAPER.digits, PAPER.size, PAPER.steps, PAPER.batch) == (2, "big", 20_000, 128)
    assert (PAPER.lr, PAPER.grad_clip, PAPER.mask_steps) == (1e-3, 1.0, 20_000)
    assert (PAPER.mask_lr, PAPER.penalty, PAPER.samples) == (1e-2, 1e-4, 4)
    assert (PAPER.mask_init, PAPER.tau, PAPER.learning) == (2.0, 1.0, "joint")
    assert f"{PAPER.alpha:.1e}" == "7.8e-07"


@pytest.mark.parametrize(
    ("size", "weights"),
    [("small", 260_800), ("medium", 1_969_600), ("big", 12_124_000)],
)
def test_published_networks(size, weights):
    model = get("addmul-fnn").build(PAPER.replace(size=size))
    assert sum(layer.weight.numel() for layer in model.layers) == weights


def test_calibrated_settings():
    assert (QUICK.digits, QUICK.widths, QUICK.steps) == (1, (200, 200), 1500)
    assert (QUICK.mask_steps, QUICK.mask_lr, QUICK.penalty) == (3000, 0.05, 5e-3)
    assert f"{QUICK.alpha:.1e}" == "3.9e-05"
    assert SMOKE.steps < QUICK.steps


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"digits": 4}, "digits must be at most 3"),
        ({"hidden": (5,)}, "hidden must name two or more layers"),
        ({"batch": 10}, "batch must be a multiple of samples, got 10 and 4"),
        ({"size": "giant"}, "size must be one of"),
        ({"learning": "both"}, "learning must be one of"),
    ],
)
def test_bad_study_settings(values, message):
    with pytest.raises(ValueError, match=message):
        AddMulSettings(**values)


def test_hidden_overrides_size():
    assert AddMulSettings(size="small", hidden=(5, 6)).widths == (5, 6)


def test_registry():
    assert get("addmul-fnn") is EXPERIMENTS["addmul-fnn"]
    with pytest.raises(ValueError, match="did you mean addmul-fnn"):
        get("addmul-fn")
    with pytest.raises(ValueError, match="there are addmul-fnn"):
        get("zzz")
