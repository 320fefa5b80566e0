"""Where masked products on a GPU take their masks from: a model of sizes and device, no GPU."""

import pytest
import torch
from fresh import run_python

from modmask_kernels import _native
from modmask_kernels.ops import _gpu
from modmask_kernels.ops._gpu import DEVICES, Product, choose, crossover, predict

H100 = next(d for d in DEVICES if d.name == "H100")
LARGE = Product(1, 4, 2048, 4096, 4096, 2)


def test_many_rows_take_packed_masks():
    for device in DEVICES:
        choice = choose(LARGE, device, None)
        assert choice.source == "bits"
        assert device.name in choice.reason
        assert choice.seconds["bits"] < choice.seconds["regenerate"]


def test_few_rows_of_a_small_weight_draw_in_the_product():
    for device in DEVICES:
        small = Product(1, 4, 8, 256, 256, 2, tile=16)
        assert choose(small, device, None).source == "regenerate"


def test_there_is_one_crossover():
    for device in DEVICES:
        sources = [
            choose(LARGE._replace(rows=2**i, outputs=512, inputs=512), device, None).source
            for i in range(15)
        ]
        assert sources == sorted(sources, reverse=True)
        most = crossover(lambda rows: LARGE._replace(rows=rows, outputs=512, inputs=512), device)
        assert most == (0 if sources[0] == "bits" else 2 ** (sources.count("regenerate") - 1))


def test_soft_masks_have_no_bits():
    choice = choose(LARGE._replace(hard=False), H100, "bits")
    assert choice.source == "regenerate"
    assert "soft" in choice.reason


def test_forced():
    for source in _gpu.SOURCES:
        assert choose(LARGE, H100, source)[:2] == (source, f"MODMASK_GPU_MASKS={source}")


def test_the_prediction_counts_what_it_says():
    """Without arithmetic time is traffic: the weight once, logits or bits, x and y."""
    free = H100._replace(lanes=1e30, dense=(1e30,) * 3)
    p = Product(2, 3, 5, 64, 128, 2)
    weights, rows = 64 * 128, 6 * 5 * (64 + 128)
    logits, bits = 4 * 2 * weights, 6 * weights / 8
    scale = 1 / H100.bandwidth / _gpu.SHARE
    seconds = predict(p, free)
    launch = _gpu.LAUNCH
    assert seconds["regenerate"] == pytest.approx((2 * (weights + rows) + logits) * scale + launch)
    assert seconds["bits"] == pytest.approx(
        (2 * (weights + rows) + 2 * bits + logits) * scale + 2 * launch
    )
    # without traffic it is instructions and products, of whole tiles
    free = H100._replace(bandwidth=1e30)
    busy = 6 * weights * (_gpu.REGENERATE / H100.lanes + 2 * 128 / H100.dense[0])
    assert predict(p, free)["regenerate"] == pytest.approx(busy / _gpu.SHARE + launch)
    assert predict(p._replace(quads=False), free)["regenerate"] > predict(p, free)["regenerate"]


def test_products_by_dtype():
    assert [H100.products(2, False), H100.products(4, True), H100.products(4, False)] == list(
        H100.dense
    )


@pytest.mark.parametrize("value", ["bits", "regenerate", "repack", "both"])
def test_environment(value):
    done = run_python(
        "-c",
        "from modmask_kernels.ops import _gpu; print(_gpu.FORCED_SOURCE, _gpu.SAVES)",
        MODMASK_GPU_MASKS=value,
    )
    if value == "both":
        assert (
            "MODMASK_GPU_MASKS must be one of bits, regenerate, repack, not 'both'" in done.stderr
        )
    else:
        source = "bits" if value == "repack" else value
        assert done.stdout.split() == [source, str(value == "bits")], done.stderr


def test_a_forced_backend_leaves_gpus_to_the_reference(monkeypatch):
    monkeypatch.setattr(_native, "FORCED_BACKEND", "reference")
    assert _gpu.absent() == "MODMASK_BACKEND=reference"


def test_the_kernels_are_not_imported_with_the_package():
    done = run_python("-c", "import sys, modmask_kernels; print(*sys.modules, sep='\\n')")
    loaded = done.stdout.splitlines()
    assert "modmask_kernels.ops.masked_linear.gpu" in loaded
    assert not [name for name in loaded if "modmask_kernels" in name and "triton" in name]


def test_the_package_works_without_triton():
    code = """
import importlib.util, sys
sys.modules["triton"] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch, modmask_kernels as mm
from modmask_kernels.ops import _gpu
x, w = torch.randn(4, 3), torch.randn(5, 3)
mm.ops.masked_linear(x, w, torch.zeros(5, 3), seed=torch.tensor(1), samples=2)
print(_gpu.absent())
"""
    done = run_python("-c", code)
    assert done.stdout.splitlines() == ["Triton is not installed"], done.stderr


