"""Compiles the Triton kernels for GPUs that are not here, as their launch functions would launch
them, and reads what the compiler made of them."""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..ops import _triton
from ..ops.masked_conv import triton as masked_conv
from ..ops.masked_linear import triton as masked_linear
from ..ops.sample_mask import triton as sample_mask

KERNELS = (
    (masked_linear, "masked_product"),
    (masked_linear, "weight_gradients"),
    (masked_linear, "bias_gradients"),
    (masked_conv, "masked_convolution"),
    (masked_conv, "weight_gradients"),
    (sample_mask, "pack_masks"),
)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")

AMD = "gfx942"


class Launch(NamedTuple):
    """A kernel with the arguments of one call."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    def with_arguments(self, **changed: Any) -> Launch:
        """The same with other arguments."""
        return self._replace(arguments={**self.arguments, **changed})


@contextlib.contextmanager
def recorded(large_tiles: bool) -> Iterator[list[Launch]]:
    """The launches of the functions called inside, none of which runs; tensors may be on meta.

    `large_tiles`: whether they shall choose as on compute capability 9.
    """
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return self.call

        def call(self, *given: Any, **named: Any) -> None:
            arguments = dict(zip(self.kernel.arg_names, given, strict=False)) | named
            options = {name: arguments.pop(name) for name in _OPTIONS if name in arguments}
            launches.append(Launch(self.kernel, arguments, options))

    with contextlib.ExitStack() as stack:
        for module, name in KERNELS:
            recorder = Recorder(getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, recorder))
        choice = mock.patch.object(masked_linear, "has_large_tiles", return_value=large_tiles)
        stack.enter_context(choice)
        yield launches


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


class Compiled(NamedTuple):
    """What a compiler made of a launch; `sass` is empty for AMD.

    Attributes:
        assembly: PTX, or the assembly of an AMD device.
        registers, stack, local: of a thread. shared: bytes of a block.
    """

    assembly: str
    sass: str
    registers: int
    stack: int
    local: int
    shared: int
    threads: int

    def instructions(self, loop: bool = False) -> Counter[str]:
        """Static counts of machine instructions by mnemonic, of all or of the longest loop."""
        return self.loops()[0] if loop else Counter(name for _, name, _ in self._lines())

    def loops(self) -> list[Counter[str]]:
        """The counts of every loop, the longest first; a loop has those of loops inside."""
        found = self._lines()
        targets = ((at, re.search(r"0x([0-9a-f]+)", rest)) for at, _, rest in found)
        back = [(int(to[1], 16), at) for at, to in targets if to and int(to[1], 16) < at]
        jumps = {at for at, name, _ in found if name == "BRA"}
        loops = sorted((b for b in back if b[1] in jumps), key=lambda b: b[0] - b[1])
        return [
            Counter(name for at, name, _ in found if first <= at <= last) for first, last in loops
        ]

    def _lines(self) -> list[tuple[int, str, str]]:
        """Address, mnemonic and the rest of every instruction."""
        name = r"IMAD\.(?:WIDE|HI)|[A-Z][A-Z0-9_]+"
        line = rf"/\*([0-9a-f]{{4,}})\*/\s+(?:@!?U?P\w+\s+)?({name})([^;]*);"
        found = [(int(at, 16), name, rest) for at, name, rest in re.findall(line, self.sass)]
        return [line for line in found if line[1] != "NOP"]  # fills the end and is not run


def compile_launch(launch: Launch, target: int | str) -> Compiled:
    """Compiles for a compute capability, 90 for instance, or an AMD architecture."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (_is_special(parameter, value) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type_of(value)
        # memory comes from PyTorch, aligned to more than this
        if isinstance(value, Tensor) or (_is_special(parameter, value) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    nvidia = isinstance(target, int)
    # kernels ask it while they are compiled
    with mock.patch.object(_triton, "PTX", tl.constexpr(nvidia)):
        compiled = triton.compile(
            ASTSource(launch.kernel, signature, constants, attributes),
            target=GPUTarget("cuda", target, 32) if nvidia else GPUTarget("hip", target, 64),
            options=launch.options,
        )
    threads = launch.options["num_warps"] * (32 if nvidia else 64)
    if not nvidia:
        assembly = compiled.asm["amdgcn"]
        vgprs, spills, private = (
            int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # type: ignore[index]
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        return Compiled(assembly, "", vgprs, private, spills, compiled.metadata.shared, threads)
    resources, sass = (_dump(compiled.asm["cubin"], option) for option in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", resources)
    assert found is not None, resources
    registers, stack, local = (int(n) for n in found.groups())
    shared = compiled.metadata.shared
    return Compiled(compiled.asm["ptx"], sass, registers, stack, local, shared, threads)


def _is_special(parameter: Any, value: Any) -> bool:
    return isinstance(value, int) and not parameter.do_not_specialize


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.lru_cache
def launch_of(
    kernel: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    source: str = "bits",
    rows: int = 2048,
    inputs: int = 4096,
    tf32: bool = False,
    hard: bool = True,
    estimator: int = 0,
    tau: float = 1.0,
    antithetic: bool = False,
    noise: bool = True,
    need_weight: bool = False,
    need_logits: bool = True,
    large_tiles: bool = True,
    config: _triton.Config | None = None,
) -> Launch:
    """A kernel as a layer of 4096 outputs launches it, with 4 samples of one set.

    Args:
        kernel: `forward`, `dx`, `gradients`, `bias_gradients` or `pack`.
        source: of the masks of a product, `bits` or `regenerate`.
        rows: of each group.
    """
    outputs, samples = 4096, 4

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    drawn = (samples, hard, estimator, tau, antithetic, noise)
    masks = _masks((outputs, inputs), *drawn, bias=kernel == "bias_gradients")
    weight, bias = empty(outputs, inputs), empty(outputs)
    x, dy = empty(samples * rows, inputs), empty(samples * rows, outputs)
    with recorded(large_tiles) as launches:
        spread = masked_linear.rows_are_words(masks, inputs)
        words = None
        if source == "bits" or kernel == "pack":
            words = sample_mask.pack(masks, spread=spread)
        given: dict[str, Any] = {"spread": spread, "tf32": tf32, "config": config}
        if kernel == "forward":
            masked_linear.product(x, weight, masks, bias, words, **given)
        elif kernel == "dx":
            masked_linear.product(dy, weight, masks, None, words, backward=True, **given)
        elif kernel == "gradients":
            masked_linear.gradients(
                dy,
                x,
                weight,
                masks,
                need_weight=need_weight,
                need_logits=need_logits,
                tf32=tf32,
                config=config,
            )
        elif kernel == "bias_gradients":
            sums = empty(samples, outputs, of=torch.float32)
            masked_linear.masked_bias_gradients(sums, bias, masks)
    return launches[-1]


def _masks(
    shape: tuple[int, ...],
    samples: int,
    hard: bool,
    estimator: int,
    tau: float,
    antithetic: bool,
    noise: bool,
    *,
    bias: bool = False,
) -> _triton.Masks:
    return _triton.Masks(
        torch.empty((1, *shape), device="meta"),
        torch.empty((1, shape[0]), device="meta") if bias else None,
        torch.empty(1, dtype=torch.int64, device="meta") if noise else None,
        tensor_id=2,
        bias_tensor_id=3,
        sample_offset=0,
        element_offset=0,
        samples=samples,
        tau=tau,
        hard=hard,
        code=estimator,
        low=0.0,
        high=0.0,
        clamp=0.0,
        antithetic=antithetic,
    )


@functools.lru_cache
def convolution_of(
    kernel: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    source: str = "bits",
    channels: int = 256,
    size: int = 28,
    taps: int = 3,
    stride: int = 1,
    tf32: bool = False,
    hard: bool = True,
    estimator: int = 0,
    tau: float = 1.0,
    antithetic: bool = False,
    noise: bool = True,
    need_weight: bool = False,
    need_logits: bool = True,
    packed: bool = False,
    packs: bool = False,
    outputs: int = 256,
    config: _triton.Config | None = None,
) -> Launch:
    """A kernel as a convolution launches it: 64 images, 4 samples of one set.

    Args:
        kernel: `conv_forward`, `conv_dx` or `conv_gradients`.
        source: of the masks, `bits` or `regenerate`. packed: whether dweight reads
            its masks. packs: whether dlogits writes them.
        size: height and width of an image. taps: of the kernel, in either dimension.
    """
    images, samples, pad = 64, 4, taps // 2
    out_size = (size + 2 * pad - taps) // stride + 1
    geometry = masked_conv.Geometry(
        images,
        1,
        channels,
        outputs,
        (size, size),
        (out_size, out_size),
        (taps, taps),
        (stride, stride),
        (pad,) * 4,
        (1, 1),
    )
    drawn = (samples, hard, estimator, tau, antithetic, noise)
    masks = _masks((outputs, channels, taps, taps), *drawn)
    weight = torch.empty(outputs, channels, taps, taps, dtype=dtype, device="meta")
    x = weight.new_empty(samples * images, channels, size, size)
    dy = weight.new_empty(samples * images, outputs, out_size, out_size)
    given: dict[str, Any] = {"tf32": tf32, "config": config}
    with recorded(large_tiles=False) as launches:
        words = sample_mask.pack(masks) if source == "bits" else None
        if kernel == "conv_forward":
            bias = weight.new_empty(outputs)
            masked_conv.product(x, weight, masks, geometry, bias, words, **given)
        elif kernel == "conv_dx":
            masked_conv.product(dy, weight, masks, geometry, None, words, backward=True, **given)
        else:
            given |= {"need_weight": need_weight, "need_logits": need_logits}
            given["words"] = words if packed or packs else None
            masked_conv.gradients(dy, x, weight, masks, geometry, **given)
    return launches[-1]
