"""Convolutions under one or several learned masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .mask_options import MaskOptions, takes_mask_options
from .masked_module import MaskedWeightAndBias

if TYPE_CHECKING:
    from typing_extensions import Unpack

Conv = TypeVar("Conv", bound="_MaskedConv")


class _MaskedConv(MaskedWeightAndBias):
    """What `MaskedConv1d` and `MaskedConv2d` share; the plain class knows the options."""

    __constants__: ClassVar[list[str]] = [
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "in_channels",
        "out_channels",
        "kernel_size",
    ]
    dense_type: ClassVar[Any]  # the plain layer
    _operation: ClassVar[Callable[..., Tensor]]
    _plain: ClassVar[Callable[..., Tensor]]

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    @takes_mask_options
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[MaskOptions],
    ) -> None:
        super().__init__()
        # checks the options, makes and fills the parameters
        plain: Any = self.dense_type(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._take_options(plain)
        self.register_parameter("weight", plain.weight)
        self.register_parameter("bias", plain.bias)
        self._add_masks(options)

    def _take_options(self, plain: nn.Conv1d | nn.Conv2d) -> None:
        for name in self.__constants__:
            setattr(self, name, getattr(plain, name))
        self._padding_around: list[int] = plain._reversed_padding_repeated_twice

    def reset_parameters(self) -> None:
        """Weight and bias as in the plain layer, all logits at `init`."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_logits()

    @classmethod
    @takes_mask_options
    def from_dense(
        cls: type[Conv],
        conv: nn.Conv1d | nn.Conv2d,
        **options: Unpack[MaskOptions],
    ) -> Conv:
        """A masked layer over the very weight and bias of `conv`, which are frozen by this.

        Args:
            conv: the plain layer; its Parameters are shared, not copied.
            options: see `MaskOptions`.
        """
        if not isinstance(conv, cls.dense_type):
            raise TypeError(
                f"conv: expected a torch.nn.{cls.dense_type.__name__}, got {type(conv).__name__}"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_options(conv)
        layer._adopt(conv, options)
        return layer

    def dense_shell(self) -> nn.Module:
        """A plain layer of these sizes and options on the meta device, for other Parameters."""
        shell: nn.Module = self.dense_type(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device="meta",
        )
        return shell

    def forward(self, x: Tensor) -> Tensor:
        """The masked convolution of x; see the class for groups and modes."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._padding_around, mode=self.padding_mode)
            padding = 0
        options = (self.stride, padding, self.dilation, self.groups)
        if self.effective_mode == "off":
            return type(self)._plain(x, self.weight, self.bias, *options)
        moved = self.batch_dim % x.dim() != 0
        if moved:
            x = x.movedim(self.batch_dim, 0)
        logits = self._logits("weight")
        assert logits is not None
        y = type(self)._operation(
            x,
            self.weight,
            logits,
            self.bias,
            self._logits("bias"),
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            **self._draw(),
        )
        return y.movedim(0, self.batch_dim) if moved else y

    def extra_repr(self) -> str:
        """The sizes and options, the sets, and the mask options that are not at their defaults."""
        shown = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}",
            f"stride={self.stride}",
        ]
        if self.padding not in ("valid", (0,) * len(self.kernel_size)):
            shown.append(f"padding={self.padding!r}")
        if any(d != 1 for d in self.dilation):
            shown.append(f"dilation={self.dilation}")
        if self.groups != 1:
            shown.append(f"groups={self.groups}")
        if self.bias is None:
            shown.append("bias=False")
        if self.padding_mode != "zeros":
            shown.append(f"padding_mode={self.padding_mode!r}")
        return ", ".join([*shown, self._mask_repr()])


class MaskedConv2d(_MaskedConv):
    """`torch.nn.Conv2d` whose weight stands under one mask per set, each drawn from logits.

    The batch is cut into ``active sets * samples`` equal contiguous groups; group
    ``g = set * samples + sample`` sees its own draw of the mask of its set (Csordás et al. 2021,
    section 2). Neither a masked weight nor the patches of the input ever exist as a whole.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as in `torch.nn.Conv2d`, all of them.
        options: sets, samples, tau, mask_bias, init, tensor_id, granularity: see `MaskOptions`.
            Rows and columns are output and input channels, one per kernel is "kernel".

    Parameters:
        weight: [out_channels, in_channels / groups, *kernel_size]. bias: [out_channels] or None.
        weight_logits: [sets, *weight.shape], float32; smaller with a coarser granularity.
            bias_logits: [sets, out_channels] or None.

    Attributes:
        mode, active_sets, samples, tau, batch_dim, set_names, sample_offset, seed: see
            `MaskedModule`; all may be changed at any time.
        tensor_id, bias_tensor_id: numbers of weight and bias in their model.

    Shape:
        Input [batch, in_channels, height, width], output [batch, out_channels, height, width]. In
        mode "threshold" with one active set the batch dimension may be absent.

    Raises:
        ValueError: for options that `torch.nn.Conv2d` rejects too, for a wrong mode, selection of
            sets, or number of sets; the operation rejects inputs that do not fit and batches that
            do not divide.

    Equivalent to::

        groups = x.chunk(sets * samples)
        masks = sample_mask(weight_logits, seed=seed, samples=samples, tensor_id=tensor_id)
        y = torch.cat([F.conv2d(x_g, weight * masks[g % samples, g // samples], bias, stride,
                                padding, dilation, groups)
                       for g, x_g in enumerate(groups)])
    """

    dense_type = nn.Conv2d
    _operation = staticmethod(ops.masked_conv2d)
    _plain = staticmethod(F.conv2d)


class MaskedConv1d(_MaskedConv):
    """`torch.nn.Conv1d` whose weight stands under one mask per set, each drawn from logits.

    Arguments, parameters, attributes, groups and errors are those of `MaskedConv2d` with one
    spatial dimension: input [batch, in_channels, length].

    Equivalent to::

        as `MaskedConv2d`, with `F.conv1d`
    """

    dense_type = nn.Conv1d
    _operation = staticmethod(ops.masked_conv1d)
    _plain = staticmethod(F.conv1d)
