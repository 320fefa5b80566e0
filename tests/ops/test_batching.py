"""`torch.vmap` over seeds, logits and inputs: one call of a kernel, the masks of one call each."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modmask_kernels import _native, ops
from modmask_kernels.ops.estimators import arguments
from modmask_kernels.ops.masked_linear import product
from modmask_kernels.ops.masked_rnn import reference as rnn_reference
from modmask_kernels.ops.sample_mask import reference

pytestmark = pytest.mark.skipif(not _native.available(), reason="tests the compiled kernels")

ELEMENTS = 3


class Calls(TorchDispatchMode):
    """Names of the operations of this package that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "modmask":
            self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# function, sizes of a row of x, shape of the weight, number of outputs, shape of the logits
PRODUCTS = {
    "linear": (ops.masked_linear, (37,), (29, 37), 29, (29, 37)),
    "blocks": (ops.masked_linear, (12,), (8, 12), 8, (4, 3)),
    "conv2d": (ops.masked_conv2d, (3, 6, 5), (4, 3, 3, 2), 4, (4, 3, 3, 2)),
    "conv1d": (ops.masked_conv1d, (3, 9), (4, 3, 3), 4, (4, 3, 3)),
    "kernels": (ops.masked_conv2d, (3, 6, 5), (4, 3, 3, 2), 4, (4, 3, 1, 1)),
    "matmul": (ops.masked_matmul, (37,), (37, 29), 29, (37, 29)),
    "transpose2d": (ops.masked_conv_transpose2d, (4, 3, 2), (4, 3, 3, 2), 3, (4, 3, 3, 2)),
    "transpose1d": (ops.masked_conv_transpose1d, (4, 7), (4, 3, 3), 3, (4, 3, 3)),
}
BATCHED = ["seed", "logits", "x", "seed logits", "seed x", "seed bias_logits", "seed logits x"]


def operands(name, sets, samples=2, rows=3):
    _, row, weight, outputs, small = PRODUCTS[name]
    leading = () if sets is None else (sets,)
    return {
        "x": normal((sets or 1) * samples * rows, *row, seed=1),
        "weight": normal(*weight, seed=2),
        "logits": normal(*leading, *small, seed=3),
        "bias": normal(outputs, seed=4),
        "bias_logits": normal(*leading, outputs, seed=5),
        "seed": torch.tensor(7) if sets is None else torch.arange(sets),
    }


def elements(tensors, names):
    """The named tensors anew for every element, in a dimension that is not always the first."""
    found = {}
    for name in names:
        t = tensors[name]
        if name == "seed":
            found[name] = torch.stack([t + 11 * n for n in range(ELEMENTS)])
        else:
            found[name] = normal(ELEMENTS, *t.shape, seed=len(name))
    return found


def together_and_alone(function, tensors, names):
    batched = elements(tensors, names)
    rest = {k: t for k, t in tensors.items() if k not in batched}

    def one(parts):
        return function(**rest, **parts)

    with Calls() as calls:
        together = torch.vmap(one)(batched)
    alone = [one({k: t[n] for k, t in batched.items()}) for n in range(ELEMENTS)]
    return calls.names, together, alone


@pytest.mark.parametrize("sets", [None, 2])
@pytest.mark.parametrize("names", BATCHED)
@pytest.mark.parametrize("name", PRODUCTS)
def test_one_call(name, names, sets, capability):
    function = PRODUCTS[name][0]

    def call(**tensors):
        return function(**tensors, samples=2, tensor_id=3, sample_offset=1, antithetic=sets is None)

    calls, together, alone = together_and_alone(call, operands(name, sets), names.split())
    assert len(calls) == 1
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("sets", [None, 2])
@pytest.mark.parametrize("names", BATCHED)
@pytest.mark.parametrize("name", PRODUCTS)
def test_gradient_of_each(name, names, sets):
    function = PRODUCTS[name][0]

    def gradients(**tensors):
        wanted = ("x", "logits", "bias_logits")

        def loss(given):
            return function(**{**tensors, **given}, samples=2).square().sum()

        return tuple(torch.func.grad(loss)({k: tensors[k] for k in wanted}).values())

    calls, together, alone = together_and_alone(gradients, operands(name, sets), names.split())
    assert calls == [calls[0], f"{calls[0]}_backward"]
    for found, expected in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("name", PRODUCTS)
