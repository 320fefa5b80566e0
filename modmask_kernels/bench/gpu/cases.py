"""The rows of every suite: what is run, beside what, and how much work it is at least."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ... import explain, ops
from ...nn import MaskedConv2d, MaskedLinear, MaskedLSTM
from ...ops.masked_linear.gpu import LEAST_SAVED
from .. import baselines, lstm, select, top_k
from ..verify import ConvProblem, GateError, Problem, check_finite, check_fused
from .events import Step

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
}
_SEED = 7


@contextlib.contextmanager
def precision_of(dtype: str) -> Iterator[None]:
    """Products of float32 rounded to TF32 or not, by every library."""
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        yield
    finally:
        for place, former in zip(places, before, strict=True):
            place.fp32_precision = former


@dataclass(frozen=True)
class Work:
    """The least that a step does: bytes of device memory, operations of matrix products."""

    bytes: float = 0.0
    operations: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """What is run for a row.

    Attributes:
        candidates: name to maker of a step; `plain` is what the others are compared with, `fused`
            the operation of this library.
        check: raises GateError where the fused operation is wrong; its errors over those allowed.
        parts: steps of the fused operation of which differences tell what each kernel takes.
        backend: which backend serves, and why.
    """

    candidates: Mapping[str, Callable[[], Step]]
    check: Callable[[], Mapping[str, float]]
    parts: Mapping[str, Callable[[], Step]] = field(default_factory=dict)
    backend: str = ""


class Case(Protocol):
    """A row; dataclasses of the numbers that make it."""

    suite: ClassVar[str]

    @property
    def label(self) -> str:
        """Its name in tables, unlike that of any other row of the suite."""

    @property
    def dtype(self) -> str:
        """Of `DTYPES`."""

    def prepare(self, device: torch.device) -> Prepared:
        """Operands and steps, on a device."""

    def work(self) -> dict[str, Work]:
        """Of the candidates for which it is known."""


def gradients(forward: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> Step:
    """Forward and backward of `forward(*leaves)`."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    return lambda: torch.autograd.grad(forward(*leaves), leaves, upstream)


def _samples(count: int) -> str:
    return f"{count} sample{'s' * (count > 1)}"


def _naive(problem: Problem, function: Callable[..., Tensor]) -> Step:
    """A naive step that has been seen to give finite numbers."""

    def forward(x: Tensor, logits: Tensor) -> Tensor:
        return function(x, problem.weight, logits, problem.bias, problem.samples)

    step: Any = gradients(forward, [problem.x, problem.logits], problem.grad)
    check_finite(dict(zip(("grad_x", "grad_logits"), step(), strict=True)), name="naive masking")
    return step  # type: ignore[no-any-return]


def _product(
    problem: Problem, naive: Callable[..., Tensor], backend: str, compiled: bool
) -> Prepared:
    """A masked product against the plain one."""
    seed = torch.tensor(_SEED, device=problem.x.device)
    x, logits = problem.x, problem.logits

    def fused(x: Tensor, logits: Tensor) -> Tensor:
        return problem.fused(x, logits, seed)

    candidates: dict[str, Callable[[], Step]] = {
        "plain": lambda: gradients(
            lambda x, weight: problem.plain(x, weight, problem.bias),
            [x, problem.weight],
            problem.grad,
        ),
        "fused": lambda: gradients(fused, [x, logits], problem.grad),
        "naive": lambda: _naive(problem, naive),
    }
    if compiled:
        candidates["compiled"] = lambda: _naive(problem, _compiled(naive))

    def forward() -> Step:
        return torch.no_grad()(lambda: fused(x, logits))

    return Prepared(
        candidates,
        lambda: check_fused(problem),
        {
            "forward": forward,
            "forward and dx": lambda: gradients(lambda x: fused(x, logits), [x], problem.grad),
            "forward and dlogits": lambda: gradients(
                lambda logits: fused(x, logits), [logits], problem.grad
            ),
        },
        backend,
    )


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def _product_work(
    weights: int,
    inputs: int,
    outputs: int,
    dtype: str,
    macs: int,
    *,
    logits_reads: int = 3,
    bits: float = 0.0,
) -> dict[str, Work]:
    """Three products; fused, logits are read and their gradient is written besides.

    Args:
        logits_reads: how often; 3 where each of the products draws its masks or has them packed.
        bits: packed masks, each time that they are written or read.
    """
    size = DTYPES[dtype].itemsize
    plain = 3.0 * size * (weights + inputs + outputs)
    masked = 4.0 * (logits_reads + 1) * weights + bits / 8
    return {"plain": Work(plain, 6.0 * macs), "fused": Work(plain + masked, 6.0 * macs)}


