"""The page that shows which masks keep which weights."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.image import imread

from modmask_kernels import MaskSet, cli
from modmask_kernels.report import modules


def masks_of(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < 0.4 for name, shape in shapes.items()}


def test_owners():
    a = torch.tensor([[1, 1, 0, 0]]).bool()
    b = torch.tensor([[1, 0, 1, 0]]).bool()
    assert modules.owners({"a": a, "b": b}).tolist() == [[3, 1, 2, 0]]
    assert modules.owners({"a": a}).tolist() == [[1, 1, 0, 0]]
    assert modules.owners({"a": a, "b": b, "c": b}).tolist() == [[4, 1, 4, 0]]


def test_filters_lie_beside_each_other():
    codes = np.arange(2 * 3 * 2 * 2, dtype=np.uint8).reshape(2, 3, 2, 2)
    picture, kernel = modules.plane(codes)
    assert (picture.shape, kernel) == ((4, 6), (2, 2))
    for o in range(2):
        for i in range(3):
            np.testing.assert_array_equal(
                picture[2 * o : 2 * o + 2, 2 * i : 2 * i + 2], codes[o, i]
            )
    assert modules.plane(np.zeros(5, np.uint8))[0].shape == (1, 5)
    assert modules.plane(np.zeros((4, 3, 5), np.uint8))[1] == (1, 5)
    assert modules.plane(np.zeros((4, 3), np.uint8))[0].shape == (4, 3)


def test_gates_are_named_as_pytorch_orders_them():
    lstm = {"rnn.weight_ih_l0": (20, 3), "rnn.weight_hh_l0": (20, 5)}
    for name in lstm:
        assert modules.gates_of(name, lstm)[1] == "forget gate"
    gru = {"rnn.weight_ih_l0": (15, 3), "rnn.weight_hh_l0": (15, 5)}
    assert modules.gates_of("rnn.weight_ih_l0", gru)[0] == "reset gate"
    attention = {"a.in_proj_weight": (12, 4)}
    assert modules.gates_of("a.in_proj_weight", attention) == ("query", "key", "value")
    assert modules.gates_of("layers.0.weight", {"layers.0.weight": (20, 5)}) == ()


def test_pictures_hold_every_weight():
    shapes = {"first.weight": (7, 5), "conv.weight": (3, 2, 3, 3), "empty.weight": (0, 4)}
    masks = {"add": masks_of(shapes, 1), "mul": masks_of(shapes, 2)}
    first, conv, empty = modules.layers(masks)
    data = base64.b64decode(first.image.split(",", 1)[1])
    pixels = imread(io.BytesIO(data), format="png")
    assert pixels.shape == (7, 5, 4)
    a, b = (masks[key]["first.weight"].numpy() for key in ("add", "mul"))
    for (i, j), _ in np.ndenumerate(a):
        name = modules.SHARED if a[i, j] and b[i, j] else modules.COLOURS[0 if a[i, j] else 1]
        expected = to_rgba(name) if a[i, j] or b[i, j] else (0, 0, 0, 0)
        np.testing.assert_allclose(pixels[i, j], expected, atol=1 / 255)
    assert [label for label, *_ in first.counts] == ["none", "add only", "mul only", "several"]
    assert sum(count for _, count, _ in first.counts) == 35
    assert first.counts[3][1] == int((a & b).sum())
    assert (conv.rows, conv.columns, conv.kernel) == (9, 6, (3, 3))
    assert empty.image is None


def test_masks_that_do_not_fit():
    one = masks_of({"a": (2, 2)})
    with pytest.raises(ValueError, match="the mask y is of another network than x"):
        modules.layers({"x": one, "y": masks_of({"b": (2, 2)})})
    with pytest.raises(ValueError, match="expected 1 to 6 masks, got 7"):
        modules.layers({str(i): one for i in range(7)})


def test_the_command_writes_one_page_without_network(tmp_path, capsys):
    files = []
    for i, name in enumerate(("add", "mul")):
        files.append(str(tmp_path / f"{name}.safetensors"))
        MaskSet.from_dict(masks_of({"a.weight": (4, 3), "<b>": (2, 2)}, i)).save(files[-1])
    out = tmp_path / "page" / "modules.html"
    assert cli.main(["show", *files, "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    text = out.read_text()
    assert text.count("data:image/png;base64,") == 2
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "add only" in text
    before = text
    assert cli.main(["show", *files, "--out", str(out)]) == 0
    assert out.read_text() == before
    assert cli.main(["show", files[0], files[0], "--out", str(out)]) == 2
    assert "comes twice" in capsys.readouterr().err


def test_masks_of_different_networks_are_refused(tmp_path, capsys):
    files = []
    for name in ("a", "b"):
        files.append(str(tmp_path / f"{name}.safetensors"))
        masks = masks_of({"w": (2, 2)})
        MaskSet.from_dict(masks, metadata={"weight_hash": name * 64}).save(files[-1])
    assert cli.main(["show", *files, "--out", str(tmp_path / "x.html")]) == 2
    assert "different networks" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
