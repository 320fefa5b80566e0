import json
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from modmask_kernels import ops
from modmask_kernels.masks import MaskSet, mask_model, unmask_model, use_set, weight_hash
from modmask_kernels.nn import MaskedLinear


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def random_masks(seed=0, shapes=None):
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or {"0.weight": (5, 6), "2.weight": (3, 5)}
    return MaskSet.from_dict(
        {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()}
    )


def masked_mlp(seed=0, **options):
    model = mask_model(mlp(seed), sets=["control", "add"], **options)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_logits"):
                parameter.normal_()
    return model


def test_a_mapping_of_bool_tensors():
    tensors = {"a": torch.rand(3, 7) < 0.5, "b": torch.rand(11) < 0.5, "c": torch.rand(0, 4) < 0.5}
    masks = MaskSet.from_dict(tensors)
    assert list(masks) == masks.names == ["a", "b", "c"]
    assert len(masks) == 3
    assert "a" in masks
    assert "d" not in masks
    assert masks.get("d") is None
    for name, tensor in tensors.items():
        assert torch.equal(masks[name], tensor)
        assert masks[name].dtype == torch.bool
    with pytest.raises(KeyError, match="no mask named 'd'"):
        masks["d"]
    assert list(masks.subset(["b"])) == ["b"]
    with pytest.raises(KeyError, match="no mask named 'd'"):
        masks.subset(["d"])
    with pytest.raises(TypeError, match=r"masks\['a'\]: expected a bool tensor, got torch.float32"):
        MaskSet.from_dict({"a": torch.ones(2)})
    with pytest.raises(TypeError, match=r"made of bool tensors by MaskSet\.from_dict"):
        MaskSet({"a": torch.ones(2, dtype=torch.bool)})


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 1000, 4099])
def test_counts_are_those_of_the_tensors(size):
    mask = torch.rand(size) < 0.3
    masks = MaskSet.from_dict({"x": mask, "full": torch.ones(2, size, dtype=torch.bool)})
    assert masks.counts() == {"x": (int(mask.sum()), size), "full": (2 * size, 2 * size)}
    kept = int(mask.sum()) + 2 * size
    assert masks.density() == (kept / (3 * size) if size else 0.0)


def test_algebra():
    a, b = random_masks(0), random_masks(1)
    for name in a:
        assert torch.equal((a & b)[name], a[name] & b[name])
        assert torch.equal((a | b)[name], a[name] | b[name])
        assert torch.equal((a - b)[name], a[name] & ~b[name])
        assert torch.equal((~a)[name], ~a[name])
    assert ~~a == a
    assert (a | ~a).density() == 1.0
    assert (a & ~a).density() == 0.0
    assert a - b == a & ~b
    assert a != b
    assert a == random_masks(0)
    assert a != "something else"
    counts = (~a).counts()
    assert all(counts[n] == (total - kept, total) for n, (kept, total) in a.counts().items())


def test_algebra_demands_the_same_tensors():
    a = random_masks(0)
    with pytest.raises(
        ValueError, match=r"'2.weight' has shape \(3, 5\) on the left and is missing on"
    ):
        a & a.subset(["0.weight"])
    other = random_masks(0, {"0.weight": (5, 6), "2.weight": (5, 3)})
    with pytest.raises(ValueError, match=r"different models: '2.weight'"):
        a | other
    assert a != other
    with pytest.raises(TypeError):
        a & {"0.weight": torch.ones(5, 6, dtype=torch.bool)}


def test_masks_of_a_model_follow_the_threshold_rule():
    model = masked_mlp(bias=True)
    with torch.no_grad():
        model[0].weight_logits[1, 0, 0] = 0.0
    masks = MaskSet.from_model(model, "add", logits=True)
    assert masks.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(masks["0.weight"], model[0].weight_logits[1] > 0)
    assert not masks["0.weight"][0, 0]
    assert torch.equal(masks["2.bias"], model[2].bias_logits[1] > 0)
    assert torch.equal(masks.logits["0.weight"], model[0].weight_logits[1])
    assert masks == MaskSet.from_model(model, 1)
    assert masks.metadata["set"] == "add"
    assert masks.metadata["weight_hash"] == weight_hash(model)
    assert masks.metadata["settings"]["bias"] is True
    assert masks.metadata["tensor_ids"]["2.weight"] == 2
    assert MaskSet.from_model(model, 0).logits is None
    with pytest.raises(ValueError, match="set: expected one of"):
        MaskSet.from_model(model, "mul")
    # what is kept does not change with the model
    with torch.no_grad():
        model[0].weight_logits.fill_(-1.0)
    assert masks["0.weight"].any()
    assert (masks.logits["0.weight"] > 0).any()


