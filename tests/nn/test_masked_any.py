import copy
import dataclasses
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modmask_kernels as mm
from modmask_kernels import ops
from modmask_kernels.nn import MaskedAny

MODULES = {
    "layer norm": (lambda: nn.LayerNorm(6), (12, 5, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (12, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (12, 6, 3)),
    "batch norm": (lambda: nn.BatchNorm1d(6).eval(), (12, 6, 3)),
    "transposed convolution": (lambda: nn.ConvTranspose3d(6, 4, 3, stride=2), (12, 6, 2, 2, 2)),
    "prelu": (lambda: nn.PReLU(6), (12, 6)),
    "embedding": (lambda: nn.Embedding(10, 6), (12, 7)),
}


class Scale(nn.Module):
    """A module of somebody's own, with a scalar parameter and a second argument."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x, other, *, by=1.0):
        return x * self.factor * by + other + self.shift


def make(name):
    torch.manual_seed(0)
    module, shape = MODULES[name]
    module = module()
    for p in module.parameters():
        nn.init.normal_(p)
    x = torch.randint(10, shape) if name == "embedding" else torch.randn(shape)
    return module, x


def masked(module, **options):
    layer = MaskedAny.from_dense(module, **options)
    with torch.no_grad():
        for name in layer.masked:
            layer.logits_of(name).normal_()
    return layer


@pytest.mark.parametrize("name", MODULES)
class TestModules:
    @pytest.mark.parametrize("mode", ["sample", "soft"])
    def test_groups_see_the_masks_of_their_set_and_sample(self, name, mode):
        module, x = make(name)
        layer = masked(module, sets=2, samples=3, mask_bias=True, tensor_id=4)
        layer.mode = mode
        layer.seed = torch.tensor([11, -12])
        parts = []
        for g, part in enumerate(x.chunk(6)):
            other = copy.deepcopy(module)
            for leaf in layer.masked:
                mask = ops.sample_mask(
                    layer.logits_of(leaf),
                    seed=layer.seed,
                    samples=3,
                    tensor_id=layer.tensor_ids[leaf],
                    hard=mode == "sample",
                )[g % 3, g // 3]
                getattr(other, leaf).data.mul_(mask)
            parts.append(other(part))
        torch.testing.assert_close(layer(x), torch.cat(parts))

    def test_kept_parameters_give_the_plain_module(self, name):
        module, x = make(name)
        expected, names = module(x), list(module.state_dict())
        layer = MaskedAny.from_dense(module, samples=4, mask_bias=True, init=100.0)
        for mode in ("sample", "threshold", "off"):
            layer.mode = mode
            torch.testing.assert_close(layer(x), expected)
        kept = [n for n in layer.state_dict() if not n.endswith("_logits")]
        assert sorted(kept) == sorted(names)

    def test_a_model_is_converted_and_restored(self, name):
        module, x = make(name)
        model = nn.Sequential(module, nn.Identity()).eval()
        expected, state = model(x), copy.deepcopy(model.state_dict())
        mm.mask_model(model, samples=2, init=100.0, also=[type(module)])
        assert type(model[0]) is MaskedAny
        assert "general path" in mm.explain(model)
        with mm.set_mode(model, "sample"):
            torch.testing.assert_close(model(x), expected)
        masks = mm.MaskSet.from_model(model)
        baked = masks.bake(model)
        torch.testing.assert_close(baked(x), expected)
        mm.unmask_model(model)
        assert model[0] is module
        assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())
        assert torch.equal(model(x), expected)

    def test_gradients_reach_the_logits_only(self, name):
        module, x = make(name)
        layer = masked(module, samples=2).train(module.training)
        layer.mode = "sample"
        layer(x).square().sum().backward()
        for leaf in layer.masked:
            assert layer.get_parameter(leaf).grad is None
            assert bool(layer.logits_of(leaf).grad.abs().sum() > 0)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
    def test_copies_behave_as_the_original(self, name, how):
        module, x = make(name)
        layer = masked(module, samples=2)
        layer.mode, layer.seed = "sample", torch.tensor([3])
        if how == "deepcopy":
            other = copy.deepcopy(layer)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(layer))
        else:
            buffer = io.BytesIO()
            torch.save(layer, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        assert torch.equal(layer(x), other(x))
        with torch.no_grad():
            other.get_parameter(other.masked[0]).zero_()
        assert not torch.equal(layer(x), other(x))


def test_dense_copies_have_the_mask_multiplied_in():
    module, x = make("layer norm")
    layer = masked(module)
    dense = layer.to_dense()
    assert type(dense) is nn.LayerNorm
    assert torch.equal(dense.weight, module.weight * (layer.weight_logits[0] > 0))
    assert dense.bias is not module.bias
    layer.mode = "threshold"
    torch.testing.assert_close(layer(x), dense(x))


def test_several_arguments_are_cut_alike():
    torch.manual_seed(0)
    module = Scale()
    layer = masked(module, samples=3)
    layer.seed = torch.tensor([7])
    x, other = torch.randn(6, 4), torch.randn(6, 1)
    parts = []
    for k in range(3):
        draw = {"seed": layer.seed[0], "sample_offset": k}
        factor, shift = (
            ops.sample_mask(layer.logits_of(n)[0], tensor_id=layer.tensor_ids[n], **draw)[0]
            for n in ("factor", "shift")
        )
        rows = slice(2 * k, 2 * k + 2)
        parts.append(x[rows] * (module.factor * factor) * 2.0 + other[rows] + module.shift * shift)
    torch.testing.assert_close(layer(x, other, by=2.0), torch.cat(parts))


def test_time_major_batches():
    module, _ = make("layer norm")
    layer = masked(module, samples=2)
    layer.seed, layer.batch_dim = torch.tensor([5]), 1
    x = torch.randn(3, 8, 6)
    swapped = copy.deepcopy(layer)
    swapped.batch_dim = 0
    torch.testing.assert_close(layer(x), swapped(x.transpose(0, 1)).transpose(0, 1))


def test_a_network_learns_masks_of_its_norms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    mm.mask_model(model, sets=["a", "b"], samples=2, also=[nn.LayerNorm])

    def data(step, generator):
        return torch.randn(8, 6, generator=generator), torch.arange(8) % 3

    def loss(output, batch):
        return F.cross_entropy(output, batch[1])

    result = mm.learn_masks(model, loss, {"a": data, "b": data}, 3, lr=0.5, progress=False)
    assert list(result.masks["a"]) == ["0.weight", "1.weight", "3.weight"]
    for name, p in mm.unmask_model(model).named_parameters():
        assert torch.equal(p, weights[name]), name


def test_compiles_as_one_graph():
    module, x = make("layer norm")
    layer = masked(module, samples=2)
    layer.seed = torch.tensor([5])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_wrong_uses_are_named():
    with pytest.raises(TypeError, match="module: expected a module to call, got ModuleList"):
        MaskedAny.from_dense(nn.ModuleList([nn.Linear(2, 2)]))
    with pytest.raises(ValueError, match="LayerNorm has no parameter to mask"):
        MaskedAny.from_dense(nn.LayerNorm(3, elementwise_affine=False))
    layer = MaskedAny.from_dense(nn.LayerNorm(3), samples=4)
    with pytest.raises(ValueError, match=r"batch of x, 6 .*\[6, 3\].* 4 samples = 4 equal"):
        layer(torch.randn(6, 3))
    with pytest.warns(UserWarning, match="it is never called"):
        mm.mask_model(
            nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.PReLU()])), also=[nn.ModuleList]
        )


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    pair: tuple
    note: str = "same"
    extra: torch.Tensor | None = None


class Tree(nn.Module):
    """Children, parameters of its own, tied ones, and outputs of several kinds."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 6))
        self.norm = nn.LayerNorm(6)
        self.up = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.head = nn.Linear(6, 3)
        self.other_head = nn.Linear(6, 3)
        self.other_head.weight = self.head.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.width = 6

    def forward(self, x, *, also=None, output="tuple"):
        h = self.norm(x + self.token) * self.scale
        if also is not None:
            h = h + also["shift"][1]
        results = (self.up(h), self.head(h) + self.other_head(h))
        if output == "tuple":
            return (*results, None)
        if output == "dict":
            return {"a": results[0], "b": [results[1], {"c": None, "d": 3}]}
        if output == "dataclass":
            return Output(results[0], results)
        return results[0].mean()


TREE = ["token", "norm.weight", "up.0.weight", "head.weight"]


def tree(**options):
    torch.manual_seed(0)
    module = Tree()
    for p in module.parameters():
        nn.init.normal_(p)
    return copy.deepcopy(module), masked(module, **options)


def groups_of(plain, layer, seed, samples):
    """A copy of the plain module with the masks of each group multiplied in."""
    for k in range(samples):
        other = copy.deepcopy(plain)
        for name in layer.masked:
            mask = ops.sample_mask(
                layer.logits_of(name)[0],
                seed=seed,
                sample_offset=k,
                tensor_id=layer.tensor_ids[name],
            )[0]
            other.get_parameter(name).data.mul_(mask)
        yield other


class TestModulesWithChildren:
    def test_logits_sit_beside_their_parameters(self):
        plain, layer = tree(mask_bias=False)
        assert list(layer.masked) == TREE
        names = [n for n, _ in layer.named_parameters() if not n.endswith("_logits")]
        assert names == [n for n, _ in plain.named_parameters()]
        assert layer.up[0].weight_logits.shape == (1, 8, 6)
        assert layer.width == 6
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = layer.no_such_thing
        assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
            n for n in layer.state_dict() if n.endswith("_logits")
        ]
        layer.load_state_dict(layer.state_dict())
        layer.to(torch.bfloat16)
        assert layer.up[0].weight_logits.dtype == torch.float32
        assert layer.up[0].weight.dtype == torch.bfloat16

    @pytest.mark.parametrize("output", ["tuple", "dict", "dataclass"])
    def test_arguments_and_outputs_may_be_trees(self, output):
        plain, layer = tree(samples=3, mask_bias=True)
        layer.seed = torch.tensor([7])
        x, shift = torch.randn(6, 6), torch.randn(6, 1)
        also = {"shift": (4, shift)}
        parts = [
            other(part, also={"shift": (4, s)}, output=output)
            for other, part, s in zip(
                groups_of(plain, layer, layer.seed[0], 3), x.chunk(3), shift.chunk(3), strict=True
            )
        ]
        got = layer(x, also=also, output=output)

        def leaves(value):
            if dataclasses.is_dataclass(value):
                return leaves([getattr(value, f.name) for f in dataclasses.fields(value)])
            return torch.utils._pytree.tree_leaves(value)

        for column, leaf in zip(zip(*map(leaves, parts), strict=True), leaves(got), strict=True):
            if isinstance(leaf, torch.Tensor):
                torch.testing.assert_close(leaf, torch.cat(column))
            else:
                assert leaf == column[0]
        assert type(got) is type(parts[0])

    def test_an_output_without_rows_is_refused(self):
        _, layer = tree(samples=2)
        with pytest.raises(TypeError, match=r"outputs with 3 rows in dimension 0.* got shape \[\]"):
            layer(torch.randn(6, 6), output="loss")
        layer.samples = 1
        assert layer(torch.randn(6, 6), output="loss").shape == ()

    def test_a_model_is_converted_baked_and_restored(self):
        plain, _ = tree()
        model = nn.Sequential(nn.Linear(6, 6), copy.deepcopy(plain))
        inner, state = model[1], copy.deepcopy(model.state_dict())
        names = [n for n, _ in model.named_parameters()]
        x = torch.randn(4, 6)
        expected = model(x)
        mm.mask_model(model, samples=2, also=[Tree])
        assert list(mm.MaskSet.from_model(model)) == ["0.weight", *(f"1.{n}" for n in TREE)]
        for name, p in model.named_parameters():
            assert p.requires_grad == name.endswith("_logits"), name
        assert model[1].tensor_ids["head.weight"] == names.index("1.head.weight")
        with mm.set_mode(model, "threshold"):
            torch.testing.assert_close(model(x), expected)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.normal_()
        masks = mm.MaskSet.from_model(model)
        with mm.set_mode(model, "threshold"):
            found = model(x)
        baked, dense = masks.bake(model), model[1].to_dense()
        assert type(baked[1]) is Tree
        assert baked[1].head.weight is baked[1].other_head.weight
        assert not any(n.endswith("_logits") for n in (*baked.state_dict(), *dense.state_dict()))
        for got, want in zip(baked(x), found, strict=True):
            if got is not None:
                torch.testing.assert_close(got, want)
        copied = mm.unmask_model(copy.deepcopy(model))
        mm.unmask_model(model)
        assert model[1] is inner
        assert [n for n, _ in model.named_parameters()] == names
        for network in (model, copied):
            assert all(torch.equal(network.state_dict()[n], t) for n, t in state.items())
        # and onto a plain model
        torch.testing.assert_close(masks.bake(model)(x)[0], found[0])

    def test_the_filter_decides_about_the_children(self):
        def model():
            return nn.Sequential(nn.Linear(6, 6), Tree())

        masked_model = mm.mask_model(
            model(), also=[Tree], filter=lambda name, m: not name.startswith("1.up")
        )
        assert "1.up.0.weight" not in mm.MaskSet.from_model(masked_model)
        assert "1.norm.weight" in mm.MaskSet.from_model(masked_model)
        only = mm.mask_model(model(), also=[Tree], filter=lambda name, m: name == "1")
        assert list(mm.MaskSet.from_model(only)) == ["1.token"]

    def test_hand_made_layers_can_be_unmasked(self):
        plain, layer = tree()
        with torch.no_grad():
            layer.logits_of("norm.weight").fill_(-1)
        x = torch.randn(4, 6)
        restored = mm.unmask_model(nn.Sequential(layer))
        assert not any(n.endswith("_logits") for n in restored.state_dict())
        torch.testing.assert_close(restored[0](x), plain(x))

    def test_masks_are_learned(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), Tree())
        before = copy.deepcopy(model.state_dict())
        mm.mask_model(model, sets=["a", "b"], samples=2, also=[Tree])

        def data(step, generator):
            return (torch.randn(8, 6, generator=generator),)

        def loss(output, batch):
            return output[1].square().mean()

        mm.learn_masks(model, loss, {"a": data, "b": data}, 3, lr=0.5, progress=False)
        assert (model[1].token_logits != 2).any()
        assert (model[1].head.weight_logits != 2).any()
        mm.unmask_model(model)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    def test_compiles_as_one_graph(self):
        _, layer = tree(samples=2)
        layer.seed = torch.tensor([5])
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(4, 6)
        torch.testing.assert_close(compiled(x), layer(x))