def test_gradient_of_the_sum(name):
    """Seeds that share one loss: the kernel sums over them, one tensor like the logits."""
    function = PRODUCTS[name][0]
    tensors = operands(name, 2)
    seeds = elements(tensors, ["seed"])["seed"]
    wanted = ("x", "weight", "logits", "bias", "bias_logits")

    def gradients(losses):
        leaves = {k: tensors[k].clone().requires_grad_() for k in wanted}
        losses(lambda seed: function(**{**tensors, **leaves, "seed": seed}, samples=2)).backward()
        return [leaves[k].grad for k in wanted]

    with Calls() as calls:
        found = gradients(lambda call: torch.vmap(call)(seeds).square().sum())
    assert len(calls.names) == 2
    expected = gradients(lambda call: sum(call(seed).square().sum() for seed in seeds))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_of_weights_are_one_by_one():
    tensors = operands("linear", None)
    seeds = elements(tensors, ["seed"])["seed"]

    def loss(weight, seed):
        y = ops.masked_linear(**{**tensors, "weight": weight, "seed": seed}, samples=2)
        return y.square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(tensors["weight"], seeds)
    for n, seed in enumerate(seeds):
        assert torch.equal(found[n], torch.func.grad(loss)(tensors["weight"], seed))


@pytest.mark.parametrize("estimator", ["top_k", "threshold", "hard_concrete"])
@pytest.mark.parametrize("names", ["seed", "logits", "seed logits"])
def test_estimators(estimator, names):
    tensors = operands("linear", None)

    def gradient(**given):
        def loss(logits):
            return ops.masked_linear(
                **{**given, "logits": logits}, samples=2, estimator=estimator
            ).sum()

        return torch.func.grad_and_value(loss)(given["logits"])

    _, together, alone = together_and_alone(gradient, tensors, names.split())
    for n, expected in enumerate(alone):
        assert torch.equal(together[0][n], expected[0])
        torch.testing.assert_close(together[1][n], expected[1])


def test_without_a_seed_and_n_of_m():
    tensors = operands("linear", None)
    tensors["x"], tensors["weight"] = normal(6, 36), normal(29, 36)
    tensors["logits"] = normal(29, 36, seed=3)
    for seed, n_of_m in ((None, None), (None, (2, 4)), (torch.tensor(1), (2, 4))):

        def call(seed=seed, n_of_m=n_of_m, **given):
            return ops.masked_linear(**given, seed=seed, n_of_m=n_of_m)

        given = {k: t for k, t in tensors.items() if k != "seed"}
        calls, together, alone = together_and_alone(call, given, ["logits"])
        assert calls == ["masked_linear"]
        assert torch.equal(together, torch.stack(alone))


def test_vmap_of_vmap():
    tensors = operands("linear", None)
    seeds = torch.arange(6).reshape(2, 3)

    def one(seed):
        return ops.masked_linear(**{**tensors, "seed": seed}, samples=2)

    with Calls() as calls:
        together = torch.vmap(torch.vmap(one))(seeds)
    assert calls.names == ["masked_linear"]
    for i in range(2):
        for j in range(3):
            assert torch.equal(together[i, j], one(seeds[i, j]))


def test_dimensions_other_than_the_first():
    tensors = operands("linear", 2)
    seeds = torch.arange(6).reshape(2, 3)

    def one(seed):
        return ops.masked_linear(**{**tensors, "seed": seed}, samples=2)

    together = torch.vmap(one, in_dims=1, out_dims=2)(seeds)
    for n in range(3):
        assert torch.equal(together[..., n], one(seeds[:, n]))


def test_compiled():
    tensors = operands("linear", None)

    def call(seeds):
        return torch.vmap(lambda seed: ops.masked_linear(**{**tensors, "seed": seed}))(seeds)

    seeds = torch.arange(3)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(seeds), call(seeds))


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_shared_logits_stay_where_they_are(name):
    """Logits expanded over sets are those of a copy, and none is made."""
    tensors = operands(name, None, samples=4)
    leaf = tensors["logits"]
    tensors["seed"] = torch.arange(4)
    tensors["bias_logits"] = None
    shared = leaf.expand(4, *leaf.shape)
    function = PRODUCTS[name][0]
    with torch.profiler.profile(record_shapes=True) as profile:
        y = function(**{**tensors, "logits": shared})
    copied = [e for e in profile.events() if e.name in ("aten::clone", "aten::contiguous")]
    assert not [e for e in copied if list(shared.shape) in e.input_shapes]
    assert torch.equal(y, function(**{**tensors, "logits": shared.contiguous()}))


