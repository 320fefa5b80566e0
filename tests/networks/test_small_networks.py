"""Networks of torch, torchvision and transformers, small and random."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
import transformers
from check import check_network
from torch import nn

import modmask_kernels as mm
from modmask_kernels.nn import MaskedHuggingFaceConv1D, MaskedMultiheadAttention

IDS = torch.tensor([[5, 3, 9, 1, 7], [2, 2, 8, 0, 0], [4, 1, 1, 6, 0], [9, 9, 2, 3, 4]])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def with_random_statistics(model):
    """Norms that do something, and heads that are not zero."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("also", [(), (nn.BatchNorm2d,)], ids=["", "norms"])
def test_resnet18(also):
    model = with_random_statistics(torchvision.models.resnet18(num_classes=10))
    masked = check_network(model, (torch.randn(4, 3, 32, 32),), also=also, export=not also)
    assert len(masked) == (41 if also else 21)


def test_vision_transformer():
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5)
    masked = check_network(with_random_statistics(model), (torch.randn(4, 3, 16, 16),))
    assert "encoder.layers.encoder_layer_0.self_attention.in_proj_weight" in masked
    assert "conv_proj.weight" in masked


def test_any_parameter_of_a_vision_transformer():
    model = torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=5)
    masked = check_network(
        with_random_statistics(model),
        (torch.randn(4, 3, 16, 16),),
        also=[torchvision.models.VisionTransformer],
        bias=True,
        export=False,
    )
    assert masked == [name for name, _ in model.named_parameters()]
    assert "class_token" in masked


def bert():
    config = transformers.BertConfig(
        vocab_size=10,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
    )
    return transformers.BertModel(config)


# position embeddings have no batch of their own, so the module around them is masked
EMBEDDINGS = transformers.models.bert.modeling_bert.BertEmbeddings


@pytest.mark.parametrize("also", [(), (EMBEDDINGS, nn.LayerNorm)], ids=["", "all"])
def test_bert(also):
    inputs = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
    masked = check_network(
        bert(), inputs, lambda y: y.pooler_output, also=also, export=not also, bias=bool(also)
    )
    assert ("embeddings.word_embeddings.weight" in masked) == bool(also)


def test_bert_layers_on_the_general_path():
    kind = transformers.models.bert.modeling_bert.BertLayer
    inputs = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
    masked = check_network(
        bert(),
        inputs,
        lambda y: y.last_hidden_state,
        also=[kind],
        filter=lambda name, module: "layer" in name and not isinstance(module, nn.LayerNorm),
        export=False,
    )
    assert len(masked) == 12


def test_gpt2():
    config = transformers.GPT2Config(
        vocab_size=10,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=8,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    masked = check_network(model, {"input_ids": IDS}, lambda y: y.logits)
    assert len(masked) == 9
    mm.mask_model(model)
    assert type(model.transformer.h[0].attn.c_attn) is MaskedHuggingFaceConv1D
    assert model.lm_head.weight is model.transformer.wte.weight  # tied, masked in the head only


class Translator(nn.Module):
    """A custom forward around nn.Transformer, with a shared module and tied weights."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.mix = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Identity()])
        self.network = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, source, target):
        source, target = (self.mix[1](self.mix[0](self.embedding(t))) for t in (source, target))
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        hidden = self.network(source, target, tgt_mask=mask, tgt_is_causal=True)
        return {"scores": self.head(hidden), "hidden": hidden, "nothing": None}


def test_transformer_with_tied_weights_and_shared_modules():
    model = Translator()
    masked = check_network(model, (IDS, IDS[:, :3].contiguous()), lambda y: y["scores"])
    assert "network.decoder.layers.1.multihead_attn.in_proj_weight" in masked
    assert "mix.0.0.weight" in masked
    mm.mask_model(model)
    assert type(model.network.encoder.layers[0].self_attn) is MaskedMultiheadAttention


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Sequential(nn.ConvTranspose2d(6, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
            nn.ModuleDict({"up": nn.ConvTranspose2d(8, 3, 3, 2, 1, 1)})["up"],
        )

    def forward(self, x):
        return torch.tanh(self.blocks(x.view(-1, 6, 2, 2)))


def test_a_generator_of_transposed_convolutions():
    masked = check_network(with_random_statistics(Generator()), (torch.randn(4, 24),))
    assert masked == ["blocks.0.0.weight", "blocks.1.weight"]


def test_time_major_transformer():
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0)
    inputs = (torch.randn(3, 4, 16), torch.randn(5, 4, 16))

    model.eval()
    expected = model(*inputs)
    mm.mask_model(model, samples=2, init=100.0, batch_dim=1)
    with mm.set_mode(model, "sample"):
        torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-4)
    result = mm.learn_masks(
        model,
        lambda y, batch: F.mse_loss(y, torch.ones_like(y)),
        lambda step, generator: (inputs,),
        2,
        batch_dim=1,
        progress=False,
    )
    assert len(next(iter(result.masks.values()))) == 10
