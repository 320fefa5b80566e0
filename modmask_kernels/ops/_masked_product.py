"""What the operations share that multiply with a masked weight.

All have the operands x, weight, logits, bias, bias_logits and seed, in this order, then options of
their own, then what says which masks are drawn. A seed [sets, draws] draws `samples` masks from
each seed of a set. The backward operation takes the gradient of the result first, and last which of
the five gradients are needed; the others come back empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from . import _batching, _blocks, _check, _library, estimators
from .estimators import Estimator

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_OPERANDS = (
    "Tensor x, Tensor weight, Tensor logits, Tensor? bias, Tensor? bias_logits, Tensor? seed"
)
_DRAW = (
    "int tensor_id, int bias_tensor_id, SymInt sample_offset, SymInt element_offset, "
    f"int samples, float tau, bool hard, {estimators.SCHEMA}, int[] n_of_m"
)
_NEEDS = "bool need_x, bool need_weight, bool need_logits, bool need_bias, bool need_bias_logits"


_DRAW_NAMES = (
    "tensor_id",
    "bias_tensor_id",
    "sample_offset",
    "element_offset",
    "samples",
    "tau",
    "hard",
)


def positional(reference: Callable[..., Tensor], *options: str) -> Callable[..., Tensor]:
    """A reference with the arguments of the schema, by position; `options` follow the seed."""
    names = ("seed", *options, *_DRAW_NAMES)

    def call(*arguments: Any) -> Tensor:
        end = 5 + len(names)
        code, low, high, clamp, antithetic, n_of_m = arguments[end:]
        return reference(
            *arguments[:5],
            **dict(zip(names, arguments[5:end], strict=True)),
            estimator=estimators.of_arguments(code, low, high, clamp),
            antithetic=antithetic,
            # a list, since operations have no None among integers
            **({"n_of_m": tuple(n_of_m)} if n_of_m else {}),
        )

    return call


def draw_arguments(
    tensor_id: int,
    bias_tensor_id: int | None,
    sample_offset: int,
    element_offset: int,
    samples: int,
    tau: float,
    hard: bool,
    estimator: str | Estimator,
    antithetic: bool,
    n_of_m: Sequence[int] | None = None,
) -> tuple[Any, ...]:
    """What the schemas say of the masks, checked."""
    _check.check_draw(samples, tau, tensor_id, sample_offset, element_offset)
    check_hard(n_of_m, hard, estimator)
    chosen = estimators.resolve(estimator)
    estimators.check_whole(chosen, element_offset)
    bias_id = number_of_bias(tensor_id, bias_tensor_id)
    drawn = estimators.arguments(chosen, antithetic)
    kept = [] if n_of_m is None else n_of_m
    return (tensor_id, bias_id, sample_offset, element_offset, samples, tau, hard, *drawn, kept)


class MaskedProduct:
    """A registered operation `y = product(x, weight * mask) + bias` with its gradient.

    Args:
        name: of the operation; its backward is `<name>_backward`.
        options: schema of the arguments between `seed` and `tensor_id`, each with a comma after it.
        reference: the operation in plain PyTorch, arguments in the order of the schema.
        shape: the shape of the result, from the same arguments.
    """

    def __init__(
        self,
        name: str,
        options: str,
        reference: Callable[..., Tensor],
        shape: Callable[..., Sequence[int]],
    ) -> None:
        self.name = name
        self.options = options
        self.reference = reference
        self.shape = shape
        _library.define(f"{name}({_OPERANDS}, {options}{_DRAW}) -> Tensor", reference)
        _library.define(
            f"{name}_backward(Tensor dy, {_OPERANDS}, {options}{_DRAW}, {_NEEDS}) "
            "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
            self.backward_reference,
        )

        @_library.fake(name)
        def forward_fake(x: Tensor, *rest: Any) -> Tensor:
            # one operand without data is enough to get here
            if any(t is not None and t.device != x.device for t in rest[:5]):
                raise RuntimeError(f"{name}: all tensors must be on the device of x, {x.device}")
            return x.new_empty(shape(x, *rest))

        _library.fake(f"{name}_backward")(_backward_fake)

        self._operation = getattr(torch.ops.modmask, name).default
        samples_at = 6 + options.count(",") + _DRAW_NAMES.index("samples")
        self._traced = _library.differentiable(
            name, _setup_context, self._backward, _batching.product(samples_at)
        )
        self._differentiate = _library.differentiable_once(
            f"{name}_backward", _batching.product_backward
        )
        self._eager = self._make_function(name, self._differentiate)
        self._unserved_on_gpu: Callable[..., str | None] | None = None
        self._saves: Callable[..., bool] | None = None

    def on_gpu(
        self,
        unserved: Callable[..., str | None],
        forward: Callable[..., Tensor],
        backward: Callable[..., tuple[Tensor, ...]],
    ) -> None:
        """Let kernels serve the operation on CUDA tensors, except where `unserved` says why not."""
        self._unserved_on_gpu = unserved
        _library.implement(self.name, "CUDA", forward)
        _library.implement(f"{self.name}_backward", "CUDA", backward)

    def saving_on_gpu(
        self,
        saves: Callable[..., bool],
        words: Callable[..., Sequence[int]],
        forward: Callable[..., tuple[Tensor, Tensor]],
        backward: Callable[..., tuple[Tensor, ...]],
    ) -> None:
        """On CUDA tensors for which `saves` holds, let the forward pass give its packed masks too.

        The backward takes them after dy, int32 of the shape `words`, and packs nothing.
        """
        name = f"{self.name}_saving"
        _library.define_on_cuda(
            f"{name}({_OPERANDS}, {self.options}{_DRAW}) -> (Tensor, Tensor)",
        )
        _library.define_on_cuda(
            f"{name}_backward(Tensor dy, Tensor words, {_OPERANDS}, {self.options}{_DRAW}, "
            f"{_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        )

        @_library.fake(name)
        def forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
            x = arguments[0]
            packed = x.new_empty(words(*arguments), dtype=torch.int32)
            return x.new_empty(self.shape(*arguments)), packed

        @_library.fake(f"{name}_backward")
        def backward_fake(dy: Tensor, words: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            return _backward_fake(dy, *rest)

        _library.implement(name, "CUDA", forward)
        _library.implement(f"{name}_backward", "CUDA", backward)
        differentiate = _library.differentiable_once(f"{name}_backward")
        self._saves = saves
        self._traced_saving = _library.differentiable(
            name, _setup_context, lambda ctx, dy, _: self._gradients(ctx, dy, differentiate)
        )
        self._eager_saving = self._make_function(name, differentiate)

    def saving(self, *arguments: Any) -> Tensor:
        """The operation where `saving_on_gpu` says so."""
        call = self._traced_saving if torch.compiler.is_compiling() else self._eager_saving
        y = call(*arguments)
        return y[0] if isinstance(y, tuple) else y

    def unserved(self, *arguments: Any) -> str | None:
        """Why no kernel serves these arguments and the reference does, or None."""
        x = arguments[0]
        if uses_kernel(x):
            return None
        return self.unserved_on_gpu(*arguments) if x.is_cuda else explain(x)[1]

    def unserved_on_gpu(self, *arguments: Any) -> str | None:
        """`unserved` of CUDA tensors, whatever device these are on."""
        if self._unserved_on_gpu is None:
            return f"no GPU kernel for {self.name}"
        return self._unserved_on_gpu(*arguments)

    def __call__(self, *arguments: Any) -> Tensor:
        """The operation, by the quickest way that serves the first argument, x."""
        y: Tensor
        if not uses_kernel(arguments[0]) and self.unserved(*arguments) is not None:
            y = self.reference(*arguments)
        elif self._is_saved(arguments):
            y = self.saving(*arguments)
        elif _library.traced():
            y = self._traced(*arguments)
        elif torch.is_grad_enabled():
            y = self._eager(*arguments)
        else:
            y = self._below_autograd(*arguments)
        return y

    def _is_saved(self, arguments: tuple[Any, ...]) -> bool:
        return (
            arguments[0].is_cuda
            and self._saves is not None
            and torch.is_grad_enabled()
            and (torch.compiler.is_compiling() or not _library.traced())
            and self._saves(*arguments)
        )

    def quick(self, *arguments: Any) -> Tensor | None:
        """The operation on the compiled CPU kernels, which check the arguments too, only tersely.

        Returns:
            None where there is no such kernel, or where an argument does not fit or the logits are
            fewer than the weights: that asks for a close look in Python, which takes longer than a
            small layer.
        """
        if (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or torch.is_autocast_enabled("cpu")
            or not _native.enabled()
        ):
            return None
        try:
            if not arguments[0].is_cpu or arguments[2].numel() < arguments[1].numel():
                return None  # maybe a plain product does
            if arguments[5] is not None and arguments[5].dim() > 1:
                return None  # draws of the batching rules, of no use to others
            call = self._eager if torch.is_grad_enabled() else self._below_autograd
            return call(*arguments)
        except (RuntimeError, TypeError, AttributeError):
            return None

    def _below_autograd(self, *arguments: Any) -> Tensor:
        # the registered gradient looks at every call, even of one that needs none
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = self._operation(*arguments)
        return y

    def _backward(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return self._gradients(ctx, dy, self._differentiate)

    def _gradients(
        self, ctx: Any, dy: Tensor, differentiate: Callable[..., Any]
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:5]
        rest = ctx.rest
        # packed masks first, where the forward pass gave them
        dx, dweight, dlogits, dbias, dbias_logits = differentiate(
            dy, *ctx.saved_tensors, *rest, *needs
        )
        need_x, need_weight, need_logits, need_bias, need_bias_logits = needs
        return (
            dx if need_x else None,
            dweight if need_weight else None,
            dlogits if need_logits else None,
            dbias if need_bias else None,
            dbias_logits if need_bias_logits else None,
            None,
            *(None,) * len(rest),
        )

    def _make_function(self, name: str, refuse: Callable[..., Any]) -> Callable[..., Tensor]:
        product = self
        operation = getattr(torch.ops.modmask, name).default
        backward_operation = getattr(torch.ops.modmask, f"{name}_backward").default

        def differentiate(*arguments: Any) -> Any:
            # around the operation alone: reading saved tensors may run a checkpoint again
            with torch._C._AutoDispatchBelowAutograd():
                return backward_operation(*arguments)

        class Function(torch.autograd.Function):
            """The registered gradient without the generic machinery, dearer than a small layer."""

            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Tensor:
                with torch._C._AutoDispatchBelowAutograd():
                    output = operation(*inputs)
                _setup_context(ctx, inputs, output)
                y: Tensor = output[0] if isinstance(output, tuple) else output
                return y

            @staticmethod
            def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
                if torch.is_grad_enabled():  # create_graph: the registered operation refuses
                    return product._gradients(ctx, dy, refuse)
                return product._gradients(ctx, dy, differentiate)

        apply: Callable[..., Tensor] = Function.apply
        return apply

    def backward_reference(self, dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """The backward operation in plain PyTorch, arguments in the order of its schema."""
        given, rest, needs = arguments[:5], arguments[5:-5], arguments[-5:]
        with _library.graph():
            leaves: list[Any] = [
                None if t is None else t.detach().requires_grad_(need)
                for t, need in zip(given, needs, strict=True)
            ]
            y = self.reference(*leaves, *rest)
        wanted = [t for t, need in zip(leaves, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(y, wanted, dy) if wanted else ())
        return tuple(next(grads) if need else dy.new_empty(0) for need in needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    words = output[1:] if isinstance(output, tuple) else ()
    ctx.save_for_backward(*words, *inputs[:6])
    ctx.rest = inputs[6:]


def _backward_fake(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    likes, needs = arguments[:5], arguments[-5:]
    weight, logits = arguments[1], arguments[2]
    return tuple(
        torch.empty_like(like, memory_format=torch.contiguous_format)
        if need and like is not None
        else (weight if i < 4 and i != 2 else logits).new_empty(0)
        for i, (like, need) in enumerate(zip(likes, needs, strict=True))
    )


def uses_kernel(x: Tensor) -> bool:
    """Whether the compiled kernels serve an input like `x`."""
    return x.device.type in ("cpu", "meta") and x.dtype in FUSED_DTYPES and _native.enabled()


def explain(x: Tensor) -> tuple[str, str]:
    """The backend that serves an input like `x` (`cpu` or `reference`), and why."""
    if uses_kernel(x):
        return "cpu", f"compiled kernels, capability {_native.capability()}"
    if _native.FORCED_BACKEND == "reference":
        return "reference", "MODMASK_BACKEND=reference"
    if not _native.available():
        return "reference", f"the compiled kernels are absent: {_native.LOAD_ERROR}"
    if x.dtype not in FUSED_DTYPES:
        return "reference", f"no fused kernel for {x.dtype}"
    return "reference", f"no fused kernel for device {x.device.type}"


def check_parameters(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    bias_logits: Tensor | None,
    seed: Tensor | None,
    n_of_m: Sequence[int] | None = None,
    outputs: int | None = None,
) -> int:
    """Raise unless shapes of everything but x, all dtypes and devices fit; the number of sets.

    `outputs`: length of the bias, where it is not the first dimension of weight.
    """
    _check.check_optional_tensors(bias=bias, bias_logits=bias_logits)
    dims = weight.dim()
    of_sets = logits.unsqueeze(0) if logits.dim() == dims else logits
    _check.check_seed(seed, of_sets.shape[0] if of_sets.dim() == dims + 1 else None, x, "x")
    if (
        of_sets.dim() != dims + 1
        or not _blocks.divides(of_sets.shape[1:], weight.shape)
        or of_sets.shape[0] < 1
    ):
        shape = ", ".join(str(n) for n in weight.shape)
        raise ValueError(
            f"logits must have shape [{shape}] or [sets, {shape}] like weight, or divide it in "
            f"every dimension, not {_check.shape_of(logits)}"
        )
    if n_of_m is not None:
        check_n_of_m(n_of_m, weight, logits)
    sets, out = of_sets.shape[0], weight.shape[0] if outputs is None else outputs
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias must have shape [{out}], not {_check.shape_of(bias)}")
    if bias_logits is not None:
        if bias is None:
            raise ValueError("bias_logits came without a bias")
        if bias_logits.shape != (sets, out) and (sets > 1 or bias_logits.shape != (out,)):
            raise ValueError(
                f"bias_logits must have shape [{out}] or [{sets}, {out}], "
                f"not {_check.shape_of(bias_logits)}"
            )
    if not x.is_floating_point():
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, not {x.dtype}")
    for t, name in ((weight, "weight"), (bias, "bias")):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, not {t.dtype}")
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    for t, name in ((logits, "logits"), (bias_logits, "bias_logits")):
        if t is not None and t.dtype not in (torch.float32, wanted):
            raise TypeError(f"{name} must be float32, not {t.dtype}")
    for t, name in (
        (weight, "weight"),
        (logits, "logits"),
        (bias, "bias"),
        (bias_logits, "bias_logits"),
    ):
        if t is not None:
            _check.check_device(t, name, x, "x")
    return sets


def check_n_of_m(n_of_m: Sequence[int], weight: Tensor, logits: Tensor) -> None:
    """Raise unless the weight and its logits fit n of every m consecutive inputs."""
    _, m = n_of_m
    if weight.shape[1] % m:
        raise ValueError(
            f"n_of_m: the {weight.shape[1]} inputs of weight {_check.shape_of(weight)} do not "
            f"divide into groups of {m}"
        )
    if logits.shape[-weight.dim() :] != weight.shape:
        raise ValueError(
            f"n_of_m needs logits like weight {_check.shape_of(weight)}, "
            f"not {_check.shape_of(logits)}"
        )


def check_hard(
    n_of_m: Sequence[int] | None, hard: bool, estimator: str | Estimator = "gumbel_sigmoid"
) -> None:
    """Raise unless n of m can be kept; n:m masks exist as hard ones of the Gumbel-sigmoid only."""
    if n_of_m is None:
        return
    if len(n_of_m) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in n_of_m):
        raise ValueError(f"n_of_m must be two integers, not {n_of_m!r}")
    n, m = n_of_m
    if not 0 < n <= m:
        raise ValueError(f"n_of_m must be (n, m) with 0 < n <= m, not {n_of_m}")
    if not hard:
        raise ValueError("n_of_m needs hard masks, hard=True: soft ones do not compete")
    name = estimators.resolve(estimator).name
    if name != "gumbel_sigmoid":
        raise ValueError(f"n_of_m needs the estimator 'gumbel_sigmoid', not {name!r}")


def check_batch(x: Tensor, dim: int, sets: int, samples: int, unbatched: bool = False) -> int:
    """The rows of each of sets * samples groups; ValueError unless the batch of x divides.

    `unbatched`: the batch, of size 1, is not the caller's.
    """
    groups = sets * samples
    if x.shape[dim] % groups:
        if unbatched:
            raise ValueError(
                f"x {_check.shape_of(x.squeeze(dim))} has no batch dimension, which would be "
                f"divided into {sets} sets * {samples} samples = {groups} groups"
            )
        raise ValueError(
            f"the batch of x, {x.shape[dim]} (dimension {dim} of {_check.shape_of(x)}), does not "
            f"divide into {sets} sets * {samples} samples = {groups} equal groups"
        )
    return x.shape[dim] // groups


def lowered(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """x, weight and bias in the dtype of autocast, where that is on; logits never come here."""
    x = tensors[0]
    assert x is not None
    if not _library.autocasts(x):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def number_of_bias(tensor_id: int, bias_tensor_id: int | None) -> int:
    """The number of the bias in the noise: the one given, checked, or that after the weight's."""
    if bias_tensor_id is None:
        return (tensor_id + 1) % 2**32
    if not 0 <= bias_tensor_id < 2**32:
        raise ValueError(f"bias_tensor_id must be in [0, 2**32), not {bias_tensor_id}")
    return bias_tensor_id
