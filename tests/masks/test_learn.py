import math
import os
import re
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modmask_kernels.masks import (
    MaskSet,
    learn_masks,
    mask_model,
    masked_layers,
    set_mode,
    use_set,
    weight_hash,
)
from modmask_kernels.masks.learner import Learner, Settings
from modmask_kernels.masks.seeds import step_seed, stream_key
from modmask_kernels.nn import MaskedLinear

SETS = ["control", "add", "mul"]


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C as in a terminal: a shell starts its background jobs with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
    )


def masked(sets=("control", "add", "mul"), samples=2, seed=0, **options):
    return mask_model(mlp(seed), sets=list(sets), samples=samples, **options)


def source(shift):
    def data(step, generator):
        x = torch.randn(8, 6, generator=generator)
        return x, (x.sum(1) > shift).long() + shift

    return data


DATA = {"control": source(0), "add": source(1), "mul": source(2)}


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


def learn(model, data=None, steps=12, **options):
    options = {"progress": False, "penalty": 1e-2, "lr": 0.3, "callback_every": 5, **options}
    return learn_masks(model, loss, DATA if data is None else data, steps, **options)


def logits_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("_logits")}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# what is learned


def test_masks_find_the_part_of_the_network_that_is_needed():
    # two functions in two blocks of one network: y0 = relu(x0), y1 = relu(x1)
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.fill_(-0.5)
            layer.weight.diagonal().fill_(2.0)
            layer.bias.zero_()
    model = mask_model(model, sets=["first", "second"], samples=4)

    def data(column):
        def draw(step, generator):
            x = torch.rand(64, 2, generator=generator)
            return x, 4 * x[:, column]

        return draw

    def error(column):
        return lambda output, batch: F.mse_loss(output[:, column], batch[1])

    result = learn_masks(
        model,
        {"first": error(0), "second": error(1)},
        {"first": data(0), "second": data(1)},
        600,
        lr=0.05,
        penalty=1e-3,
        progress=False,
    )
    for n, masks in enumerate(result.masks.values()):
        wanted = torch.zeros(2, 2, dtype=torch.bool)
        wanted[n, n] = True
        assert torch.equal(masks["2.weight"], wanted)
        assert torch.equal(masks["0.weight"], wanted)


@pytest.mark.parametrize("bias", [False, True])
def test_the_loop_is_adam_on_penalty_and_clipped_gradients(bias):
    model = masked(["only"], bias=bias)
    result = learn(model, {"only": DATA["add"]}, grad_clip=0.05)

    other = masked(["only"], bias=bias).eval()
    set_mode(other, "sample")
    parameters = [p for n, p in other.named_parameters() if n.endswith("_logits")]
    optimizer = torch.optim.Adam(parameters, lr=0.3)
    generator = torch.Generator()
    generator.manual_seed(step_seed(stream_key(0, "only", "data"), 0))
    for step in range(12):
        noise = torch.tensor([step_seed(stream_key(0, "only", "noise"), step)])
        for layer in masked_layers(other).values():
            layer.seed = noise
        batch = DATA["add"](step, generator)
        optimizer.zero_grad()
        task = loss(other(batch[0]), batch)
        (task + 1e-2 * sum(p.sum() for p in parameters)).backward()
        norm = nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()
    for name, expected in logits_of(other).items():
        torch.testing.assert_close(logits_of(model)[name], expected, rtol=1e-4, atol=1e-4)
    assert norm > 0.05
    assert math.isclose(result.metrics[-1]["grad_norm"], float(norm), rel_tol=1e-4)
    assert math.isclose(result.metrics[-1]["loss"], float(task.detach()), rel_tol=1e-4)


