"""Masked recurrent layers and cells beside the plain ones of torch.nn."""

import copy
import pickle

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import modmask_kernels as mm
from modmask_kernels import ops

LAYERS = {"lstm": (mm.MaskedLSTM, nn.LSTM), "gru": (mm.MaskedGRU, nn.GRU)}
CELLS = {"lstm": (mm.MaskedLSTMCell, nn.LSTMCell), "gru": (mm.MaskedGRUCell, nn.GRUCell)}
each_kind = pytest.mark.parametrize("kind", ["lstm", "gru"])
OPTIONS = [
    {},
    {"num_layers": 2},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bidirectional": True},
    {"bias": False},
    {"num_layers": 3, "dropout": 0.5},
]


def plain_of(kind, **options):
    torch.manual_seed(3)
    return LAYERS[kind][1](5, 7, **options)


def states_of(plain, batch):
    g = torch.Generator().manual_seed(8)
    count = plain.num_layers * (2 if plain.bidirectional else 1)
    sizes = [plain.proj_size or plain.hidden_size, plain.hidden_size]
    states = [torch.randn(count, batch, n, generator=g) for n in sizes]
    return tuple(states) if isinstance(plain, nn.LSTM) else states[0]


def part_of(states, part):
    return tuple(h[:, part] for h in states) if isinstance(states, tuple) else states[:, part]


def flat(found):
    """y (padded), h_n, c_n."""
    y, last = found
    if isinstance(y, nn.utils.rnn.PackedSequence):
        y = pad_packed_sequence(y)[0]
    return (y, *last) if isinstance(last, tuple) else (y, last)


def masked_parameters(layer, plain, sample):
    """The parameters of one sample of the only set."""
    return {
        name: p
        * (
            ops.sample_mask(
                layer.logits_of(name),
                seed=layer.seed,
                sample_offset=sample,
                tensor_id=layer.tensor_ids[name],
            )[0, 0]
            if name in layer.masked
            else 1
        )
        for name, p in plain.named_parameters()
    }


@each_kind
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_groups_are_plain_layers_on_masked_weights(kind, options):
    plain = plain_of(kind, **options).eval()
    layer = LAYERS[kind][0].from_dense(plain, samples=2, mask_bias=True, init=0.5)
    layer.mode = "sample"
    layer.seed = torch.tensor([9])
    x = torch.randn(6, 4, 5)
    x = x.transpose(0, 1) if plain.batch_first else x
    states = states_of(plain, 4)
    for hx in (states, None):
        ours = flat(layer(x, hx))
        parts = []
        for k in range(2):
            part = slice(2 * k, 2 * k + 2)
            given = (x[part] if plain.batch_first else x[:, part]).contiguous()
            own = None if hx is None else part_of(hx, part)
            parameters = masked_parameters(layer, plain, k)
            parts.append(flat(functional_call(plain, parameters, (given, own))))
        for n, mine in enumerate(ours):
            dim = 0 if n == 0 and plain.batch_first else 1
            torch.testing.assert_close(mine, torch.cat([p[n] for p in parts], dim=dim))


@each_kind
@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
@pytest.mark.parametrize("mode", ["threshold", "off"])
def test_all_ones_is_the_plain_layer(kind, options, mode):
    plain = plain_of(kind, **options).eval()
    layer = LAYERS[kind][0].from_dense(copy.deepcopy(plain))
    layer.mode = mode
    x, states = torch.randn(6, 6, 5), states_of(plain, 6)
    for mine, theirs in zip(flat(layer(x, states)), flat(plain(x, states)), strict=True):
        torch.testing.assert_close(mine, theirs)
        if mode == "off":
            assert torch.equal(mine, theirs)


