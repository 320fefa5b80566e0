"""A linear layer under one or several learned masks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .mask_options import MaskOptions, takes_mask_options
from .masked_module import MaskedWeightAndBias

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MaskedLinear(MaskedWeightAndBias):
    """`torch.nn.Linear` whose weight stands under one mask per set, each drawn from logits.

    The batch is cut into ``active sets * samples`` equal contiguous groups along `batch_dim`;
    group ``g = set * samples + sample`` sees its own draw of the mask of its set
    (Csordás et al. 2021, section 2; a mask value is 1 with probability sigmoid(logit), its
    gradient is that of the concrete distribution, straight-through).

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
        options: sets, samples, tau, mask_bias, init, tensor_id, granularity: see `MaskOptions`.

    Parameters:
        weight: [out_features, in_features], `dtype`. bias: [out_features] or None.
        weight_logits: [sets, out_features, in_features], float32, whatever `dtype` is; smaller
            with a coarser granularity.
        bias_logits: [sets, out_features], float32, or None without `mask_bias`.
        ``Module.to(dtype)`` and its relatives leave the logits in float32.

    Attributes:
        mode, active_sets, samples, tau, batch_dim, set_names, sample_offset, seed: see
            `MaskedModule`; all may be changed at any time.
        tensor_id, bias_tensor_id: numbers of weight and bias in their model.

    Shape:
        Input [..., in_features] in the dtype of the weight, output [..., out_features].

    Raises:
        ValueError: for a wrong mode, selection of sets, or number of sets; the operation itself
            rejects inputs that do not fit and batches that do not divide.

    Equivalent to::

        groups = x.chunk(sets * samples, dim=batch_dim)
        masks = sample_mask(weight_logits, seed=seed, samples=samples, tensor_id=tensor_id)
        y = torch.cat([F.linear(x_g, weight * masks[g % samples, g // samples], bias)
                       for g, x_g in enumerate(groups)], dim=batch_dim)
    """

    __constants__: ClassVar[list[str]] = ["in_features", "out_features"]
    in_features: int
    out_features: int

    @takes_mask_options
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[MaskOptions],
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._add_masks(options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight and bias as in `torch.nn.Linear`, all logits at `init`."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_logits()

    @classmethod
    @takes_mask_options
    def from_dense(
        cls,
        linear: nn.Linear,
        **options: Unpack[MaskOptions],
    ) -> MaskedLinear:
        """A masked layer over the very weight and bias of `linear`, which are frozen by this.

        Args:
            linear: any `torch.nn.Linear`; its Parameters are shared, not copied.
            options: see `MaskOptions`.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features = linear.in_features
        layer.out_features = linear.out_features
        layer._adopt(linear, options)
        return layer

    def dense_shell(self) -> nn.Linear:
        """A `torch.nn.Linear` of these sizes on the meta device, for other Parameters."""
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """The masked product of x [..., in_features]; see the class for groups and modes."""
        if self.effective_mode == "off":
            return F.linear(x, self.weight, self.bias)
        logits = self._logits("weight")
        assert logits is not None
        return ops.masked_linear(
            x,
            self.weight,
            logits,
            self.bias,
            self._logits("bias"),
            batch_dim=self.batch_dim,
            **self._draw(),
        )

    def extra_repr(self) -> str:
        """The sizes, the sets, and the options that are not at their defaults."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._mask_repr()}"
        )
