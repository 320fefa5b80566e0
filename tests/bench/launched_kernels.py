"""Which GPU kernels the cases of `bench.gpu.small` launch, told without a GPU.

`python launched_kernels.py BACKEND`, with MODMASK_GPU_MASKS: the operations on CPU tensors go as on
CUDA tensors, down to the launches, which are written down and not done. Of CUDA C++ these are the
operations of the library, whose launchers (csrc/cuda/*_launch.cu) tell the kernels; of Triton the
kernels themselves. Prints {kernel: names of cases}; of BACKEND "none" the reference has to serve
everything, as on a device without kernels.
"""

from __future__ import annotations

import collections
import importlib
import json
import math
import sys
from typing import Any

import torch

SERVED: dict[str, Any] = {}  # what the package registers for CUDA tensors
_register = torch.library.Library.impl


def _keep(self: Any, name: Any, function: Any, device: str = "", **options: Any) -> Any:
    if device == "CUDA":
        SERVED[name] = function
    return _register(self, name, function, device, **options)


torch.library.Library.impl = _keep  # type: ignore[method-assign]

from modmask_kernels import _native, ops  # noqa: E402
from modmask_kernels.bench.gpu import small  # noqa: E402
from modmask_kernels.ops import _gpu, _group_affine, estimators  # noqa: E402
from modmask_kernels.ops._convolution import shape_of_result  # noqa: E402
from modmask_kernels.ops._masked_product import MaskedProduct  # noqa: E402
from modmask_kernels.ops.masked_linear import gpu as linear_gpu  # noqa: E402
from modmask_kernels.ops.masked_rnn.gpu import SAVED  # noqa: E402

MULTIPROCESSORS = 148  # of the largest device
SEARCH = {f"top_k_{part}" for part in ("list", "start", "count", "digit", "ties", "ranks")}
TOP_K = estimators.NAMES.index("top_k")
GUMBEL = estimators.NAMES.index("gumbel_sigmoid")

launched: set[str] = set()


def as_public(name: str):
    """A stub with the results of the operation that the kernel serves, by its fake kernel."""
    operation = getattr(torch.ops.modmask, name)

    def stub(*arguments):
        def on_meta(value):
            if isinstance(value, (list, tuple)):
                return [on_meta(v) for v in value]
            return value.to("meta") if isinstance(value, torch.Tensor) else value

        def here(value):
            if isinstance(value, (list, tuple)):
                return type(value)(here(v) for v in value)
            return torch.zeros(value.shape, dtype=value.dtype)

        return here(operation(*map(on_meta, arguments)))

    return stub


def sampling(name: str, kernel: str, code: int):
    stub = as_public(name)

    def call(*arguments):
        launched.add(kernel)
        if arguments[code] == TOP_K and "backward" not in name:
            launched.update(SEARCH | {"top_k_cut"})
        return stub(*arguments)

    return call


def mask_words(logits, seed, shape, samples, *draw):
    launched.add("sample_bits")
    if draw[3] == TOP_K:
        launched.update(SEARCH | {"top_k_cut"})
    if list(logits.shape[1:]) != list(shape):
        launched.add("expand_bits")
    groups = 1 if seed is None else samples
    words = math.prod(shape) // 32 + 17
    return torch.zeros(logits.shape[0], groups, words, dtype=torch.int32)


def source_of(words, draw):
    hard, code = draw[6:8]
    if words is not None:
        return "packed"
    assert not hard or code == GUMBEL
    return "noise" if hard else "soft"


def product(a, weight, logits, bias, bias_logits, seed, words, backward, *draw):
    name = "masked_linear_dx" if backward else "masked_linear_forward"
    launched.update({name, f"{name} {source_of(words, draw)}", "finish_linear"})
    return a.new_zeros(a.shape[0], weight.shape[1 if backward else 0])


def gradients(dy, x, weight, logits, seed, words, need_weight, need_logits, *draw):
    plain = seed is not None and draw[7] == GUMBEL
    template = f"{'plain' if plain else 'general'}{', dweight' * need_weight}"
    launched.update({"masked_linear_gradients", f"masked_linear_gradients {template}"})
    return torch.zeros_like(weight), torch.zeros_like(logits)


def bias_gradients(sums, bias, bias_logits, *_):
    launched.add("bias_gradients")
    return torch.zeros_like(bias), torch.zeros_like(bias_logits)


def loop(gates, weight, bits, *rest):
    cell, _, groups, _ = rest[-4:]
    name = ("lstm", "gru")[cell]
    whole = groups <= MULTIPROCESSORS
    launched.update({"rnn_forward", f"rnn_forward {name}"} if whole else step("forward", name))
    steps, batch, hidden = *gates.shape[:2], weight.shape[1]
    y = gates.new_zeros(steps, batch, hidden)
    return y, y[0].clone(), y[0].clone(), y.new_zeros(steps, batch, SAVED, hidden)


def loop_backward(saved, weight, bits, *rest):
    cell, _, groups, _ = rest[-4:]
    name = ("lstm", "gru")[cell]
    whole = groups <= MULTIPROCESSORS
    launched.update({"rnn_backward", f"rnn_backward {name}"} if whole else step("backward", name))
    dgates = torch.zeros_like(saved[:, :, :4])
    return dgates, torch.zeros_like(saved[0, :, 0]), torch.zeros_like(saved[0, :, 0])