def test_algebra_drops_logits_and_keeps_the_weights_hash():
    model = masked_mlp()
    a, b = (MaskSet.from_model(model, s, logits=True) for s in (0, 1))
    for result in (a & b, a | b, a - b, ~a):
        assert result.logits is None
        assert result.metadata == {"weight_hash": a.metadata["weight_hash"]}
    other = MaskSet.from_model(masked_mlp(seed=5))
    assert (a & other).metadata == {}


def test_repr_says_what_is_kept():
    assert repr(random_masks()).startswith("MaskSet(2 tensors, ")
    assert "'add'" in repr(MaskSet.from_model(masked_mlp(), "add"))


@pytest.mark.parametrize("logits", [False, True])
def test_files_round_trip(tmp_path, logits):
    model = masked_mlp(bias=True)
    masks = MaskSet.from_model(model, "add", logits=logits)
    path = tmp_path / "new" / "add.safetensors"
    masks.save(path)
    first = path.read_bytes()
    for _ in range(4):
        masks.save(path)  # over the old one
        assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["add.safetensors"]
    loaded = MaskSet.load(str(path))
    assert loaded == masks
    assert loaded.names == masks.names
    assert loaded.metadata["set"] == "add"
    assert loaded.metadata["weight_hash"] == masks.metadata["weight_hash"]
    assert loaded.metadata["settings"] == masks.metadata["settings"]
    assert isinstance(loaded.metadata["library_version"], str)
    if logits:
        assert all(torch.equal(loaded.logits[n], masks.logits[n]) for n in masks)
    else:
        assert loaded.logits is None
    loaded.check(model)
    with safetensors.safe_open(str(path), framework="pt") as file:
        assert file.get_tensor("mask/0.weight").dtype == torch.uint8
        assert file.metadata()["format"] == "modmask-mask-set"


def test_odd_names_and_shapes_round_trip(tmp_path):
    masks = random_masks(
        3, {"ein Gewicht/é.weight": (3,), "": (2, 2), "scalar": (), "none": (0, 5)}
    )
    masks.save(tmp_path / "m")
    assert MaskSet.load(tmp_path / "m") == masks


def test_apply_writes_one_set():
    model = masked_mlp()
    before = MaskSet.from_model(model, "control", logits=True)
    masks = random_masks(7)
    masks.apply(model, "add")
    assert MaskSet.from_model(model, "add") == masks
    assert set(model[0].weight_logits[1].unique().tolist()) == {-1.0, 1.0}
    masks.apply(model, "add", magnitude=3.0)
    assert set(model[0].weight_logits[1].unique().tolist()) == {-3.0, 3.0}
    after = MaskSet.from_model(model, "control", logits=True)
    assert all(torch.equal(after.logits[n], before.logits[n]) for n in before)
    before.apply(model, "add")
    assert torch.equal(model[2].weight_logits[0], model[2].weight_logits[1])
    with pytest.raises(ValueError, match="magnitude: expected a positive number, got 0"):
        masks.apply(model, 0, magnitude=0)


def test_bake_gives_a_new_plain_model():
    model = masked_mlp(bias=True).eval()
    original = {n: p.clone() for n, p in model.named_parameters()}
    masks = MaskSet.from_model(model, "add")
    x = torch.randn(9, 6)
    with use_set(model, "add"):
        expected = model(x)
    baked = masks.bake(model)
    assert [type(m) for m in baked] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(baked(x), expected)
    assert torch.equal(baked[0].weight, model[0].weight * masks["0.weight"])
    assert torch.equal(baked[2].bias, model[2].bias * masks["2.bias"])
    assert all(p.requires_grad for p in baked.parameters())
    assert all(torch.equal(p, original[n]) for n, p in model.named_parameters())
    dense = unmask_model(model)
    again = masks.bake(dense)
    assert again is not dense
    torch.testing.assert_close(again(x), expected)
    assert torch.equal(dense[0].weight, original["0.weight"])


