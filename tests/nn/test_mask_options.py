"""What the layers do with their mask options, whatever the layer."""

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from modmask_kernels import nn as masked
from modmask_kernels.nn.mask_options import DEFAULTS

# class, arguments of the plain layer, the plain layer
LAYERS = [
    (masked.MaskedLinear, (4, 6), nn.Linear(4, 6)),
    (masked.MaskedConv1d, (4, 6, 3), nn.Conv1d(4, 6, 3)),
    (masked.MaskedConv2d, (4, 6, 3), nn.Conv2d(4, 6, 3)),
    (masked.MaskedConvTranspose1d, (4, 6, 3), nn.ConvTranspose1d(4, 6, 3)),
    (masked.MaskedConvTranspose2d, (4, 6, 3), nn.ConvTranspose2d(4, 6, 3)),
    (masked.MaskedHuggingFaceConv1D, (6, 4), Conv1D(6, 4)),
    (masked.MaskedLSTM, (4, 6), nn.LSTM(4, 6)),
    (masked.MaskedGRU, (4, 6), nn.GRU(4, 6)),
    (masked.MaskedLSTMCell, (4, 6), nn.LSTMCell(4, 6)),
    (masked.MaskedGRUCell, (4, 6), nn.GRUCell(4, 6)),
    (masked.MaskedMultiheadAttention, (4, 2), nn.MultiheadAttention(4, 2)),
    (masked.MaskedAny, None, nn.Conv3d(4, 6, 2)),
]
makers = pytest.mark.parametrize(
    ("maker", "arguments", "kind"),
    [
        pytest.param(make, arguments, kind, id=f"{kind.__name__}-{way}")
        for kind, given, plain in LAYERS
        for way, make, arguments in (
            ("init", kind, given),
            ("from_dense", kind.from_dense, (plain,)),
        )
        if arguments is not None
    ],
)


def test_options_have_a_default_each():
    assert list(DEFAULTS) == list(masked.MaskOptions.__annotations__)


@makers
def test_signatures_name_the_options(maker, arguments, kind):
    parameters = inspect.signature(maker).parameters
    shown = {n: p.default for n, p in parameters.items() if n in DEFAULTS}
    assert shown == DEFAULTS
    assert parameters["samples"].annotation == "int"
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@makers
def test_defaults(maker, arguments, kind):
    layer = maker(*copy.deepcopy(arguments))
    found = {n: getattr(layer, n) for n in ("sets", "samples", "tau", "init", "granularity")}
    assert found == {n: DEFAULTS[n] for n in found}
    assert min(layer.tensor_ids.values()) == 0
    assert not any("bias" in name for name in layer.masked)


@makers
def test_options_arrive(maker, arguments, kind):
    given = {"sets": ["a", "b"], "samples": 3, "tau": 0.5, "init": -1.0, "granularity": "row"}
    layer = maker(*copy.deepcopy(arguments), **given, mask_bias=True, tensor_id=7)
    assert layer.set_names == ("a", "b")
    assert {n: getattr(layer, n) for n in list(given)[1:]} == dict(list(given.items())[1:])
    assert list(layer.tensor_ids.values()) == list(range(7, 7 + len(layer.masked)))
    assert any("bias" in name for name in layer.masked)
    for name in layer.masked:
        assert torch.equal(layer.logits_of(name), torch.full_like(layer.logits_of(name), -1.0))


@makers
def test_unknown_options_are_named(maker, arguments, kind):
    message = rf"{kind.__name__}: expected arguments .* or sets, samples, .*, got 'smaples'"
    arguments = copy.deepcopy(arguments)
    with pytest.raises(TypeError, match=message):
        maker(*arguments, smaples=2)
    with pytest.raises(TypeError, match=r"got 'estimator'; set layer\.estimator of the finished"):
        maker(*arguments, estimator="top_k")
    if isinstance(arguments[0], nn.Module):  # left as it was
        assert all(p.requires_grad for p in arguments[0].parameters())


def test_masked_biases_that_are_not_there():
    for kind, arguments, plain in LAYERS:
        if arguments is None or "bias" not in inspect.signature(kind).parameters:
            continue
        with pytest.raises(ValueError, match="mask_bias: expected False for a layer without bias"):
            kind(*arguments, bias=False, mask_bias=True)
        layer = kind.from_dense(type(plain)(*arguments, bias=False), mask_bias=True)
        assert not any("bias" in name for name in layer.masked)