def step(pass_: str, name: str) -> set[str]:
    of_product = f"masked_linear_{'forward' if pass_ == 'forward' else 'dx'}"
    cell = f"rnn_cell_{pass_}"
    return {cell, f"{cell} {name}", of_product, f"{of_product} packed"}


def top_k_mask(scores, k, largest, packed):
    launched.update(SEARCH | {"top_k_write"})
    shapes = [((t.numel() + 7) // 8,) if packed else t.shape for t in scores]
    dtype = torch.uint8 if packed else torch.bool
    return [torch.zeros(s, dtype=dtype) for s in shapes] + [torch.zeros(1, dtype=torch.int32)]


def select_linear(x, weight, *_):
    launched.update({"masked_linear_forward", "masked_linear_forward packed", "finish_linear"})
    return x.new_zeros(x.shape[0], weight.shape[0])


def selected_product(x, weight, *rest):
    *_, stride, padding, dilation, _ = rest
    launched.update({"selected_product", f"selected_product {'conv' if stride else 'linear'}"})
    if stride:
        return x.new_zeros(shape_of_result(x, weight, stride, padding, dilation))
    return x.new_zeros(*x.shape[:-1], weight.shape[0])


def group_affine(x, scale, shift):
    launched.add("group_affine")
    return torch.zeros_like(x)


def group_affine_backward(dy, x, scale, *_):
    launched.update({"group_affine_backward", "group_affine_finish"})
    launched.add(f"group_affine_backward {'inner' if dy.shape[-1] > 1 else 'channels'}")
    return torch.zeros_like(dy), torch.zeros_like(scale), torch.zeros_like(scale)


CUDA = {
    "sample_mask_cuda": sampling("sample_mask", "sample_values", 8),
    "sample_mask_packed_cuda": sampling("sample_mask_packed", "sample_bits", 6),
    "sample_mask_backward_cuda": sampling("sample_mask_backward", "sample_backward", 8),
    "mask_words_cuda": mask_words,
    "masked_product_cuda": product,
    "masked_gradients_cuda": gradients,
    "masked_bias_gradients_cuda": bias_gradients,
    "rnn_loop": loop,
    "rnn_loop_backward": loop_backward,
    "top_k_mask_cuda": top_k_mask,
    "select_linear_cuda": select_linear,
    "selected_product_cuda": selected_product,
    "group_affine_cuda": group_affine,
    "group_affine_backward_cuda": group_affine_backward,
}


def _product(options: dict[str, Any]) -> str:
    return "dx" if options["BACKWARD"] else "forward"


# names as in tests/triton/test_budgets.py
TRITON = {
    ("sample_mask", "pack_masks"): lambda _: "pack",
    ("masked_linear", "masked_product"): _product,
    ("masked_linear", "weight_gradients"): lambda _: "gradients",
    ("masked_linear", "bias_gradients"): lambda _: "bias_gradients",
    ("masked_conv", "masked_convolution"): lambda options: f"conv_{_product(options)}",
    ("masked_conv", "weight_gradients"): lambda _: "conv_gradients",
}
FLAGS = ("SPREAD", "NEED_WEIGHT", "NEED_LOGITS", "PACK", "PACKED")


class Recorder:
    """In place of a Triton kernel."""

    def __init__(self, name):
        self.name = name

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *_, **options):
        name = f"triton {self.name(options)}"
        launched.add(name)
        if "SOURCE" in options:
            bits = options["SOURCE"] == BITS.value
            launched.add(f"{name} {'bits' if bits else 'noise' if options['HARD'] else 'soft'}")
        launched.update(f"{name} {flag}" for flag in FLAGS if options.get(flag))


def main(backend: str) -> None:
    global BITS
    from modmask_kernels.ops._triton import BITS

    reason = "ruled out" if backend in ("triton", "none") else None
    _native.FORCED_BACKEND = backend if backend in ("cuda", "triton") else None
    _native.cuda_loaded = lambda: reason is None
    _native.cuda_unserved = lambda device: reason
    if backend == "none":
        _gpu.TRITON_ERROR = "ruled out"
    MaskedProduct.quick = lambda *_: None
    MaskedProduct._is_saved = lambda self, arguments: (  # but for the device
        self._saves is not None and torch.is_grad_enabled() and self._saves(*arguments)
    )
    _group_affine.unserved = lambda *_: reason
    linear_gpu.runs_on = lambda device: _native.cuda_unserved(device) is None
    torch.cuda.is_current_stream_capturing = lambda: False
    pack_bits = ops.pack_bits
    if reason is None:
        ops.pack_bits = lambda mask: launched.add("pack_bits") or pack_bits(mask)
    for (family, kernel), name in TRITON.items():
        module = importlib.import_module(f"modmask_kernels.ops.{family}.triton")
        assert hasattr(module, kernel)
        setattr(module, kernel, Recorder(name))
    library = torch.library.Library("modmask", "IMPL")
    for operation, function in {**SERVED, **CUDA}.items():
        library.impl(operation, function, "CPU", allow_override=True)
    way = small.here()
    found = collections.defaultdict(list)
    for case, call in small.calls(torch.device("cpu"), way):
        launched.clear()
        call()
        for kernel in launched:
            found[kernel].append(f"{case} ({way})")
        if not launched:
            found["none"].append(f"{case} ({way})")
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
