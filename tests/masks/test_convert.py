import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modmask_kernels.masks import (
    MaskSet,
    mask_model,
    masked_layers,
    set_mode,
    unmask_model,
    use_set,
    weight_hash,
)
from modmask_kernels.nn import MaskedLinear


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.parts = nn.ModuleDict({"up": nn.Linear(width, 2 * width), "act": nn.ReLU()})
        self.downs = nn.ModuleList([nn.Linear(2 * width, width, bias=False)])

    def forward(self, x):
        return x + self.downs[0](self.parts["act"](self.parts["up"](self.norm(x))))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.head = nn.Linear(6, 4)

    def forward(self, tokens):
        return self.head(self.blocks(self.embedding(tokens)))


LINEARS = [
    "blocks.0.parts.up",
    "blocks.0.downs.0",
    "blocks.1.parts.up",
    "blocks.1.downs.0",
    "head",
]


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def test_every_linear_of_a_nested_model_is_converted():
    torch.manual_seed(0)
    model = Nested().eval()
    tokens = torch.randint(0, 11, (8, 5))
    before = model(tokens)
    names = [name for name, _ in model.named_parameters()]
    assert mask_model(model, sets=["control", "add"], samples=2) is model
    layers = masked_layers(model)
    assert list(layers) == LINEARS
    for name, layer in layers.items():
        assert layer.tensor_id == names.index(f"{name}.weight")
        assert layer.samples == 2
        assert layer.set_names == ("control", "add")
        if layer.bias is not None:
            assert layer.bias_tensor_id == names.index(f"{name}.bias")
    # logits at 2 keep everything
    with use_set(model, "add"):
        torch.testing.assert_close(model(tokens), before)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.endswith("_logits"), name


def test_unmask_gives_back_the_same_modules_and_parameters():
    model = Nested()
    model.head.weight.requires_grad_(False)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    mask_model(model, bias=True)
    assert not model.embedding.weight.requires_grad
    assert unmask_model(model) is model
    assert dict(model.named_modules()) == modules
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is p for name, p in parameters.items())
    assert {name: p.requires_grad for name, p in after.items()} == flags
    mask_model(model)  # and it can be masked again
    assert list(masked_layers(model)) == LINEARS


def test_a_model_that_is_itself_a_linear():
    dense = nn.Linear(6, 3)
    masked = mask_model(dense, samples=1)
    assert isinstance(masked, MaskedLinear)
    assert masked.weight is dense.weight
    assert list(MaskSet.from_model(masked)) == ["weight"]
    x = torch.randn(4, 6)
    torch.testing.assert_close(masked.eval()(x), F.linear(x, dense.weight, dense.bias))
    assert unmask_model(masked) is dense
    assert dense.weight.requires_grad


def test_the_filter_decides():
    model = Nested()
    seen = []

    def without_head(name, module):
        seen.append((name, module))
        return name != "head"

    head = model.head
    mask_model(model, filter=without_head)
    assert [name for name, _ in seen] == LINEARS
    assert list(masked_layers(model)) == LINEARS[:-1]
    assert model.head is head
    assert not head.weight.requires_grad  # frozen all the same


def test_biases_are_masked_on_demand():
    model = mask_model(Nested(), sets=3, bias=True)
    layers = masked_layers(model)
    assert layers["head"].bias_logits.shape == (3, 4)
    assert layers["blocks.0.downs.0"].bias_logits is None
    assert mask_model(mlp())[0].bias_logits is None


def test_a_module_at_two_places_is_converted_once():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict(
        {"a": nn.Sequential(shared, nn.ReLU()), "b": nn.Sequential(nn.ReLU(), shared)}
    )
    mask_model(model)
    assert model["a"][0] is model["b"][1]
    assert list(masked_layers(model)) == ["a.0"]
    unmask_model(model)
    assert model["a"][0] is shared
    assert model["b"][1] is shared


def test_layers_that_share_a_weight_share_its_logits():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    mask_model(model, samples=2, bias=True)
    assert model[0].weight_logits is model[2].weight_logits
    assert model[0].bias_logits is not model[2].bias_logits
    assert model[0].tensor_id == model[2].tensor_id
    assert model[0].bias_tensor_id != model[2].bias_tensor_id
    assert MaskSet.from_model(model).names == ["0.weight", "0.bias", "2.bias"]
    model(torch.randn(4, 6)).sum().backward()
    assert model[0].weight_logits.grad.any()