def test_all_kept_is_the_network_nothing_kept_is_zero():
    dense = mlp().eval()
    x = torch.randn(4, 6)
    nothing = random_masks() & ~random_masks()
    torch.testing.assert_close((~nothing).bake(dense)(x), dense(x))
    assert torch.equal(nothing.bake(dense)(x), dense[2].bias.expand(4, 3))


def test_a_part_of_the_masks_can_be_baked():
    dense = mlp()
    masks = random_masks().subset(["2.weight"])
    baked = masks.bake(dense)
    assert torch.equal(baked[0].weight, dense[0].weight)
    assert torch.equal(baked[2].weight, dense[2].weight * masks["2.weight"])


def test_baking_tied_layers_keeps_them_tied():
    dense = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    dense[1].weight = dense[0].weight
    model = mask_model(dense)
    with torch.no_grad():
        model[0].weight_logits.normal_()
    masks = MaskSet.from_model(model)
    for source in (model, unmask_model(model)):
        baked = masks.bake(source)
        assert baked[0].weight is baked[1].weight
        assert torch.equal(baked[1].weight, source[1].weight * masks["0.weight"])


def test_a_root_linear_can_be_baked():
    masked = mask_model(nn.Linear(4, 3))
    with torch.no_grad():
        masked.weight_logits.normal_()
    baked = MaskSet.from_model(masked).bake(masked)
    assert type(baked) is nn.Linear
    assert torch.equal(baked.weight, masked.weight * (masked.weight_logits[0] > 0))


def test_masks_of_another_model_are_refused():
    model = masked_mlp()
    masks = MaskSet.from_model(model)
    other = masked_mlp(seed=4)
    for use in (masks.check, masks.apply, masks.bake):
        with pytest.raises(ValueError, match=r"for another model: .* the weights differ"):
            use(other)
    masks.check(other, strict=False)
    masks.apply(other, strict=False)
    masks.bake(other, strict=False)
    with pytest.raises(ValueError, match=r"another model: it has no parameter '0.weight'"):
        masks.check(nn.ReLU())
    wide = mask_model(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)))
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(5, 6\), the parameter \(9, 6\)"):
        masks.bake(wide)
    with pytest.raises(ValueError, match=r"the model masks '2.weight', the set does not"):
        masks.subset(["0.weight"]).apply(model)
    with_bias = MaskSet.from_model(masked_mlp(bias=True))
    with pytest.raises(ValueError, match=r"the set masks '0.bias', the model does not"):
        with_bias.apply(model)


def test_the_weight_hash_follows_the_weights_only():
    dense = mlp()
    first = weight_hash(dense)
    model = mask_model(dense, sets=2)
    assert weight_hash(model) == first
    with torch.no_grad():
        model[0].weight_logits.normal_()
    assert weight_hash(model) == first
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-6
    assert weight_hash(model) != first
    assert weight_hash(mlp().to(torch.bfloat16)) != first
    with pytest.raises(ValueError, match="'weight' is on the meta device"):
        weight_hash(MaskedLinear(2, 2, device="meta"))


# files that are damaged or malicious


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "masks.safetensors"
    MaskSet.from_model(masked_mlp(), "add", logits=True).save(path)
    return path


def test_truncated_files_are_refused(saved):
    data = saved.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        saved.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"masks.safetensors: not a readable mask file"):
            MaskSet.load(saved)
    saved.write_bytes(data + b"x")
    with pytest.raises(ValueError, match="not a readable mask file"):
        MaskSet.load(saved)


def test_no_damaged_byte_crashes_the_reader(saved):
    data = saved.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        position = int(torch.randint(0, len(data), (), generator=generator))
        value = int(torch.randint(0, 256, (), generator=generator))
        saved.write_bytes(data[:position] + bytes([value]) + data[position + 1 :])
        try:
            loaded = MaskSet.load(saved)
        except ValueError as error:
            assert "masks.safetensors" in str(error)  # noqa: PT017
        else:
            for name in loaded:
                assert loaded[name].shape == loaded.shapes[name]