@each_kind
@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_sequences(kind, enforce_sorted, batch_first):
    plain = plain_of(kind, num_layers=2, bidirectional=True, batch_first=batch_first).eval()
    layer = LAYERS[kind][0].from_dense(plain, samples=2, init=0.5)
    layer.mode = "sample"
    layer.seed = torch.tensor([4])
    lengths = [5, 3, 2, 2] if enforce_sorted else [2, 5, 3, 5]
    sequences = [torch.randn(n, 5) for n in lengths]
    packed = pack_sequence(sequences, enforce_sorted=enforce_sorted)
    states = states_of(plain, 4)
    ours = layer(packed, states)
    assert torch.equal(ours[0].batch_sizes, packed.batch_sizes)
    assert (ours[0].sorted_indices is None) == enforce_sorted
    y, *last = flat(ours)
    # sequences 0 and 1 belong to sample 0, whatever their lengths
    for b, sequence in enumerate(sequences):
        parameters = masked_parameters(layer, plain, b // 2)
        given = sequence.unsqueeze(0 if batch_first else 1)
        own = part_of(states, slice(b, b + 1))
        found = functional_call(plain, parameters, (given, own))
        expected, *ends = flat(found)
        expected = expected.squeeze(0 if batch_first else 1)
        torch.testing.assert_close(y[: lengths[b], b], expected)
        assert not y[lengths[b] :, b].any()
        for mine, theirs in zip(last, ends, strict=True):
            torch.testing.assert_close(mine[:, b], theirs[:, 0])


@pytest.mark.parametrize("packed", [False, True])
def test_projections_take_the_general_path(packed):
    torch.manual_seed(3)
    plain = nn.LSTM(5, 7, 2, proj_size=3, bidirectional=True)
    layer = mm.MaskedLSTM.from_dense(plain, samples=2, init=0.5)
    layer.mode, layer.seed = "sample", torch.tensor([4])
    assert "weight_hr_l0" in layer.masked
    assert "general path" in mm.explain(layer)
    x = torch.randn(6, 4, 5)
    lengths = torch.tensor([3, 6, 6, 1]) if packed else torch.full((4,), 6)
    states = states_of(plain, 4)
    given = pack_padded_sequence(x, lengths, enforce_sorted=False) if packed else x
    y, *last = flat(layer(given, states))
    for b in range(4):
        parameters = masked_parameters(layer, plain, b // 2)
        own = part_of(states, slice(b, b + 1))
        found = functional_call(plain, parameters, (x[: lengths[b], b : b + 1], own))
        expected, *ends = flat(found)
        torch.testing.assert_close(y[: lengths[b], b], expected[:, 0])
        for mine, theirs in zip(last, ends, strict=True):
            torch.testing.assert_close(mine[:, b], theirs[:, 0])


@each_kind
def test_a_row_mask_takes_the_general_path(kind):
    plain = plain_of(kind)
    layer = LAYERS[kind][0].from_dense(plain, granularity="row", init=0.0)
    assert layer.logits_of("weight_hh_l0").shape[1:] == (plain.weight_hh_l0.shape[0], 1)
    layer.mode, layer.seed = "sample", torch.tensor([4])
    y, *_ = flat(layer(torch.randn(3, 2, 5)))
    (grad,) = torch.autograd.grad(y.sum(), layer.logits_of("weight_hh_l0"))
    assert bool(grad.any())


@each_kind
@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("rule", [{"antithetic": True}, {"inclusive": True}, {}])
def test_rules_of_masks_are_those_of_the_general_path(kind, cell, rule):
    torch.manual_seed(3)
    masked, plain = (CELLS if cell else LAYERS)[kind]
    options = {"samples": 2, "mask_bias": True, "init": 0.0}
    # blocks of one weight take the general path
    layers = [
        masked.from_dense(plain(5, 7), granularity=granularity, **options)
        for granularity in ("weight", ("block", 1, 1))
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        layer.seed = torch.tensor([4])
        layer.estimator = "hard_concrete" if not rule else "gumbel_sigmoid"
        for name, value in rule.items():
            setattr(layer, name, value)
        layer.mode = "threshold" if "inclusive" in rule else "sample"
    assert ["general path" in mm.explain(layer) for layer in layers] == [False, True]
    x = torch.randn(4, 5) if cell else torch.randn(3, 4, 5)
    found = []
    for layer in layers:
        last = layer(x)
        y = last[0] if isinstance(last, tuple) else last
        logits = [layer.logits_of(name) for name in layer.masked]
        found.append((y, *torch.autograd.grad(y.square().sum(), logits)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@each_kind
def test_dropout_is_between_layers(kind):
    plain = plain_of(kind, num_layers=2, dropout=0.5)
    layer = LAYERS[kind][0].from_dense(plain)
    layer.mode = "threshold"
    x = torch.randn(6, 3, 5)
    assert not torch.equal(flat(layer(x))[0], flat(layer(x))[0])
    layer.eval()
    assert torch.equal(flat(layer(x))[0], flat(layer(x))[0])


@each_kind
def test_without_a_batch(kind):
    layer = LAYERS[kind][0](5, 7, num_layers=2).eval()
    x = torch.randn(4, 5)
    alone = flat(layer(x))
    for mine, theirs in zip(alone, flat(layer(x.unsqueeze(1))), strict=True):
        assert torch.equal(mine, theirs.squeeze(1))


@each_kind
@pytest.mark.parametrize("bias", [True, False])
def test_cells(kind, bias):
    torch.manual_seed(1)
    plain = CELLS[kind][1](5, 7, bias)
    cell = CELLS[kind][0].from_dense(plain, samples=2, mask_bias=True, init=0.3)
    cell.mode, cell.seed = "sample", torch.tensor([4])
    x, h = torch.randn(4, 5), torch.randn(4, 7)
    hx = (h, torch.randn(4, 7)) if kind == "lstm" else h
    for given in (hx, None):
        found = cell(x, given)
        for k in range(2):
            part = slice(2 * k, 2 * k + 2)
            own = None if given is None else part_of_cell(given, part)
            expected = functional_call(plain, masked_parameters(cell, plain, k), (x[part], own))
            torch.testing.assert_close(part_of_cell(found, part), expected)
    cell.mode = "off"
    torch.testing.assert_close(cell(x, hx), plain(x, hx), rtol=0, atol=0)
    cell.mode = "threshold"
    torch.testing.assert_close(cell(x, hx), plain(x, hx))
    alone = cell(x[0], part_of_cell(hx, 0))
    torch.testing.assert_close(alone, part_of_cell(plain(x, hx), 0))
    with pytest.raises(ValueError, match=r"input: expected shape \[batch, 5\] or \[5\]"):
        cell(torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"hx: expected shape \[4, 7\], got \[3, 7\]"):
        cell(x, part_of_cell(hx, slice(3)))


def part_of_cell(states, part):
    return tuple(h[part] for h in states) if isinstance(states, tuple) else states[part]


def test_cells_step_as_layers_run():
    layer = mm.MaskedLSTM(5, 7, samples=2, init=0.5)
    cell = mm.MaskedLSTMCell(5, 7, samples=2, init=0.5)
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(cell, name).copy_(getattr(layer, f"{name}_l0"))
    layer.seed = cell.seed = torch.tensor([6])
    cell.tensor_ids = {n.removesuffix("_l0"): number for n, number in layer.tensor_ids.items()}
    x = torch.randn(4, 6, 5)
    y, _ = layer(x)
    state = None
    for t in range(4):
        state = cell(x[t], state)
        torch.testing.assert_close(state[0], y[t])


@each_kind
def test_state_dict_copy_and_pickle(kind):
    masked, plain_type = LAYERS[kind]
    plain = plain_of(kind, num_layers=2)
    layer = masked(5, 7, 2)
    missing = layer.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(name.endswith("_logits") for name in missing.missing_keys)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x = torch.randn(3, 2, 5)
        other.mode = layer.mode = "sample"
        other.seed = layer.seed = torch.tensor([1])
        assert torch.equal(flat(other(x))[0], flat(layer(x))[0])
    with torch.no_grad():
        layer.logits_of("weight_hh_l1")[0, :5] = -1.0
    layer.mode = "threshold"
    dense = layer.to_dense()
    assert type(dense) is plain_type
    assert not dense.weight_hh_l1[:5].any()
    torch.testing.assert_close(flat(dense(x))[0], flat(layer(x))[0])
    other = plain_type(5, 7, 2)
    other.load_state_dict({n: t for n, t in layer.state_dict().items() if "logits" not in n})


@each_kind
def test_models_are_converted_learned_baked_and_restored(kind):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = LAYERS[kind][1](5, 6, 2, batch_first=True)
            self.cell = CELLS[kind][1](6, 4)
            self.out = nn.Linear(4, 3)

        def forward(self, x):
            y, _ = self.rnn(x)
            state = self.cell(y[:, -1])
            return self.out(state[0] if kind == "lstm" else state)

    torch.manual_seed(0)
    model = Tagger().eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(8, 4, 5)
    expected = model(x)
    mm.mask_model(model, sets=["a", "b"], samples=2)
    assert isinstance(model.rnn, LAYERS[kind][0])
    assert isinstance(model.cell, CELLS[kind][0])
    with mm.use_set(model, "a"), mm.set_mode(model, "threshold"):
        torch.testing.assert_close(model(x), expected)

    def batches(step, generator):
        return torch.randn(8, 4, 5, generator=generator), torch.zeros(8, dtype=torch.long)

    result = mm.learn_masks(
        model,
        lambda y, batch: nn.functional.cross_entropy(y, batch[1]),
        {"a": batches, "b": batches},
        steps=4,
        lr=1.0,
        progress=False,
    )
    for name, t in before.items():
        assert torch.equal(model.state_dict()[name], t), name
    baked = result.masks["a"].bake(model)
    with mm.use_set(model, "a"), mm.set_mode(model, "threshold"):
        torch.testing.assert_close(baked(x), model(x))
    assert type(baked.rnn) is LAYERS[kind][1]
    mm.unmask_model(model)
    assert torch.equal(model(x), expected)
    model.double()
    model(x.double())


@each_kind
def test_dtypes_devices_and_compile(kind):
    layer = LAYERS[kind][0](5, 7, samples=2, device="meta")
    assert flat(layer(torch.empty(3, 4, 5, device="meta")))[0].is_meta
    layer = LAYERS[kind][0](5, 7, samples=2, dtype=torch.bfloat16)
    assert flat(layer(torch.zeros(3, 4, 5, dtype=torch.bfloat16)))[0].dtype == torch.bfloat16
    layer = LAYERS[kind][0](5, 7, num_layers=2, samples=2)
    layer.seed = torch.tensor([2])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 5)
    for mine, theirs in zip(flat(compiled(x)), flat(layer(x)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_bad_input():
    layer = mm.MaskedLSTM(5, 7, samples=2)
    for x, hx, message in [
        (torch.zeros(3, 4, 6), None, r"input: expected 5 values per step, got 6"),
        (torch.zeros(5), None, r"input: expected 2 or 3 dimensions, got \[5\]"),
        (torch.zeros(3, 3, 5), None, r"batch of x, 3 .*2 samples = 2"),
        (torch.zeros(3, 4, 5), (torch.zeros(1, 4, 7),), r"hx: expected 2 states, got 1"),
        (
            torch.zeros(3, 4, 5),
            (torch.zeros(1, 2, 7), torch.zeros(1, 4, 7)),
            r"hx: expected shape \[1, 4, 7\], got \[1, 2, 7\]",
        ),
        (torch.zeros(3, 5), (torch.zeros(1, 1, 7),) * 2, r"hx: expected 2 dimensions"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer(x, hx)
    h = torch.zeros(2, 7)
    cell, gru = mm.MaskedLSTMCell(5, 7), mm.MaskedGRUCell(5, 7)
    for hx, kind, message in [
        ((h,), ValueError, r"hx: expected 2 states, got 1"),
        ((h, h, h), ValueError, r"hx: expected 2 states, got 3"),
        (h, TypeError, r"hx: expected 2 tensors, got Tensor"),
    ]:
        with pytest.raises(kind, match=message):
            cell(torch.zeros(2, 5), hx)
    for layer, x in ((gru, torch.zeros(2, 5)), (mm.MaskedGRU(5, 7), torch.zeros(3, 2, 5))):
        with pytest.raises(TypeError, match=r"hx: expected a tensor, got tuple"):
            layer(x, (h,))
    with pytest.raises(ValueError, match=r"mask_bias: expected False"):
        mm.MaskedGRU(5, 7, bias=False, mask_bias=True)
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.LSTM, got GRU"):
        mm.MaskedLSTM.from_dense(nn.GRU(5, 7))
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.GRUCell, got Linear"):
        mm.MaskedGRUCell.from_dense(nn.Linear(5, 7))


@each_kind
def test_checkpointing_over_two_layers_changes_nothing(kind):
    layers = [LAYERS[kind][0](5, 5, samples=2) for _ in range(2)]
    for layer in layers:
        layer.seed = torch.tensor([3])
    x = torch.randn(3, 4, 5)

    def run(x):
        for layer in layers:
            x = flat(layer(x))[0].tanh()
        return x

    leaves = [layer.logits_of(name) for layer in layers for name in layer.masked]
    expected = torch.autograd.grad(run(x).sum(), leaves)
    for use_reentrant in (False, True):
        given = x.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(run, given, use_reentrant=use_reentrant)
        for leaf in leaves:
            leaf.grad = None
        y.sum().backward()
        for leaf, grad in zip(leaves, expected, strict=True):
            assert torch.equal(leaf.grad, grad)


@each_kind
@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("options", [{"granularity": "row"}, {"estimator": "hard_concrete"}])
def test_compiles(kind, cell, options):
    torch.manual_seed(0)
    layer = mm.mask_model(
        (CELLS if cell else LAYERS)[kind][1](5, 6), samples=2, init=0.0, **options
    )
    layer.seed = torch.tensor([3])
    x = torch.randn(4, 5) if cell else torch.randn(3, 4, 5)

    def output(y):
        return y if isinstance(y, torch.Tensor) else y[0]

    expected = output(layer(x))
    got = output(torch.compile(layer, fullgraph=True, backend="aot_eager")(x))
    torch.testing.assert_close(got, expected)
    names = [n for n in layer.masked if n.startswith("weight")]
    logits = [layer.logits_of(n) for n in names]
    gradients = [torch.autograd.grad(y.square().sum(), logits) for y in (expected, got)]
    torch.testing.assert_close(gradients[1], gradients[0])
    assert bool(gradients[0][0].any())
