"""Exact formulas on masks made by hand (spec 1.11), and spec test (vii)."""

import pytest
import torch

from modmask_kernels import MaskSet, analysis


def bits(text):
    return torch.tensor([c == "1" for c in text])


A, B = bits("110100"), bits("101101")  # 3 and 4 kept, 2 in common, union 5
NONE, ALL = bits("000000"), bits("111111")


def test_iou_and_io_min_by_hand():
    assert analysis.iou(A, B) == 2 / 5
    assert analysis.io_min(A, B) == 2 / 3
    assert analysis.io_min(B, A) == 2 / 3


@pytest.mark.parametrize("measure", [analysis.iou, analysis.io_min])
def test_a_mask_and_itself(measure):
    for mask in (A, B, ALL, NONE):
        assert measure(mask, mask) == 1.0


def test_subset_has_io_min_one():
    subset = A & B
    assert analysis.io_min(subset, A) == 1.0
    assert analysis.iou(subset, A) == 2 / 3


def test_empty_masks():
    assert analysis.iou(NONE, NONE) == 1.0
    assert analysis.iou(NONE, A) == 0.0
    assert analysis.io_min(NONE, A) == analysis.io_min(A, NONE) == 1.0
    assert analysis.shared(NONE, [A]) == 0.0
    assert analysis.shared(A, []) == 0.0
    assert analysis.remaining(NONE, A) == 0.0
    assert analysis.density(torch.zeros(0, dtype=torch.bool)) == 0.0
    assert analysis.total_shared({"w": NONE}, [{"w": A}]) == 0.0
    assert analysis.stability({"w": NONE}, {"w": NONE}) == 1.0
    assert analysis.overall_io_min({"w": NONE}, {"w": A}) == 1.0
    assert analysis.chance_total_shared({"w": NONE}, {"w": A}) == 0.0
    assert analysis.shared_of_union({"w": NONE}, [{"w": NONE}]) == 0.0


def test_size_zero_tensors():
    none = torch.zeros(0, 3, dtype=torch.bool)
    assert analysis.iou(none, none) == analysis.io_min(none, none) == 1.0
    assert analysis.kept_counts({"w": none}) == {"w": (0, 0)}


def test_shared_counts_weights_in_any_other_mask():
    c = bits("010000")
    assert analysis.shared(A, [B]) == 2 / 3
    assert analysis.shared(A, [B, c]) == 3 / 3
    assert analysis.shared(B, [A, c]) == 2 / 4
    assert analysis.transfer_sharing(A, [B]) == 2 / 3


def test_total_shared_sums_over_tensors_before_dividing():
    one = {"u": A, "v": bits("11")}
    two = {"v": bits("00"), "u": B}
    assert analysis.total_shared(one, [two]) == 2 / 5
    assert analysis.total_shared(two, [one]) == 2 / 4
    # not the mean of the tensors' fractions
    assert analysis.total_shared(one, [two]) != (2 / 3 + 0) / 2
    assert analysis.shared_of_union(one, [two]) == 2 / (5 + 2)


def test_remaining():
    assert analysis.remaining(A, B) == 2 / 3
    assert analysis.remaining(B, A) == 2 / 4
    control, mask = {"u": A, "v": ALL}, {"u": B, "v": NONE}
    assert analysis.total_remaining(control, mask) == 2 / 9


def test_removed_per_row():
    control = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]).bool()
    assert analysis.removed_per_row(control, mask).tolist() == [75.0, 0.0, 0.0]
    assert analysis.removed_per_row(A, B).tolist() == [0.0, 100.0, 0.0, 0.0, 0.0, 0.0]


def test_stability_is_a_ratio_of_sums():
    one, two = {"u": A, "v": bits("11")}, {"u": B, "v": bits("00")}
    assert analysis.stability(one, two) == 2 / 7
    assert analysis.stability(one, two, exclude=["v"]) == 2 / 5
    assert analysis.overall_io_min(one, two) == 2 / 4