def test_a_tied_embedding_stays_whole():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(9, 4)
            self.out = nn.Linear(4, 9, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, tokens):
            return self.out(self.embedding(tokens))

    model = mask_model(Tied()).eval()
    weight = model.embedding.weight
    assert model.out.weight is weight
    with torch.no_grad():
        model.out.weight_logits.normal_()
    tokens = torch.arange(9)
    mask = model.out.weight_logits[0] > 0
    expected = F.linear(weight, weight * mask)
    torch.testing.assert_close(model(tokens), expected)
    masks = MaskSet.from_model(model)
    assert masks.names == ["out.weight"]
    for other in (model, unmask_model(copy.deepcopy(model))):
        baked = masks.bake(other)
        torch.testing.assert_close(baked(tokens), expected)
        assert torch.equal(baked.embedding.weight, weight)


def test_hooks_and_training_flags_move_along():
    model = mlp()
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    model[0].eval()
    mask_model(model, samples=1)
    assert not model[0].training
    assert model[2].training
    model(torch.randn(2, 6))
    assert calls == [1]
    later = model[0].register_forward_hook(lambda *_: calls.append(2))
    unmask_model(model)
    model(torch.randn(2, 6))
    assert calls == [1, 1, 2]
    handle.remove()
    later.remove()
    model(torch.randn(2, 6))
    assert calls == [1, 1, 2]


def test_what_cannot_be_masked_is_named_in_a_warning():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Plain(nn.Linear):
        pass

    model = nn.Sequential(
        Own(6, 6),
        Plain(6, 6),
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        nn.MultiheadAttention(6, 2),
        nn.utils.parametrizations.weight_norm(nn.LSTM(6, 6, 2), "weight_hh_l1"),
    )
    with pytest.warns(UserWarning, match="unmasked") as caught:
        mask_model(model, filter=lambda name, module: name != "3")
    message = str(caught[0].message)
    assert "'0' (Own has its own forward)" in message
    assert "'2' (its weight is computed" in message
    assert "'3.out_proj' (torch.nn.MultiheadAttention" in message
    assert "'4' (its weight is computed" in message
    assert list(masked_layers(model)) == ["1"]
    assert type(unmask_model(model)[1]) is Plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask_model(model, filter=lambda name, module: name == "1")


def test_the_fused_encoder_path_does_not_skip_masks():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    mask_model(encoder, filter=lambda name, module: "linear" in name)
    for masked in masked_layers(encoder).values():
        nn.init.constant_(masked.weight_logits, -1.0)
    x = torch.randn(3, 4, 8)
    padding = torch.tensor([[False] * 4, [False] * 3 + [True], [False] * 4])
    with torch.no_grad():
        y = encoder(x, src_key_padding_mask=padding)
    expected = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(y, expected)
    unmask_model(encoder)
    with torch.no_grad():
        assert not torch.allclose(encoder(x), y)
    assert encoder.use_nested_tensor
    assert encoder.layers[0].activation_relu_or_gelu == 1


def test_sets_and_modes_are_chosen_for_all_layers():
    model = mask_model(mlp(), sets=["a", "b"], samples=2).eval()
    for layer in masked_layers(model).values():
        with torch.no_grad():
            layer.weight_logits[0].normal_()
    x = torch.randn(4, 6)
    with set_mode(model, "off"):
        plain = model(x)
    with use_set(model, "b"):
        torch.testing.assert_close(model(x), plain)
        with use_set(model, 0):
            assert not torch.allclose(model(x), plain)
            with set_mode(model, "sample"):
                assert {layer.mode for layer in masked_layers(model).values()} == {"sample"}
            assert {layer.mode for layer in masked_layers(model).values()} == {None}
        torch.testing.assert_close(model(x), plain)
    assert masked_layers(model)["0"].active_sets is None
    use_set(model, 1)  # effective without `with`, like torch.set_grad_enabled
    torch.testing.assert_close(model(x), plain)
    use_set(model, None)
    assert masked_layers(model)["0"].active_sets is None


def test_settings_are_restored_after_an_error():
    model = mask_model(mlp(), sets=2)
    with pytest.raises(RuntimeError), use_set(model, 1), set_mode(model, "off"):
        raise RuntimeError
    layer = masked_layers(model)["0"]
    assert layer.active_sets is None
    assert layer.mode is None


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_masked_models_can_be_copied_and_unmasked(how):
    model = mask_model(Nested(), sets=["a", "b"])
    with torch.no_grad():
        model.head.weight_logits.normal_()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert MaskSet.from_model(other, "b") == MaskSet.from_model(model, "b")
    unmask_model(other)
    assert all(p.requires_grad for p in other.parameters())
    assert weight_hash(other) == weight_hash(model)
    assert other.head.weight.data_ptr() != model.head.weight.data_ptr()


def test_state_dicts_round_trip():
    model = mask_model(Nested(), sets=2, bias=True)
    with torch.no_grad():
        for layer in masked_layers(model).values():
            layer.weight_logits.normal_()
    other = mask_model(Nested(), sets=2, bias=True)
    other.load_state_dict(model.state_dict())
    assert MaskSet.from_model(other, 1) == MaskSet.from_model(model, 1)
    plain = Nested()
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(name.endswith("_logits") for name in unexpected)