def test_the_union_clip_is_that_of_the_published_code():
    model = masked(["only"])
    before = {n: p.clone() for n, p in model.named_parameters() if not n.endswith("_logits")}
    learn(model, {"only": DATA["add"]}, grad_clip=0.05, union_clip=True)
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])
            assert parameter.grad is None
            assert not parameter.requires_grad

    other = masked(["only"]).eval()
    set_mode(other, "sample")
    other.requires_grad_()
    parameters = [p for n, p in other.named_parameters() if n.endswith("_logits")]
    optimizer = torch.optim.Adam(parameters, lr=0.3)
    generator = torch.Generator()
    generator.manual_seed(step_seed(stream_key(0, "only", "data"), 0))
    for step in range(12):
        noise = torch.tensor([step_seed(stream_key(0, "only", "noise"), step)])
        for layer in masked_layers(other).values():
            layer.seed = noise
        batch = DATA["add"](step, generator)
        optimizer.zero_grad()  # of the logits only: weight gradients pile up
        (loss(other(batch[0]), batch) + 1e-2 * sum(p.sum() for p in parameters)).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.05)
        optimizer.step()
    for name, expected in logits_of(other).items():
        torch.testing.assert_close(logits_of(model)[name], expected, rtol=1e-4, atol=1e-4)
    plain = masked(["only"])
    learn(plain, {"only": DATA["add"]}, grad_clip=0.05)
    assert not torch.equal(plain[0].weight_logits, model[0].weight_logits)