def test_kept_counts():
    assert analysis.kept_counts({"u": A, "v": ALL}) == {"u": (3, 6), "v": (6, 6)}


def test_chance_levels_by_formula():
    assert analysis.chance_iou(0.75, 0.75) == pytest.approx(0.60)
    assert analysis.chance_iou(1, 1) == 1
    assert analysis.chance_iou(0, 0.3) == 0
    assert analysis.chance_iou(0, 0) == 1  # as iou of two empty masks
    assert analysis.chance_io_min(0.2, 0.7) == 0.7
    assert analysis.chance_io_min(0, 0.7) == 1  # as io_min with an empty mask


def test_chance_levels_of_independent_masks():
    generator = torch.Generator().manual_seed(0)
    n, p, q = 1_000_000, 0.05, 0.2
    a = torch.rand(n, generator=generator) < p
    b = torch.rand(n, generator=generator) < q
    assert analysis.iou(a, b) == pytest.approx(analysis.chance_iou(p, q), rel=0.02)
    assert analysis.io_min(a, b) == pytest.approx(analysis.chance_io_min(p, q), rel=0.02)
    assert analysis.total_shared({"w": a}, [{"w": b}]) == pytest.approx(
        analysis.chance_total_shared({"w": a}, {"w": b}), rel=0.02
    )


def test_chance_total_shared_weights_tensors_by_the_mask():
    one = {"u": bits("1110"), "v": bits("1000")}
    two = {"u": bits("1000"), "v": bits("1111")}
    assert analysis.chance_total_shared(one, two) == (3 * 0.25 + 1 * 1.0) / 4


def test_chance_stability():
    one, two = {"u": A, "v": bits("11")}, {"u": B, "v": bits("00")}
    p, q = 3 / 6, 4 / 6
    expected = 6 * p * q / (6 * (p + q - p * q) + 2)
    assert analysis.chance_stability(one, two) == pytest.approx(expected)
    assert analysis.chance_stability(one, two, exclude=["v"]) == pytest.approx(
        analysis.chance_iou(p, q)
    )
    assert analysis.chance_stability({"u": NONE}, {"u": NONE}) == 1.0


def test_chance_overall_io_min():
    one, two = {"u": A, "v": bits("11")}, {"u": B, "v": bits("10")}
    both = 6 * (3 / 6) * (4 / 6) + 2 * 1.0 * 0.5
    assert analysis.chance_overall_io_min(one, two) == pytest.approx(both / 5)
    assert analysis.chance_overall_io_min(one, two, exclude=["v"]) == pytest.approx(
        analysis.chance_io_min(3 / 6, 4 / 6)
    )
    assert analysis.chance_overall_io_min({"u": NONE}, {"u": A}) == 1.0


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="a must be a bool tensor"):
        analysis.iou(A.float(), B)
    with pytest.raises(ValueError, match="one shape"):
        analysis.io_min(A, bits("10"))
    with pytest.raises(ValueError, match="one shape"):
        analysis.shared(A, [bits("10")])
    with pytest.raises(ValueError, match="different parameters: v"):
        analysis.stability({"u": A}, {"u": A, "v": A})
    with pytest.raises(ValueError, match="exclude"):
        analysis.stability({"u": A}, {"u": A}, exclude=["w"])
    model = MaskSet.from_dict({"u": A})
    with pytest.raises(TypeError, match=r"a must be the mask of one tensor, got MaskSet; .*total_"):
        analysis.iou(model, model)
    with pytest.raises(TypeError, match=r"one tensor, got MaskSet; .*MaskSet\.density\(\)"):
        analysis.density(model)
    for function, own in ((analysis.total_shared, model), (analysis.shared, A)):
        with pytest.raises(TypeError, match="others: expected a list of masks, got one MaskSet"):
            function(own, model)
    with pytest.raises(TypeError, match="masks of a model by parameter name, got Tensor"):
        analysis.stability(A, A)
    with pytest.raises(TypeError, match="control"):
        analysis.remaining(A.int(), B)
