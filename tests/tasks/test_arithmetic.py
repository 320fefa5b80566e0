import pytest
import torch

from modmask_kernels.tasks import OPERATIONS, AddMul, decode_digits, digit_loss, encode_digits


def decode_inputs(inputs, n_digits):
    """(first, second, operation) of one-hot rows, written independently of the generator."""
    blocks = inputs[:, : 20 * n_digits].reshape(len(inputs), 2, n_digits, 10)
    assert torch.equal(blocks.sum(-1), torch.ones(len(inputs), 2, n_digits))
    operation = inputs[:, 20 * n_digits :]
    assert torch.equal(operation.sum(-1), torch.ones(len(inputs)))
    numbers = [
        [int("".join(str(int(d)) for d in digits.argmax(-1).tolist()[::-1])) for digits in row]
        for row in blocks
    ]
    return [a for a, _ in numbers], [b for _, b in numbers], operation.argmax(-1).tolist()


def test_digits_are_little_endian():
    assert encode_digits(torch.tensor([42, 7]), 3).tolist() == [[2, 4, 0], [7, 0, 0]]
    numbers = torch.arange(1000)
    assert torch.equal(decode_digits(encode_digits(numbers, 3)), numbers)


def test_published_sizes():
    task = AddMul()
    assert (task.in_features, task.out_features, len(task)) == (42, 20, 20000)


@pytest.mark.parametrize("n_digits", [1, 2])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_all_rows_hold_every_pair_once_with_the_right_result(n_digits, operation):
    task = AddMul(n_digits, (operation,))
    inputs, targets = task.rows(torch.arange(len(task)))
    first, second, asked = decode_inputs(inputs, n_digits)
    assert len(set(zip(first, second, strict=True))) == 100**n_digits == len(task)
    assert set(asked) == {OPERATIONS.index(operation)}
    for a, b, digits in zip(first, second, targets.tolist(), strict=True):
        result = (a + b if operation == "add" else a * b) % 10**n_digits
        assert digits == [result // 10**i % 10 for i in range(n_digits)]


@pytest.mark.parametrize("operations", [("add",), ("mul",), ("add", "mul"), ("mul", "add")])
@pytest.mark.parametrize("n_digits", [1, 2, 3])
def test_batches_hold_only_the_named_operations(n_digits, operations):
    """Spec test (viii): the published code once trained every mask on the same subset."""
    sources = {ops: AddMul(n_digits, ops, 64) for ops in [("add",), operations, ("mul",)]}
    generator = torch.Generator().manual_seed(3)
    seen = set()
    for step in range(4):
        inputs, targets = sources[operations](step, generator)
        assert inputs.dtype == torch.float32
        assert targets.dtype == torch.int64
        first, second, asked = decode_inputs(inputs, n_digits)
        seen |= set(asked)
        for a, b, op, result in zip(
            first, second, asked, decode_digits(targets).tolist(), strict=True
        ):
            assert result == (a + b, a * b)[op] % 10**n_digits
    assert seen == {OPERATIONS.index(name) for name in operations}


def test_batches_depend_on_the_generator_only():
    task = AddMul(2)
    draw = [task(step, torch.Generator().manual_seed(5)) for step in (0, 9)]
    assert torch.equal(draw[0][0], draw[1][0])
    assert torch.equal(draw[0][1], draw[1][1])
    other = task(0, torch.Generator().manual_seed(6))
    assert not torch.equal(draw[0][0], other[0])


def test_rows_are_drawn_uniformly():
    task = AddMul(1, batch_size=20000)
    inputs, _ = task(0, torch.Generator().manual_seed(0))
    share = inputs.mean(0)
    expected = torch.tensor([0.1] * 20 + [0.5] * 2)
    error = (expected * (1 - expected) / 20000).sqrt()
    assert bool(((share - expected).abs() < 4.5 * error).all())


def test_table_and_encoding_agree():
    task = AddMul(2, ("mul",), 32)
    table = task(0, torch.Generator().manual_seed(1))
    task._table = None
    encoded = task(0, torch.Generator().manual_seed(1))
    assert torch.equal(table[0], encoded[0])
    assert torch.equal(table[1], encoded[1])


def test_predictions_and_results():
    task = AddMul(2)
    _, targets = task.rows(torch.arange(len(task)))
    output = torch.nn.functional.one_hot(targets, 10).flatten(1).float()
    assert torch.equal(task.predictions(output), decode_digits(targets))
    results = task.results(torch.tensor([12, 99]), torch.tensor([95, 99]))
    assert results.tolist() == [[7, 98], [40, 1]]


def test_loss_is_the_mean_over_batch_and_digits():
    torch.manual_seed(0)
    output, targets = torch.randn(6, 20), torch.randint(10, (6, 2))
    by_hand = torch.stack(
        [
            -torch.log_softmax(output[i, 10 * d : 10 * d + 10], 0)[targets[i, d]]
            for i in range(6)
            for d in range(2)
        ]
    ).mean()
    torch.testing.assert_close(digit_loss(output, (output, targets)), by_hand)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_digits": 0}, "n_digits"),
        ({"n_digits": 9}, "n_digits"),
        ({"operations": ("sub",)}, "operations"),
        ({"operations": ()}, "operations"),
        ({"operations": ("add", "add")}, "operations"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AddMul(**arguments)
