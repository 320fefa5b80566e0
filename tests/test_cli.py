"""The command line as a person uses it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import modmask_kernels
from modmask_kernels import _native, cli, info
from modmask_kernels.report import style

SMOKE = ["run", "addmul-fnn", "--preset", "smoke", "--quiet", "--steps", "30", "--mask-steps", "20"]
ROOT = Path(modmask_kernels.__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def quick_figures():
    """Drawing takes seconds; one test below does it, the others get an empty picture."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("html", "summary"):
            patch.setattr(f"modmask_kernels.report.{module}.render_svg", lambda *_: "<svg/>")
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_figures):
    path = tmp_path_factory.mktemp("runs") / "demo"
    assert cli.main([*SMOKE, "--seeds", "2", "--out", str(path)]) == 0
    return path


def python(*words, code=None):
    command = [sys.executable, "-m", "modmask_kernels", *words]
    if code is not None:
        command = [sys.executable, "-c", code, *words]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_run_ends_with_the_path_of_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("modmask_kernels.report.html.render_svg", style.render_svg)
    path = tmp_path / "demo"
    assert cli.main([*SMOKE, "--out", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(path / "report.html")
    assert "addmul-fnn, preset smoke, 1 seed" in captured.err
    assert "network 22-32-32-10, 30 steps" in captured.err
    assert "penalty beta 0.005 (alpha 3.91e-05 per logit)" in captured.err
    for name in ("settings.json", "metrics.json", "report.html", "figures/accuracy-dark.svg"):
        assert (path / name).exists()
    assert (path / "figures" / "accuracy-dark.svg").stat().st_size > 5000
    record = json.loads((path / "settings.json").read_text())
    assert record["settings"]["steps"] == 30


def test_progress_tells_stage_rate_and_time_left(tmp_path, capfd):
    words = [word for word in SMOKE if word != "--quiet"]
    assert cli.main([*words, "--out", str(tmp_path / "demo")]) == 0
    text = capfd.readouterr().err
    assert "seed 0 (1/1) network: 100%" in text
    assert "seed 0 (1/1) masks: 100%" in text
    assert "step/s" in text


def test_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(SMOKE) == 0
    assert (tmp_path / "runs" / "addmul-fnn-smoke" / "report.html").exists()


def test_report_rebuilds(finished, tmp_path, capsys):
    page = (finished / "report.html").read_bytes()
    (finished / "report.html").unlink()
    (finished / "metrics.json").unlink()
    summary = tmp_path / "summary"
    assert cli.main(["report", str(finished), "--summary", str(summary)]) == 0
    assert (finished / "report.html").read_bytes() == page
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [str(finished / "report.html"), str(summary / "README.md")]


def test_resume_of_a_finished_run_and_more_seeds(finished, capsys):
    assert cli.main(["run", "--resume", str(finished), "--quiet"]) == 0
    assert cli.main(["run", "--resume", str(finished), "--seeds", "3", "--quiet"]) == 0
    assert json.loads((finished / "metrics.json").read_text())["seeds"] == [0, 1, 2]
    assert "3 seeds" in (finished / "report.html").read_text()
    assert cli.main(["run", "--resume", str(finished), "--seeds", "1"]) == 2
    assert "--seeds 1 is fewer than the 3 of the run" in capsys.readouterr().err


def test_seeds_may_stand_before_the_experiment(tmp_path):
    words = ["run", "--seeds", "2", *SMOKE[1:], "--first-seed", "5", "--out", str(tmp_path / "r")]
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "r" / "settings.json").read_text())["seeds"] == [5, 6]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["inverse"], "inverse: add"),
        (["inverse", "--exclude-io", "fullmask"], "inverse: add"),
        (["half-mask", "--early", "1"], "early: layers 1 of 3"),
        (["histogram", "--bins", "4"], "undecided"),
        (["stability"], "control, again"),
    ],
)
def test_tests(finished, capsys, words, expected):
    assert cli.main(["test", words[0], str(finished), *words[1:]]) == 0
    assert expected in capsys.readouterr().out