def test_draws_are_for_batching_rules_only():
    tensors = operands("linear", None)
    for seed in (torch.arange(2)[None], torch.arange(2)[:, None]):
        with pytest.raises(ValueError, match=r"seed must have shape"):
            ops.masked_linear(**{**tensors, "seed": seed})
        with pytest.raises(ValueError, match=r"seed must have shape"):
            ops.sample_mask(tensors["logits"], seed=seed)


# ---- masks themselves ----

DRAWS = {
    "values": lambda **given: ops.sample_mask(**given, samples=2, antithetic=True),
    "packed": lambda **given: ops.sample_mask_packed(**given, samples=2, sample_offset=3),
    "gradient": lambda **given: torch.func.grad(
        lambda logits: (ops.sample_mask(**{**given, "logits": logits}, samples=2) * 3).sum()
    )(given["logits"]),
}


@pytest.mark.parametrize("n_of_m", [None, (2, 4)])
@pytest.mark.parametrize("sets", [None, 2])
@pytest.mark.parametrize("names", ["seed", "logits", "seed logits"])
@pytest.mark.parametrize("name", DRAWS)
def test_masks_in_one_call(name, names, sets, n_of_m, capability):
    leading = () if sets is None else (sets,)
    tensors = {"logits": normal(*leading, 29, 36), "seed": operands("linear", sets)["seed"]}

    def call(**given):
        return DRAWS[name](**given, n_of_m=n_of_m)

    calls, together, alone = together_and_alone(call, tensors, names.split())
    assert len(calls) == (2 if name == "gradient" else 1)
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("estimator", ["gumbel_sigmoid", "top_k"])
def test_final_masks(name, estimator):
    """Bytes of bits and the ranks of top_k belong to one parameter: a call for each."""

    def call(logits):
        return DRAWS[name](logits=logits, seed=None, estimator=estimator)

    calls, together, alone = together_and_alone(call, {"logits": normal(29, 37)}, ["logits"])
    assert torch.equal(together, torch.stack(alone))
    if estimator == "gumbel_sigmoid" and name != "packed":
        assert len(calls) == (2 if name == "gradient" else 1)


def test_reference_of_several_draws():
    tensors = operands("linear", 2, rows=9)
    tensors["seed"] = torch.arange(6).reshape(2, 3)
    draw = (3, 4, 0, 0, 2, 1.0, True, *arguments("gumbel_sigmoid", False), [])
    y = torch.ops.modmask.masked_linear(*tensors.values(), *draw)
    torch.testing.assert_close(y, product.reference(*tensors.values(), *draw))
    where = (3, 0, 0, *arguments("gumbel_sigmoid", False), [])
    masks = torch.ops.modmask.sample_mask(tensors["logits"], tensors["seed"], 2, 1.0, True, *where)
    assert masks.shape == (6, 2, 29, 37)
    drawn = reference.sample_mask(tensors["logits"], seed=tensors["seed"], samples=2, tensor_id=3)
    assert torch.equal(masks, drawn)
    packed = torch.ops.modmask.sample_mask_packed(tensors["logits"], tensors["seed"], 2, *where)
    assert torch.equal(packed[4, 1], ops.pack_bits(masks[4, 1] > 0))


# ---- recurrent layers ----


def recurrent_operands(cell, sets):
    gates = {"lstm": 4, "gru": 3}[cell] * 5
    leading = () if sets is None else (sets,)
    batch = (sets or 1) * 2 * 3
    return {
        "x": normal(4, batch, 6, seed=1),
        "weight_ih": normal(gates, 6, seed=2),
        "weight_hh": normal(gates, 5, seed=3),
        "logits_ih": normal(*leading, gates, 6, seed=4),
        "logits_hh": normal(*leading, gates, 5, seed=5),
        "bias_ih": normal(gates, seed=6),
        "bias_hh": normal(gates, seed=7),
        "bias_logits_ih": normal(*leading, gates, seed=8),
        "h0": normal(batch, 5, seed=9),
        "seed": torch.tensor(7) if sets is None else torch.arange(sets),
    }


def run_cell(cell, lengths=None, **given):
    if cell == "lstm":
        y, (h, c) = ops.masked_lstm(**given, samples=2, lengths=lengths)
        return torch.cat([y, h[None], c[None]])
    y, h = ops.masked_gru(**given, samples=2, lengths=lengths)
    return torch.cat([y, h[None]])


def gradients_of_cell(cell, lengths=None, **given):
    wanted = ("x", "h0", "logits_ih", "logits_hh", "bias_logits_ih")

    def loss(leaves):
        return run_cell(cell, lengths, **{**given, **leaves}).square().sum()

    return tuple(torch.func.grad(loss)({k: given[k] for k in wanted}).values())