@dataclass(frozen=True)
class Linear:
    """masked_linear, forward and backward, against torch.nn.Linear with a trainable weight."""

    outputs: int
    inputs: int
    batch: int
    samples: int
    dtype: str = "bfloat16"
    compiled: bool = False

    suite: ClassVar[str] = "linear"

    @property
    def label(self) -> str:
        """As `4096x4096, 256, 4 samples, bfloat16`."""
        return f"{self.outputs}x{self.inputs}, {self.batch}, {_samples(self.samples)}, {self.dtype}"

    def prepare(self, device: torch.device) -> Prepared:
        """See `Case`."""
        dtype = DTYPES[self.dtype]
        problem = Problem.random(
            self.outputs, self.inputs, self.batch, self.samples, device=device
        ).to(dtype)
        dense = nn.Linear(self.inputs, self.outputs, device=device, dtype=dtype)
        layer = MaskedLinear.from_dense(dense, samples=self.samples)
        return _product(problem, baselines.naive_masked_linear, explain(layer), self.compiled)

    def work(self) -> dict[str, Work]:
        """See `Case`."""
        weights = self.outputs * self.inputs
        rows = self.batch * self.inputs, self.batch * self.outputs
        masks: dict[str, Any] = {}
        if weights >= LEAST_SAVED and self.dtype != "float32":
            # packed once for both products, and drawn again for the slope
            masks = {"logits_reads": 2, "bits": 3.0 * self.samples * weights}
        return _product_work(weights, *rows, self.dtype, self.batch * weights, **masks)