def test_list(capsys):
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    for word in ("addmul-fnn", "paper, quick, smoke", "inverse, half-mask"):
        assert word in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["run", "test", "report", "bench", "info", "list"]),
        (["run"], ["--resume", "addmul-fnn"]),
        (["run", "addmul-fnn"], ["--penalty", "--mask-steps", "paper: 20000", "--seeds"]),
        (["test"], ["half-mask", "stability"]),
        (["test", "inverse"], ["--exclude-io"]),
        (["report"], ["--summary"]),
        (["list"], []),
        (["info"], []),
        (["bench"], ["--suite"]),
    ],
)
def test_help(capsys, words, expected):
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in expected:
        assert word in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "name an experiment"),
        (["run", "addmul-fnn", "--batch", "10"], "batch must be a multiple of samples"),
        (["run", "addmul-fnn", "--digits", "7"], "digits must be at most 3"),
        (["run", "--resume", "nowhere"], "no results folder"),
        (["run", "--resume", "x", "addmul-fnn"], "--resume takes no experiment"),
        (["report", "nowhere"], "no results folder"),
        (["test", "inverse", "nowhere"], "no results folder"),
    ],
)
def test_errors_are_one_clear_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["fly"],
        ["run", "addmul"],
        ["run", "addmul-fnn", "--seeds", "0"],
        ["run", "addmul-fnn", "--step", "5"],  # no abbreviations
        ["run", "addmul-fnn", "--resume", "x"],
        ["test", "x", "y"],
        [],
    ],
)
def test_wrong_words_are_usage_errors(capsys, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "usage: modmask" in capsys.readouterr().err


def test_a_second_mask_file_needs_an_operation(capsys):
    with pytest.raises(SystemExit):
        cli.main(["masks", "a", "b"])
    assert "arguments: b; a second file comes with --and, --or or" in capsys.readouterr().err


def test_an_existing_folder_is_refused(finished, capsys):
    assert cli.main([*SMOKE, "--out", str(finished)]) == 2
    assert f"modmask run --resume {finished}" in capsys.readouterr().err


def test_interrupting_says_how_to_continue(tmp_path, monkeypatch, capsys):
    from modmask_kernels.experiments import study

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    path = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setattr(study, "learn_masks", interrupt)
        assert cli.main([*SMOKE, "--out", str(path)]) == 130
    assert f"modmask run --resume {path}" in capsys.readouterr().err
    assert cli.main(["run", "--resume", str(path), "--quiet"]) == 0
    assert (path / "report.html").exists()


def test_nothing_is_run_without_the_packages_of_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main([*SMOKE, "--out", str(tmp_path / "demo")]) == 2
    assert "pip install 'modmask-kernels[report]'" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("MODMASK_BACKEND", "gpu", "modmask: MODMASK_BACKEND must be one of"),
        ("MODMASK_CPU_CAPABILITY", "sse", "modmask: MODMASK_CPU_CAPABILITY must be one of"),
    ],
)
def test_a_wrong_environment_is_one_line(monkeypatch, variable, value, said):
    monkeypatch.setenv(variable, value)
    result = python("info")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(said)
    assert line.endswith(f"not '{value}'")


def test_info_says_what_is_not_used(monkeypatch):
    monkeypatch.setattr(_native, "WANTED_CAPABILITY", "avx512")
    monkeypatch.setattr(_native, "capabilities", lambda: ["avx2", "plain"])
    monkeypatch.setattr(_native, "available", lambda: True)
    monkeypatch.setattr(_native, "FORCED_BACKEND", "reference")
    lines = dict(info.lines())
    assert lines["MODMASK_CPU_CAPABILITY"].startswith("avx512, ignored")
    assert lines["CPU kernels"].endswith(", unused: MODMASK_BACKEND=reference")


def test_info_needs_the_core_packages_only():
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("matplotlib", "jinja2"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from modmask_kernels.cli import main
sys.exit(main(["info"]))
"""
    result = python(code=code)
    assert result.returncode == 0, result.stderr
    assert modmask_kernels.__version__ in result.stdout