@pytest.mark.parametrize("header", [2**63, 2**40, 2**64 - 1])
def test_a_header_length_beyond_the_file_is_refused(tmp_path, header):
    path = tmp_path / "m"
    path.write_bytes(struct.pack("<Q", header) + b"{}")
    with pytest.raises(ValueError, match="not a readable mask file"):
        MaskSet.load(path)


def rewritten(path, change):
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata))


def settings(metadata, **values):
    metadata.update(provenance=json.dumps({"settings": values}))


DAMAGES = {
    "format: expected": lambda m, t: m.pop("format"),
    "another version": lambda m, t: m.update(format_version="99"),
    "masks: missing": lambda m, t: m.pop("masks"),
    "masks: not JSON": lambda m, t: m.update(masks="[["),
    "masks: not JSON:": lambda m, t: m.update(masks="[" * 100_000),
    "masks: expected a list": lambda m, t: m.update(masks="{}"),
    "masks: expected \\[name": lambda m, t: m.update(masks='[["a"]]'),
    "expected sizes for 'a'": lambda m, t: m.update(masks='[["a", [-1]]]'),
    "expected sizes for 'b'": lambda m, t: m.update(masks='[["b", [true]]]'),
    "impossible shape of 'a'": lambda m, t: m.update(masks='[["a", [0, 4611686018427387904, 8]]]'),
    "impossible shape of 'b'": lambda m, t: m.update(masks=json.dumps([["b", [1] * 50]])),
    "'0.weight' occurs twice": lambda m, t: m.update(
        masks='[["0.weight",[5,6]],["0.weight",[5,6]]]'
    ),
    "provenance: missing": lambda m, t: m.pop("provenance"),
    "provenance: expected an object": lambda m, t: m.update(provenance="[]"),
    "tensor 'mask/2.weight' is missing": lambda m, t: t.pop("mask/2.weight"),
    "tensor 'logits/2.weight' is missing": lambda m, t: t.pop("logits/2.weight"),
    "unexpected tensor 'zzz'": lambda m, t: t.update(zzz=torch.ones(1)),
    "expected torch.uint8": lambda m, t: t.update({"mask/0.weight": torch.ones(4)}),
    r"uint8 \(4,\), got torch.uint8 \(3,\)": lambda m, t: t.update(
        {"mask/0.weight": torch.ones(3, dtype=torch.uint8)}
    ),
    "bits are set beyond its 30": lambda m, t: t["mask/0.weight"][-1].fill_(255),
    "holds NaN": lambda m, t: t["logits/0.weight"].fill_(float("nan")),
    "contradicts its mask": lambda m, t: t["logits/0.weight"].neg_(),
    "estimator: expected a name, got 5": lambda m, t: settings(m, estimator=5),
    "estimator: expected one of": lambda m, t: settings(m, estimator="nobody"),
    "estimator_options: expected numbers": lambda m, t: settings(
        m, estimator="threshold", estimator_options={"value": 10**400}
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_inconsistent_files_are_refused(saved, message):
    rewritten(saved, DAMAGES[message])
    with pytest.raises(ValueError, match=message) as error:
        MaskSet.load(saved)
    assert "not a valid mask file" in str(error.value)


def test_foreign_files_are_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pickle.pt")
    (tmp_path / "text").write_text("hello, this is no mask file")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("pickle.pt", "text", "empty"):
        with pytest.raises(ValueError, match=f"{name}: not a readable mask file"):
            MaskSet.load(tmp_path / name)
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="format: expected 'modmask-mask-set', got None"):
        MaskSet.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no mask file at"):
        MaskSet.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no mask file at"):
        MaskSet.load(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m"
    masks = random_masks(0)
    masks.save(path)

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        random_masks(1).save(path)
    monkeypatch.undo()
    assert MaskSet.load(path) == masks
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_bits_are_little_endian_and_row_major():
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = True  # elements 1 and 9
    assert MaskSet.from_dict({"x": mask})._packed["x"].tolist() == [0b10, 0b10]
    assert torch.equal(ops.unpack_bits(torch.tensor([2, 2], dtype=torch.uint8), (2, 5)), mask)