@pytest.mark.parametrize("sets", [None, 2])
@pytest.mark.parametrize(
    "names", ["seed", "seed x", "x h0", "logits_hh", "seed logits_ih logits_hh"]
)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrent_layers(cell, names, sets, capability):
    tensors = recurrent_operands(cell, sets)
    lengths = torch.arange(tensors["x"].shape[1]) % 5

    def forward(**given):
        return run_cell(cell, lengths, **given)

    calls, together, alone = together_and_alone(forward, tensors, names.split())
    once = sets is None or "logits" in names
    assert len(calls) == (1 if once else ELEMENTS)
    assert torch.equal(together, torch.stack(alone))

    def gradients(**given):
        return gradients_of_cell(cell, lengths, **given)

    calls, together, alone = together_and_alone(gradients, tensors, names.split())
    assert len(calls) == (2 if once else 2 * ELEMENTS)
    for found, expected in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("estimator", ["hard_concrete", "sigmoid", "threshold", "top_k"])
@pytest.mark.parametrize("names", ["seed x", "seed logits_ih logits_hh"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_estimators_of_recurrent_layers(cell, names, estimator):
    tensors = recurrent_operands(cell, None)

    def gradients(**given):
        return gradients_of_cell(cell, estimator=estimator, antithetic=True, hard=False, **given)

    calls, together, alone = together_and_alone(gradients, tensors, names.split())
    assert calls == ["masked_rnn", "masked_rnn_backward"]
    for found, expected in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrent_layers_beyond_one_call(cell):
    """Gradients of weights, Jacobians and nested batches agree with one element at a time."""
    tensors = recurrent_operands(cell, None)
    seeds = torch.arange(3)

    def of_weight(weight, seed):
        given = {**tensors, "weight_hh": weight, "seed": seed}
        return run_cell(cell, **given).square().sum()

    gradient = torch.func.grad(of_weight)
    found = torch.vmap(gradient, (None, 0))(tensors["weight_hh"], seeds)
    assert torch.equal(found, torch.stack([gradient(tensors["weight_hh"], s) for s in seeds]))

    def last(x, seed):
        return run_cell(cell, **{**tensors, "x": x, "seed": seed})[-1, 0]

    jacobian = torch.func.jacrev(last)
    found = torch.vmap(jacobian, (None, 0))(tensors["x"], seeds)
    assert torch.equal(found, torch.stack([jacobian(tensors["x"], s) for s in seeds]))

    def one(seed):
        return run_cell(cell, **{**tensors, "seed": seed})

    pairs = torch.arange(6).reshape(2, 3)
    with Calls() as calls:
        together = torch.vmap(torch.vmap(one))(pairs)
    assert calls.names == ["masked_rnn"]
    assert torch.equal(together.flatten(0, 1), torch.stack([one(s) for s in pairs.flatten()]))

    leaves = [tensors["logits_hh"].clone().requires_grad_() for _ in range(2)]
    torch.vmap(lambda s: run_cell(cell, **{**tensors, "logits_hh": leaves[0], "seed": s}))(
        seeds
    ).square().sum().backward()
    for s in seeds:
        y = run_cell(cell, **{**tensors, "logits_hh": leaves[1], "seed": s})
        y.square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrent_reference_of_several_draws(cell):
    tensors = recurrent_operands(cell, 2)
    x, h0 = normal(4, 12, 6, seed=1), normal(12, 5, seed=9)
    c0 = normal(12, 5, seed=10) if cell == "lstm" else None
    parameters = [tensors[n] for n in ("weight_ih", "weight_hh", "logits_ih", "logits_hh")]
    parameters += [tensors["bias_ih"], tensors["bias_hh"], tensors["bias_logits_ih"], None]
    seed = torch.arange(6).reshape(2, 3)
    rest = (None, ("lstm", "gru").index(cell), False, [3, 9, 4, 1], 0, 2, 1.0, True)
    operands = (x, h0, c0, *parameters, seed, *rest)
    drawn = arguments("gumbel_sigmoid", True)
    found = torch.ops.modmask.masked_rnn(*operands, *drawn)
    expected = rnn_reference.masked_rnn(*operands, antithetic=True)
    for a, b in zip(found, expected, strict=False):
        torch.testing.assert_close(a, b)
    tests = ("test_schema", "test_faketensor")
    operation = torch.ops.modmask.masked_rnn.default
    torch.library.opcheck(operation, (*operands, *drawn), test_utils=tests)