class TestRecurrent:
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
    def test_states_are_cut_along_the_batch(self, kind, batch_first):
        torch.manual_seed(0)
        module = kind(3, 4, num_layers=2, batch_first=batch_first)
        plain = copy.deepcopy(module)
        layer = masked(module, samples=3, mask_bias=True)
        layer.seed = torch.tensor([7])
        dim = 0 if batch_first else 1
        x = torch.randn(6, 5, 3) if batch_first else torch.randn(5, 6, 3)
        hx = (
            (torch.randn(2, 6, 4), torch.randn(2, 6, 4))
            if kind is nn.LSTM
            else torch.randn(2, 6, 4)
        )
        parts = []
        for k, other in enumerate(groups_of(plain, layer, layer.seed[0], 3)):
            of_k = torch.utils._pytree.tree_map(lambda h, k=k: h.chunk(3, 1)[k], hx)
            parts.append(other(x.chunk(3, dim)[k], of_k))
        y, state = layer(x, hx)
        torch.testing.assert_close(y, torch.cat([p[0] for p in parts], dim))
        for got, *of_parts in zip(
            *(torch.utils._pytree.tree_leaves(s) for s in (state, *(p[1] for p in parts))),
            strict=True,
        ):
            torch.testing.assert_close(got, torch.cat(of_parts, 1))

    def test_packed_sequences_are_for_one_group(self):
        layer = masked(nn.RNN(3, 4), samples=2)
        packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
        with pytest.raises(TypeError, match="cannot cut a PackedSequence into 2 groups for RNN"):
            layer(packed)
        layer.mode = "threshold"
        assert layer(packed)[1].shape == (1, 2, 4)


