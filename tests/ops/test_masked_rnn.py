"""`masked_lstm` and `masked_gru` against their float64 reference, and what they promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import check_close
from torch._dynamo.testing import CompileCounterWithBackend

from modmask_kernels import _native, ops
from modmask_kernels.ops import estimators
from modmask_kernels.ops.masked_rnn import reference

NAMES = (
    "x",
    "h0",
    "c0",
    "weight_ih",
    "weight_hh",
    "logits_ih",
    "logits_hh",
    "bias_ih",
    "bias_hh",
    "bias_logits_ih",
    "bias_logits_hh",
)
# the few numbers of a masked bias tell something about largest errors only over many draws
MATRICES = tuple(name for name in NAMES if "bias_logits" not in name)
OPERATIONS = {"lstm": ops.masked_lstm, "gru": ops.masked_gru}
needs_kernels = pytest.mark.skipif(not _native.available(), reason="tests the compiled kernels")
each_cell = pytest.mark.parametrize("cell", ["lstm", "gru"])
# the options of a call that say how masks follow from logits and noise
ESTIMATORS = {
    "hard_concrete": {"estimator": estimators.hard_concrete((-0.2, 1.3), clamp=1e-2), "tau": 2 / 3},
    "sigmoid": {"estimator": estimators.sigmoid(), "tau": 0.4},
    "threshold": {"estimator": estimators.threshold(0.25)},
    "threshold, inclusive": {"estimator": estimators.threshold(0.25, inclusive=True)},
    "top_k": {"estimator": estimators.top_k(0.3)},
    "antithetic": {"estimator": estimators.gumbel_sigmoid(), "antithetic": True},
    "antithetic, hard_concrete": {"estimator": estimators.hard_concrete(), "antithetic": True},
}
each_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def tensors_of(cell, steps=4, rows=9, inputs=19, hidden=21, sets=2, samples=2, **given_options):
    """Operands and options of a call."""
    dtype = given_options.pop("dtype", torch.float32)
    seeds = given_options.pop("seeds", "each")
    absent = given_options.pop("absent", ())
    cut = given_options.pop("cut", False)
    ties = given_options.pop("ties", False)
    g = torch.Generator().manual_seed(given_options.pop("draw", 0))
    out = reference.GATES[cell] * hidden
    batch = sets * (1 if seeds is None else samples) * rows

    def normal(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    def logits(*shape):
        drawn = normal(sets, *shape, scale=2.0, dtype=torch.float32)
        return (4 * drawn).round() / 4 if ties else drawn

    tensors = {
        "x": normal(steps, batch, inputs),
        "h0": normal(batch, hidden, scale=0.3),
        "c0": normal(batch, hidden, scale=0.3),
        "weight_ih": normal(out, inputs, scale=max(inputs, 1) ** -0.5),
        "weight_hh": normal(out, hidden, scale=max(hidden, 1) ** -0.5),
        "logits_ih": logits(out, inputs),
        "logits_hh": logits(out, hidden),
        "bias_ih": normal(out),
        "bias_hh": normal(out),
        "bias_logits_ih": logits(out),
        "bias_logits_hh": logits(out),
    }
    if cell == "gru":
        del tensors["c0"]
    for name in absent:
        tensors.pop(name, None)
    seed = {"each": torch.arange(sets) * 7 - 3, "one": torch.tensor(5), None: None}[seeds]
    options = {"seed": seed, "samples": samples, "tensor_ids": (3, 9, 4, 1), **given_options}
    if cut:
        options["lengths"] = torch.randint(0, steps + 1, (batch,), generator=g)
    return tensors, options


def results_of(found):
    """y, h_n and c_n, where there is one."""
    y, states = found
    return (y, *states) if isinstance(states, tuple) else (y, states)


def by_reference(cell):
    """The reference with the signature of the operation."""

    def call(**given):
        batch_first = given.pop("batch_dim", 1) == 0
        x = given.pop("x")
        seed = given.pop("seed")
        defaults = {
            "reverse": False,
            "sample_offset": 0,
            "samples": 1,
            "tau": 1.0,
            "hard": True,
            "lengths": None,
        }
        operands = [
            x.transpose(0, 1) if batch_first else x,
            *(given.pop(n, None) for n in NAMES[1:]),
        ]
        rest = {**defaults, **given, "cell": reference.CELLS.index(cell)}
        y, h, c = reference.masked_rnn(*operands, seed, **rest)
        y = y.transpose(0, 1) if batch_first else y
        return y, ((h, c) if cell == "lstm" else h)

    return call


def apply(function, tensors, options, wanted=NAMES, dtype=None):
    """Results and gradients by name."""
    leaves = {name: (t if dtype is None else t.to(dtype)).detach() for name, t in tensors.items()}
    wanted = [name for name in wanted if name in leaves]
    for name in wanted:
        leaves[name].requires_grad_()
    results = results_of(function(**leaves, **options))
    g = torch.Generator().manual_seed(100)
    dy = [torch.randn(t.shape, generator=g).to(t.dtype) for t in results]
    grads = torch.autograd.grad(results, [leaves[n] for n in wanted], dy) if wanted else ()
    named = dict(zip(("y", "h_n", "c_n"), (t.detach() for t in results), strict=False))
    return {**named, **dict(zip(wanted, grads, strict=True))}


def check(cell, wanted=MATRICES, draws=4, **change):
    """Results and gradients by the tolerance rule; largest errors are those of several draws."""
    found = {}
    for draw in range(draws):
        tensors, options = tensors_of(cell, draw=draw, **change)
        if change.get("batch_dim") == 0:
            tensors["x"] = tensors["x"].transpose(0, 1).contiguous()
        plain = apply(by_reference(cell), tensors, options, wanted)
        exact = apply(by_reference(cell), tensors, options, wanted, torch.float64)
        ours = apply(OPERATIONS[cell], tensors, options, wanted)
        for name in ours:
            found.setdefault(name, []).append((ours[name], plain[name], exact[name]))
    check_close(
        (name, *(torch.stack(of_all) for of_all in zip(*found[name], strict=True)))
        for name in found
    )


# ---- against the reference ----


@each_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sets": 1, "samples": 1},
        {"sets": 3, "samples": 3, "rows": 1},
        {"seeds": "one"},
        {"seeds": None},
        {"absent": ("h0", "c0")},
        {"absent": ("bias_logits_ih",)},
        {"absent": ("bias_ih", "bias_hh", "bias_logits_ih", "bias_logits_hh")},
        {"reverse": True},
        {"cut": True},
        {"cut": True, "reverse": True, "absent": ("h0", "c0")},
        {"batch_dim": 0},
        {"hard": False},
        {"hard": False, "tau": 0.6},
        {"tau": 3.0, "seeds": None},
        {"sample_offset": 9},
    ],
    ids=str,
)
def test_values_and_gradients(cell, change, dtype, capability):
    check(cell, dtype=dtype, **change)


@each_cell
@pytest.mark.parametrize(
    "change",
    [
        {"rows": 33, "hidden": 26, "inputs": 20},
        {"rows": 16, "hidden": 32, "inputs": 16},
        {"rows": 150, "hidden": 5, "inputs": 3, "sets": 1, "cut": True},
        # several tiles of rows, of columns, of sums
        {"rows": 9, "hidden": 70, "inputs": 530, "sets": 1},
        {"rows": 2, "hidden": 300, "inputs": 9, "sets": 1, "steps": 2},
        {"rows": 9, "hidden": 6, "inputs": 6, "steps": 40, "sets": 1, "reverse": True},
    ],
    ids=str,
)
def test_sizes(cell, change, capability):
    check(cell, **change)


@each_cell
@pytest.mark.parametrize(
    "wanted", [("x",), ("logits_hh",), ("weight_ih", "bias_hh"), ("h0", "weight_hh"), ("c0",)]
)
def test_some_gradients(cell, wanted, capability):
    check(cell, wanted, cut=True)


@each_cell
def test_gradients_of_masked_biases(cell, capability):
    biases = ("bias_ih", "bias_hh", "bias_logits_ih", "bias_logits_hh")
    check(cell, biases, draws=16, steps=3)


@each_cell
@each_estimator
@pytest.mark.parametrize(("hard", "seeds"), [(True, "each"), (False, "each"), (False, None)])
def test_estimators(cell, name, hard, seeds, capability):
    change = {"hard": hard, "seeds": seeds, "sample_offset": 1, **ESTIMATORS[name]}
    ties = change["estimator"].name in ("threshold", "top_k")
    check(cell, draws=10, ties=ties, **change)


@each_cell
@pytest.mark.parametrize("name", ["hard_concrete", "top_k"])
def test_estimators_of_masked_biases(cell, name, capability):
    biases = ("bias_ih", "bias_hh", "bias_logits_ih", "bias_logits_hh")
    check(cell, biases, draws=16, steps=3, ties=True, hard=False, **ESTIMATORS[name])


@each_cell
@pytest.mark.parametrize("change", [{"dtype": torch.bfloat16}, {"rows": 33, "hidden": 70}], ids=str)
def test_cuts_through_matrices_of_several_tiles(cell, change, capability):
    check(cell, ties=True, inputs=300, sets=2, samples=1, **ESTIMATORS["top_k"], **change)


@needs_kernels
@each_cell
@each_estimator
def test_hard_masks_are_those_of_sample_mask(cell, name, capability):
    """The gradient of a weight is zero where its mask is, in the one group that has a gradient."""
    tensors, options = tensors_of(cell, ties=True, sample_offset=1, **ESTIMATORS[name])
    leaves = [tensors[n].requires_grad_() for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    y, _ = OPERATIONS[cell](**tensors, **options)
    drawn = [
        ops.sample_mask(
            tensors[n],
            tensor_id=number,
            **{k: v for k, v in options.items() if k not in ("tensor_ids", "lengths")},
        )
        for n, number in zip(
            ("logits_ih", "logits_hh", "bias_logits_ih", "bias_logits_hh"),
            options["tensor_ids"],
            strict=True,
        )
    ]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    for g, part in enumerate(y.chunk(4, dim=1)):
        grads = torch.autograd.grad(part, leaves, dy.chunk(4, dim=1)[g], retain_graph=True)
        for grad, masks in zip(grads, drawn, strict=True):
            assert torch.equal(grad != 0, masks[g % 2, g // 2] > 0)


@needs_kernels
@each_cell
def test_top_k_knows_parameters_of_one_number_apart(cell):
    tensors, options = tensors_of(cell, **ESTIMATORS["top_k"])
    found = apply(OPERATIONS[cell], tensors, options)
    same = apply(OPERATIONS[cell], tensors, {**options, "tensor_ids": (5, 5, 5, 5)})
    assert all(torch.equal(found[n], same[n]) for n in found)


@each_cell
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_options(cell, data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    check(
        cell,
        ("x", "weight_ih", "weight_hh", "logits_ih", "logits_hh"),
        steps=draw(1, 6),
        rows=draw(8, 20),
        inputs=draw(16, 40),
        hidden=draw(16, 40),
        sets=draw(1, 2),
        samples=draw(1, 3),
        reverse=data.draw(st.booleans()),
        cut=data.draw(st.booleans()),
        hard=data.draw(st.booleans()),
    )


@each_cell
@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"rows": 0}, {"hidden": 0}, {"inputs": 0}], ids=str
)
def test_sizes_of_zero(cell, change, capability):
    tensors, options = tensors_of(cell, **change)
    expected = apply(by_reference(cell), tensors, options, ())
    # the gradients of nothing are zero
    result = apply(OPERATIONS[cell], tensors, options)
    for name, t in expected.items():
        torch.testing.assert_close(result[name], t)
    if change == {"steps": 0}:
        assert bool((result["h0"] != 0).all())
    for name in ("weight_ih", "logits_hh", "bias_ih"):
        assert result[name].shape == tensors[name].shape
        if change != {"inputs": 0}:
            assert not result[name].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
@each_cell
def test_values_that_are_not_numbers(cell, value, capability):
    tensors, options = tensors_of(cell, sets=1, samples=1)
    tensors["x"][1, 0, 0] = value
    tensors["weight_ih"].fill_(1.0)
    tensors["logits_ih"].fill_(100.0)
    ours = results_of(OPERATIONS[cell](**tensors, **options))
    plain = results_of(by_reference(cell)(**tensors, **options))
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@each_cell
def test_is_that_of_torch(cell, capability):
    tensors, options = tensors_of(cell, sets=1, samples=2, rows=4)
    seed, ids = torch.tensor(11), options["tensor_ids"]
    y, states = OPERATIONS[cell](**tensors, **{**options, "seed": seed})
    for k in range(2):
        part = slice(4 * k, 4 * k + 4)
        weights = []
        for number, leaf in zip(ids, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), strict=True):
            of = leaf.replace("weight_", "logits_").replace("bias_", "bias_logits_")
            mask = ops.sample_mask(tensors[of], seed=seed, samples=2, tensor_id=number)[k, 0]
            weights.append(tensors[leaf] * mask)
        rest = (weights, True, 1, 0.0, False, False, False)
        if cell == "lstm":
            initial = (tensors["h0"][None, part], tensors["c0"][None, part])
            expected = torch.lstm(tensors["x"][:, part], initial, *rest)
            torch.testing.assert_close(states[1][part], expected[2][0])
        else:
            expected = torch.gru(tensors["x"][:, part], tensors["h0"][None, part], *rest)
        torch.testing.assert_close(y[:, part], expected[0])


# ---- bits ----


@each_cell
def test_layout_changes_nothing(cell, capability):
    tensors, options = tensors_of(cell, rows=9)
    first = apply(OPERATIONS[cell], tensors, options)
    turned = {n: t.mT.contiguous().mT if t.dim() > 1 else t for n, t in tensors.items()}
    again = apply(OPERATIONS[cell], turned, options)
    assert all(torch.equal(first[name], again[name]) for name in first)


@each_cell
def test_groups_at_once_are_groups_one_by_one(cell, capability):
    tensors, options = tensors_of(cell, sets=2, samples=2, rows=5, cut=True)
    y, states = OPERATIONS[cell](**tensors, **options)
    for g in range(4):
        part = slice(5 * g, 5 * g + 5)
        mine = {
            n: t[g // 2] if "logits" in n else t[:, part] if n == "x" else t
            for n, t in tensors.items()
        }
        mine.update({n: t[part] for n, t in tensors.items() if n in ("h0", "c0")})
        alone, last = OPERATIONS[cell](
            **mine,
            **{
                **options,
                "seed": options["seed"][g // 2],
                "samples": 1,
                "sample_offset": g % 2,
                "lengths": options["lengths"][part],
            },
        )
        assert torch.equal(alone, y[:, part])
        for one, all_of_them in zip(
            results_of((alone, last))[1:], results_of((y, states))[1:], strict=True
        ):
            assert torch.equal(one, all_of_them[part])


@needs_kernels
@each_cell
@pytest.mark.parametrize("name", [None, "top_k", "antithetic, hard_concrete"])
def test_threads_and_runs_change_nothing(cell, name, capability, threads):
    change = {"samples": 1} if name is None else {"hard": False, **ESTIMATORS[name]}
    tensors, options = tensors_of(cell, rows=70, hidden=40, inputs=50, cut=True, **change)
    threads(1)
    first = apply(OPERATIONS[cell], tensors, options)
    for n in (1, 2, 3, 4):
        threads(n)
        again = apply(OPERATIONS[cell], tensors, options)
        assert all(torch.equal(first[name], again[name]) for name in first), n


@needs_kernels
@pytest.mark.skipif(len(_native.capabilities()) < 2, reason="one capability only")
def test_another_capability_between_forward_and_backward():
    tensors, options = tensors_of("lstm")
    logits = tensors["logits_ih"].requires_grad_()
    before = _native.capability()
    y, _ = ops.masked_lstm(**tensors, **options)
    try:
        _native.set_capability("plain")
        with pytest.raises(RuntimeError, match="capability has changed since the forward pass"):
            y.sum().backward()
    finally:
        _native.set_capability(before)
    assert logits.grad is None


# ---- PyTorch ----


@each_cell
@pytest.mark.parametrize("estimator", ["gumbel_sigmoid", "top_k"])
def test_opcheck(cell, estimator):
    tensors, options = tensors_of(cell, cut=True)
    arguments = [
        *(tensors[n].requires_grad_() if n in tensors else None for n in NAMES),
        options["seed"],
        options["lengths"],
        reference.CELLS.index(cell),
        False,
        [3, 9, 4, 1],
        0,
        2,
        1.0,
        True,
        *estimators.arguments(estimator, True),
    ]
    # what the backward pass keeps has no gradient of its own, which the first test wants to see
    torch.library.opcheck(
        torch.ops.modmask.masked_rnn.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@each_cell
def test_gradcheck_through_the_soft_path(cell):
    tensors, options = tensors_of(cell, inputs=2, hidden=2, rows=1, steps=3, reverse=True)
    leaves = [t.double().requires_grad_() for t in tensors.values()]

    def soft(*operands):
        named = dict(zip(tensors, operands, strict=True))
        return results_of(OPERATIONS[cell](**named, **options, hard=False))

    assert torch.autograd.gradcheck(soft, leaves)


@each_cell
def test_vmap_and_functional_transforms(cell, capability):
    tensors, options = tensors_of(cell, sets=1, samples=1)
    seeds = torch.arange(3)
    options.pop("seed")

    def call(seed, logits):
        return OPERATIONS[cell](**{**tensors, "logits_hh": logits}, **options, seed=seed)[0]

    stacked = torch.vmap(call, (0, None))(seeds, tensors["logits_hh"])
    for n in range(3):
        assert torch.equal(stacked[n], call(seeds[n], tensors["logits_hh"]))
    grad = torch.func.grad(lambda logits: call(seeds[1], logits).square().sum())(
        tensors["logits_hh"]
    )
    leaf = tensors["logits_hh"].clone().requires_grad_()
    call(seeds[1], leaf).square().sum().backward()
    assert torch.equal(grad, leaf.grad)


@each_cell
@pytest.mark.parametrize("change", [{}, ESTIMATORS["top_k"]], ids=["default", "top_k"])
def test_compiles_without_breaks_or_recompiles(cell, change):
    tensors, options = tensors_of(cell, rows=6, absent=("h0", "c0"), **change)
    counter = CompileCounterWithBackend("aot_eager")

    def call(x, logits):
        return OPERATIONS[cell](**{**tensors, "x": x, "logits_hh": logits}, **options)[0]

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    counts = []
    for batch in (8, 16, 24):
        x = tensors["x"][:, :batch].contiguous()
        torch._dynamo.mark_dynamic(x, 1)
        logits = tensors["logits_hh"].clone().requires_grad_()
        compiled(x, logits).sum().backward()
        expected = tensors["logits_hh"].clone().requires_grad_()
        call(x, expected).sum().backward()
        assert torch.equal(logits.grad, expected.grad)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], f"compiled anew for another batch: {counts}"


@each_cell
def test_autocast_never_lowers_the_logits(cell):
    tensors, options = tensors_of(cell)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = OPERATIONS[cell](**tensors, **options)
    low = {n: t if "logits" in n else t.bfloat16() for n, t in tensors.items()}
    assert torch.equal(y, OPERATIONS[cell](**low, **options)[0])


@each_cell
def test_meta_device(cell):
    tensors, options = tensors_of(cell)
    meta = {name: t.to("meta") for name, t in tensors.items()}
    y, _ = OPERATIONS[cell](**meta, **{**options, "seed": options["seed"].to("meta")})
    assert y.is_meta
    assert y.shape == OPERATIONS[cell](**tensors, **options)[0].shape


@each_cell
def test_refuses_double_backward(cell):
    tensors, options = tensors_of(cell)
    logits = tensors["logits_hh"].requires_grad_()
    y, _ = OPERATIONS[cell](**tensors, **options)
    (grad,) = torch.autograd.grad(y.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


# ---- bad input ----

X, W, V = torch.zeros(3, 8, 4), torch.zeros(24, 4), torch.zeros(24, 6)
L, M = torch.zeros(2, 24, 4), torch.zeros(2, 24, 6)
BAD = [
    ({"x": torch.zeros(8, 4)}, ValueError, r"x must have shape \[steps, batch, in\], not \[8, 4\]"),
    ({"x": torch.zeros(3, 9, 4)}, ValueError, r"batch of x, 9 .*2 sets \* 2 samples = 4"),
    ({"x": torch.zeros(3, 8, 5)}, ValueError, r"weight_ih must have shape \[24, 5\]"),
    ({"x": X, "batch_dim": 2}, ValueError, r"batch_dim must be 0 or 1, not 2"),
    ({"weight_hh": torch.zeros(24, 5)}, ValueError, r"weight_hh must have shape \[4 \* hidden"),
    ({"weight_ih": W.half()}, TypeError, r"weight_ih must be torch\.float32, not torch\.float16"),
    ({"x": X.double()}, TypeError, r"x must have the dtype of the weights, .*32, not .*float64"),
    ({"x": X.long()}, TypeError, r"x must be float32, .*, not torch\.int64"),
    ({"logits_hh": torch.zeros(6, 24)}, ValueError, r"logits_hh .*\[2, 24, 6\], not \[6, 24\]"),
    (
        {"logits_ih": torch.zeros(4, 24)},
        ValueError,
        r"logits_ih must have shape \[24, 4\] or \[1, 24, 4\], not \[4, 24\]",
    ),
    ({"logits_hh": L}, ValueError, r"logits_hh must have shape \[2, 24, 6\], not \[2, 24, 4\]"),
    ({"logits_ih": L.double()}, TypeError, r"logits_ih must be torch\.float32, not torch\.float64"),
    ({"bias_ih": torch.zeros(6)}, ValueError, r"bias_ih must have shape \[24\], not \[6\]"),
    ({"bias_logits_ih": torch.zeros(2, 24)}, ValueError, r"bias_logits_ih must come with its bias"),
    ({"h0": torch.zeros(8, 5)}, ValueError, r"h0 must have shape \[8, 6\]"),
    ({"c0": torch.zeros(1, 8, 6)}, ValueError, r"c0 must have shape \[8, 6\]"),
    ({"lengths": torch.ones(8)}, TypeError, r"lengths must be torch\.int64, not torch\.float32"),
    ({"lengths": torch.ones(3).long()}, ValueError, r"lengths must have shape \[8\]"),
    ({"lengths": torch.tensor([3, -1] * 4)}, ValueError, r"lengths must be from 0 to 3, .*not -1"),
    ({"lengths": torch.tensor([3, 4] * 4)}, ValueError, r"lengths must be from 0 to 3, .*not 4"),
    ({"lengths": [3] * 8}, TypeError, r"lengths must be a tensor, not list"),
    ({"bias_ih": 1.0}, TypeError, r"bias_ih must be a tensor, not float"),
    ({"samples": 1.5}, TypeError, r"samples must be an integer, not 1\.5"),
    ({"weight_hh": V.to("meta")}, ValueError, r"weight_hh is on meta, but x is on cpu"),
    ({"seed": torch.zeros(3).long()}, ValueError, r"seed must have shape \[\] or \[2\]"),
    ({"tensor_ids": (1, 2)}, ValueError, r"tensor_ids must be four numbers, not \(1, 2\)"),
    ({"tensor_ids": (1, 2, 3, -1)}, ValueError, r"tensor_id must be in \[0, 2\*\*32\), not -1"),
    ({"x": None}, TypeError, r"x must be a tensor, not NoneType"),
    ({"samples": 0}, ValueError, r"samples must be at least 1, not 0"),
    ({"tau": -1.0}, ValueError, r"tau must be positive and finite"),
    ({"estimator": "gumbel"}, ValueError, r"estimator: expected one of .*, got 'gumbel'"),
    ({"estimator": 3}, TypeError, r"estimator: expected a name or an Estimator, got int"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_bad_input(change, kind, message):
    arguments = {
        **{"x": X, "weight_ih": W, "weight_hh": V, "logits_ih": L, "logits_hh": M},
        **{"seed": torch.tensor(3), "samples": 2},
    }
    ops.masked_lstm(**arguments)
    with pytest.raises(kind, match=message):
        ops.masked_lstm(**{**arguments, **change})
