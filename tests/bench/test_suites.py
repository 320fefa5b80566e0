"""The suites on tiny shapes: that they measure, check and report; never how long anything took."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modmask_kernels import bench, cli, ops
from modmask_kernels.bench import (
    antithetic,
    baselines,
    conv,
    linear,
    lstm,
    memory,
    network,
    select,
    step,
    tables,
    top_k,
)
from modmask_kernels.bench import cli as bench_cli
from modmask_kernels.bench.figure import figure_of
from modmask_kernels.bench.verify import GateError

# compiling the naive layer takes longer than everything else here together
FAST = ("naive", "neurosurgeon")


@pytest.fixture(scope="module")
def linear_rows() -> list[dict[str, Any]]:
    return [
        linear.run_case(linear.LinearCase(16, 24, 8, samples), names=FAST, rounds=2)
        for samples in (1, 4)
    ]


@pytest.fixture(scope="module")
def step_rows() -> list[dict[str, Any]]:
    return [step.run_case(step.StepCase("mini", 8, 2), rounds=2, visit_seconds=0.0)]


@pytest.fixture(scope="module")
def conv_rows() -> list[dict[str, Any]]:
    small = [
        conv.ConvCase(6, 4, 5, 3, 8, 1, target=1.05),
        conv.ConvCase(6, 4, 5, 3, 8, 4, stride=2, groups=2),
    ]
    return [conv.run_case(case, rounds=2, visit_seconds=0.0) for case in small]


@pytest.fixture(scope="module")
def lstm_rows() -> list[dict[str, Any]]:
    small = [
        lstm.LSTMCase(24, 1, 1, batch=16, steps=3, target=1.05),
        lstm.LSTMCase(24, 4, 2, batch=16, steps=3),
    ]
    return [lstm.run_case(case, rounds=2, visit_seconds=0.0) for case in small]


@pytest.fixture(scope="module")
def select_rows() -> list[dict[str, Any]]:
    return [select.run_case(select.SelectCase(9, 7, 5, 6), rounds=2, visit_seconds=0.0)]


@pytest.fixture(scope="module")
def top_k_rows() -> list[dict[str, Any]]:
    timing = {"median": 0.1, "p20": 0.1, "p80": 0.1, "calls": 3}
    seconds = {name: dict(timing) for name in top_k.CANDIDATES}
    return [
        {
            "count": 1000,
            "k": 500,
            "dtype": "float32",
            "seconds": seconds,
            "extra_bytes": dict.fromkeys(top_k.CANDIDATES, 2**20),
            "quickest": "kthvalue",
            "ratio_to_quickest": 1.0,
            "times_less_memory": 1.0,
            "verdict_time": "met",
            "verdict_memory": "missed",
        }
    ]


@pytest.fixture(scope="module")
def memory_rows() -> list[dict[str, Any]]:
    extra = {
        "plain": {"1": 9 * 2**20},
        "fused": {"1": 8 * 2**20, "8": 9 * 2**20},
        "naive": {"1": 70 * 2**20, "8": 240 * 2**20},
    }
    return [
        {
            "out_features": 1024,
            "in_features": 1024,
            "batch": 128,
            "dtype": "float32",
            "weight_bytes": 4 * 2**20,
            "extra_bytes": extra,
            "fused_growth": 1.125,
            "target_growth": memory.TARGET_GROWTH,
            "verdict": linear.verdict(1.125, memory.TARGET_GROWTH),
        }
    ]


@pytest.fixture(scope="module")
def network_rows() -> list[dict[str, Any]]:
    small = [
        network.NetworkCase("resnet18", 16, 4, 2),
        network.NetworkCase("decoder", 16, 4, 4, context=8),
    ]
    with pytest.MonkeyPatch.context() as patch:
        # fresh processes take seconds each
        patch.setattr(network, "extra_memory", lambda *_: 1000)
        return [network.run_case(case, rounds=1) for case in small]


@pytest.fixture(scope="module")
def antithetic_rows() -> list[dict[str, Any]]:
    small = {"draws": 40, "hidden": 16, "training": 20}
    return [
        antithetic.run_case(antithetic.AntitheticCase(3, 8, same_rows, **small))
        for same_rows in (True, False)
    ]


@pytest.fixture
def results(
    linear_rows: list[Any],
    step_rows: list[Any],
    memory_rows: list[Any],
    conv_rows: list[Any],
    lstm_rows: list[Any],
    network_rows: list[Any],
    select_rows: list[Any],
    top_k_rows: list[Any],
    antithetic_rows: list[Any],
) -> dict[str, Any]:
    from modmask_kernels.bench.machine import describe

    return {
        "settings": {"format": 1, "quick": True},
        "machine": describe(),
        "linear": linear_rows,
        "memory": memory_rows,
        "step": step_rows,
        "conv": conv_rows,
        "lstm": lstm_rows,
        "network": network_rows,
        "select": select_rows,
        "top_k": top_k_rows,
        "antithetic": antithetic_rows,
    }


class TestTargets:
    @pytest.mark.parametrize(
        ("case", "target", "relaxed"),
        [
            ((1024, 1024, 128, 1), 1.1, None),
            ((1024, 1024, 128, 4), 1.5, 1.6),
            ((1024, 1024, 128, 8), 2.0, 2.2),
            ((1024, 1024, 8, 1), 1.25, None),
            ((384, 384, 128, 4), 1.5 * 1.15, 1.6 * 1.15),
            ((384, 384, 8, 1), None, None),
            ((64, 64, 128, 4), None, None),
        ],
    )
    def test_of_the_table(
        self, case: tuple[int, int, int, int], target: float | None, relaxed: float | None
    ) -> None:
        row = linear.LinearCase(*case)
        assert (row.target, row.relaxed_target) == (target, relaxed)

    def test_the_full_table_has_every_row_that_has_a_target(self) -> None:
        rows = linear.cases()
        assert len(rows) == len(set(rows)) == 12
        assert sum(row.target is not None for row in rows) == 10
        assert set(linear.cases(quick=True)) <= set(rows)

    @pytest.mark.parametrize(
        ("numbers", "words"),
        [
            ((1.4, 1.5, 1.6), "met"),
            ((1.5, 1.5), "met"),
            ((1.55, 1.5, 1.6, 1.4), "met with the floor"),
            ((1.8, 1.5, 1.6, 1.4), "missed by 20 %"),
            ((1.8, 1.5, None, 1.7), "missed by 20 %, floor above target"),
            ((9.9, None), "no target"),
        ],
    )
    def test_verdict(self, numbers: tuple[Any, ...], words: str) -> None:
        assert linear.verdict(*numbers) == words


class TestConv:
    def test_every_candidate_is_timed_and_checked(self, conv_rows: list[dict[str, Any]]) -> None:
        for row in conv_rows:
            assert set(row["seconds"]) == {"plain", "fused", "naive"}
            assert max(row["error_over_allowed"].values()) <= 1.0
            ratios = ("ratio_to_plain", "naive_ratio_to_plain", "ratio_to_naive")
            assert all(0.0 < row[name]["p20"] <= row[name]["value"] for name in ratios)
        assert conv_rows[1]["verdict"] == "no target"

    def test_the_full_table_has_the_wanted_bounds(self) -> None:
        wanted = [
            (c.out_channels, c.samples, c.target) for c in conv.cases() if c.target is not None
        ]
        assert wanted == [(64, 1, 1.05), (64, 4, 1.15), (512, 1, 1.15), (512, 4, 1.5)]
        assert conv.cases(quick=True) == [c for c in conv.cases() if c.target == 1.5]


class TestLSTM:
    def test_every_candidate_is_timed_and_checked(self, lstm_rows: list[dict[str, Any]]) -> None:
        for row in lstm_rows:
            assert set(row["seconds"]) == {"plain", "fused", "naive"}
            assert max(row["error_over_allowed"].values()) <= 1.0
        assert lstm_rows[1]["verdict"] == "no target"

    def test_the_full_table_has_the_wanted_bounds(self) -> None:
        wanted = [(c.units, c.samples, c.target) for c in lstm.cases() if c.target is not None]
        assert wanted == [(256, 1, 1.1), (256, 4, 1.3), (64, 1, 1.2), (64, 4, 1.5)]
        assert lstm.cases(quick=True) == [c for c in lstm.cases() if c.target == 1.5]


class TestAntithetic:
    def test_two_plain_samples_are_worth_two(self, antithetic_rows: list[dict[str, Any]]) -> None:
        for row in antithetic_rows:
            assert row["worth"]["plain"]["mean"] == pytest.approx(2.0, rel=0.3)
            assert row["worth"]["antithetic"]["mean"] > 1.0

    def test_rows(self) -> None:
        rows = antithetic.cases()
        assert len(rows) == len(set(rows)) == 8
        assert antithetic.cases(quick=True) == rows[:1]


class TestNetwork:
    def test_time_and_memory_of_every_candidate(self, network_rows: list[dict[str, Any]]) -> None:
        for row in network_rows:
            assert set(row["seconds"]) == set(row["extra_bytes"]) == {"plain", "fused", "naive"}
            assert row["extra_bytes"]["fused"] > row["extra_bytes"]["plain"] == 1000
        assert [row["target"] for row in network_rows] == [None, network.TARGET]

    def test_memory_of_a_fresh_process(self) -> None:
        case = network.NetworkCase("decoder", 64, 8, 4, context=16)
        weights = sum(p.numel() * 4 for p in network.build(case).parameters())
        assert network.extra_memory("fused", case, 1) > weights  # at least the gradient and Adam

    def test_what_is_wrong_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(network, "_ALWAYS", -1000.0)
        with pytest.raises(GateError, match="decoder: masks of ones"):
            network.check(network.NetworkCase("decoder", 16, 4, 4, context=8))


class TestTopK:
    def test_candidates_agree(self) -> None:
        top_k.check(10_001)

    def test_a_wrong_candidate_is_stopped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        wrong = {**top_k.CANDIDATES, "topk": lambda scores, k: scores > 1.0}
        monkeypatch.setattr(top_k, "CANDIDATES", wrong)
        with pytest.raises(GateError, match="topk: keeps other scores"):
            top_k.check(1000)

    def test_the_suite_measures_time_and_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(top_k, "QUICK_SCORES", 200_000)
        (row,) = top_k.run(quick=True, progress=False)
        assert set(row["seconds"]) == set(row["extra_bytes"]) == set(top_k.CANDIDATES)
        assert row["quickest"] in top_k.LIBRARY


class TestSelect:
    def test_every_candidate_is_timed(self, select_rows: list[dict[str, Any]]) -> None:
        (row,) = select_rows
        assert set(row["seconds"]) == set(select.CANDIDATES)
        assert row["mask_bytes"] == {"fused": 5 * 8, "naive": 5 * 63, "masked weights": 6 * 63 * 4}
        assert row["error_over_allowed"]["fused"] <= 1.0
        assert len(select.cases(quick=True)) < len(select.cases())

    def test_a_wrong_candidate_is_stopped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        wrong = {**select.CANDIDATES, "fused": select.CANDIDATES["plain"]}
        monkeypatch.setattr(select, "CANDIDATES", wrong)
        with pytest.raises(GateError, match="fused: error"):
            select.run_case(select.SelectCase(9, 7, 5, 6), rounds=1)


class TestLinear:
    def test_every_candidate_is_timed(self, linear_rows: list[dict[str, Any]]) -> None:
        one, four = linear_rows
        parts = {"noise", "noise_call", "products", "copy", "operation", "layer"}
        assert {"plain", "fused", "naive"} | parts <= set(four["seconds"])
        assert "neurosurgeon" in four["absent"]
        assert ("neurosurgeon" in one["seconds"]) != ("neurosurgeon" in one["absent"])
        for row in linear_rows:
            assert all(t["p20"] <= t["median"] <= t["p80"] for t in row["seconds"].values())
            assert max(row["error_over_allowed"].values()) <= 1.0

    def test_the_floor_is_made_of_its_parts(self, linear_rows: list[dict[str, Any]]) -> None:
        for row in linear_rows:
            floor, seconds = row["floor"], row["seconds"]
            noise = seconds["noise"]["median"] - seconds["noise_call"]["median"]
            call = seconds["operation"]["median"] - seconds["layer"]["median"]
            arithmetic = seconds["plain"]["median"] + call + 2 * noise
            assert floor["seconds"] == max(arithmetic, floor["traffic_seconds"])
            assert floor["traffic_bytes"] == 7 * 4 * 16 * 24
            fused = row["ratio_to_plain"]["value"]
            assert floor["ratio_to_plain"] > 0.0
            assert floor["fused_over_floor"] == fused / floor["ratio_to_plain"]

    def test_what_is_wrong_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = ops.masked_linear
        monkeypatch.setattr(ops, "masked_linear", lambda *a, **k: right(*a, **k) + 1.0)
        with pytest.raises(GateError, match="masked_linear, y"):
            linear.run_case(linear.LinearCase(8, 8, 4, 1), names=(), rounds=1)

    def test_the_compiled_baseline(self) -> None:
        torch.manual_seed(0)
        problem = linear.Problem.random(64, 16, 8, 2)
        assert linear.baseline_step("compiled", problem)() is not None

    def test_a_compiler_that_fails_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def failing() -> Any:
            def call(*args: Any) -> Any:
                raise RuntimeError("no C++ compiler\nand a long trace")

            return call

        monkeypatch.setattr(baselines, "compiled_naive_masked_linear", failing)
        row = linear.run_case(linear.LinearCase(8, 8, 4, 1), names=("compiled",), rounds=1)
        assert row["absent"] == {"compiled": "torch.compile fails here: no C++ compiler"}


class TestMemory:
    def test_a_fresh_process_reports_its_mark(self) -> None:
        case = memory.MemoryCase(512, 512, 8)
        extra = memory.extra_memory("naive", case, 8, repeats=1)
        assert 0 < memory.extra_memory("fused", case, 8, repeats=1) < extra
        # the naive layer keeps several tensors of 8 weights, 8 MiB each, beyond any noise
        assert extra > 16 * 2**20

    def test_a_failing_process_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(RuntimeError, match="failed"):
            memory.measure("fused", memory.MemoryCase(8, 8, 8), 1, run=True)

    def test_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def extra(name: str, case: memory.MemoryCase, samples: int, repeats: int) -> int:
            asked.append((name, samples))
            return 100 * samples if name == "naive" else 100 + samples

        monkeypatch.setattr(memory, "extra_memory", extra)
        row = memory.run(quick=True, progress=False)[0]
        assert asked.count(("plain", 1)) == 1
        assert row["extra_bytes"]["naive"] == {"1": 100, "4": 400, "8": 800}
        assert row["fused_growth"] == 108 / 101
        assert row["verdict"] == "met"


class TestStep:
    def test_all_three_loops_are_timed(self, step_rows: list[dict[str, Any]]) -> None:
        row = step_rows[0]
        seconds = row["seconds"]
        parts = {"noise", "noise_call", "operation", "layer"}
        assert set(seconds) == {"plain", "fused", "naive"} | parts
        noise = seconds["noise"]["median"] - seconds["noise_call"]["median"]
        call = seconds["operation"]["median"] - seconds["layer"]["median"]
        assert row["floor"]["seconds"] == seconds["plain"]["median"] + call + 2 * noise
        assert row["hidden"] == [32, 32]
        assert row["masked_weights"] == 42 * 32 + 32 * 32 + 32 * 20

    def test_set_up_and_the_first_steps_are_not_timed(self) -> None:
        asked = []

        def loop(data: step.Data, steps: int) -> None:
            for number in range(steps):
                asked.append(data(number, torch.Generator()))

        visit = step.visitor_of(loop, lambda number, generator: (torch.zeros(1), torch.zeros(1)))
        assert len(visit(5)) == 5
        assert len(asked) == 5 + 3

    def test_weights_that_move_are_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def learn(model: torch.nn.Module, *args: Any, **options: Any) -> None:
            for parameter in model.parameters():
                parameter.data.add_(1.0)

        monkeypatch.setattr(step, "learn_masks", learn)
        with pytest.raises(GateError, match=r"frozen parameter layers\.0\.weight"):
            step.run_case(step.StepCase("mini", 8, 2), rounds=1)


class TestOutput:
    def test_text_has_every_number_of_the_tables(self, results: dict[str, Any]) -> None:
        text = tables.text(results)
        assert "16x24, 8, 4" in text
        assert "mini (32-32)" in text
        assert "missed by 2 %" in text
        assert all(
            len(set(map(len, [*table.rows, table.header]))) == 1 for table in tables.tables(results)
        )

    def test_columns_are_aligned(self) -> None:
        table = tables.Table(caption="c", header=["a", "bb"], rows=[["long", "1"], ["x", "22"]])
        assert tables.text_table(table).splitlines() == [
            "c",
            "",
            "a     bb",
            "----  --",
            "long   1",
            "x     22",
        ]

    def test_a_suite_alone(self, results: dict[str, Any]) -> None:
        for suite in bench_cli.SUITES:
            alone = {key: results[key] for key in ("settings", "machine", suite)}
            assert tables.tables(alone)
            # a few numbers need no figure
            assert (figure_of(alone) is None) == (suite in ("select", "top_k", "antithetic"))
        assert figure_of({}) is None

    def test_files(self, results: dict[str, Any], tmp_path: Path) -> None:
        paths = bench_cli.write(results, tmp_path, "modmask bench --quick")
        assert sorted(path.name for path in paths) == [
            "README.md",
            "bench.json",
            "speed-dark.svg",
            "speed-light.svg",
        ]
        again = bench_cli.write(results, tmp_path / "again", "modmask bench --quick")
        assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]
        assert json.loads(paths[0].read_text(encoding="utf-8")) == results
        page = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert "modmask bench --quick" in page
        assert page.count("| --- |") == len(tables.tables(results))
        for name in re.findall(r'(?:src|srcset)="([^"]+)"', page):
            assert (tmp_path / name).exists()

    def test_without_matplotlib_the_numbers_are_kept(
        self,
        results: dict[str, Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def absent() -> None:
            raise ModuleNotFoundError("the report needs matplotlib: pip install it")

        monkeypatch.setattr(bench_cli.report, "require", absent)
        assert [p.name for p in bench_cli.write(results, tmp_path, "")] == ["bench.json"]
        assert "pip install" in capsys.readouterr().err


class TestCommand:
    @pytest.fixture(autouse=True)
    def _tiny(self, monkeypatch: pytest.MonkeyPatch, results: dict[str, Any]) -> None:
        for suite in bench_cli.SUITES:
            rows = copy.deepcopy(results[suite])
            monkeypatch.setitem(bench_cli.SUITES, suite, lambda rows=rows, **options: rows)

    @pytest.mark.parametrize("main", [bench.main, lambda words: cli.main(["bench", *words])])
    def test_all_suites(
        self, main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        assert main(["--quick", "--quiet", "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert "fused / floor" in printed
        assert str(out / "bench.json") in printed

    def test_threads_hold_for_the_run_only(self, tmp_path: Path) -> None:
        before = torch.get_num_threads()
        words = ["--quiet", "--suite", "step", "--threads", "1", "--out", str(tmp_path)]
        assert bench.main(words) == 0
        written = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
        assert written["machine"]["threads"] == 1
        assert torch.get_num_threads() == before
        with pytest.raises(SystemExit):
            bench.main(["--threads", "0"])

    def test_keep_adds_a_suite_and_refuses_another_machine(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["--quiet", "--out", str(tmp_path), "--keep", "--suite"]
        assert bench.main([*words, "linear"]) == 0
        assert bench.main([*words, "step"]) == 0
        path = tmp_path / "bench.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        assert {"linear", "step"} <= set(written)
        written["machine"]["processor"] = "another"
        path.write_text(json.dumps(written), encoding="utf-8")
        assert bench.main([*words, "memory"]) == 1
        assert "another machine" in capsys.readouterr().err
        assert json.loads(path.read_text(encoding="utf-8")) == written

    def test_a_wrong_candidate_ends_the_run(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def wrong(**options: Any) -> list[Any]:
            raise GateError("masked_linear, y: error 1")

        monkeypatch.setitem(bench_cli.SUITES, "linear", wrong)
        assert bench.main(["--quiet", "--out", str(tmp_path)]) == 1
        assert "masked_linear, y" in capsys.readouterr().err
        assert not (tmp_path / "bench.json").exists()