def test_only_the_learned_logits_change():
    model = masked()
    weights = {n: p.clone() for n, p in model.named_parameters() if not n.endswith("_logits")}
    before = logits_of(model)
    digest = weight_hash(model)
    learn(model, sets=["add"])
    assert weight_hash(model) == digest
    for name, parameter in model.named_parameters():
        if name in weights:
            assert torch.equal(parameter, weights[name])
    for name, after in logits_of(model).items():
        assert torch.equal(after[0], before[name][0])
        assert torch.equal(after[2], before[name][2])
        assert not torch.equal(after[1], before[name][1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", ["sample", "soft"])
def test_joint_learning_is_one_after_the_other(bias, mode):
    joint = masked(bias=bias)
    together = learn(joint, mode=mode)
    apart = masked(bias=bias)
    for name in reversed(SETS):
        alone = learn(apart, sets=[name], mode=mode)
        assert alone.masks[name] == together.masks[name]
        times = {"seconds"}
        rows = [row for row in together.metrics if row["set"] == name]
        for row, expected in zip(alone.metrics, rows, strict=True):
            assert {k: row[k] for k in row.keys() - times} == {
                k: expected[k] for k in row.keys() - times
            }
    assert_same(logits_of(joint), logits_of(apart))


def test_the_sets_beside_do_not_matter():
    joint = masked()
    learn(joint)
    # a gap between the learned sets, another position, another order of the data
    partial = masked()
    learn(partial, {"mul": DATA["mul"], "control": DATA["control"]})
    moved = masked(["mul", "x", "control"])
    learn(moved, {"control": DATA["control"], "mul": DATA["mul"]})
    for name, expected in logits_of(joint).items():
        assert torch.equal(logits_of(partial)[name][0], expected[0])
        assert torch.equal(logits_of(partial)[name][2], expected[2])
        assert torch.equal(logits_of(moved)[name][0], expected[2])
        assert torch.equal(logits_of(moved)[name][2], expected[0])
        assert bool((logits_of(partial)[name][1] == 2.0).all())


def test_settings_may_differ_between_the_sets():
    joint = masked()
    options = {
        "lr": {"control": 0.1, "add": 0.2, "mul": 0.3},
        "penalty": {"control": 0.0, "add": 1e-3, "mul": 1e-2},
        "grad_clip": {"control": None, "add": 0.1, "mul": 0.01},
    }
    learn(joint, **options)
    apart = masked()
    for name in SETS:
        own = {key: value[name] for key, value in options.items()}
        learn(apart, sets=[name], **own)
    assert_same(logits_of(joint), logits_of(apart))


def test_runs_are_reproducible_and_seeds_matter():
    results = []
    for seed in (0, 0, 1):
        model = masked()
        torch.manual_seed(len(results))  # the default generator has no say
        learn(model, seed=seed)
        results.append(logits_of(model))
    assert_same(results[0], results[1])
    assert not torch.equal(results[0]["0.weight_logits"], results[2]["0.weight_logits"])


def test_seeds_of_streams_and_steps():
    # outputs of SplitMix64 seeded with 0, from its public-domain code
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [step_seed(0, n) % 2**64 for n in range(3)] == known
    assert all(-(2**63) <= step_seed(5, n) < 2**63 for n in range(100))
    keys = {stream_key(s, n, p) for s in (0, 1) for n in ("a", "b") for p in ("noise", "data")}
    assert len(keys) == 8


def test_the_seed_is_what_the_layers_see():
    model = masked()
    seen = []
    model[0].register_forward_hook(lambda layer, *_: seen.append(layer.seed.clone()))
    learn(model, steps=2, seed=4)
    for step, seeds in enumerate(seen):
        expected = [step_seed(stream_key(4, name, "noise"), step) for name in SETS]
        assert seeds.tolist() == expected


def test_steps_that_are_not_looked_at_give_the_same_logits():
    results = []
    for immediate in (True, False):
        model = masked()
        settings = Settings(0.3, 1e-2, 0.05, False, 0, (0.9, 0.999), 1e-8, "sample", 0)
        learner = Learner(model, dict.fromkeys(SETS, loss), DATA, settings, immediate=immediate)
        learner.select(learner.runs[0])
        model.eval()
        set_mode(model, "sample")
        for step in range(8):
            learner.step(step)
        learner.check_late()
        results.append(logits_of(model))
        rows = [learner.row(stream, 8, 0.0) for stream in learner.streams]
        assert all(math.isfinite(row["loss"]) for row in rows)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-6)


def test_a_bad_step_that_is_not_looked_at_is_found_later():
    model = masked(["only"])
    copies = []

    def data(step, generator):
        copies.append(logits_of(model))
        x, y = DATA["add"](step, generator)
        return (x * math.nan if step == 4 else x), y

    settings = Settings(0.3, 1e-2, 1.0, False, 0, (0.9, 0.999), 1e-8, "sample", 0)
    learner = Learner(model, {"only": loss}, {"only": data}, settings, immediate=False)
    learner.select(learner.runs[0])
    model.eval()
    set_mode(model, "sample")
    for step in range(8):
        learner.step(step)
    with pytest.raises(FloatingPointError, match=r"not finite \(set 'only', step 4\)"):
        learner.check_late()
    assert_same(logits_of(model), copies[4])


# what goes in and comes out


def test_results_carry_metrics_and_masks_with_their_origin():
    model = masked()
    calls = []
    result = learn(model, seed=7, callback=lambda step, rows: calls.append((step, rows)))
    assert result.step == 12
    assert result.time > 0
    assert [(r["step"], r["set"]) for r in result.metrics] == [
        (step, name) for step in (5, 10, 12) for name in SETS
    ]
    assert [step for step, _ in calls] == [5, 10, 12]
    assert [row for _, rows in calls for row in rows] == result.metrics
    assert list(result.masks) == SETS
    for name, masks in result.masks.items():
        assert masks == MaskSet.from_model(model, name)
        assert masks.metadata["seed"] == 7
        assert masks.metadata["steps"] == 12
        assert masks.metadata["learning"]["penalty"] == 1e-2
        assert masks.metadata["settings"]["samples"] == 2
        assert masks.metadata["weight_hash"] == weight_hash(model)
        assert MaskSet.from_model(model, name).metadata == masks.metadata
        last = [row for row in result.metrics if row["set"] == name][-1]
        assert math.isclose(last["kept"], masks.density())


def test_masks_can_be_evaluated_in_the_callback():
    model = masked()
    x = torch.randn(5, 6)
    seen = []

    def callback(step, rows):
        with torch.no_grad(), use_set(model, "add"), set_mode(model, "threshold"):
            masks = MaskSet.from_model(model, "add")
            torch.testing.assert_close(model(x), masks.bake(model)(x))
            seen.append(masks)

    learn(model, callback=callback, callback_every=1)
    undisturbed = masked()
    learn(undisturbed)
    assert_same(logits_of(model), logits_of(undisturbed))
    assert seen[0] != seen[-1]


def test_one_set_may_come_without_its_name():
    model = masked(["only"])
    result = learn(model, DATA["add"])
    assert list(result.masks) == ["only"]
    assert list(learn(masked(), DATA["add"], sets=[1]).masks) == ["add"]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Linear(3, 4)
        self.right = nn.Linear(2, 4)

    def forward(self, left, right):
        y = self.left(left) + self.right(right)
        return {"sum": y, "extra": (y * 2, "label")}


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_inputs_and_outputs_may_be_trees(kind):
    def data(step, generator):
        left = torch.randn(4, 3, generator=generator)
        right = torch.randn(4, 2, generator=generator)
        if kind == "tuple":
            return (left, right), left.sum(1)
        return {"left": left, "right": right}

    def tree_loss(output, batch):
        assert output["sum"].shape == (4, 4)
        assert output["extra"][0].shape == (4, 4)
        assert output["extra"][1] == "label"
        return output["sum"].square().mean() + output["extra"][0].mean()

    results = []
    for groups in (["a", "b"], ["a"], ["b"]):
        torch.manual_seed(0)
        model = mask_model(TwoInputs(), sets=["a", "b"], samples=2)
        chosen = dict.fromkeys(groups, data)
        learn_masks(model, tree_loss, chosen, 6, lr=0.1, progress=False)
        results.append(logits_of(model))
    for name in results[0]:
        assert torch.equal(results[0][name][0], results[1][name][0])
        assert torch.equal(results[0][name][1], results[2][name][1])


def test_time_major_models():
    def data(step, generator):
        x = torch.randn(3, 8, 6, generator=generator)
        return x, x.sum(-1)

    def time_loss(output, batch):
        assert output.shape[:2] == (3, 8)
        return (output[..., 0] - batch[1]).square().mean()

    results = []
    for names in (["a", "b"], ["b"], ["a"]):
        model = mask_model(mlp(), sets=["a", "b"], samples=4, batch_dim=1)
        chosen = dict.fromkeys(names, data)
        learn_masks(model, time_loss, chosen, 5, lr=0.1, batch_dim=1, progress=False)
        results.append(logits_of(model))
    for name in results[0]:
        assert torch.equal(results[0][name][0], results[2][name][0])
        assert torch.equal(results[0][name][1], results[1][name][1])


class TimeMajor(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.recurrent(x)[0])


def learn_time_major(of_model, of_learning, steps=6, compiled=False):
    def data(step, generator):
        x = torch.randn(steps, 8, 4, generator=generator)
        return x, x[..., :2]

    model = mask_model(TimeMajor(), sets=["a", "b"], samples=1, batch_dim=of_model)
    called = torch.compile(model, backend="eager") if compiled else model
    loss = lambda output, batch: (output - batch[1]).square().mean()  # noqa: E731
    chosen = {"a": data, "b": data}
    learn_masks(called, loss, chosen, 2, lr=0.1, batch_dim=of_learning, progress=False)
    return model


@pytest.mark.parametrize(
    ("of_model", "of_learning", "message"),
    [
        (0, 1, r"batch of 16 \(dimension 1 of the data\) in dimension 0 .* 'head'"),
        (1, 0, r"batch of 12 \(dimension 0 of the data\) in dimension 1 .* 'recurrent'"),
        (0, 0, r"batch of 12 \(dimension 0 of the data\) in dimension 1 .* 'recurrent'"),
    ],
)
def test_a_cut_along_time_is_refused(of_model, of_learning, message):
    with pytest.raises(ValueError, match=f"^batch_dim: expected the {message}"):
        learn_time_major(of_model, of_learning)


def test_a_cut_along_time_where_sizes_divide_is_warned_of():
    with pytest.warns(UserWarning, match="maybe something else than the batch is cut.*'head'"):
        learn_time_major(0, 1, steps=32)


@pytest.mark.filterwarnings("error")
def test_a_cut_along_the_batch_leaves_no_hooks():
    model = learn_time_major(1, 1)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_compiled_models_get_no_hooks():
    learn_time_major(0, 1, compiled=True)


def test_tied_and_uncalled_layers():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.unused = nn.Linear(3, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))[:, :4]

    torch.manual_seed(0)
    model = mask_model(Odd(), sets=2, samples=2)
    learn(model, {0: DATA["control"], 1: DATA["add"]}, steps=10)
    assert model.a.weight_logits is model.b.weight_logits
    assert model.a.weight_logits.std() > 0
    # the penalty alone moves what the model does not call: down, all alike
    torch.testing.assert_close(model.unused.weight_logits, torch.full((2, 3, 3), 2 - 10 * 0.3))