@pytest.mark.parametrize("batch_first", [False, True])
def test_masks_of_positions_are_not_cut(batch_first):
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    plain = copy.deepcopy(module)
    layer = MaskedAny.from_dense(module, samples=2, mask_bias=True, init=100.0)
    layer.batch_dim = 0 if batch_first else 1
    x = torch.randn(4, 4, 8)  # as many positions as rows
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    padding = torch.zeros(4, 4)
    padding[3, 2:] = -torch.inf
    options = {"src_mask": causal, "src_key_padding_mask": padding}
    torch.testing.assert_close(layer(x, **options), plain(x, **options))
    by_head = causal.expand(8, 4, 4)
    torch.testing.assert_close(layer(x, by_head), plain(x, by_head))


class TestBatchStatistics:
    @pytest.mark.parametrize("track", [True, False])
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_are_those_of_the_whole_batch(self, dims, track):
        torch.manual_seed(0)
        kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        module = kind(3, track_running_stats=track).train()
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
        plain = copy.deepcopy(module)
        x = torch.randn(8, 3, *[2] * dims)
        layer = MaskedAny.from_dense(module, samples=4, mask_bias=True, init=100.0)
        assert layer.effective_mode == "sample"
        torch.testing.assert_close(layer(x), plain(x))
        for name, value in plain.named_buffers():
            torch.testing.assert_close(getattr(layer, name), value)
        with torch.no_grad():
            layer.weight_logits.zero_()
        layer.seed = torch.tensor([3])
        mask = ops.sample_mask(
            layer.weight_logits[0], seed=layer.seed[0], samples=4, tensor_id=0
        ).repeat_interleave(2, 0)
        plain.train().requires_grad_(False)
        weight, bias = plain.weight.clone(), plain.bias.clone()
        plain.weight.fill_(1), plain.bias.zero_()
        shape = (-1, 3, *[1] * dims)
        expected = plain(x) * (weight * mask).view(shape) + bias.view(1, *shape[1:])
        torch.testing.assert_close(layer(x), expected)

    def test_learning_leaves_them_alone(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        before = copy.deepcopy(model.state_dict())
        mm.mask_model(model, samples=2, also=[nn.BatchNorm1d])
        mm.learn_masks(
            model,
            lambda y, batch: y.square().mean(),
            lambda step, generator: (torch.randn(4, 4, generator=generator),),
            2,
            progress=False,
        )
        mm.unmask_model(model)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_padding_rows_of_an_embedding_get_no_gradient():
    layer = masked(nn.Embedding(5, 3, padding_idx=1), samples=2)
    assert layer.padding_idx == 1
    layer.mode = "sample"
    layer(torch.tensor([[0, 1], [1, 4]])).sum().backward()
    grad = layer.weight_logits.grad[0]
    assert not grad[1].any()
    assert not grad[2].any()
    assert grad[0].any()
    assert grad[4].any()


def test_explain_says_what_it_costs():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.PReLU(4))
    mm.mask_model(model, sets=2, samples=4, also=[nn.LayerNorm, nn.PReLU], bias=True)
    norm, other = mm.explain(model).splitlines()[1:]
    assert norm == (
        "1: general path (one call of LayerNorm per batch, scaled and shifted by 8 masked values "
        "in each of 8 groups: plain PyTorch on this device)"
    )
    assert other == (
        "2: general path (8 calls of PReLU per batch, each with a masked copy of 4 values, "
        "16 bytes)"
    )


class Twice(nn.Module):
    """One weight under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_tied_parameters_have_one_mask_and_stay_tied():
    torch.manual_seed(0)
    layer = MaskedAny.from_dense(Twice())
    assert layer.masked == ("first.weight",)
    with torch.no_grad():
        layer.logits_of("first.weight").normal_()
    dense = layer.to_dense()
    assert dense.first.weight is dense.second.weight
    layer.mode = "threshold"
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), dense(x))


def test_a_tied_embedding_that_is_masked_too():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.embedding(tokens))

    torch.manual_seed(0)
    plain = Tied()
    model = mm.mask_model(copy.deepcopy(plain), also=[nn.Embedding]).eval()
    with torch.no_grad():
        model.embedding.weight_logits.normal_()
    masks, tokens = mm.MaskSet.from_model(model), torch.arange(9)
    assert masks.names == ["embedding.weight"]
    expected = model(tokens)
    for network in (model, plain):
        torch.testing.assert_close(masks.bake(network)(tokens), expected)
        chooser = mm.select_masks(network, {"a": masks, "b": ~masks})
        with torch.no_grad(), mm.use_sets(chooser, "a"):
            torch.testing.assert_close(chooser(tokens), expected)
