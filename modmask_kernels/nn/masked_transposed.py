"""Layers whose weight is [in, out, ...] under masks: transposed convolutions, `Conv1D`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .granularity import Granularity
from .mask_options import MaskOptions, takes_mask_options
from .masked_conv import _MaskedConv
from .masked_module import MaskedWeightAndBias

if TYPE_CHECKING:
    from typing_extensions import Unpack


def turned(granularity: Granularity, shape: Sequence[int]) -> Granularity:
    """A granularity, which speaks of outputs and inputs, for a weight [in, out, ...]."""
    kind: Any
    numbers: Any
    kind, *numbers = (granularity,) if isinstance(granularity, str) else granularity
    if kind == "n:m":
        raise ValueError(
            f"granularity: {granularity!r} needs a weight [out, in, ...], this one is "
            f"[in, out, ...] {list(shape)}"
        )
    if kind in ("row", "column"):
        return "column" if kind == "row" else "row"
    if kind == "head":
        return ("block", shape[0], numbers[0])
    if kind == "block":
        return ("block", numbers[1], numbers[0])
    return granularity


class InsOuts(MaskedWeightAndBias):
    """A masked module with a weight [in, out, ...]."""

    def _granularity_of(self, name: str) -> Granularity:
        own = super()._granularity_of(name)
        return own if name == "bias" else turned(own, self.weight.shape)

    def _draw(self) -> dict[str, Any]:
        return {key: value for key, value in super()._draw().items() if key != "n_of_m"}


class _MaskedConvTranspose(InsOuts, _MaskedConv):
    """What `MaskedConvTranspose1d` and `MaskedConvTranspose2d` share."""

    __constants__: ClassVar[list[str]] = [*_MaskedConv.__constants__, "output_padding"]
    output_padding: tuple[int, ...]

    @takes_mask_options
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[MaskOptions],
    ) -> None:
        nn.Module.__init__(self)
        plain: Any = self.dense_type(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        self._take_options(plain)
        self.register_parameter("weight", plain.weight)
        self.register_parameter("bias", plain.bias)
        self._add_masks(options)

    def dense_shell(self) -> nn.Module:
        """A plain layer of these sizes and options on the meta device, for other Parameters."""
        shell: nn.Module = self.dense_type(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.bias is not None,
            self.dilation,
            self.padding_mode,
            device="meta",
        )
        return shell

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The masked transposed convolution of x; see the class for groups and modes."""
        added = self.dense_type._output_padding(
            self,
            x,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            len(self.kernel_size),
            self.dilation,
        )
        if self.effective_mode == "off":
            options = (self.stride, self.padding, added, self.groups, self.dilation)
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
            padding=self.padding,
            output_padding=added,
            groups=self.groups,
            dilation=self.dilation,
            **self._draw(),
        )
        return y.movedim(0, self.batch_dim) if moved else y


class MaskedConvTranspose2d(_MaskedConvTranspose):
    """`torch.nn.ConvTranspose2d` whose weight stands under one mask per set, drawn from logits.

    Groups, modes, attributes and errors are those of `MaskedConv2d`; the operation is
    `ops.masked_conv_transpose2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
            dilation, padding_mode, device, dtype: as in `torch.nn.ConvTranspose2d`, all of them.
        options: sets, samples, tau, mask_bias, init, tensor_id, granularity: see `MaskOptions`.
            "row" and "column" are output and input channels here too, ("n:m", n, m) is refused.

    Parameters:
        weight: [in_channels, out_channels / groups, *kernel_size]. bias: [out_channels] or None.
        weight_logits: [sets, *weight.shape], float32; smaller with a coarser granularity.
            bias_logits: [sets, out_channels] or None.

    Shape:
        Input [batch, in_channels, height, width], output [batch, out_channels, height, width].

    Raises:
        ValueError: as `MaskedConv2d`.

    Equivalent to::

        as `MaskedConv2d`, with `F.conv_transpose2d`
    """

    dense_type = nn.ConvTranspose2d
    _operation = staticmethod(ops.masked_conv_transpose2d)
    _plain = staticmethod(F.conv_transpose2d)


class MaskedConvTranspose1d(_MaskedConvTranspose):
    """`torch.nn.ConvTranspose1d` whose weight stands under one mask per set, drawn from logits.

    As `MaskedConvTranspose2d` with one spatial dimension: input [batch, in_channels, length].

    Equivalent to::

        as `MaskedConv2d`, with `F.conv_transpose1d`
    """

    dense_type = nn.ConvTranspose1d
    _operation = staticmethod(ops.masked_conv_transpose1d)
    _plain = staticmethod(F.conv_transpose1d)


def is_hugging_face_conv1d(kind: type) -> bool:
    """Whether it is `transformers.pytorch_utils.Conv1D`; transformers is not imported."""
    return kind.__name__ == "Conv1D" and kind.__module__.split(".")[0] == "transformers"


class MaskedHuggingFaceConv1D(InsOuts):
    """Hugging Face's `Conv1D`, a linear layer with a weight [in, out], under masks.

    As `MaskedLinear`, with `ops.masked_matmul`: weight and logits keep their layout, so masks and
    mask files follow the parameter as it is.

    Args:
        nf: number of outputs. nx: number of inputs.
        options: sets, samples, tau, mask_bias, init, tensor_id, granularity: see `MaskOptions`.
            "row" and "column" are outputs and inputs here too, ("n:m", n, m) is refused.

    Parameters:
        weight: [nx, nf]. bias: [nf].
        weight_logits: [sets, nx, nf], float32; smaller with a coarser granularity.
            bias_logits: [sets, nf] or None.

    Shape:
        Input [..., nx] in the dtype of the weight, output [..., nf].

    Raises:
        ValueError: as `MaskedLinear`.

    Equivalent to::

        as `MaskedLinear`, with `x @ weight + bias`
    """

    nf: int
    nx: int

    @takes_mask_options
    def __init__(
        self,
        nf: int,
        nx: int,
        **options: Unpack[MaskOptions],
    ) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(nf))
        self._add_masks(options)

    @classmethod
    @takes_mask_options
    def from_dense(
        cls,
        conv: nn.Module,
        **options: Unpack[MaskOptions],
    ) -> MaskedHuggingFaceConv1D:
        """A masked layer over the very weight and bias of `conv`, which are frozen by this.

        Args:
            conv: a `transformers.pytorch_utils.Conv1D`; its Parameters are shared, not copied.
            options: see `MaskOptions`.
        """
        if not any(is_hugging_face_conv1d(kind) for kind in type(conv).__mro__):
            raise TypeError(
                f"conv: expected a transformers.pytorch_utils.Conv1D, got {type(conv).__name__}"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.nx, layer.nf = conv._parameters["weight"].shape  # type: ignore[union-attr]
        layer._adopt(conv, options)
        return layer

    def dense_shell(self) -> nn.Module:
        """A plain layer of these sizes on the meta device; needs transformers."""
        plain: Any = importlib.import_module("transformers.pytorch_utils")
        with torch.device("meta"):
            shell: nn.Module = plain.Conv1D(self.nf, self.nx)
        return shell

    def forward(self, x: Tensor) -> Tensor:
        """The masked product of x [..., nx]; see the class for groups and modes."""
        if self.effective_mode == "off":
            y = x @ self.weight
            return y if self.bias is None else y + self.bias
        logits = self._logits("weight")
        assert logits is not None
        return ops.masked_matmul(
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
        return f"nf={self.nf}, nx={self.nx}, {self._mask_repr()}"
