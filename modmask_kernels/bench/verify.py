"""The gate in front of every measurement: what is wrong is not timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops.masked_conv import reference as conv_reference
from ..ops.masked_linear import reference as linear_reference
from ..ops.sample_mask import reference as mask_reference

if TYPE_CHECKING:
    from typing_extensions import Self


class GateError(RuntimeError):
    """A candidate that computes something else than it should; the message says what."""


@dataclass(frozen=True)
class Problem:
    """Inputs of one masked linear layer and the gradient that comes from above.

    Attributes:
        x: `[batch, in]`. weight: `[out, in]`. bias: `[out]`. logits: `[out, in]` float32.
        grad: `[batch, out]`. samples: masks per batch.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    logits: Tensor
    grad: Tensor
    samples: int

    operation: ClassVar[str] = "masked_linear"

    @staticmethod
    def random(
        out_features: int,
        in_features: int,
        batch: int,
        samples: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> Problem:
        """Standard normal activations, weights of a freshly made layer, logits around 2."""
        normal = _normal(seed, device)
        return Problem(
            x=normal(batch, in_features),
            weight=normal(out_features, in_features) / math.sqrt(in_features),
            bias=normal(out_features),
            logits=2.0 + normal(out_features, in_features),
            grad=normal(batch, out_features),
            samples=samples,
        )

    def to(self, dtype: torch.dtype) -> Self:
        """The same with everything but the logits in another dtype."""
        names = ("x", "weight", "bias", "grad")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without masks."""
        return F.linear(x, weight, bias)

    def fused(self, x: Tensor, logits: Tensor, seed: Tensor) -> Tensor:
        """The fused operation."""
        return ops.masked_linear(x, self.weight, logits, self.bias, seed=seed, samples=self.samples)

    def reference(self, x: Tensor, logits: Tensor, seed: Tensor) -> Tensor:
        """The reference beside it, in the dtype of x."""
        return linear_reference.masked_linear(
            x,
            self.weight.to(x.dtype),
            logits,
            self.bias.to(x.dtype),
            seed=seed,
            samples=self.samples,
        )


@dataclass(frozen=True)
class ConvProblem(Problem):
    """Inputs of one masked convolution: x and grad are images, weight and logits kernels."""

    stride: int = 1
    padding: int = 0
    groups: int = 1

    operation: ClassVar[str] = "masked_conv2d"

    @staticmethod
    def random_images(
        out_channels: int,
        in_channels: int,
        size: int,
        batch: int,
        samples: int,
        *,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> ConvProblem:
        """Square images of `size`, padded so that a stride of 1 keeps the size."""
        normal = _normal(seed, device)
        shape = (out_channels, in_channels // groups, kernel, kernel)
        out_size = (size + 2 * (kernel // 2) - kernel) // stride + 1
        return ConvProblem(
            x=normal(batch, in_channels, size, size),
            weight=normal(*shape) / math.sqrt(math.prod(shape[1:])),
            bias=normal(out_channels),
            logits=2.0 + normal(*shape),
            grad=normal(batch, out_channels, out_size, out_size),
            samples=samples,
            stride=stride,
            padding=kernel // 2,
            groups=groups,
        )

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without masks."""
        return F.conv2d(x, weight, bias, self.stride, self.padding, 1, self.groups)

    def fused(self, x: Tensor, logits: Tensor, seed: Tensor) -> Tensor:
        """The fused operation."""
        return ops.masked_conv2d(
            x,
            self.weight,
            logits,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
            seed=seed,
            samples=self.samples,
        )

    def reference(self, x: Tensor, logits: Tensor, seed: Tensor) -> Tensor:
        """The reference beside it, in the dtype of x."""
        return conv_reference.masked_conv2d(
            x,
            self.weight.to(x.dtype),
            logits,
            self.bias.to(x.dtype),
            stride=(self.stride,) * 2,
            padding=(self.padding,) * 4,
            groups=self.groups,
            seed=seed,
            samples=self.samples,
        )


def _normal(seed: int, device: torch.device | str) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return normal


def _outputs(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, logits: Tensor, grad: Tensor
) -> dict[str, Tensor]:
    """Output and gradients of `function(x, logits)`."""
    x, logits = x.detach().requires_grad_(), logits.detach().requires_grad_()
    y = function(x, logits)
    grad_x, grad_logits = torch.autograd.grad(y, (x, logits), grad)
    return {"y": y.detach(), "grad_x": grad_x, "grad_logits": grad_logits}


def check_fused(
    problem: Problem,
    function: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    *,
    seed: int = 7,
) -> dict[str, float]:
    """Compares a fused operation with its reference in float64.

    The error of each result must be at most twice that of the reference in the dtype of the
    inputs, plus one unit in the last place of the largest entry.

    Args:
        problem: the inputs.
        function: called with x, logits and seed in place of `problem.fused`.
        seed: seed of the noise.

    Returns:
        name of the result to its error over the allowed one.

    Raises:
        GateError: an error is larger than allowed, or not a number.
    """
    key = torch.tensor(seed, device=problem.x.device)
    candidate = function or problem.fused

    def reference(x: Tensor, logits: Tensor) -> Tensor:
        return problem.reference(x, logits, key)

    def fused(x: Tensor, logits: Tensor) -> Tensor:
        return candidate(x, logits, key)

    inputs = (problem.x, problem.logits, problem.grad)
    return check_results(
        problem.operation,
        ours=_outputs(fused, *inputs),
        plain=_outputs(reference, *inputs),
        exact=_outputs(reference, *(tensor.double() for tensor in inputs)),
    )


def check_results(
    operation: str,
    *,
    ours: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
) -> dict[str, float]:
    """Compares results by name: ours and plain ones in one dtype, exact ones in float64.

    Returns:
        name of the result to its error over the allowed one.

    Raises:
        GateError: an error is larger than twice that of `plain` plus one unit in the last place of
            the largest entry, or not a number.
    """
    shares = {}
    for name, oracle in exact.items():
        largest = float(oracle.abs().max())
        allowed = 2.0 * float((plain[name] - oracle).abs().max())
        allowed += torch.finfo(plain[name].dtype).eps * largest
        error = float((ours[name] - oracle).abs().max())
        # written so that an error that is not a number fails
        if not error <= allowed:
            raise GateError(
                f"{operation}, {name}: error {error:.3g}, allowed {allowed:.3g} "
                f"(largest entry {largest:.3g})"
            )
        shares[name] = error / allowed if allowed else 0.0
    return shares


def check_packed_masks(
    function: Callable[..., Tensor], logits: Tensor, samples: int, *, seed: int = 7
) -> None:
    """Compares the bits of a `sample_mask_packed` with the reference: none may differ.

    Raises:
        GateError: with the number of differing bits.
    """
    key = torch.tensor(seed)
    bits = function(logits, seed=key, samples=samples)
    shifts = torch.arange(8, dtype=torch.uint8)
    values = ((bits.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., : logits.numel()].bool()
    expected = mask_reference.sample_mask(logits, seed=key, samples=samples).bool()
    differing = int((values != expected.flatten(1)).sum())
    if differing:
        raise GateError(f"sample_mask_packed: {differing} of {expected.numel()} bits differ")


def check_distribution(
    function: Callable[[Tensor, Tensor], Tensor], problem: Problem, *, name: str
) -> None:
    """Checks a masked layer that draws its own noise.

    With keep probability p = sigmoid(logit), an output has mean sum x w p and variance
    sum x^2 w^2 p (1-p). Outputs of different units and samples are independent, which bounds the
    mean of the standardised outputs and of their squares. The gradient of a logit is
    sum_k w dL/dw'_k s(1-s), at most sum_k |w dL/dw'_k| / 4.

    Raises:
        GateError: an output or a gradient that cannot come from these masks.
    """
    got = _outputs(function, problem.x, problem.logits, problem.grad)
    for result, values in got.items():
        if not bool(torch.isfinite(values).all()):
            raise GateError(f"{name}, {result}: not finite")
    keep = torch.sigmoid(problem.logits)
    mean = problem.plain(problem.x, problem.weight * keep, problem.bias)
    spread = problem.weight.square() * keep * (1 - keep)
    variance = problem.plain(problem.x.square(), spread, None)
    if got["y"].shape != mean.shape:
        raise GateError(f"{name}: output of shape {tuple(got['y'].shape)}, not {tuple(mean.shape)}")
    z = (got["y"] - mean) / variance.sqrt()
    independent = problem.weight.shape[0] * problem.samples
    for what, value, bound in (
        ("mean", float(z.mean()), 6.0 / math.sqrt(independent)),
        ("mean square - 1", float(z.square().mean()) - 1.0, 6.0 * math.sqrt(2.0 / independent)),
    ):
        if abs(value) > bound:
            raise GateError(f"{name}: {what} of the standardised outputs {value:.3g} > {bound:.3g}")
    most = torch.zeros_like(problem.weight)
    parts = zip(problem.grad.chunk(problem.samples), problem.x.chunk(problem.samples), strict=True)
    for grad, x in parts:
        weight = problem.weight.detach().requires_grad_()
        (products,) = torch.autograd.grad(problem.plain(x, weight, None), weight, grad)
        most += (problem.weight * products).abs() / 4.0
    excess = float((got["grad_logits"].abs() - most).max())
    if excess > 1e-5 * float(most.max()):
        raise GateError(f"{name}: a gradient of a logit is {excess:.3g} larger than it can be")
    if not bool(got["grad_logits"].any()):
        raise GateError(f"{name}: all gradients of the logits are 0")


def check_finite(results: Mapping[str, Tensor | None], *, name: str) -> None:
    """For a baseline with masks of another kind: every result is there, finite and not all 0.

    Raises:
        GateError: otherwise.
    """
    for result, values in results.items():
        if values is None or not bool(torch.isfinite(values).all()) or not bool(values.any()):
            raise GateError(f"{name}, {result}: absent, not finite, or all 0")
