import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

import modmask_kernels as mm
from modmask_kernels import MaskedMultiheadAttention, ops

OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 6, "vdim": 10},
    "all": {"kdim": 6, "vdim": 10, "add_bias_kv": True, "add_zero_attn": True},
}
L, S, N, E, H = 3, 5, 12, 8, 2


def pair(options, seed=0, **mask_options):
    """A plain layer with random biases, and a masked one over a copy of it."""
    torch.manual_seed(seed)
    plain = nn.MultiheadAttention(E, H, **options)
    for p in plain.parameters():
        nn.init.normal_(p, std=0.5)
    layer = MaskedMultiheadAttention.from_dense(copy.deepcopy(plain), **mask_options)
    return plain, layer


def inputs_of(plain, batch_first, kind="cross"):
    q = torch.randn(L, N, E)
    if kind == "self":
        k = v = q
    else:
        k = torch.randn(S, N, plain.kdim)
        v = k if kind == "memory" else torch.randn(S, N, plain.vdim)
    if batch_first:
        swapped = {id(t): t.transpose(0, 1) for t in (q, k, v)}
        q, k, v = (swapped[id(t)] for t in (q, k, v))
    return q, k, v


def group_masks(layer, sets, samples, g):
    return {
        name: layer.get_parameter(name)
        * ops.sample_mask(
            layer.logits_of(name),
            seed=layer.seed,
            samples=samples,
            tensor_id=layer.tensor_ids[name],
            hard=layer.mode == "sample",
        )[g % samples, g // samples]
        for name in layer.masked
    }


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("batch_first", [False, True])
class TestOptions:
    @pytest.mark.parametrize("mask_bias", [False, True])
    @pytest.mark.parametrize("need_weights", [False, True])
    def test_groups_see_the_masks_of_their_set_and_sample(
        self, name, batch_first, mask_bias, need_weights
    ):
        options = {**OPTIONS[name], "batch_first": batch_first}
        plain, layer = pair(options, sets=2, samples=3, mask_bias=mask_bias, tensor_id=4)
        with torch.no_grad():
            for leaf in layer.masked:
                layer.logits_of(leaf).normal_()
        layer.seed = torch.tensor([11, -12])
        kinds = ["cross"] if plain.kdim != E else ["self", "memory", "cross"]
        for kind in kinds:
            for mode in ("sample", "soft"):
                layer.mode = mode
                q, k, v = inputs_of(plain, batch_first, kind)
                ys, weights = [], []
                dim = 0 if batch_first else 1
                for g, part in enumerate(zip(*(t.chunk(6, dim) for t in (q, k, v)), strict=True)):
                    y, w = functional_call(
                        plain, group_masks(layer, 2, 3, g), part, {"need_weights": need_weights}
                    )
                    ys.append(y)
                    weights.append(w)
                y, w = layer(q, k, v, need_weights=need_weights)
                torch.testing.assert_close(y, torch.cat(ys, dim))
                if need_weights:
                    torch.testing.assert_close(w, torch.cat(weights))
                else:
                    assert w is None

    @pytest.mark.parametrize("training", [False, True])
    def test_kept_weights_give_the_plain_layer(self, name, batch_first, training):
        options = {**OPTIONS[name], "batch_first": batch_first}
        plain, layer = pair(options, samples=4, mask_bias=name != "no bias", init=100.0)
        plain.train(training), layer.train(training)
        q, k, v = inputs_of(plain, batch_first)
        causal = torch.ones(L, S, dtype=torch.bool).triu(1)
        padding = torch.zeros(N, S, dtype=torch.bool)
        padding[2, 3:] = True
        calls = [
            {},
            {"need_weights": False},
            {"average_attn_weights": False},
            {"attn_mask": causal},
            {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
            {"attn_mask": torch.randn(N * H, L, S), "key_padding_mask": torch.randn(N, S)},
            {"attn_mask": torch.randn(L, S), "need_weights": False},
            {"key_padding_mask": padding, "need_weights": False},
        ]
        if "add_zero_attn" not in options:
            calls.append({"attn_mask": causal, "is_causal": True, "need_weights": False})
        for mode in ("sample", "soft", "threshold", "off"):
            layer.mode = mode
            for call in calls:
                expected, got = plain(q, k, v, **call), layer(q, k, v, **call)
                torch.testing.assert_close(got[0], expected[0])
                assert got[0].shape == expected[0].shape
                if expected[1] is None:
                    assert got[1] is None
                else:
                    torch.testing.assert_close(got[1], expected[1])
        with torch.no_grad():
            layer.mode = "threshold"
            single = [t[0] if batch_first else t[:, 0] for t in (q, k, v)]
            for got, expected in zip(
                layer(*single, key_padding_mask=padding[2]),
                plain(*single, key_padding_mask=padding[2]),
                strict=True,
            ):
                torch.testing.assert_close(got, expected)

    def test_gradients_are_those_of_the_groups(self, name, batch_first):
        options = {**OPTIONS[name], "batch_first": batch_first}
        plain, layer = pair(options, samples=2, mask_bias=True)
        layer.mode, layer.seed = "sample", torch.tensor([5])
        plain.requires_grad_(False)
        q, k, v = inputs_of(plain, batch_first)
        dim = 0 if batch_first else 1
        gradients = []
        for fused in (True, False):
            leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
            for leaf in layer.masked:
                layer.logits_of(leaf).grad = None
            if fused:
                y = layer(*leaves, need_weights=False)[0]
            else:
                parts = zip(*(t.chunk(2, dim) for t in leaves), strict=True)
                y = torch.cat(
                    [
                        functional_call(plain, group_masks(layer, 1, 2, g), part)[0]
                        for g, part in enumerate(parts)
                    ],
                    dim,
                )
            y.square().sum().backward()
            gradients.append(
                [t.grad for t in leaves] + [layer.logits_of(n).grad for n in layer.masked]
            )
        assert all(p.grad is None for n, p in layer.named_parameters() if "_logits" not in n)
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    def test_state_dicts_fit_the_plain_layer(self, name, batch_first):
        options = {**OPTIONS[name], "batch_first": batch_first}
        plain, layer = pair(options, mask_bias=True)
        assert [n for n in layer.state_dict() if "_logits" not in n] == list(plain.state_dict())
        made = MaskedMultiheadAttention(E, H, **options)
        missing = made.load_state_dict(plain.state_dict(), strict=False).missing_keys
        assert missing
        assert all(n.endswith("_logits") for n in missing)
        plain.load_state_dict(
            {n: t for n, t in made.state_dict().items() if not n.endswith("_logits")}
        )
        made.load_state_dict(made.state_dict())

    def test_dense_copies_have_the_mask_multiplied_in(self, name, batch_first):
        options = {**OPTIONS[name], "batch_first": batch_first}
        plain, layer = pair(options, mask_bias=True)
        with torch.no_grad():
            for leaf in layer.masked:
                layer.logits_of(leaf).normal_()
        dense = layer.to_dense()
        assert type(dense) is nn.MultiheadAttention
        layer.mode = "threshold"
        q, k, v = inputs_of(plain, batch_first)
        torch.testing.assert_close(layer(q, k, v)[0], dense(q, k, v)[0])
        kept = layer.logits_of("out_proj.weight")[0] > 0
        assert torch.equal(dense.out_proj.weight, plain.out_proj.weight * kept)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    def forward(self, x, memory):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.network(memory, x, tgt_mask=mask, tgt_is_causal=True)


def test_a_transformer_is_masked_learned_baked_and_restored():
    torch.manual_seed(0)
    model = Network()
    inner = model.network.encoder.layers[0].self_attn
    state = copy.deepcopy(model.state_dict())
    x, memory = torch.randn(8, 3, 8), torch.randn(8, 4, 8)
    expected = model(x, memory)
    mm.mask_model(model, sets=["a", "b"], samples=2)
    names = list(mm.MaskSet.from_model(model))
    assert set(names) == {n for n in state if n.endswith("weight") and "norm" not in n}
    assert "network.decoder.layers.0.multihead_attn.in_proj_weight" in names
    mm.use_set(model, "a")
    for training in (True, False):
        model.train(training)
        with mm.set_mode(model, "threshold"), torch.no_grad():
            torch.testing.assert_close(model(x, memory), expected)
    mm.use_set(model, None)

    def data(step, generator):
        shapes = (4, 3, 8), (4, 4, 8)
        return (tuple(torch.randn(shape, generator=generator) for shape in shapes),)

    result = mm.learn_masks(
        model,
        lambda y, batch: y.square().mean(),
        {"a": data, "b": data},
        3,
        lr=0.7,
        progress=False,
    )
    masks = result.masks["a"]
    mm.use_set(model, "a")
    with mm.set_mode(model, "threshold"), torch.no_grad():
        torch.testing.assert_close(masks.bake(model).eval()(x, memory), model.eval()(x, memory))
    mm.unmask_model(model)
    assert model.network.encoder.layers[0].self_attn is inner
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_the_encoder_shortcut_does_not_skip_masks():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=True
    ).eval()
    mm.mask_model(encoder, filter=lambda name, m: isinstance(m, nn.MultiheadAttention))
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if name.endswith("_logits"):
                p.normal_()
    x, padding = torch.randn(4, 5, 8), torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 2:] = True
    baked = mm.MaskSet.from_model(encoder).bake(encoder).train()
    for module in baked.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in baked.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    with torch.no_grad():
        for options in ({}, {"src_key_padding_mask": padding}):
            torch.testing.assert_close(encoder(x, **options), baked(x, **options))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_behave_as_the_original(how):
    _, layer = pair({}, samples=2)
    layer.seed = torch.tensor([3])
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    x = torch.randn(L, N, E)
    assert torch.equal(layer(x, x, x)[0], other(x, x, x)[0])