def test_a_root_linear_and_hand_made_models():
    model = mask_model(nn.Linear(6, 4), samples=2)
    learn(model, DATA["add"])
    assert model.weight_logits.std() > 0
    twin = nn.Sequential(MaskedLinear(6, 5, samples=2), MaskedLinear(5, 4, samples=2))
    with pytest.raises(ValueError, match=r"'0.weight' and '1.weight' both have 0"):
        learn(twin, DATA["add"])
    hand = nn.Sequential(MaskedLinear(6, 5, samples=2), MaskedLinear(5, 4, samples=2, tensor_id=2))
    weight = hand[0].weight.clone()
    learn(hand, DATA["add"])
    assert torch.equal(hand[0].weight, weight)
    assert hand[0].weight.grad is None
    assert hand[0].weight.requires_grad


def test_dropout_is_off_and_statistics_stay():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.9), nn.Linear(8, 4)
    )
    model[1].running_mean.normal_()
    before = {n: b.clone() for n, b in model.named_buffers()}
    mask_model(model, samples=2)
    flags = []
    model.register_forward_hook(lambda m, *_: flags.append([x.training for x in m.modules()]))
    learn(model, DATA["add"])
    assert not any(any(f) for f in flags)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_a_compiled_model_learns_the_same():
    torch.compiler.reset()
    plain, model = masked(), masked()
    learn(plain, steps=4)
    result = learn(torch.compile(model, backend="aot_eager", fullgraph=True), steps=4)
    assert result.masks["add"].names == ["0.weight", "2.weight", "4.weight"]
    for name, expected in logits_of(plain).items():
        torch.testing.assert_close(logits_of(model)[name], expected, rtol=1e-4, atol=1e-4)


