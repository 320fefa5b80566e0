"""The whole of `masked_linear` as on a GPU, its CUDA kernels run on the CPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mask_arguments import bytes_of, mask_arguments, top_k_cuts
from ops.tolerance import check_close

from modmask_kernels import _native, ops
from modmask_kernels.ops import _gpu, _gpu_masks, estimators
from modmask_kernels.ops.masked_linear import gpu, reference

SETS, SAMPLES = 2, 2


@pytest.fixture
def operation(simt, monkeypatch):
    """(forward, backward) for CPU tensors, by the CUDA kernels only."""

    def drawn(logits, seed, draw):
        tensor_id, bias_id, offset, element, samples, tau, hard, code, *rule, antithetic = draw
        arguments = mask_arguments(
            logits,
            seed,
            samples=samples,
            tau=tau,
            tensor_id=tensor_id,
            sample_offset=offset,
            element_offset=element,
            estimator=estimators.of_arguments(code, *rule),
            antithetic=antithetic,
        )
        return {**arguments, "hard": hard, "bias_tensor_id": bias_id}

    def layer(weight, logits, seed, words, draw):
        # of masks by top_k only the slope is asked for, that of a threshold
        decided = draw[7] == estimators.NAMES.index("top_k")
        code = estimators.NAMES.index("threshold") if decided else draw[7]
        given = drawn(logits, seed, (*draw[:7], code, *draw[8:]))
        stride = 0 if words is None else words.shape[2] * 4
        return {
            **given,
            "hard": draw[6] or words is not None,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "in": weight.shape[1],
            "out": weight.shape[0],
            "weight": bytes_of(weight),
            "logits": bytes_of(logits.contiguous()),
            "bits": None if words is None else words.numpy().view(np.uint8),
            "set_stride": 0 if words is None else words.shape[1] * stride,
            "sample_stride": stride,
        }

    def mask_words(logits, seed, shape, samples, tensor_id, offset, element, *rest):
        *rule, n_of_m = rest
        arguments = mask_arguments(
            logits,
            seed,
            samples=samples,
            tensor_id=tensor_id,
            sample_offset=offset,
            element_offset=element,
            estimator=estimators.of_arguments(*rule[:-1]),
            antithetic=rule[-1],
            n_of_m=tuple(n_of_m) or None,
        )
        masks = logits.shape[0] * arguments["samples"]

        def empty(count):
            return np.full((masks, (count + 31) // 32 * 4 + 64), 0xAA, np.uint8)

        count, whole = logits[0].numel(), math.prod(shape)
        small = empty(count)
        stride = small.shape[1]
        device = simt.Device()
        device.run(
            "sample_bits",
            **arguments,
            logits=bytes_of(logits),
            bits=small,
            count=count,
            sample_stride=stride,
            set_stride=stride * arguments["samples"],
        )
        if count != whole:
            to = empty(whole)
            device.run(
                "expand_bits",
                whole=np.array([1] * (4 - len(shape)) + list(shape)),
                small=np.array([1] * (4 - len(shape)) + list(logits.shape[1:])),
                to=to,
                to_stride=to.shape[1],
                masks=masks,
                **{"from": small, "from_stride": stride},
            )
            small = to
        return torch.from_numpy(small.view(np.int32)).view(logits.shape[0], -1, small.shape[1] // 4)

    def masked_product(a, weight, logits, bias, bias_logits, seed, words, backward, *draw):
        given = layer(weight, logits, seed, words, draw)
        if bias_logits is not None and draw[7] == estimators.NAMES.index("top_k"):
            given["estimator"] = draw[7]
            given["bias_cuts"] = top_k_cuts(bias_logits, estimators.top_k(draw[8]))
        groups = given["sets"] * given["samples"]
        result = a.new_full((a.shape[0], weight.shape[1 if backward else 0]), 9.0)
        simt.Device().run(
            "masked_linear_dx" if backward else "masked_linear",
            **given,
            rows=a.shape[0] // groups,
            bias=bytes_of(bias),
            bias_logits=bytes_of(bias_logits),
            **{"dy" if backward else "x": bytes_of(a), "dx" if backward else "y": bytes_of(result)},
        )
        return result

    def gradients(dy, x, weight, logits, seed, words, need_weight, need_logits, *draw):
        given = layer(weight, logits, seed, words, draw)
        dweight = torch.full_like(weight, 9.0) if need_weight else None
        shape = (logits.shape[0], *weight.shape)
        dlogits = torch.full(shape, 9.0) if need_logits else None
        simt.Device().run(
            "masked_linear_gradients",
            **given,
            rows=x.shape[0] // (given["sets"] * given["samples"]),
            x=bytes_of(x),
            dy=bytes_of(dy),
            dweight=bytes_of(dweight),
            dlogits=bytes_of(dlogits),
        )
        none = weight.new_empty(0)
        return none if dweight is None else dweight, none if dlogits is None else dlogits

    def bias_gradients(sums, bias, bias_logits, seed, need_bias, need_logits, *draw):
        given = drawn(bias_logits.unsqueeze(1), seed, draw)
        dbias, dlogits = torch.full_like(bias, 9.0), torch.full_like(bias_logits, 9.0)
        simt.Device().run(
            "bias_gradients",
            **given,
            **{"dtype": str(bias.dtype).removeprefix("torch."), "rows": 1, "in": 0},
            out=bias.shape[0],
            sums=bytes_of(sums),
            bias=bytes_of(bias),
            bias_logits=bytes_of(bias_logits),
            bias_cuts=given["cuts"],
            dbias=bytes_of(dbias),
            dbias_logits=bytes_of(dlogits),
        )
        return dbias, dlogits

    monkeypatch.setattr(_gpu, "absent", lambda: "MODMASK_BACKEND=cuda")
    monkeypatch.setattr(_native, "cuda_loaded", lambda: True)
    monkeypatch.setattr(gpu, "runs_on", lambda device: True)
    with torch.library._scoped_library("modmask", "IMPL") as library:
        library.impl("mask_words_cuda", mask_words, "CPU")
        library.impl("masked_product_cuda", masked_product, "CPU")
        library.impl("masked_gradients_cuda", gradients, "CPU")
        library.impl("masked_bias_gradients_cuda", bias_gradients, "CPU")
        yield gpu.unserved, gpu.forward, gpu.backward


RULES = [
    {},
    {"hard": False, "tau": 0.7},
    {"estimator": "hard_concrete"},
    {"estimator": "sigmoid"},
    {"estimator": estimators.threshold(0.3)},
    {"estimator": estimators.top_k(0.4)},
    {"antithetic": True, "sample_offset": 3},
    {"n_of_m": (2, 4)},
    {"seed": None},
    {"seed": torch.tensor([[3, 4], [5, 6]])},
    {"blocks": (2, 4)},
    {"blocks": (1, 12), "estimator": estimators.top_k(0.4)},
    {"blocks": (3, 1), "seed": torch.tensor([[3, 4], [5, 6]]), "antithetic": True},
    {"blocks": (2, 4), "element_offset": 5, "seed": None},
    {"element_offset": 5, "estimator": "hard_concrete"},
]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_whole_operation(operation, rule, rows):
    unserved, forward, backward = operation
    rule = {"seed": torch.tensor([5, -6]), "hard": True, "tau": 1.0, "bias_tensor_id": 7, **rule}
    blocks, n_of_m = rule.pop("blocks", (1, 1)), rule.pop("n_of_m", None)
    outputs, inputs = 6, 24
    g = torch.Generator().manual_seed(rows)

    def random(*shape):
        return torch.randn(*shape, generator=g)

    seed = rule["seed"]
    groups = SETS * (1 if seed is None else SAMPLES * (seed.shape[1] if seed.dim() == 2 else 1))
    operands = [
        random(groups * rows, inputs),
        random(outputs, inputs),
        random(SETS, outputs // blocks[0], inputs // blocks[1]),
        random(outputs),
        random(SETS, outputs),
    ]
    dy = random(groups * rows, outputs)
    rule["estimator"] = estimators.resolve(rule.get("estimator", "gumbel_sigmoid"))
    draw = (
        *(4, rule["bias_tensor_id"], rule.get("sample_offset", 0), rule.get("element_offset", 0)),
        *(SAMPLES, rule["tau"], rule["hard"]),
        *estimators.arguments(rule["estimator"], rule.get("antithetic", False)),
        list(n_of_m or ()),
    )
    assert unserved(*operands, seed, *draw) is None
    y = forward(*operands, seed, *draw)
    ours = [y, *backward(dy, *operands, seed, *draw, *[True] * 5)]

    def expected(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in operands]
        y = reference.masked_linear(
            *leaves,
            **{"sample_offset": 0, "element_offset": 0, **rule},
            tensor_id=4,
            samples=SAMPLES,
            n_of_m=n_of_m,
        )
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    names = ("y", "dx", "dweight", "dlogits", "dbias", "dbias_logits")
    check_close(zip(names, ours, expected(torch.float32), expected(torch.float64), strict=True))


def test_soft_masks_of_blocks_are_refused(operation):
    unserved, *_ = operation
    operands = (torch.ones(2, 4), torch.ones(6, 4), torch.ones(1, 3, 2), None, None, None)
    draw = (0, 1, 0, 0, 1, 1.0, False, *estimators.arguments("gumbel_sigmoid", False), [])
    assert "soft masks of logits smaller than the weight" in unserved(*operands, *draw)


@pytest.mark.parametrize("blocks", [(1, 1), (2, 3), (1, 12), (6, 1)])
def test_words_have_the_bits_of_the_cpu(operation, blocks):
    logits = torch.randn(2, 6 // blocks[0], 36 // blocks[1])
    seed = torch.tensor([1, 2])
    rule = estimators.arguments("gumbel_sigmoid", False)
    masks = _gpu_masks.Masks(logits, None, seed, 3, 4, 1, 0, 3, 1.0, True, *rule)
    words = _gpu_masks.mask_words(masks, torch.Size((6, 36)), [])
    expected = ops.sample_mask(logits, seed=seed, samples=3, tensor_id=3, sample_offset=1)
    expected = expected.repeat_interleave(blocks[0], 2).repeat_interleave(blocks[1], 3)
    for set_ in range(2):
        for k in range(3):
            found = words[set_, k].view(torch.uint8)[: 6 * 36 // 8]
            assert torch.equal(found, ops.pack_bits(expected[k, set_] > 0))
