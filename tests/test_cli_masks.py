"""`modmask masks`: counts and combinations of mask files."""

import pytest
import torch

from modmask_kernels import MaskSet, cli


@pytest.fixture
def files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sets = [
        MaskSet.from_dict({"layer.weight": torch.rand(5, 7, generator=generator) < 0.5})
        for _ in range(2)
    ]
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for masks, path in zip(sets, paths, strict=True):
        masks.save(path)
    return *sets, *map(str, paths), tmp_path / "c.safetensors"


def test_counts(files, capsys):
    a, _, path, _, _ = files
    assert cli.main(["masks", path]) == 0
    kept = int(a["layer.weight"].sum())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"layer.weight  {kept} of 35 kept ({kept / 35:.1%})"
    assert lines[1] == f"all           {kept} of 35 kept ({kept / 35:.1%})"


@pytest.mark.parametrize("name", ["and", "or", "minus"])
def test_combinations(files, capsys, name):
    a, b, first, second, out = files
    expected = {"and": a & b, "or": a | b, "minus": a - b}[name]
    assert cli.main(["masks", first, f"--{name}", second, "--out", str(out)]) == 0
    assert MaskSet.load(out) == expected
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(out)
    assert f" {int(expected['layer.weight'].sum())} of 35 kept" in lines[0]
    assert cli.main(["masks", first, f"--{name}", second]) == 0  # counts alone


def test_wrong_uses_are_told(files, tmp_path, capsys):
    _, _, first, second, out = files
    assert cli.main(["masks", first, "--out", str(out)]) == 2
    assert "--out needs one of --and, --or, --minus" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main(["masks", str(tmp_path / "none.safetensors")]) == 2
    assert "no mask file at" in capsys.readouterr().err
    other = tmp_path / "other.safetensors"
    MaskSet.from_dict({"layer.weight": torch.ones(2, 2, dtype=torch.bool)}).save(other)
    assert cli.main(["masks", first, "--and", str(other)]) == 2
    assert "different models" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["masks", first, "--and", second, "--or", second])


def test_help_says_what_each_option_keeps(capsys):
    with pytest.raises(SystemExit):
        cli.main(["masks", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "the weights that FILE keeps and OTHER does not" in text
    assert "modmask masks add.safetensors --minus mul.safetensors" in text