def test_zero_steps_do_nothing():
    model = masked()
    before = logits_of(model)
    result = learn(model, steps=0)
    assert result.step == 0
    assert result.metrics == []
    assert_same(logits_of(model), before)


def test_the_progress_bar_tells_rate_and_time_left(capsys):
    learn(masked(), progress=True, description="masks of size small", steps=300)
    shown = capsys.readouterr().err
    assert "masks of size small" in shown
    assert "300/300" in shown
    assert "step/s" in shown
    assert re.search(r"loss control \d\S* kept \d+\.\d%, add ", shown)
    learn(masked(), steps=2)
    assert capsys.readouterr().err == ""


# the model afterwards


def state_of_layers(model):
    return [
        (layer.mode, layer.active_sets, layer.seed, layer._views, layer.training)
        for layer in masked_layers(model).values()
    ]


@pytest.mark.parametrize("how", ["end", "error", "interrupt"])
def test_the_model_is_restored(how):
    model = masked()
    model.train()
    model[1].eval()
    use_set(model, "mul")
    set_mode(model, "soft")
    for layer in masked_layers(model).values():
        layer.seed = torch.tensor([1, 2, 3])
    before = state_of_layers(model)
    flags = [p.requires_grad for p in model.parameters()]

    def data(step, generator):
        if step == 3 and how == "error":
            raise OSError("no more data")
        if step == 3 and how == "interrupt":
            raise KeyboardInterrupt
        return DATA["add"](step, generator)

    if how == "end":
        learn(model, {"add": data})
    else:
        with pytest.raises(OSError if how == "error" else KeyboardInterrupt):
            learn(model, {"add": data})
    assert state_of_layers(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model[1].training
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_ends_the_step_and_writes_a_checkpoint(tmp_path):
    path = tmp_path / "run.pt"

    def data(step, generator):
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return DATA["add"](step, generator)

    model = masked()
    with pytest.raises(KeyboardInterrupt):
        learn(model, {"control": DATA["control"], "add": data}, checkpoint=path)
    resumed, unbroken = masked(), masked()
    sources = {"control": DATA["control"], "add": DATA["add"]}
    result = learn(resumed, sources, checkpoint=path, resume=True)
    assert result.step == 12
    learn(unbroken, sources)
    assert_same(logits_of(resumed), logits_of(unbroken))


def test_a_second_ctrl_c_does_not_wait():
    seen = []

    def data(step, generator):
        seen.append(step)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return DATA["add"](step, generator)

    model = masked()
    before = logits_of(model)
    with pytest.raises(KeyboardInterrupt):
        learn(model, {"add": data})
    assert seen == [0]
    assert_same(logits_of(model), before)


# bad input


def test_logits_that_are_nan():
    model = masked()
    with torch.no_grad():
        model[2].weight_logits[1, 3, 3] = math.nan
    with pytest.raises(FloatingPointError, match=r"logits of '2.weight' \(set 'add', step 0\)"):
        learn(model)


def test_logits_that_become_nan():
    model = masked()

    def data(step, generator):
        if step == 3:
            model[2].weight_logits.data[2, 0, 0] = math.nan
        return DATA["mul"](step, generator)

    with pytest.raises(FloatingPointError, match=r"'2.weight' \(set 'mul', step [35]\)"):
        learn(model, {**DATA, "mul": data})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(value):
    model = masked()
    kept = []

    def data(step, generator):
        kept.append(logits_of(model))
        x, y = DATA["add"](step, generator)
        return (x * value if step == 5 else x), y

    message = r"loss: expected a finite value, got (nan|inf) \(set 'add', step 5\)"
    with pytest.raises(FloatingPointError, match=message):
        learn(model, {**DATA, "add": data})
    assert_same(logits_of(model), kept[5])  # no set has taken the bad step


def test_a_gradient_that_is_not_finite():
    model = masked(["only"])

    def root(output, batch):
        return (output * 0).square().sum().sqrt()

    message = r"gradient is not finite in the logits of '0.weight' \(set 'only', step 0\)"
    with pytest.raises(FloatingPointError, match=message):
        learn_masks(model, root, {"only": DATA["add"]}, 3, progress=False)


def fixed(size):
    return lambda step, generator: (torch.zeros(size, 6), torch.zeros(size, dtype=torch.long))


def test_batches_that_do_not_fit():
    with pytest.raises(ValueError, match=r"data\['add'\]: the batch of step 0 is empty"):
        learn(masked(), {"add": fixed(0)})
    message = r"data\['add'\]: a batch of 9 does not divide into 2 equal parts.*step 0"
    with pytest.raises(ValueError, match=message):
        learn(masked(), {"add": fixed(9)})
    with pytest.raises(ValueError, match="batches of one size, got 'control' 8, 'add' 6 at step 0"):
        learn(masked(), {"control": fixed(8), "add": fixed(6)})
    with pytest.raises(ValueError, match=r"data\['add'\]: expected input tensors with the batch"):
        learn(masked(), {"add": lambda step, generator: (torch.tensor(1.0), None)})
    with pytest.raises(ValueError, match=r"data\['add'\]: expected input tensors .* got str"):
        learn(masked(), {"add": lambda step, generator: ("text", None)})

    def two(step, generator):
        return (torch.zeros(8, 6), torch.zeros(8, 1)), torch.zeros(8, dtype=torch.long)

    with pytest.raises(ValueError, match="differ in structure"):
        learn(masked(), {"control": fixed(8), "add": two})

    def labelled(label):
        return lambda step, generator: ((torch.zeros(8, 6), label), None)

    with pytest.raises(ValueError, match="differ in a value that is no tensor"):
        learn(masked(), {"control": labelled(1), "add": labelled(2)})


def test_outputs_and_losses_that_do_not_fit():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x):
            return self.inner(x).mean(0)

    model = mask_model(Mean(), sets=["control", "add"], samples=2)
    with pytest.raises(ValueError, match=r"output needs 16 rows in dimension 0, got shape \(4,\)"):
        learn(model, {"control": DATA["control"], "add": DATA["add"]})
    for wrong in (lambda o, b: o, lambda o, b: 1.0):
        with pytest.raises(ValueError, match="loss: expected a scalar tensor for set 'control'"):
            learn_masks(masked(), wrong, DATA, 2, progress=False)
    with pytest.raises(ValueError, match="loss of set 'control' does not depend on the masks"):
        learn_masks(masked(), lambda o, b: o.detach().sum(), DATA, 2, progress=False)


