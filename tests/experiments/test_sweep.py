"""Sweeps: a grid of runs on this machine or on a Ray cluster, killed and continued."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from modmask_kernels import cli
from modmask_kernels.experiments import Run, get, sweep
from modmask_kernels.experiments.comparison import compare
from modmask_kernels.experiments.sweep import Failure, Sweep, Unit, on_ray, on_this_machine

EXPERIMENT = get("addmul-fnn")
SHORT = EXPERIMENT.presets["smoke"].replace(steps=20, mask_steps=10)
GRID = {"penalty": [0.001, 0.01]}


@pytest.fixture(scope="module", autouse=True)
def quick_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modmask_kernels.report.html.render_svg", lambda *_: "<svg/>")
        yield


def create(path, settings=SHORT, grid=GRID, seeds=(0,)):
    return Sweep.create(path, EXPERIMENT, "smoke", settings, grid, seeds)


def here(units, threads):
    """A launcher without processes."""
    for unit in units:
        sweep.execute_unit(str(unit.path), unit.seed)
        yield None


def results(one: Sweep) -> dict[str, object]:
    return {
        f"{run.path.name}/{seed}": json.loads(run.folder(seed).metrics.read_text())
        for run in one.runs
        for seed in run.seeds
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, quick_figures):
    one = create(tmp_path_factory.mktemp("sweep") / "here")
    one.execute(here, progress=False)
    return one


def test_points_are_all_combinations_and_have_names():
    grid = {"size": ["mini", "tiny"], "penalty": [1e-3, 1e-2]}
    assert [sweep.point_name(point) for point in sweep.points(grid)] == [
        "size=mini_penalty=0.001",
        "size=mini_penalty=0.01",
        "size=tiny_penalty=0.001",
        "size=tiny_penalty=0.01",
    ]
    assert sweep.point_name({"device": "cuda:0/x"}) == "device=cuda-0-x"


def test_every_point_is_an_ordinary_run(unbroken):
    assert not unbroken.missing()
    for run, penalty in zip(unbroken.runs, GRID["penalty"], strict=True):
        assert Run.open(run.path).finished
        assert run.settings.penalty == penalty
        assert run.settings.replace(penalty=SHORT.penalty) == SHORT
        assert (run.path / "report.html").exists()
    page = unbroken.page()
    assert page.question == "What does the penalty change?"
    assert [row[0] for row in page.sections[0].tables[0].rows] == ["penalty 0.001", "penalty 0.01"]
    assert any("smoke" in limit for limit in page.limits)


def test_processes_on_this_machine_give_the_same_results(unbroken, tmp_path):
    path = tmp_path / "sweep"
    words = ["sweep", "addmul-fnn", "--preset", "smoke", "--steps", "20", "--mask-steps", "10"]
    words += ["--grid", "penalty=0.001,0.01", "--jobs", "2", "--quiet", "--out", str(path)]
    assert cli.main(words) == 0
    assert (path / "report.html").exists()
    assert results(Sweep.open(path)) == results(unbroken)
    # nothing is run twice
    stamps = {file: file.stat().st_mtime_ns for file in path.rglob("seed-*/metrics.json")}
    assert cli.main(["sweep", "--resume", str(path), "--quiet"]) == 0
    assert stamps == {file: file.stat().st_mtime_ns for file in stamps}
    assert cli.main(["report", str(path)]) == 0


def script(monkeypatch, text):
    monkeypatch.setattr(
        sweep, "_command", lambda unit: [sys.executable, "-c", text, str(unit.path)]
    )


def test_a_killed_process_is_started_again_but_not_for_ever(monkeypatch, tmp_path):
    once = "import os, sys; p = sys.argv[1]\n"
    once += "if not os.path.exists(p): open(p, 'w').close(); os.kill(os.getpid(), 9)"
    script(monkeypatch, once)
    assert list(on_this_machine(1)([Unit(tmp_path / "a", 0)], 1)) == [None]
    script(monkeypatch, "import os; os.kill(os.getpid(), 9)")
    (failure,) = on_this_machine(1)([Unit(tmp_path / "b", 0)], 1)
    assert failure == Failure(Unit(tmp_path / "b", 0), "killed by signal 9, 3 times")


def test_a_failed_unit_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    one = create(tmp_path / "sweep")

    def half(units, threads):
        yield from here(units[:1], threads)
        yield Failure(units[1], "no space left on device")

    with pytest.raises(
        sweep.SweepError, match=r"1 of 2 runs failed \(penalty=0.01 seed 0\): no sp"
    ):
        one.execute(half, progress=False)
    assert [unit.path.name for unit in one.missing()] == ["penalty=0.01"]
    script(monkeypatch, "import sys; sys.exit('no space left on device')")
    assert [f.message for f in on_this_machine(2)(one.missing(), 1)] == ["no space left on device"]
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--resume", str(one.path), "--quiet"])
    assert "continue with `modmask sweep --resume" in capsys.readouterr().err


def test_ray_loses_nothing_where_a_worker_is_killed(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    settings = SHORT.replace(steps=600, mask_steps=100, checkpoint_every=20)
    one = create(tmp_path / "ray", settings, {"penalty": [0.001, 0.01, 0.02]})
    runs, killed = one.runs, []

    def kill_first() -> None:
        for _ in range(6000):
            for run in runs:
                folder = run.folder(0)
                if folder.checkpoint("network").exists() and not folder.metrics.exists():
                    killed.append(int((folder.path / ".lock").read_text()))
                    os.kill(killed[0], signal.SIGKILL)
                    return
            time.sleep(0.01)

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        killer = threading.Thread(target=kill_first)
        killer.start()
        one.execute(on_ray(), progress=False)
        killer.join()
    finally:
        ray.shutdown()
    assert killed
    sessions = [
        json.loads(file.read_text())["sessions"] for file in one.path.rglob("provenance.json")
    ]
    assert sorted(sessions) == [1, 1, 2]  # the killed one alone was continued
    alone = create(tmp_path / "here", settings, {"penalty": [0.001, 0.01, 0.02]})
    alone.execute(on_this_machine(2), progress=False)
    assert results(one) == results(alone)


def test_a_seed_is_run_by_one_process_at_a_time(tmp_path):
    one = create(tmp_path / "sweep")
    run = one.runs[0]
    with (
        run._alone(run.folder(0)),
        pytest.raises(ValueError, match=f"is being run by another process, {os.getpid()}"),
    ):
        run.execute_seeds([0], progress=False)
    with pytest.raises(ValueError, match="seed 3 is none of"):
        run.execute_seeds([3])


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "at least one setting with values"),
        ({"penalty": []}, "at least one setting with values"),
        ({"penlty": [1.0]}, "has no setting 'penlty'"),
        ({"penalty": [0.1, 0.1]}, "the point penalty=0.1 comes twice"),
        ({"penalty": [0.1, -1.0]}, "setting penalty must be at least 0"),
        ({"samples": [3]}, "batch must be a multiple of samples"),
    ],
)
def test_a_wrong_grid_writes_nothing(grid, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        create(tmp_path / "sweep", grid=grid)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["addmul-fnn", "--grid", "penalty"], "--grid takes NAME=A,B,..., not 'penalty'"),
        (["addmul-fnn", "--grid", "penalty=x"], "setting penalty takes a number, not 'x'"),
        (["addmul-fnn", "--grid", "tau=1", "tau=2"], "--grid names tau twice"),
        (["addmul-fnn", "--grid", "stability=maybe"], "setting stability takes yes or no"),
        (["addmul-fnn", "--grid", "tau=1", "--address", "x:1"], "--address is for --launcher ray"),
        (
            ["addmul-fnn", "--grid", "tau=1", "--launcher", "ray", "--jobs", "2"],
            "--jobs is for the local launcher",
        ),
        ([], "name an experiment"),
        (["--resume", "nowhere"], "nowhere is no sweep"),
    ],
)
def test_wrong_words(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # a mistake leaves no folder to be in the way


def test_one_seed_alone_is_of_a_run_that_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "--only", "0", "addmul-fnn", "--preset", "smoke"]) == 2
    assert "--only continues a run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_overwritten_and_a_damaged_record_is_named(tmp_path):
    create(tmp_path / "sweep")
    with pytest.raises(FileExistsError, match="modmask sweep --resume"):
        create(tmp_path / "sweep")
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match="is not a JSON file"):
        Sweep.open(tmp_path / "sweep")
    (tmp_path / "sweep" / "sweep.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="has not the format"):
        Sweep.open(tmp_path / "sweep")


class TestComparison:
    def test_report_of_several_runs_compares_them(self, unbroken, tmp_path, capsys):
        paths = [str(run.path) for run in unbroken.runs]
        out = tmp_path / "both"
        assert cli.main(["report", *paths, "--out", str(out)]) == 0
        assert capsys.readouterr().out.strip() == str(out / "report.html")
        text = (out / "report.html").read_text()
        assert "What does the penalty change?" in text
        assert "penalty=0.001" in text

    def test_runs_and_reports_are_not_confused(self, unbroken, tmp_path, capsys):
        first, second = (str(run.path) for run in unbroken.runs)
        assert cli.main(["report", first, second, "--out", first]) == 2
        assert "is a run itself" in capsys.readouterr().err
        assert cli.main(["report", first, "--out", str(tmp_path)]) == 2
        assert cli.main(["report", first, second, "--summary", str(tmp_path)]) == 2
        with pytest.raises(ValueError, match="at least two runs"):
            compare([Path(first)], None, "")

    def test_numbers_are_those_of_the_runs(self, unbroken):
        page = unbroken.page()
        overlap = page.sections[2].tables[0]
        for run, row in zip(unbroken.runs, overlap.rows, strict=True):
            pair = json.loads((run.path / "metrics.json").read_text())["summary"]["hidden"]["pairs"]
            assert row[1] == f"{pair['add & mul']['iou']['mean']:.3f}"
            assert row[2] == f"{pair['add & mul']['chance_iou']['mean']:.3f}"
            assert row[5] == "\N{EN DASH}"
