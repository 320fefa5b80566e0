"""Schemas, fake kernels, gradients and batching rules of the operations.

The schemas are defined here, so that an operation exists before any shared library is loaded; the
compiled library adds its kernels to them, and without it the reference serves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _native
from ._batching import Rule

NAMESPACE = "modmask"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]

# asked here: torch 2.11 cannot trace the question
_AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "hpu", "mps", "mtia")
    if torch.amp.is_autocast_available(device)
)

Function = TypeVar("Function", bound=Callable[..., Any])


def define(schema: str, reference: Callable[..., Any]) -> None:
    """Define `modmask::<schema>`; `reference` serves where no compiled kernel is loaded."""
    name = schema.split("(", 1)[0]
    tags = (torch.Tag.pt2_compliant_tag,)
    LIBRARY.define(schema, tags=tags)  # type: ignore[no-untyped-call]
    if not _native.available():
        LIBRARY.impl(name, reference, "CPU")  # type: ignore[no-untyped-call]


def implement(name: str, device: str, function: Callable[..., Any]) -> None:
    """Let `function` serve an operation on tensors of a device type, "CUDA" for instance."""
    LIBRARY.impl(name, function, device)  # type: ignore[no-untyped-call]


def define_on_cuda(schema: str) -> None:
    """Define `modmask::<schema>`, which only the CUDA library serves, behind another operation."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


def fake(name: str) -> Callable[[Function], Function]:
    """Decorates the fake kernel of an operation: shapes and dtypes without data."""

    def register(function: Function) -> Function:
        torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=LIBRARY)
        return function

    return register


@contextlib.contextmanager
def graph() -> Iterator[None]:
    """Records a graph within an operation too, which the dispatcher runs below autograd."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(key, False):
        yield


def traced() -> bool:
    """Whether a compiler or a functorch transform looks on, which need the registered operation."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def autocasts(x: Tensor) -> bool:
    """Whether autocast applies to an operand like `x`."""
    device = x.device.type
    return (
        device in _AUTOCAST_DEVICES
        and torch.is_autocast_enabled(device)
        and x.dtype != torch.float64
    )


def batched(
    name: str, call: Callable[..., Any] | None = None, together: Rule | None = None
) -> Callable[..., Any]:
    """Register the batching rule of `torch.vmap`.

    Args:
        name: of the operation.
        call: the operation, unless it is to be called as registered.
        together: all elements in one call; without it, or where it gives None, there is one call
            per element and the results are stacked.
    """
    one = call or getattr(getattr(torch.ops, NAMESPACE), name).default

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        if together is not None:
            found = together(one, info.batch_size, in_dims, args)
            if found is not None:
                return found
        results = [
            one(
                *(
                    arg.select(dim, i) if isinstance(dim, int) else arg
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0,) * len(results[0])

    torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=LIBRARY)
    return rule


def differentiable(
    name: str,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    together: Rule | None = None,
) -> Callable[..., Any]:
    """Register the gradient and the batching rule of an operation; `together` as in `batched`.

    Returns:
        the operation, also for `torch.func.grad` and its like, which the gradient registered with
        the dispatcher does not serve.
    """
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return op(*args)
        return transformed.apply(*args)

    def forward(*args: Any) -> Any:
        return op(*args)

    parts = {
        "forward": forward,
        "setup_context": setup_context,
        "backward": backward,
        "vmap": batched(name, call, together),
    }
    transformed: Any = type(
        f"{name}_under_transforms",
        (torch.autograd.Function,),
        {key: staticmethod(part) for key, part in parts.items()},
    )
    return call


def differentiable_once(name: str, together: Rule | None = None) -> Callable[..., Any]:
    """`differentiable` for a backward operation: its own gradient is a clear error."""
    return without_gradient(
        name,
        "masked operations have no second derivative. Use backend 'reference' "
        "(MODMASK_BACKEND=reference) where one is needed.",
        together,
    )


def without_gradient(name: str, reason: str, together: Rule | None = None) -> Callable[..., Any]:
    """`differentiable` for an operation whose gradient is a clear error."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{NAMESPACE}::{name} cannot be differentiated: {reason}")

    return differentiable(name, setup_context, backward, together)