@dataclass(frozen=True)
class Conv:
    """masked_conv2d, forward and backward, against torch.nn.Conv2d with a trainable weight."""

    out_channels: int
    in_channels: int
    size: int
    kernel: int
    batch: int = 64
    samples: int = 4
    stride: int = 1
    groups: int = 1
    dtype: str = "bfloat16"
    compiled: bool = False

    suite: ClassVar[str] = "conv"

    @property
    def label(self) -> str:
        """As `64 to 64, 56x56, kernel 3; 64, 4 samples, bfloat16`."""
        options = f"kernel {self.kernel}"
        options += f", stride {self.stride}" if self.stride != 1 else ""
        options += f", {self.groups} groups" if self.groups != 1 else ""
        return (
            f"{self.in_channels} to {self.out_channels}, {self.size}x{self.size}, {options}; "
            f"{self.batch}, {_samples(self.samples)}, {self.dtype}"
        )

    def prepare(self, device: torch.device) -> Prepared:
        """See `Case`."""
        dtype = DTYPES[self.dtype]
        problem = ConvProblem.random_images(
            *(self.out_channels, self.in_channels, self.size, self.batch, self.samples),
            kernel=self.kernel,
            stride=self.stride,
            groups=self.groups,
            device=device,
        ).to(dtype)
        dense = nn.Conv2d(
            *(self.in_channels, self.out_channels, self.kernel, self.stride, self.kernel // 2),
            groups=self.groups,
            device=device,
            dtype=dtype,
        )
        naive = functools.partial(
            baselines.naive_masked_conv2d,
            stride=self.stride,
            padding=self.kernel // 2,
            groups=self.groups,
        )
        layer = MaskedConv2d.from_dense(dense, samples=self.samples)
        return _product(problem, naive, explain(layer), self.compiled)

    def work(self) -> dict[str, Work]:
        """See `Case`."""
        weights = self.out_channels * (self.in_channels // self.groups) * self.kernel**2
        out_size = (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1
        places = self.batch * out_size**2
        images = self.batch * self.in_channels * self.size**2
        masks: dict[str, Any] = {}
        if self.kernel > 1:  # both products take packed masks
            together = weights // self.out_channels % 32 == 0  # packed where the slope is drawn
            masks = {"logits_reads": 2 if together else 3, "bits": 4.0 * self.samples * weights}
        return _product_work(
            *(weights, images, places * self.out_channels, self.dtype, places * weights), **masks
        )


@dataclass(frozen=True)
class LSTM:
    """MaskedLSTM, forward and backward, against torch.nn.LSTM (cuDNN) with trainable weights."""

    units: int
    samples: int
    layers: int = 1
    batch: int = 64
    steps: int = 100
    dtype: str = "float32"

    suite: ClassVar[str] = "lstm"

    @property
    def label(self) -> str:
        """As `1 layer of 256; 64, 100 steps, 4 samples, float32`."""
        layers = f"{self.layers} layer{'s' * (self.layers > 1)} of {self.units}"
        return f"{layers}; {self.batch}, {self.steps} steps, {_samples(self.samples)}, {self.dtype}"

    def prepare(self, device: torch.device) -> Prepared:
        """See `Case`."""
        case = lstm.LSTMCase(self.units, self.samples, self.layers, self.batch, self.steps)
        problem = lstm.LSTMProblem.of(case).to(device, DTYPES[self.dtype])
        masked = problem.masked(MaskedLSTM)
        masked.seed = torch.tensor([_SEED], device=device)

        def step(layer: nn.Module, parameters: list[nn.Parameter]) -> Step:
            leaves = [problem.x.clone().requires_grad_(), *parameters]
            return lambda: torch.autograd.grad(layer(leaves[0])[0], leaves, problem.grad)

        def naive() -> Step:
            layer = baselines.NaiveMaskedLSTM(problem.plain, self.samples)
            return step(layer, list(layer.logits))

        return Prepared(
            {
                "plain": lambda: step(problem.plain, list(problem.plain.parameters())),
                "fused": lambda: step(masked, [masked.logits_of(n) for n in masked.masked]),
                "naive": naive,
            },
            lambda: lstm.check(problem),
            backend=explain(masked),
        )

    def work(self) -> dict[str, Work]:
        """See `Case`; of memory only the weights are counted."""
        weights = self.layers * 8 * self.units**2
        return _product_work(weights, 0, 0, self.dtype, self.steps * self.batch * weights)


@dataclass(frozen=True)
class Sample:
    """Drawing masks, against one copy of the logits."""

    count: int
    samples: int
    what: str  # of `KINDS`
    compiled: bool = False

    suite: ClassVar[str] = "sample"
    dtype: ClassVar[str] = "float32"
    KINDS: ClassVar[tuple[str, ...]] = ("bits", "values", "values and gradient")

    @property
    def label(self) -> str:
        """As `bits, 16777216 logits, 4 samples`."""
        return f"{self.what}, {self.count} logits, {_samples(self.samples)}"

    def prepare(self, device: torch.device) -> Prepared:
        """See `Case`."""
        generator = torch.Generator(device).manual_seed(0)
        logits = 2.0 + torch.randn(self.count, generator=generator, device=device)
        seed = torch.tensor(_SEED, device=device)
        draw: dict[str, Any] = {"seed": seed, "samples": self.samples}
        shape = (self.samples, self.count)

        def of(function: Callable[[Tensor], Tensor]) -> Step:
            if self.what != "values and gradient":
                return torch.no_grad()(lambda: function(logits))
            upstream = torch.randn(shape, generator=generator, device=device)
            return gradients(lambda leaf: function(leaf).view(shape), [logits], upstream)

        operation = ops.sample_mask_packed if self.what == "bits" else ops.sample_mask
        copy = torch.empty_like(logits)

        def naive(logits: Tensor) -> Tensor:
            return baselines.gumbel_sigmoid(logits, self.samples)

        candidates: dict[str, Callable[[], Step]] = {
            "plain": lambda: lambda: copy.copy_(logits),
            "fused": lambda: of(lambda logits: operation(logits, **draw)),
            "naive": lambda: of(naive),
        }
        if self.compiled:
            candidates["compiled"] = lambda: of(_compiled(naive))

        def check() -> dict[str, float]:
            values = ops.sample_mask(logits, **draw)
            bits = ops.sample_mask_packed(logits, **draw)
            part = min(self.count, 2**16)
            here: dict[str, Any] = {"seed": seed.cpu(), "samples": self.samples}
            expected = ops.sample_mask(logits[:part].cpu(), **here)
            unpacked = torch.stack([ops.unpack_bits(row, (self.count,)) for row in bits])
            for found in (values, unpacked):
                differing = int((found[:, :part].cpu() != expected).sum())
                if differing:
                    raise GateError(f"{self.what}: {differing} bits differ from those of the CPU")
            return {}

        return Prepared(candidates, check)

    def work(self) -> dict[str, Work]:
        """See `Case`."""
        masks = float(self.samples * self.count)
        moved = {
            "bits": 4.0 * self.count + masks / 8,
            "values": 4.0 * (self.count + masks),
            "values and gradient": 4.0 * (3 * self.count + 2 * masks),
        }
        return {"plain": Work(8.0 * self.count), "fused": Work(moved[self.what])}


@dataclass(frozen=True)
class PackBits:
    """pack_bits, against one copy of the mask."""

    count: int

    suite: ClassVar[str] = "sample"
    dtype: ClassVar[str] = "float32"

    @property
    def label(self) -> str:
        """As `pack_bits, 16777216 bools`."""
        return f"pack_bits, {self.count} bools"

    def prepare(self, device: torch.device) -> Prepared:
        """See `Case`."""
        mask = torch.rand(self.count, device=device) < 0.5
        copy = torch.empty_like(mask)
        powers = 2 ** torch.arange(8, device=device, dtype=torch.uint8)

        def naive() -> Tensor:
            return (mask.view(-1, 8) * powers).sum(1, dtype=torch.uint8)

        def check() -> dict[str, float]:
            if not torch.equal(ops.pack_bits(mask), naive()):
                raise GateError("pack_bits: other bits than plain PyTorch's")
            return {}

        return Prepared(
            {
                "plain": lambda: lambda: copy.copy_(mask),
                "fused": lambda: lambda: ops.pack_bits(mask),
                "naive": lambda: naive,
            },
            check,
        )

    def work(self) -> dict[str, Work]:
        """See `Case`."""
        return {"plain": Work(2.0 * self.count), "fused": Work(1.125 * self.count)}


@dataclass(frozen=True)
class TopK:
    """top_k_mask, keeping half of the scores, against torch.topk."""

    count: int
    dtype: str = "float32"

    suite: ClassVar[str] = "top_k"

    @property
    def label(self) -> str:
        """As `16777216 scores, float32`."""
        return f"{self.count} scores, {self.dtype}"

    def prepare(self, device: torch.device) -> Prepared:
        """See `Case`."""
        generator = torch.Generator(device).manual_seed(0)
        scores = torch.randn(self.count, generator=generator, device=device)
        scores, k = scores.to(DTYPES[self.dtype]), self.count // 2
        names = {"plain": "topk", "fused": "fused", "packed": "fused, packed", "naive": "kthvalue"}

        def check() -> dict[str, float]:
            kept = ops.top_k_mask(scores, k)
            if int(kept.sum()) != k or scores[kept].min() < scores[~kept].max():
                raise GateError(f"top_k_mask: not the {k} largest scores")
            return {}

        def maker(name: str) -> Callable[[], Step]:
            return lambda: lambda: top_k.CANDIDATES[name](scores, k)

        return Prepared({role: maker(name) for role, name in names.items()}, check)

    def work(self) -> dict[str, Work]:
        """See `Case`: scores are read for each of three digits and for the mask, and once more for
        the equal ones, of which 2-byte scores always have some."""
        size = DTYPES[self.dtype].itemsize
        scores = (5.0 if size == 2 else 4.0) * size * self.count
        return {"fused": Work(scores + self.count), "packed": Work(scores + self.count / 8)}


@dataclass(frozen=True)
class Select:
    """select_linear, forward, against torch.nn.functional.linear without masks."""

    outputs: int
    inputs: int
    sets: int
    batch: int
    dtype: str = "bfloat16"

    suite: ClassVar[str] = "select"

    @property
    def label(self) -> str:
        """As `1024x1024; 100 sets, 32 rows, bfloat16`."""
        return f"{self.outputs}x{self.inputs}; {self.sets} sets, {self.batch} rows, {self.dtype}"

    def prepare(self, device: torch.device) -> Prepared:
        """See `Case`."""
        case = select.SelectCase(self.outputs, self.inputs, self.sets, self.batch)
        problem = select.Selected.random(case, device, DTYPES[self.dtype])

        def maker(name: str) -> Callable[[], Step]:
            function = torch.no_grad()(select.CANDIDATES[name])
            return lambda: functools.partial(function, problem)

        return Prepared(
            {name: maker(name) for name in select.CANDIDATES},
            lambda: {"y": torch.no_grad()(select.check)(problem)},
        )

    def work(self) -> dict[str, Work]:
        """See `Case`: the weight once, the bits of every row."""
        weights = self.outputs * self.inputs
        size = DTYPES[self.dtype].itemsize
        rows = self.batch * (self.inputs + self.outputs)
        operations = 2.0 * self.batch * weights
        return {
            "plain": Work(float(size * (weights + rows)), operations),
            "fused": Work(size * (weights + rows) + self.batch * weights / 8, operations),
        }


@dataclass(frozen=True)
class Ceiling:
    """What the device reaches: memory by copy and triad, products by the library."""

    what: str  # `copy`, `triad`, or of `DTYPES`
    size: int

    suite: ClassVar[str] = "ceilings"

    @property
    def label(self) -> str:
        """As `copy` or `product, bfloat16`."""
        return self.what if self.what not in DTYPES else f"product, {self.what}"

    @property
    def dtype(self) -> str:
        """See `Case`."""
        return self.what if self.what in DTYPES else "float32"

    def prepare(self, device: torch.device) -> Prepared:
        """See `Case`."""
        if self.what in DTYPES:
            a, b = (
                torch.randn(self.size, self.size, device=device).to(DTYPES[self.what])
                for _ in range(2)
            )
            c = torch.empty_like(a)
            return _alone(lambda: torch.mm(a, b, out=c))
        a, b, c = (torch.rand(self.size, device=device) for _ in range(3))
        if self.what == "copy":
            return _alone(lambda: c.copy_(a))
        return _alone(lambda: torch.add(a, b, alpha=3.0, out=c))

    def work(self) -> dict[str, Work]:
        """See `Case`."""
        if self.what in DTYPES:
            return {"plain": Work(operations=2.0 * self.size**3)}
        return {"plain": Work(bytes=4.0 * self.size * (2 if self.what == "copy" else 3))}


def _alone(step: Step) -> Prepared:
    return Prepared({"plain": lambda: step}, dict)


def rehearsal() -> list[Case]:
    """Tiny rows that the CPU computes in seconds, to try out everything around them."""
    return [
        Ceiling("copy", 2**12),
        Ceiling("triad", 2**12),
        *(Ceiling(dtype, 32) for dtype in DTYPES),
        Linear(32, 24, 16, 4),
        Linear(32, 24, 16, 1, "tf32"),
        Conv(8, 4, 6, 3, batch=8),
        LSTM(16, 2, batch=8, steps=3),
        *(Sample(1000, 4, kind) for kind in Sample.KINDS),
        PackBits(1024),
        TopK(1000),
        Select(9, 8, 5, 6, "float32"),
    ]


def quick() -> list[Case]:
    """What is worth knowing first, the most telling row of a suite before the others."""
    large = 2**24
    return [
        Ceiling("copy", 2**28),
        Ceiling("triad", 2**28),
        *(Ceiling(dtype, 8192) for dtype in DTYPES),
        Linear(4096, 4096, 8192, 4, compiled=True),
        Linear(4096, 4096, 256, 4, compiled=True),
        Linear(4096, 4096, 8, 4),
        Linear(4096, 4096, 1024, 4),
        Linear(4096, 4096, 256, 4, "tf32"),
        Linear(4096, 4096, 8192, 4, "tf32"),
        Linear(1024, 1024, 128, 4),
        Linear(1024, 1024, 8, 1),
        Linear(4096, 4096, 256, 1),
        Linear(4096, 4096, 256, 8),
        Conv(64, 64, 56, 3),
        Conv(512, 512, 7, 3),
        LSTM(256, 4),
        LSTM(256, 4, dtype="tf32"),  # as PyTorch computes unless told otherwise
        LSTM(512, 1, dtype="bfloat16"),
        Sample(large, 4, "bits", compiled=True),
        Sample(large, 4, "values and gradient"),
        PackBits(large),
        TopK(large),
        Select(1024, 1024, 100, 32),
    ]


def full() -> list[Case]:
    """All rows, those of `quick` first."""
    batches, counts = (8, 64, 256, 1024, 4096, 8192), (1, 4, 8)
    others: list[Case] = [
        Linear(width, width, batch, samples, dtype, samples == 4 and batch in (256, 8192))
        for width in (4096, 1024)
        for dtype in ("bfloat16", "tf32")
        for batch in batches
        for samples in counts
        if batch % samples == 0
    ]
    others += [Linear(4096, 4096, batch, 4, "float32") for batch in (256, 8192)]
    others += [Linear(4096, 4096, batch, 4, "float16") for batch in (256, 8192)]
    stages = ((64, 56), (128, 28), (256, 14), (512, 7))  # of a ResNet, channels and size
    others += [
        Conv(channels, channels, size, 3, samples=samples, dtype=dtype)
        for channels, size in stages
        for dtype in ("bfloat16", "tf32")
        for samples in (1, 4)
    ]
    others += [
        Conv(64, 3, 224, 7, stride=2),
        *(Conv(2 * channels, channels, size, 3, stride=2) for channels, size in stages[:3]),
        *(Conv(4 * channels, channels, size, 1) for channels, size in stages),
        Conv(128, 128, 28, 3, groups=128),
        Conv(128, 128, 28, 3, groups=4),
    ]
    others += [
        LSTM(units, samples, dtype=dtype)
        for units in (128, 256, 512, 1024)
        for samples in counts
        for dtype in ("float32", "tf32", "bfloat16")
    ]
    others += [LSTM(256, 4, layers=2), LSTM(256, 4, batch=256)]
    others += [
        Sample(count, samples, kind)
        for count in (2**20, 2**24)
        for samples in counts
        for kind in Sample.KINDS
    ]
    others += [PackBits(2**20), TopK(2**20), TopK(2**27), TopK(2**24, "bfloat16")]
    others += [
        Select(size, size, 100, batch, dtype)
        for size in (1024, 4096)
        for batch in (8, 32, 64, 128)
        for dtype in ("bfloat16", "float32")
        if size * size * batch <= 2**30
    ]
    first = quick()
    names = {(case.suite, case.label) for case in first}
    return first + [case for case in others if (case.suite, case.label) not in names]


SUITES = ("ceilings", "linear", "conv", "lstm", "sample", "top_k", "select")
