"""Products with a transposed masked weight, out of the kernels of the plain ones.

The forward pass of a transposed product is the gradient of the plain one with respect to its
input, and the other way round; the gradient of the weight swaps the two factors. So the weight and
its logits stay in the layout that they have in the model, and with them the numbers of the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from . import _library
from ._batching import masks_per_set
from ._masked_product import MaskedProduct, uses_kernel
from .masked_linear import product as linear

_SAMPLES = 4  # position of `samples` among the arguments that say which masks are drawn
_ONLY_X = (True, False, False, False, False)


class TransposedProduct(MaskedProduct):
    """A registered operation `y = product(x, (weight * mask) transposed) + bias`.

    Args:
        name, options, reference, shape: as for `MaskedProduct`.
        plain: the operation whose weight is not transposed, with the same options.
        options_count: how many options there are.
        channels_last: whether the outputs are the last dimension of y, else the second.
    """

    def __init__(
        self,
        name: str,
        options: str,
        reference: Callable[..., Tensor],
        shape: Callable[..., Sequence[int]],
        plain: MaskedProduct,
        options_count: int,
        channels_last: bool,
    ) -> None:
        super().__init__(name, options, reference, shape)
        self._shape = shape
        self._plain = getattr(torch.ops.modmask, plain.name).default
        self._plain_backward = getattr(torch.ops.modmask, f"{plain.name}_backward").default
        self._bias = getattr(torch.ops.modmask, linear.name).default
        self._bias_backward = getattr(torch.ops.modmask, f"{linear.name}_backward").default
        self._options_count = options_count
        self._channels_last = channels_last
        self._unserved_plain = plain.unserved_on_gpu
        self.on_gpu(self._unserved, self._forward_kernel, self._backward_kernel)
        if _native.available():
            _library.LIBRARY.impl(name, self._forward_kernel, "CPU")  # type: ignore[no-untyped-call]
            _library.LIBRARY.impl(  # type: ignore[no-untyped-call]
                f"{name}_backward", self._backward_kernel, "CPU"
            )

    def __call__(self, *arguments: Any) -> Tensor:
        """As `MaskedProduct`; the compiled CPU kernels know no blocks of a weight [in, out]."""
        x, weight, logits = arguments[:3]
        if uses_kernel(x) and logits.shape[-weight.dim() :] != weight.shape:
            y: Tensor = self.reference(*arguments)
            return y
        return super().__call__(*arguments)

    def _unserved(
        self,
        x: Tensor,
        weight: Tensor,
        logits: Tensor,
        bias: Tensor | None,
        bias_logits: Tensor | None,
        seed: Tensor | None,
        *rest: Any,
    ) -> str | None:
        """Why the GPU kernels of the plain products do not serve, or None."""
        shape = self._shape(x, weight, logits, None, None, None, *rest)
        like = torch.empty(shape, dtype=x.dtype, device="meta")
        reason = self._unserved_plain(like, weight, logits, None, None, seed, *rest)
        if reason is None and bias is not None:
            nothing = self._without_input(bias, weight, logits, seed, rest)
            draw = rest[self._options_count :]
            reason = linear.unserved_on_gpu(*nothing, bias, bias_logits, seed, *draw)
        return reason

    def _by_group(self, y: Tensor, groups: int) -> tuple[Tensor, int]:
        """A view of a contiguous y with the groups first, and its dimension of the outputs."""
        if self._channels_last:
            return y.view(groups, y.numel() // (groups * y.shape[-1]), y.shape[-1]), 2
        batch, channels = y.shape[:2]
        return y.view(groups, batch // groups, channels, y.numel() // (batch * channels)), 2

    def _without_input(
        self, bias: Tensor, weight: Tensor, logits: Tensor, seed: Tensor | None, rest: Any
    ) -> tuple[Any, ...]:
        """Operands of a linear product of no inputs, which gives the bias of every group."""
        sets = logits.shape[0] if logits.dim() == weight.dim() + 1 else 1
        draw = rest[self._options_count :]
        groups = sets * masks_per_set(seed, draw[_SAMPLES])
        out = bias.shape[0]
        return bias.new_empty(groups, 0), bias.new_empty(out, 0), logits.new_empty(sets, out, 0)

    def _forward_kernel(
        self,
        x: Tensor,
        weight: Tensor,
        logits: Tensor,
        bias: Tensor | None,
        bias_logits: Tensor | None,
        seed: Tensor | None,
        *rest: Any,
    ) -> Tensor:
        like = x.new_empty(self._shape(x, weight, logits, None, None, None, *rest))
        y: Tensor = self._plain_backward(
            x, like, weight, logits, None, None, seed, *rest, *_ONLY_X
        )[0]
        if bias is not None and y.numel():
            nothing = self._without_input(bias, weight, logits, seed, rest)
            draw = rest[self._options_count :]
            of_groups = self._bias(*nothing, bias, bias_logits, seed, *draw)
            grouped, dim = self._by_group(y, of_groups.shape[0])
            shape = [of_groups.shape[0]] + [1] * (grouped.dim() - 1)
            shape[dim] = bias.shape[0]
            grouped += of_groups.view(shape)
        return y

    def _backward_kernel(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        logits: Tensor,
        bias: Tensor | None,
        bias_logits: Tensor | None,
        seed: Tensor | None,
        *rest_and_needs: Any,
    ) -> tuple[Tensor, ...]:
        rest, needs = rest_and_needs[:-5], rest_and_needs[-5:]
        need_x, need_weight, need_logits, need_bias, need_bias_logits = needs
        common = (weight, logits, None, None, seed, *rest)
        dx = self._plain(dy, *common) if need_x else x.new_empty(0)
        dweight, dlogits = weight.new_empty(0), logits.new_empty(0)
        if need_weight or need_logits:
            _, dweight, dlogits, _, _ = self._plain_backward(
                x, dy, *common, False, need_weight, need_logits, False, False
            )
        dbias, dbias_logits = weight.new_empty(0), logits.new_empty(0)
        if bias is not None and (need_bias or need_bias_logits):
            # in float32, so that the sums of the groups are rounded once
            exact = bias.float()
            nothing = self._without_input(exact, weight, logits, seed, rest)
            if dy.numel():
                grouped, dim = self._by_group(dy.contiguous(), nothing[0].shape[0])
                others = [d for d in range(1, grouped.dim()) if d != dim]
                sums = grouped.sum(others, dtype=torch.float32)
            else:
                sums = exact.new_zeros(nothing[0].shape[0], exact.shape[0])
            draw = rest[self._options_count :]
            *_, dbias, dbias_logits = self._bias_backward(
                sums,
                *nothing,
                exact,
                bias_logits,
                seed,
                *draw,
                *(False, False, False, need_bias, need_bias_logits),
            )
            dbias = dbias.to(bias.dtype)
        return dx, dweight, dlogits, dbias, dbias_logits