def test_conversion_of_dtype_survives_unmasking():
    model = mask_model(mlp()).to(torch.bfloat16)
    unmask_model(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_models_built_from_masked_layers_work_too():
    model = nn.Sequential(MaskedLinear(6, 4, samples=2), nn.ReLU(), MaskedLinear(4, 2, samples=2))
    assert MaskSet.from_model(model).names == ["0.weight", "2.weight"]
    with use_set(model, 0), set_mode(model, "threshold"):
        assert model(torch.randn(3, 6)).shape == (3, 2)
    plain = unmask_model(model)
    assert [type(m) for m in plain] == [nn.Linear, nn.ReLU, nn.Linear]


def test_a_masked_model_compiles_as_one_graph():
    torch.compiler.reset()
    model = mask_model(mlp(), samples=2)
    set_mode(model, "threshold")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 6):
        x = torch.randn(batch, 6)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_names_are_those_of_the_wrapped_model(wrap):
    model = mlp()
    outer = wrap(model)
    assert mask_model(outer) is outer
    assert (
        MaskSet.from_model(outer).names
        == MaskSet.from_model(model).names
        == [
            "0.weight",
            "2.weight",
        ]
    )
    assert weight_hash(outer) == weight_hash(model)
    masks = MaskSet.from_model(outer)
    masks.apply(outer)
    assert [type(m) for m in masks.bake(outer)] == [nn.Linear, nn.ReLU, nn.Linear]
    assert unmask_model(outer) is outer
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert isinstance(mask_model(wrap(nn.Linear(2, 2))), MaskedLinear)


def test_wrong_calls_are_refused():
    with pytest.raises(
        ValueError, match=r"expected at least one layer that can be masked .*Conv2d, .*\)$"
    ):
        mask_model(nn.ReLU())
    with pytest.raises(ValueError, match="that the filter accepts"):
        mask_model(mlp(), filter=lambda name, module: False)
    with pytest.raises(ValueError, match=r"estimator: expected one of .* got 'nobody'"):
        mask_model(mlp(), estimator="nobody")
    with pytest.raises(ValueError, match="sets: expected distinct names"):
        mask_model(mlp(), sets=["add", "add"])
    for message, options in {
        "sets: expected a number or a list of non-empty names, got 1.5": {"sets": 1.5},
        "tau: expected a positive number, got 'a'": {"tau": "a"},
        "init: expected a number, got nan": {"init": float("nan")},
        "eval_mode: expected .* got 'x'": {"eval_mode": "x"},
        "eval_tau: expected a positive number, got -1": {"eval_tau": -1},
        "batch_dim: expected an integer, got 0.5": {"batch_dim": 0.5},
    }.items():
        with pytest.raises(ValueError, match=message):
            mask_model(mlp(), **options)
    with pytest.raises(TypeError, match="filter: expected a callable"):
        mask_model(mlp(), filter="0")
    for also in (nn.LayerNorm, ["LayerNorm"]):
        with pytest.raises(TypeError, match="also: expected a list of types of modules"):
            mask_model(mlp(), also=also)
    with pytest.warns(UserWarning, match="also: the model has no module of type LayerNorm"):
        mask_model(mlp(), also=[nn.LayerNorm])
    for wrong in (torch.zeros(2), {}, None):
        expected = f"model: expected a torch.nn.Module, got {type(wrong).__name__}"
        with pytest.raises(TypeError, match=expected):
            mask_model(wrong)
        with pytest.raises(TypeError, match=expected):
            masked_layers(wrong)
    with pytest.raises(ValueError, match="found '0' masked"):
        mask_model(mask_model(mlp()))
    with pytest.raises(ValueError, match="run the model once"):
        mask_model(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match="expected masked layers, found none"):
        unmask_model(mlp())
    with pytest.raises(ValueError, match="use mask_model first"):
        use_set(mlp(), 0)
    model = mask_model(mlp(), sets=["a", "b"])
    for wrong in ("c", 2, -1):
        with pytest.raises(ValueError, match=r"set: expected one of \['a', 'b'\]"):
            use_set(model, wrong)
    with pytest.raises(ValueError, match=r"mode: expected .* got 'train'"):
        set_mode(model, "train")
    different = nn.Sequential(MaskedLinear(2, 2, sets=1), MaskedLinear(2, 2, sets=2))
    with pytest.raises(ValueError, match="have different sets"):
        masked_layers(different)


def test_nothing_is_changed_when_masking_fails():
    model = mlp()
    with pytest.raises(ValueError, match="samples"):
        mask_model(model, samples=0)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(p.requires_grad for p in model.parameters())