@pytest.fixture(params=[True, False], ids=["with CUDA C++", "without"])
def with_cuda(request, monkeypatch):
    monkeypatch.setattr(_native, "cuda_loaded", lambda: request.param)
    return request.param


@pytest.mark.skipif(_gpu.TRITON_ERROR is not None, reason="Triton is not installed")
def test_explain_a_layer(with_cuda):
    from modmask_kernels.ops import estimators
    from modmask_kernels.ops.masked_linear import gpu

    rule = estimators.gumbel_sigmoid()
    weight, logits = torch.empty(512, 512, dtype=torch.bfloat16), torch.empty(1, 512, 512)
    backend, why = gpu.explain(weight, logits, 4, rule, device=H100)
    assert backend == "triton"
    assert "up to" in why
    assert "H100" in why
    assert why.startswith("triton")
    assert ("cuda: the CUDA kernels are absent" in why) == (not with_cuda)
    assert "kept" not in why
    wide = torch.empty(4096, 4096)
    _, why = gpu.explain(wide.bfloat16(), wide.unsqueeze(0), 4, rule, device=H100)
    assert "packed masks kept for the gradient of x (8.0 MiB)" in why
    _, why = gpu.explain(wide, wide.unsqueeze(0), 4, rule, device=DEVICES[0])
    assert why.startswith("cuda" if with_cuda else "triton")
    for more in ({"estimator": estimators.top_k()}, {"estimator": rule, "n_of_m": (2, 4)}):
        backend, why = gpu.explain(weight, logits, 4, device=H100, **more)
        assert backend == ("triton" if with_cuda else "reference")
        assert ("packed" in why) if with_cuda else why.startswith("no GPU kernel for")


def test_few_rows_are_for_cuda_and_many_for_triton():
    """Of float32, whose products have no matrix units: a tile of 16 costs what it has.

    Later devices have as many operations in float32 that Triton is quicker from one row on.
    """
    wide = LARGE._replace(element_size=4)
    for device in DEVICES:
        kinds = [
            _gpu.choose_way(
                wide._replace(rows=rows, tile=16 if rows <= 16 else 64), device, _gpu.KINDS
            ).kind
            for rows in (1, 2, 4, 8, 64, 512, 8192)
        ]
        assert kinds == sorted(kinds)
        assert (kinds[0], kinds[-1]) == ("cuda" if device.name == "A100" else "triton", "triton")


def test_the_model_of_few_rows_counts_what_it_says():
    """Without arithmetic time is traffic: weight and logits for every eight jobs of a set."""
    free = H100._replace(lanes=1e30, dense=(1e30,) * 3)
    p = Product(2, 3, 20, 64, 128, 2)
    weights, rows = 64 * 128, 6 * 20 * (64 + 128)
    reads = 2 * 2  # 3 samples of 3 jobs of 8 rows
    moved = reads * weights * (2 + 4) + rows * (2 + 4)
    expected = moved / H100.bandwidth / _gpu.SHARE + 2 * _gpu.LAUNCH
    assert _gpu.predict_few_rows(p, free)["regenerate"] == pytest.approx(expected)


def test_one_kind_serves_alone():
    way = _gpu.choose_way(LARGE, H100, ("cuda",), forced="bits")
    assert way[:2] == ("cuda", "bits")
    assert "only kernels" in way.reason


@pytest.mark.skipif(_gpu.TRITON_ERROR is not None, reason="Triton is not installed")
def test_explain_a_convolution(with_cuda):
    from modmask_kernels.ops import estimators
    from modmask_kernels.ops.masked_conv import gpu

    def explain(weight, small=False, rule=None, **options):
        logits = torch.empty(1, *(weight[:, ::2] if small else weight).shape)
        rule = rule or estimators.gumbel_sigmoid()
        return gpu.explain(weight, logits, 4, rule, device=H100, **options)

    for kernel in ((3,), (3, 3)):
        weight = torch.empty(64, 64, *kernel)
        for options in ({}, {"transposed": True}):
            backend, why = explain(weight, **options)
            assert backend == "triton"
            assert "masks packed, then convolved" in why
            packed_only = (
                ({"rule": estimators.top_k()}, "the estimator top_k"),
                ({"n_of_m": (2, 4)}, "n_of_m"),
                ({"small": True}, "logits smaller than the weight"),
            )
            for masks, name in packed_only:
                backend, why = explain(weight, **masks, **options)
                if with_cuda:
                    expected = f"masks packed by the CUDA kernels, then convolved: {name}"
                    assert (backend, why) == ("triton", expected)
                else:
                    assert (backend, why) == ("reference", f"no GPU kernel for {name}")
