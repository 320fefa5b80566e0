"""The LSTM of the arithmetic studies."""

import math

import pytest
import torch

from modmask_kernels.models import Recurrent


def model(**options):
    return Recurrent(42, 128, 20, generator=torch.Generator().manual_seed(0), **options)


def test_initial_values_of_the_study():
    net = model()
    lstm, size = net.lstm, 128
    for layer, inputs in ((0, 42), (1, size)):
        weight_ih = getattr(lstm, f"weight_ih_l{layer}").detach().unflatten(0, (4, size))
        weight_hh = getattr(lstm, f"weight_hh_l{layer}").detach().unflatten(0, (4, size))
        for gate in range(4):
            scale = 5 / 3 if gate == 2 else 1.0
            expected = scale / math.sqrt(inputs + size)
            assert float(weight_ih[gate].std()) == pytest.approx(expected, rel=0.05)
            if gate != 2:
                expected = 1 / math.sqrt(2 * size)
                assert float(weight_hh[gate].std()) == pytest.approx(expected, rel=0.05)
        square = weight_hh[2] @ weight_hh[2].T
        assert torch.allclose(square, 25 / 18 * torch.eye(size), atol=1e-4)
        bias = getattr(lstm, f"bias_ih_l{layer}").detach().unflatten(0, (4, size))
        assert (bias[1] == 1).all()
        assert not bias[[0, 2, 3]].any()
        other = getattr(lstm, f"bias_hh_l{layer}")
        assert not other.any()
        assert not other.requires_grad
    assert float(net.output.weight.detach().abs().max()) <= 1 / math.sqrt(size)


def test_forward():
    net = model(repeat=3, read=(2, 5))
    x = torch.randn(4, 2, 42)
    states, _ = net.lstm(x[:, [0, 0, 0, 1, 1, 1]])
    assert torch.equal(net(x), net.output(states[:, [2, 5]]))
    alone = model(repeat=3)
    states, _ = alone.lstm(x[:, [0, 0, 0]])
    assert torch.equal(alone(x[:, 0]), alone.output(states[:, -1:]))


def test_the_generator_decides():
    first, second = model().state_dict(), model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"repeat": 0}, "repeat must be at least 1"),
        ({"read": ()}, "read must name at least one step"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)