def test_a_hand_made_layer_can_be_unmasked():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": MaskedMultiheadAttention(E, H, mask_bias=True, add_bias_kv=True)})
    names = [n for n in model.state_dict() if not n.endswith("_logits")]
    weight = model["a"].in_proj_weight
    mm.unmask_model(model)
    assert type(model["a"]) is nn.MultiheadAttention
    assert list(model.state_dict()) == names
    assert model["a"].in_proj_weight is weight
    x = torch.randn(L, N, E)
    assert model["a"](x, x, x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    plain, layer = pair({}, samples=2, init=100.0)
    plain, layer = plain.to(dtype), layer.to(dtype)
    assert layer.out_proj.weight_logits.dtype == torch.float32
    x = torch.randn(L, N, E, dtype=dtype)
    torch.testing.assert_close(layer(x, x, x)[0], plain(x, x, x)[0])


def test_autocast():
    plain, layer = pair({}, samples=2, init=100.0)
    x = torch.randn(L, N, E)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = layer(x, x, x)[0], plain(x, x, x)[0]
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


def test_compiles_as_one_graph():
    _, layer = pair({"add_bias_kv": True}, samples=2, mask_bias=True)
    layer.seed = torch.tensor([5])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    q, k = torch.randn(L, N, E), torch.randn(S, N, E)
    torch.testing.assert_close(compiled(q, k, k)[0], layer(q, k, k)[0])


def test_dropout_follows_training():
    torch.manual_seed(0)
    layer = MaskedMultiheadAttention(E, H, dropout=0.5, init=100.0)
    x = torch.randn(L, N, E)
    for need_weights in (False, True):
        call = lambda: layer(x, x, x, need_weights=need_weights)[0]  # noqa: E731, B023
        layer.train()
        assert not torch.equal(call(), call())
        layer.eval()
        assert torch.equal(call(), call())


def test_an_empty_batch_and_no_keys():
    layer = MaskedMultiheadAttention(E, H, samples=2, mask_bias=True, add_bias_kv=True)
    x = torch.randn(L, 0, E)
    assert layer(x, x, x)[0].shape == (L, 0, E)
    assert layer(x, x, x, attn_mask=torch.zeros(L, L))[0].shape == (L, 0, E)
    q, k = torch.randn(L, 2, E), torch.randn(0, 2, E)
    assert layer(q, k, k)[0].isfinite().all()


def test_the_constructor_is_that_of_the_plain_layer():
    torch.manual_seed(3)
    plain = nn.MultiheadAttention(E, H, 0.1, True, True, True, 6, 10, True)
    torch.manual_seed(3)
    layer = MaskedMultiheadAttention(E, H, 0.1, True, True, True, 6, 10, True, tensor_id=7)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, layer.state_dict()[name])
    assert layer.tensor_ids == {
        "q_proj_weight": 7,
        "k_proj_weight": 8,
        "v_proj_weight": 9,
        "out_proj.weight": 10,
    }
    assert "kdim=6" in repr(layer)
    assert "samples=1" in repr(layer)


