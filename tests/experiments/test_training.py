import pytest
import torch

from modmask_kernels.experiments import derive_seed, train
from modmask_kernels.models import FeedForward
from modmask_kernels.tasks import AddMul, digit_loss

TASK = AddMul(1)


class KilledError(Exception):
    pass


def fresh():
    return FeedForward(22, (16,), 10, generator=torch.Generator().manual_seed(1))


def run(model, steps=30, data=TASK, **options):
    return train(model, digit_loss, data, steps, progress=False, log_every=5, **options)


def test_learns_and_takes_exactly_the_steps():
    steps = []

    def data(step, generator):
        steps.append(step)
        return TASK(step, generator)

    model = fresh()
    rows = run(model, 60, data, lr=1e-2)
    assert steps == list(range(60))
    assert [row["step"] for row in rows] == list(range(5, 65, 5))
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("kill_at", [0, 6, 7, 13, 20, 29])
def test_continues_bit_identical_after_a_kill(tmp_path, kill_at):
    whole = fresh()
    expected = run(whole, seed=3)

    checkpoint = tmp_path / "network.pt"
    killed = fresh()

    def data(step, generator):
        if step == kill_at:
            raise KilledError
        return TASK(step, generator)

    with pytest.raises(KilledError):
        run(killed, data=data, seed=3, checkpoint=checkpoint, checkpoint_every=7)
    resumed = fresh()
    rows = run(resumed, seed=3, checkpoint=checkpoint, checkpoint_every=7)
    assert rows == expected
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [f.name for f in tmp_path.iterdir()] == ["network.pt"]


def test_a_finished_checkpoint_is_only_loaded(tmp_path):
    first, second = fresh(), fresh()
    expected = run(first, checkpoint=tmp_path / "n.pt")

    def data(step, generator):
        raise AssertionError("no step is left")

    assert run(second, data=data, checkpoint=tmp_path / "n.pt") == expected
    assert torch.equal(first.layers[0].weight, second.layers[0].weight)


def test_equals_plain_pytorch():
    model, plain = fresh(), fresh()
    run(model, 10, lr=1e-2, grad_clip=0.5, seed=4)
    optimiser = torch.optim.Adam(plain.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(4)
    for step in range(10):
        batch = TASK(step, generator)
        optimiser.zero_grad()
        digit_loss(plain(batch[0]), batch).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimiser.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_loss_that_is_not_finite_is_an_error():
    model = fresh()
    with torch.no_grad():
        model.layers[0].weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="training loss is nan at step 4"):
        run(model)


def test_derived_seeds_differ_by_purpose():
    seeds = {derive_seed(s, name) for s in range(3) for name in ("a", "b")}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "a") == derive_seed(1, "a")