def test_inference_mode():
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match=r"learn_masks needs gradients.*inference_mode\(\)"):
            learn(masked())
        model = masked()
    with pytest.raises(
        ValueError, match=r"'0.weight' or its logits came from torch.inference_mode"
    ):
        learn(model)


def test_logits_elsewhere_than_the_weight():
    model = masked()
    model[2].weight_logits = nn.Parameter(torch.empty(3, 12, 16, device="meta"))
    with pytest.raises(ValueError, match=r"those of '2.weight' are on meta, the weight on cpu"):
        learn(model)
    meta = mask_model(mlp().to("meta"))
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device"):
        learn(meta, DATA["add"])
    wrong = masked()
    wrong[0].weight_logits = nn.Parameter(wrong[0].weight_logits.detach().double())
    with pytest.raises(ValueError, match=r"logits: expected float32 for '0.weight'"):
        learn(wrong)


def test_wrong_settings_are_named():
    model = masked()
    cases = {
        "steps: expected at least 0, got -1": {"steps": -1},
        "steps: expected an integer, got 1.5": {"steps": 1.5},
        "seed: expected an integer, got 'x'": {"seed": "x"},
        "lr: expected a positive number, got 0": {"lr": 0},
        "penalty: expected a finite number, got nan": {"penalty": math.nan},
        "penalty: no value for set 'add', got \\['control'\\]": {"penalty": {"control": 1.0}},
        "penalty: expected names of sets, one of .*'add'.*, got 'z'": {
            "penalty": {"add": 1.0, "mul": 1.0, "control": 1.0, "z": 1.0}
        },
        "lr: expected names of sets, .* got 0": {"lr": {0: 1.0}},
        "grad_clip: expected a positive number, got -1": {"grad_clip": -1.0},
        "mode: expected one of": {"mode": "threshold"},
        "betas: expected two numbers": {"betas": (0.9, 1.0)},
        "eps: expected a finite number of at least 0, got -1": {"eps": -1.0},
        "eps: expected a finite number of at least 0, got 'a'": {"eps": "a"},
        "betas: expected two numbers in .* got 5": {"betas": 5},
        "callback_every: expected": {"callback_every": 0},
        "checkpoint_every: expected": {"checkpoint_every": 0},
        "batch_dim: expected": {"batch_dim": -1},
        "resume: expected a checkpoint": {"resume": True},
        "union_clip: expected one set": {"union_clip": True},
        "sets: expected distinct sets": {"sets": ["add", "add"]},
        "sets: expected a list of sets, got the string": {"sets": "add"},
        "set: expected one of": {"sets": ["div"]},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message):
            learn(model, **options)
    with pytest.raises(ValueError, match="sets that have data"):
        learn(model, {"add": DATA["add"]}, sets=["mul"])
    for key in ("div", 7):
        with pytest.raises(ValueError, match=rf"data: expected one of .*'add'.*, got {key!r}"):
            learn(model, {key: DATA["add"]})
    with pytest.raises(TypeError, match=r"data\['add'\]: .*\(step, generator\), but too many"):
        learn(model, {"add": lambda step: None})
    with pytest.raises(ValueError, match="data: expected at least one set"):
        learn(model, {})
    with pytest.raises(TypeError, match="data: expected a mapping"):
        learn(model, DATA["add"])
    with pytest.raises(TypeError, match=r"data\['add'\]: expected a callable"):
        learn(model, {"add": [1, 2]})
    with pytest.raises(ValueError, match="use mask_model first"):
        learn(mlp())
    with pytest.raises(TypeError, match=r"loss: called as loss\(output, batch\) .*'add'.*tuple"):
        learn_masks(model, torch.nn.CrossEntropyLoss(), {"add": DATA["add"]}, 1)
    with pytest.raises(TypeError, match=r"loss: expected a callable\(output, .* 'add', got 1"):
        learn_masks(model, {"add": 1}, {"add": DATA["add"]}, 1)
    with pytest.raises(ValueError, match=r"loss: no value for set 'add', got \['control'\]"):
        learn_masks(model, {"control": loss}, {"add": DATA["add"]}, 1)
    with pytest.raises(ValueError, match=r"loss: expected names of sets, .* got 'z'"):
        learn_masks(model, {"add": loss, "z": loss}, {"add": DATA["add"]}, 1)
    with pytest.raises(TypeError, match=r"^data: .*\(step, generator\), but too many"):
        learn_masks(mask_model(mlp()), loss, lambda: None, 1)
    with pytest.raises(TypeError, match=r"callback: expected a callable\(step, rows\), got int"):
        learn(model, callback=5)
    model[0].samples = 4
    with pytest.raises(ValueError, match="one number of samples, got 4 in '0' and 2 in '2'"):
        learn(model)