def test_wrong_uses_are_named():
    with pytest.raises(ValueError, match="num_heads: expected a divisor of embed_dim=8, got 3"):
        MaskedMultiheadAttention(8, 3)
    with pytest.raises(ValueError, match="mask_bias: expected False"):
        MaskedMultiheadAttention(8, 2, bias=False, mask_bias=True)
    with pytest.raises(TypeError, match=r"attention: expected a torch.nn.MultiheadAttention"):
        MaskedMultiheadAttention.from_dense(nn.Linear(2, 2))
    layer = MaskedMultiheadAttention(8, 2, samples=4)
    x = torch.randn(3, 8, 8)
    with pytest.raises(ValueError, match="does not divide into 1 sets"):
        layer(x[:, :6], x[:, :6], x[:, :6])
    with pytest.raises(ValueError, match=r"key: expected shape \[..., 8\]"):
        layer(x, x[..., :4], x)
    with pytest.raises(ValueError, match="value: expected length and batch of key"):
        layer(x, x, x[:2])
    with pytest.raises(ValueError, match="key: expected a batch of 8"):
        layer(x, x[:, :4], x[:, :4])
    with pytest.raises(ValueError, match=r"attn_mask: expected shape \[3, 3\] or \[16, 3, 3\]"):
        layer(x, x, x, attn_mask=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"key_padding_mask: expected shape \[8, 3\]"):
        layer(x, x, x, key_padding_mask=torch.zeros(3, 8))
    with pytest.raises(TypeError, match=r"attn_mask: expected bool or floating point"):
        layer(x, x, x, attn_mask=torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="attn_mask: expected the causal mask beside is_causal"):
        layer(x, x, x, is_causal=True)
    with pytest.raises(TypeError, match="query: expected a dense tensor, got NoneType"):
        layer(None, x, x)


@pytest.mark.parametrize("granularity", ["weight", "row"])
@pytest.mark.parametrize("kind", ["self", "memory", "cross"])
def test_top_k_ranks_the_whole_projection(kind, granularity):
    plain, layer = pair({}, granularity=granularity)
    layer.estimator = ops.estimators.top_k(0.3)
    with torch.no_grad():
        for leaf in layer.masked:
            layer.logits_of(leaf).normal_()
    for mode in ("sample", "threshold"):
        layer.mode = mode
        inputs = inputs_of(plain, False, kind)
        y, _ = layer(*inputs)
        torch.testing.assert_close(y, layer.to_dense()(*inputs)[0])
    y.sum().backward()
    assert all(bool(layer.logits_of(leaf).grad.any()) for leaf in layer.masked)
