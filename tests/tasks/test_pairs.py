"""Double addition: what each source and each mode holds."""

import pytest
import torch
import torch.nn.functional as F

from modmask_kernels.models import Recurrent
from modmask_kernels.tasks import IO_MODES, PAIRS, AddPairsApart, AddPairsInTime

STEPS = 6


def numbers(slots, n_digits):
    """The two arguments in a slot, [..., 2 * n_digits * 10] to [..., 2]."""
    digits = slots.unflatten(-1, (2, n_digits, 10)).argmax(-1)
    return (digits * 10 ** torch.arange(n_digits)).sum(-1)


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("n_digits", [1, 2])
def test_rows_by_hand(n_digits):
    task = AddPairsApart(n_digits)
    assert (task.in_features, task.out_features) == (40 * n_digits, 20 * n_digits)
    for slot, name in enumerate(PAIRS):
        inputs, targets, pair = task.all_rows(name)
        assert len(inputs) == 100**n_digits
        assert pair.unique().tolist() == [slot]
        slots = inputs.unflatten(1, (2, -1))
        assert not slots[:, 1 - slot].any()
        assert (slots[:, slot].unflatten(1, (-1, 10)).sum(-1) == 1).all()
        arguments = numbers(slots[:, slot], n_digits)
        assert len(arguments.unique(dim=0)) == 100**n_digits
        result = (targets * 10 ** torch.arange(n_digits)).sum(-1)
        assert torch.equal(result, arguments.sum(-1) % 10**n_digits)


@pytest.mark.parametrize("pairs", [("first",), ("second",), PAIRS])
def test_sources_apart_hold_only_their_pairs(pairs):
    task = AddPairsApart(2, pairs, batch_size=8)
    for step in range(10):
        inputs, _, pair = task(step, generator())
        assert len(inputs) == 8 * len(pairs)
        # an example's rows are neighbours, so that they meet one mask sample
        assert pair.tolist() == [PAIRS.index(name) for name in pairs] * 8
        shown = inputs.unflatten(1, (2, -1)).any(-1)
        assert torch.equal(shown, F.one_hot(pair, 2).bool())


def test_the_loss_reads_the_slot_of_the_row():
    task = AddPairsApart(1, batch_size=4)
    batch = task(0, generator())
    output = torch.zeros(8, 20, requires_grad=True)
    task.loss(output, batch).backward()
    touched = output.grad.unflatten(1, (2, 10)).any(-1)
    assert torch.equal(touched, F.one_hot(batch[2], 2).bool())
    perfect = torch.zeros(8, 2, 10)
    perfect[torch.arange(8), batch[2], batch[1][:, 0]] = 1
    assert task.right(perfect.flatten(1), batch).all()
    assert not task.right(-perfect.flatten(1), batch).any()


# mode: steps that show each pair, input slots, step and output slot that are read
EXPECTED = {
    "together": (range(6), range(6), (0, 1), (5, 5), (0, 1)),
    "only_one_io": (range(3), range(3, 6), (0, 1), (2, 5), (0, 1)),
    "only_one": (range(3), range(3, 6), (0, 1), (5, 5), (0, 1)),
    "same_output": (range(6), range(6), (0, 1), (2, 5), (0, 0)),
    "same_input": (range(3), range(3, 6), (0, 0), (5, 5), (0, 1)),
    "same_io": (range(3), range(3, 6), (0, 0), (2, 5), (0, 0)),
}


@pytest.mark.parametrize("mode", IO_MODES)
def test_which_step_shows_and_reads_what(mode):
    first, second, slots, steps, outputs = EXPECTED[mode]
    task = AddPairsInTime(1, batch_size=5, mode=mode)
    inputs, targets = task(0, generator())
    shown = inputs.repeat_interleave(STEPS // task.mode.vectors, 1)
    assert shown.shape == (5, STEPS, 20 * (1 + max(slots)))
    shown = shown.unflatten(2, (-1, 20))
    for pair, when in enumerate((first, second)):
        for step in range(STEPS):
            slot = shown[:, step, slots[pair]]
            if step in when:
                assert torch.equal(numbers(slot, 1).sum(-1) % 10, targets[:, pair, 0])
            elif slots[0] != slots[1]:
                assert not slot.any()

    # what the network gives at each step says step and slot
    read = task.read_steps(STEPS)
    output = torch.zeros(1, len(read), 1 + max(outputs), 10)
    for n, step in enumerate(read):
        for slot in range(1 + max(outputs)):
            output[0, n, slot] = 10 * step + slot
    answers = task.answers(output.flatten(2))
    assert answers.shape == (1, 2, 1, 10)
    expected = [10 * step + slot for step, slot in zip(steps, outputs, strict=True)]
    assert answers[0, :, 0, 0].tolist() == expected

    # and so does the network itself: inputs after the step that is read do not matter
    model = Recurrent(
        task.in_features, 4, task.out_features, num_layers=1, repeat=6 // inputs.shape[1], read=read
    )
    assert model(inputs).shape == (5, len(read), task.out_features)
    x = inputs.clone().requires_grad_()
    task.answers(model(x))[:, 0].sum().backward()
    last = x.grad[:, -1].any()
    assert bool(last) == (steps[0] == 5 or inputs.shape[1] == 1)


@pytest.mark.parametrize("mode", IO_MODES)
@pytest.mark.parametrize("pairs", [("first",), ("second",)])
def test_the_other_pair_is_neither_shown_nor_in_the_loss(mode, pairs):
    task = AddPairsInTime(2, pairs, batch_size=6, mode=mode)
    inputs, targets = task(0, generator())
    own = PAIRS.index(pairs[0])
    assert (targets[:, 1 - own] == -1).all()
    assert (targets[:, own] >= 0).all()
    whole = AddPairsInTime(2, batch_size=6, mode=mode)
    alone, _ = whole.rows(torch.tensor([[7, -1], [-1, 7]]))
    assert int(alone[own].count_nonzero()) == 4 * len(task.mode.shown_in[own])
    assert (inputs.flatten(1).count_nonzero(1) == 4 * len(task.mode.shown_in[own])).all()

    output = torch.zeros(6, task.readings, task.out_features, requires_grad=True)
    task.loss(output, (inputs, targets)).backward()
    touched = task.answers(output.grad).flatten(2).any(-1)
    if len({*zip(task.mode.read_at, task.mode.output_slots, strict=True)}) == 2:
        assert touched[:, own].all()
        assert not touched[:, 1 - own].any()


def test_every_argument_pair_is_evaluated():
    _, targets = AddPairsInTime(1).all_rows()
    assert targets.shape == (10_000, 2, 1)  # all combinations
    task = AddPairsInTime(2)
    inputs, targets = task.all_rows()
    assert targets.shape == (10_000, 2, 2)
    arguments = numbers(inputs[:, 0].unflatten(1, (2, -1)), 2)
    for pair in range(2):
        assert len(arguments[:, pair].unique(dim=0)) == 10_000
    assert torch.equal(AddPairsInTime(2).all_rows()[0], inputs)
    both = (arguments[:, 0] == arguments[:, 1]).all(-1)
    assert int(both.sum()) < 10  # the order is another one


@pytest.mark.parametrize("task", [AddPairsApart, AddPairsInTime])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_digits": 3}, "n_digits must be 1 or 2, got 3"),
        ({"pairs": ()}, "pairs must be distinct names of first, second"),
        ({"pairs": ("third",)}, "pairs must be distinct names"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_arguments(task, arguments, message):
    with pytest.raises(ValueError, match=message):
        task(**arguments)


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode must be one of together, only_one_io"):
        AddPairsInTime(mode="none")
