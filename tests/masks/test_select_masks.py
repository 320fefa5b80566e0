"""Whole models in which every row names its own mask set."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import modmask_kernels as mm
from modmask_kernels.nn import SelectAny, SelectConv2d, SelectLinear


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, stride=2, groups=2, bias=False),
        )
        self.head = nn.Linear(6 * 9, 5)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0), 2
        )
        self.out = nn.Linear(16, 20)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        return self.out(self.encoder(self.embedding(x)))


def of_model(kind):
    torch.manual_seed(0)
    if kind == "images":
        return Images().eval(), torch.randn(7, 3, 8, 8)
    if kind == "words":
        return Words().eval(), torch.randint(20, (7, 5))
    if kind == "sound":
        return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 8, 3)).eval(), (
            torch.randn(7, 2, 10)
        )
    return nn.Linear(6, 4), torch.randn(7, 6)


KINDS = ["images", "words", "sound", "linear"]
NAMES = ["a", "b", "c"]
ROWS = ["b", "a", "a", "c", "b", "a", "c"]


def random_masks(model, names=None):
    g = torch.Generator().manual_seed(1)
    masked = names or [n for n, p in model.named_parameters() if p.dim() > 1]
    return {
        name: mm.MaskSet.from_dict(
            {n: torch.rand(model.get_parameter(n).shape, generator=g) < 0.7 for n in masked}
        )
        for name in NAMES
    }


def one_by_one(model, masks, x, rows=ROWS):
    baked = {name: masks[name].bake(model) for name in NAMES}
    return torch.cat([baked[s](x[r : r + 1]) for r, s in enumerate(rows)])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_see_their_sets(kind):
    model, x = of_model(kind)
    masks = random_masks(model)
    chosen = mm.select_masks(model, masks)
    expected = one_by_one(model, masks, x)
    with mm.use_sets(chosen, ROWS):
        assert torch.allclose(chosen(x), expected, atol=1e-5)
    with mm.use_sets(chosen, torch.tensor([NAMES.index(s) for s in ROWS])):
        assert torch.allclose(chosen(x), expected, atol=1e-5)
    with mm.use_sets(chosen, "b"):
        assert torch.allclose(chosen(x), masks["b"].bake(model)(x), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_masked_model_brings_its_own_sets(kind):
    model, x = of_model(kind)
    masked = mm.mask_model(model, sets=NAMES)
    for n, logits in masked.named_parameters():
        if n.endswith("_logits"):
            logits.normal_(generator=torch.Generator().manual_seed(len(n)))
    before = {n: p.requires_grad for n, p in masked.named_parameters()}
    chosen = mm.select_masks(masked)
    expected = []
    mm.set_mode(masked, "threshold")
    for r, s in enumerate(ROWS):
        with mm.use_set(masked, s):
            expected.append(masked(x[r : r + 1]))
    with mm.use_sets(chosen, ROWS):
        assert torch.allclose(chosen(x), torch.cat(expected), atol=1e-5)
    assert {n: p.requires_grad for n, p in masked.named_parameters()} == before
    assert not any("logits" in n for n, _ in chosen.named_parameters())


def test_layers_are_fused_where_they_can_be():
    chosen = mm.select_masks(of_model("images")[0], random_masks(of_model("images")[0]))
    assert isinstance(chosen.body[0], SelectConv2d)
    assert isinstance(chosen.head, SelectLinear)
    words = mm.select_masks(of_model("words")[0], random_masks(of_model("words")[0]))
    layer = words.encoder.layers[0]
    assert isinstance(layer.linear1, SelectLinear)
    assert isinstance(layer.self_attn, SelectAny)
    assert layer.self_attn.masked == ("in_proj_weight", "out_proj.weight")
    assert "sets=['a', 'b', 'c']" in repr(chosen)
    assert "in_features=54, out_features=5" in repr(chosen.head)


def test_explain_names_every_layer_that_selects():
    chosen = mm.select_masks(of_model("images")[0], random_masks(of_model("images")[0]))
    lines = mm.explain(chosen).splitlines()
    backend = mm.explain(torch.zeros(1)).split(" ")[0]
    assert [line.split(" (")[0] for line in lines] == [
        f"{name}: {backend}" for name in ("body.0", "body.3", "head")
    ]
    words = mm.select_masks(of_model("words")[0], random_masks(of_model("words")[0]))
    found = dict(line.split(": ", 1) for line in mm.explain(words).splitlines())
    assert found["encoder.layers.0.self_attn"].startswith("general path (once per set")
    assert found["encoder.layers.1.linear2"].startswith(backend)
    turned = nn.ConvTranspose2d(3, 4, 2)
    assert mm.explain(mm.select_masks(turned, random_masks(turned))).startswith(
        "(root): general path (once per set"
    )


@pytest.mark.parametrize("dims", [1, 2])
@torch.no_grad()
def test_transposed_convolutions_run_once_per_set(dims):
    torch.manual_seed(0)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1]
    model = kind(4, 6, 3, stride=2, groups=2)
    x = torch.randn(7, 4, *(5, 4)[:dims])
    masks = random_masks(model, ["weight", "bias"])
    chosen = mm.select_masks(model, masks)
    assert isinstance(chosen, SelectAny)
    with mm.use_sets(chosen, ROWS):
        assert torch.allclose(chosen(x), one_by_one(model, masks, x), atol=1e-5)


def test_parameters_are_shared_and_the_model_stays():
    model, _ = of_model("images")
    state = copy.deepcopy(model.state_dict())
    chosen = mm.select_masks(model, random_masks(model))
    for name, parameter in model.named_parameters():
        assert chosen.get_parameter(name) is parameter
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(m, SelectLinear) for m in model.modules())


def test_a_hundred_sets_need_one_bit_per_weight():
    """12.5 MiB + 1% for 100 sets over 1024 x 1024 weights, beside the weight."""
    model = nn.Linear(1024, 1024)
    bits = torch.randint(256, (100, 1024 * 1024 // 8), dtype=torch.uint8)
    layer = SelectLinear.from_dense(model, {"weight": bits})
    size = {t.data_ptr(): t.untyped_storage().nbytes() for t in layer.state_dict().values()}
    weight, bias = 4 * 1024 * 1024, 4 * 1024
    assert sum(size.values()) - weight - bias <= 12.5 * 2**20 * 1.01
    size_of_file = io.BytesIO()
    torch.save(layer.state_dict(), size_of_file)
    assert size_of_file.tell() - weight <= 12.5 * 2**20 * 1.01


@torch.no_grad()
def test_time_major_and_recurrent_models():
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(5, 6, 2)
            self.out = nn.Linear(6, 3)

        def forward(self, x):
            y, (h, c) = self.rnn(x)
            return self.out(y) + h[-1].sum(-1)[None, :, None] + c[0].sum(-1)[None, :, None]

    model = Recurrent()
    x = torch.randn(4, 7, 5)
    masks = random_masks(model)
    chosen = mm.select_masks(model, masks, batch_dim=1)
    baked = {name: masks[name].bake(model) for name in NAMES}
    expected = torch.cat([baked[s](x[:, r : r + 1]) for r, s in enumerate(ROWS)], 1)
    with mm.use_sets(chosen, ROWS):
        assert torch.allclose(chosen(x), expected, atol=1e-5)


@torch.no_grad()
def test_attention_with_its_masks_and_norms():
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0).eval()  # time-major
    masks = random_masks(model, [n for n, _ in model.named_parameters()])
    chosen = mm.select_masks(model, masks, batch_dim=1)
    assert isinstance(chosen.norm1, SelectAny)
    target, memory = torch.randn(4, 7, 8), torch.randn(5, 7, 8)
    padding = torch.zeros(7, 5, dtype=torch.bool)
    padding[2, 3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    options = {"tgt_mask": causal, "memory_key_padding_mask": padding}
    baked = {name: masks[name].bake(model) for name in NAMES}
    rows = [
        baked[s](
            target[:, r : r + 1],
            memory[:, r : r + 1],
            tgt_mask=causal,
            memory_key_padding_mask=padding[r : r + 1],
        )
        for r, s in enumerate(ROWS)
    ]
    with mm.use_sets(chosen, ROWS):
        assert torch.allclose(chosen(target, memory, **options), torch.cat(rows, 1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_dtypes(dtype):
    model, x = of_model("images")
    model, x = model.to(dtype), x.to(dtype)
    masks = random_masks(model)
    chosen = mm.select_masks(model, masks)
    with mm.use_sets(chosen, ROWS):
        y = chosen(x)
    assert y.dtype == dtype
    exact = one_by_one(copy.deepcopy(model).double(), masks, x.double())
    assert torch.allclose(y.double(), exact, atol=1e-9 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
@torch.no_grad()
def test_copies_behave_as_the_original(how):
    model, x = of_model("images")
    chosen = mm.select_masks(model, random_masks(model))
    if how == "deepcopy":
        other = copy.deepcopy(chosen)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(chosen))
    else:
        ones = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
        ones = {n: ones[n] for n in random_masks(model)["a"].names}
        plain = {name: mm.MaskSet.from_dict(ones) for name in NAMES}
        other = mm.select_masks(copy.deepcopy(model), plain)
        other.load_state_dict(chosen.state_dict())
    with mm.use_sets(chosen, ROWS), mm.use_sets(other, ROWS):
        assert torch.equal(chosen(x), other(x))


@torch.no_grad()
def test_compiles_as_one_graph():
    model, _ = of_model("images")
    chosen = mm.select_masks(model, random_masks(model))
    compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (ROWS, ROWS[::-1], ROWS[:3]):
        x = torch.randn(len(rows), 3, 8, 8)
        with mm.use_sets(compiled, rows):
            assert torch.allclose(compiled(x), chosen(x))


@torch.no_grad()
def test_hooks_move_along_and_the_choice_is_restored():
    model, x = of_model("linear")
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    chosen = mm.select_masks(model, random_masks(model))
    mm.use_sets(chosen, "a")
    with mm.use_sets(chosen, ROWS):
        chosen(x)
    assert seen == [1]
    assert int(chosen.row_sets) == 0


def test_wrong_uses_are_named():
    model, x = of_model("linear")
    masks = random_masks(model)
    chosen = mm.select_masks(model, masks)
    with pytest.raises(RuntimeError, match=r"no mask sets chosen: .*use_sets"):
        chosen(x)
    with pytest.raises(ValueError, match=r"set: expected one of \['a', 'b', 'c'\].*got 'd'"):
        mm.use_sets(chosen, ["a", "d"])
    with pytest.raises(ValueError, match="use select_masks"):
        mm.use_sets(model, ROWS)
    with pytest.raises(TypeError, match="row_sets: expected an int64 tensor"):
        mm.use_sets(chosen, torch.zeros(7))
    with pytest.raises(ValueError, match=r"row_sets: expected one set per row, got \[7, 1\]"):
        mm.use_sets(chosen, torch.zeros(7, 1, dtype=torch.int64))
    with (
        mm.use_sets(chosen, ROWS[:3]),
        pytest.raises(ValueError, match=r"row_sets must have shape \[7\].*not \[3\]"),
    ):
        chosen(x)
    for wrong, got in (([masks["a"]], "list"), (masks["a"], "MaskSet")):
        with pytest.raises(TypeError, match=f"masks: expected a mapping .*MaskSets, got {got}$"):
            mm.select_masks(model, wrong)
    with pytest.raises(TypeError, match=r"masks\['b'\]: expected a MaskSet, got str"):
        mm.select_masks(model, {"b": "file"})
    with pytest.raises(ValueError, match="masks: expected at least one set"):
        mm.select_masks(model, {})
    with pytest.raises(ValueError, match="found none; use mask_model"):
        mm.select_masks(model)
    other = random_masks(model, ["weight", "bias"])
    with pytest.raises(ValueError, match=r"masks\['b'\]: .* 'a', .*bias"):
        mm.select_masks(model, {"a": masks["a"], "b": other["b"]})
    with pytest.raises(ValueError, match="no parameter 'weight'"):
        mm.select_masks(nn.Sequential(nn.Linear(6, 4)), masks)
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Linear, got Conv2d"):
        SelectLinear.from_dense(nn.Conv2d(1, 1, 1), {})
    with pytest.raises(ValueError, match=r"masks\['weight'\]: expected uint8 \[2, 3\]"):
        SelectLinear.from_dense(model, {"weight": torch.zeros(2, 4, dtype=torch.uint8)})
    lstm = nn.LSTM(3, 3)
    chosen = mm.select_masks(lstm, random_masks(lstm))
    packed = nn.utils.rnn.pack_sequence([torch.zeros(2, 3), torch.zeros(1, 3)])
    with mm.use_sets(chosen, ["a", "b"]), pytest.raises(TypeError, match="PackedSequence"):
        chosen(packed)
