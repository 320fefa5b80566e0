"""`top_k_mask` against a stable sort, and what it needs."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modmask_kernels import ops
from modmask_kernels.ops.top_k_mask import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def scores_of(*shapes, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def check(scores, k, largest=True):
    masks = ops.top_k_mask(scores, k, largest=largest)
    expected = reference.top_k_mask(scores, k, largest)
    for mask, wanted in zip(masks, expected, strict=True):
        assert mask.dtype == torch.bool
        assert torch.equal(mask, wanted)
    assert sum(int(mask.sum()) for mask in masks) == k
    packed = ops.top_k_mask(scores, k, largest=largest, packed=True)
    for bits, wanted in zip(packed, expected, strict=True):
        assert torch.equal(bits, ops.pack_bits(wanted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [True, False])
def test_over_several_tensors(dtype, largest, capability):
    scores = scores_of((7, 11), (1,), (0, 3), (130,), (2, 3, 65), (), dtype=dtype)
    total = sum(t.numel() for t in scores)
    for k in (0, 1, 2, 100, total // 2, total - 1, total):
        check(scores, k, largest)


@pytest.mark.parametrize("largest", [True, False])
def test_more_scores_than_a_thread_takes_at_once(largest, capability, threads):
    scores = scores_of((300, 1000), (513, 129), (70_001,))
    total = sum(t.numel() for t in scores)
    for n in (1, 2, 5):
        threads(n)
        for k in (1, 12_345, total // 3, total - 7):
            check(scores, k, largest)


@pytest.mark.parametrize("values", [2, 3, 50])
def test_of_equal_scores_the_first_are_kept(values, capability, threads):
    g = torch.Generator().manual_seed(values)
    scores = [torch.randint(values, shape, generator=g).float() for shape in ((400, 700), (9,))]
    for n in (1, 3):
        threads(n)
        for k in (1, 5, 99_999, 200_000, 280_008):
            check(scores, k)


def test_special_values(capability):
    inf = float("inf")
    row = torch.tensor([0.0, -0.0, inf, -inf, 1e-45, -1e-45, 3.4e38, -3.4e38, 0.0, -0.0, inf, -inf])
    for k in range(13):
        for largest in (True, False):
            check([row], k, largest)
    assert ops.top_k_mask(torch.tensor([-0.0, 0.0]), 1).tolist() == [True, False]
    assert ops.top_k_mask(torch.tensor([-0.0, 0.0]), 1, largest=False).tolist() == [True, False]


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    values=st.lists(
        st.lists(st.floats(width=32, allow_nan=False), max_size=70), min_size=1, max_size=4
    ),
    data=st.data(),
)
def test_any_scores(values, data):
    scores = [torch.tensor(row, dtype=torch.float32) for row in values]
    check(scores, data.draw(st.integers(0, sum(map(len, values)))), data.draw(st.booleans()))


def test_layout_changes_nothing(capability):
    (scores,) = scores_of((40, 50))
    mask = ops.top_k_mask(scores, 321)
    assert torch.equal(ops.top_k_mask(scores.t(), 321).t(), mask)
    assert torch.equal(ops.top_k_mask(scores.repeat(1, 2)[:, :50], 321), mask)


def test_inputs_stay_and_no_gradient_comes():
    (scores,) = scores_of((40, 50))
    kept = scores.clone()
    mask = ops.top_k_mask(scores.requires_grad_(), 100)
    assert torch.equal(scores, kept)
    assert not mask.requires_grad


def test_compiles_as_one_graph():
    scores = scores_of((30, 40), (7,))

    def call(first, second):
        return ops.top_k_mask([first * 2, second], 100)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(*scores), call(*scores), strict=True):
        assert torch.equal(ours, expected)


def test_opcheck_and_meta_device():
    scores = scores_of((5, 6), (9,))
    torch.library.opcheck(torch.ops.modmask.top_k_mask.default, (scores, 7, True, False))
    torch.library.opcheck(torch.ops.modmask.top_k_mask.default, (scores, 7, False, True))
    meta = ops.top_k_mask([t.to("meta") for t in scores], 7)
    assert [m.shape for m in meta] == [t.shape for t in scores]
    assert all(m.is_meta for m in meta)


X = torch.zeros(3, 4)
BAD = [
    (([], 0), {}, ValueError, r"scores must hold at least one tensor"),
    ((X, 13), {}, ValueError, r"k must be from 0 to the number of scores, 12, not 13"),
    ((X, -1), {}, ValueError, r"k must be from 0 to the number of scores, 12, not -1"),
    ((X, 1.5), {}, TypeError, r"k must be an integer, not 1\.5"),
    ((X, "1"), {}, TypeError, r"k must be an integer, not '1'"),
    ((X.long(), 1), {}, TypeError, r"scores must be float32, .* not torch\.int64"),
    (([X, X.half()], 1), {}, TypeError, r"scores must have one dtype, .*scores\[1\]"),
    (([X, X.to("meta")], 1), {}, ValueError, r"scores\[1\] is on meta, but scores\[0\] is on cpu"),
    (([X, None], 1), {}, TypeError, r"scores\[1\] must be a tensor, not NoneType"),
    (([X, X * float("nan")], 1), {}, ValueError, r"must not hold NaN, but scores\[1\] does"),
    ((X.double() * float("nan"), 1), {}, ValueError, r"must not hold NaN, but scores\[0\] does"),
]


@pytest.mark.parametrize(("arguments", "options", "kind", "message"), BAD)
def test_bad_input(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        ops.top_k_mask(*arguments, **options)
