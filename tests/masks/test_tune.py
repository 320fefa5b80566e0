"""The search for the largest penalty at which the control mask holds."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modmask_kernels import cli
from modmask_kernels.masks import tune, tune_penalty, weight_hash


class Fake:
    """Learning whose masks hold up to a border; the network's score is 90."""

    def __init__(self, monkeypatch, border):
        self.learned = []

        def learn(model, loss, data, steps, *, penalty, **rest):
            self.learned.append(penalty)
            score = 89.5 if penalty <= border else 50.0
            baked = SimpleNamespace(eval=lambda: SimpleNamespace(score=score))
            mask = SimpleNamespace(bake=lambda _: baked, density=lambda: 0.25)
            return SimpleNamespace(masks={"control": mask})

        monkeypatch.setattr(tune, "learn_masks", learn)

    def search(self, **options):
        score = lambda model: getattr(model, "score", 90.0)  # noqa: E731
        return tune_penalty(nn.Linear(2, 2), None, None, 1, score, **options)


@pytest.mark.parametrize("border", [1e-9, 2e-6, 1e-5, 3e-5, 4e-2])
@pytest.mark.parametrize("start", [1e-5, 1e-2])
def test_the_border_is_found_to_the_precision(monkeypatch, border, start):
    fake = Fake(monkeypatch, border)
    found = fake.search(start=start, most=40)
    assert found.penalty <= border < found.above <= 1.5 * found.penalty
    assert found.unmasked == 90.0
    assert [trial.penalty for trial in found.trials] == fake.learned
    assert fake.learned[0] == start
    assert len(set(fake.learned)) == len(fake.learned)
    assert all(trial.holds == (trial.penalty <= border) for trial in found.trials)


def test_it_stops_after_the_most_masks(monkeypatch):
    found = Fake(monkeypatch, 0.0).search(start=1.0, most=3)
    assert (found.penalty, found.above, len(found.trials)) == (None, 1 / 16, 3)
    found = Fake(monkeypatch, math.inf).search(start=1.0, most=3)
    assert (found.penalty, found.above, len(found.trials)) == (16.0, None, 3)


def test_the_tolerance_is_in_units_of_the_score(monkeypatch):
    found = Fake(monkeypatch, math.inf).search(start=1.0, tolerance=0.25, most=1)
    assert found.penalty is None


def test_a_search_continues_from_its_record(monkeypatch, tmp_path):
    file = tmp_path / "penalty.json"
    whole = Fake(monkeypatch, 3e-5)
    torch.manual_seed(0)
    expected = whole.search(start=1e-6)
    torch.manual_seed(0)
    Fake(monkeypatch, 3e-5).search(start=1e-6, most=2, record=file)
    rest = Fake(monkeypatch, 3e-5)
    torch.manual_seed(0)
    assert rest.search(start=1e-6, record=file) == expected
    assert rest.learned == whole.learned[2:]
    with pytest.raises(ValueError, match=r"is of another search; \(?weights differs"):
        Fake(monkeypatch, 3e-5).search(start=1e-6, record=file)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="is of another search; start differs"):
        Fake(monkeypatch, 3e-5).search(start=1e-5, record=file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="holds no search"):
        Fake(monkeypatch, 3e-5).search(record=file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -1.0}, "tolerance: expected a finite number at least 0"),
        ({"start": 0.0}, "start: expected a finite number above 0"),
        ({"factor": 1.0}, "factor: expected a finite number above 1"),
        ({"precision": math.nan}, "precision: expected a finite number above 1"),
        ({"most": 0}, "most: expected at least 1"),
        ({"penalty": 1.0}, "penalty: the search sets it itself"),
    ],
)
def test_wrong_settings(monkeypatch, options, message):
    with pytest.raises(ValueError, match=message):
        Fake(monkeypatch, 1.0).search(**options)


def test_a_score_that_is_no_number():
    with pytest.raises(ValueError, match="score: expected a finite number, got nan"):
        tune_penalty(nn.Linear(2, 2), None, None, 1, lambda model: math.nan)


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator)
    y = (x[:, 0] > 0).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model, x, y


def test_a_network_keeps_its_weights_and_a_killed_search_continues_within_a_mask(tmp_path):
    model, x, y = problem()
    before = weight_hash(model)
    calls = 0

    def search(limit=None, record=None):
        def data(step, generator):
            nonlocal calls
            calls += 1
            if calls == limit:
                raise InterruptedError
            rows = torch.randint(256, (64,), generator=generator)
            return x[rows], y[rows]

        return tune_penalty(
            model,
            lambda output, batch: F.cross_entropy(output, batch[1]),
            data,
            60,
            lambda net: 100 * (net(x).argmax(1) == y).float().mean().item(),
            start=1e-3,
            tolerance=2.0,
            mask={"samples": 2},
            record=record,
            lr=0.1,
            progress=False,
            checkpoint_every=20,
        )

    whole = search()
    assert weight_hash(model) == before
    assert all(p.requires_grad for p in model.parameters())
    assert whole.penalty is not None
    assert whole.penalty < whole.above <= 1.5 * whole.penalty
    kept = {trial.penalty: trial.kept for trial in whole.trials}
    assert kept[max(kept)] < kept[min(kept)]

    total, calls = calls, 0
    file = tmp_path / "penalty.json"
    with pytest.raises(InterruptedError):
        search(limit=110, record=file)
    assert len(json.loads(file.read_text())["trials"]) == 1
    first, calls = calls, 0
    assert search(record=file) == whole
    assert calls < total - 60  # neither the first mask nor the steps up to the checkpoint again
    assert first + calls < total + 20
    assert not list(tmp_path.glob("*.pt"))


def test_the_command(tmp_path, capsys):
    out = tmp_path / "search"
    words = ["tune-beta", "addmul-fnn", "--preset", "smoke", "--steps", "20", "--mask-steps", "5"]
    words += ["--tolerance", "100", "--quiet", "--out", str(out)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "modmask run addmul-fnn --preset smoke --penalty" in printed
    assert printed.count("yes") == 12  # everything holds within 100 points
    assert cli.main(["tune-beta", "--resume", str(out), "--quiet", "--tolerance", "100"]) == 0
    assert capsys.readouterr().out == printed
    assert cli.main(["tune-beta", "--resume", str(out), "--tolerance", "1"]) == 2
    assert "is of another search; tolerance differs" in capsys.readouterr().err
    assert cli.main(["tune-beta"]) == 2
