"""What the fused kernels are compared with: naive masking, its compiled form, NeuroSurgeon."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-10  # guards the logarithms against a uniform that is exactly 0


class NotAvailableError(RuntimeError):
    """A baseline that cannot run here; the message says why."""


def gumbel_sigmoid(logits: Tensor, samples: int = 1, tau: float = 1.0) -> Tensor:
    """Hard straight-through samples from two uniforms per weight (Csordás et al. 2021, section 2).

    Args:
        logits: floating tensor of any shape.
        samples: number of masks; 1 drops the sample dimension.
        tau: temperature.

    Returns:
        0/1 values of shape `logits.shape`, or `[samples, *logits.shape]` for more than one.

    Equivalent to: `F.gumbel_softmax` over the two logits (l, 0) with `hard=True`, first column.
    """
    shape = tuple(logits.shape) if samples == 1 else (samples, *logits.shape)
    uniform = torch.rand((2, *shape), dtype=logits.dtype, device=logits.device)
    noise = -torch.log(torch.log(uniform[1] + EPSILON) / torch.log(uniform[0] + EPSILON) + EPSILON)
    soft = torch.sigmoid((logits + noise) / tau)
    hard = (soft > 0.5).to(soft.dtype)
    return (hard - soft).detach() + soft


def naive_masked_linear(
    x: Tensor, weight: Tensor, logits: Tensor, bias: Tensor | None, samples: int
) -> Tensor:
    """Masked linear layer as it is usually written: every mask and masked weight is a tensor.

    Args:
        x: `[batch, in]`; part k of `samples` equal parts of the batch meets mask k.
        weight: `[out, in]`.
        logits: `[out, in]`.
        bias: `[out]` or None, not masked.
        samples: number of masks; must divide the batch.

    Returns:
        `[batch, out]`.
    """
    masked = weight * gumbel_sigmoid(logits, samples).to(weight.dtype)
    if samples == 1:
        return F.linear(x, masked, bias)
    y = torch.bmm(x.view(samples, -1, x.shape[-1]), masked.transpose(1, 2))
    if bias is not None:
        y = y + bias
    return y.view(x.shape[0], -1)


def naive_masked_conv2d(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    samples: int,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Tensor:
    """Masked convolution as it is usually written: all masks at once in a grouped convolution.

    Args:
        x: `[batch, in, height, width]`; part k of `samples` equal parts meets mask k.
        weight, logits: `[out, in / groups, kernel, kernel]`.
        bias: `[out]` or None, not masked.
        samples: number of masks; must divide the batch.
        stride, padding, groups: of the convolution.

    Returns:
        `[batch, out, height, width]`.
    """
    masked = weight * gumbel_sigmoid(logits, samples).to(weight.dtype)
    if samples == 1:
        return F.conv2d(
            x, masked[0] if masked.dim() > 4 else masked, bias, stride, padding, 1, groups
        )
    parts = x.view(samples, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
    repeated = None if bias is None else bias.repeat(samples)
    y = F.conv2d(parts, masked.flatten(0, 1), repeated, stride, padding, 1, samples * groups)
    return y.view(y.shape[0], samples, -1, *y.shape[2:]).transpose(0, 1).flatten(0, 1)


def compiled_naive_masked_linear() -> Callable[..., Tensor]:
    """`naive_masked_linear` under `torch.compile`, specialised to the shapes it is called with."""
    torch._dynamo.reset()
    return torch.compile(naive_masked_linear, fullgraph=True, dynamic=False)


class NaiveMaskedLinear(nn.Module):
    """An `nn.Linear` with frozen weight and bias under `naive_masked_linear`.

    Args:
        linear: the layer to mask; its parameters are shared.
        samples: number of masks per batch.
        init: first value of every logit.
    """

    def __init__(self, linear: nn.Linear, samples: int, init: float = 2.0) -> None:
        super().__init__()
        self.weight, self.bias, self.samples = linear.weight, linear.bias, samples
        self.weight_logits = nn.Parameter(torch.full_like(linear.weight, init))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, ..., in]` to `[batch, ..., out]`, under fresh masks."""
        y = naive_masked_linear(
            x.flatten(0, -2), self.weight, self.weight_logits, self.bias, self.samples
        )
        return y.view(*x.shape[:-1], -1)


class NaiveMaskedConv2d(nn.Module):
    """An `nn.Conv2d` with frozen weight and bias under `naive_masked_conv2d`.

    Args:
        conv: the layer to mask, square strides and zero padding; its parameters are shared.
        samples: number of masks per batch.
        init: first value of every logit.
    """

    def __init__(self, conv: nn.Conv2d, samples: int, init: float = 2.0) -> None:
        super().__init__()
        self.conv, self.samples = conv, samples
        self.weight_logits = nn.Parameter(torch.full_like(conv.weight, init))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, in, height, width]` to `[batch, out, ...]`, under fresh masks."""
        conv = self.conv
        return naive_masked_conv2d(
            x,
            conv.weight,
            self.weight_logits,
            conv.bias,
            self.samples,
            stride=conv.stride[0],
            padding=int(conv.padding[0]),
            groups=conv.groups,
        )


class NaiveMaskedLSTM(nn.Module):
    """Masked LSTM layers as they are usually written: masks as tensors, a Python loop over time.

    Args:
        lstm: the layers to mask, one direction, with biases; its parameters are shared and frozen.
        samples: number of masks per batch; must divide the batch.
        init: first value of every logit.
    """

    def __init__(self, lstm: nn.LSTM, samples: int, init: float = 2.0) -> None:
        super().__init__()
        self.samples, self.layers = samples, lstm.num_layers
        self.tensors = {name: p.detach() for name, p in lstm.named_parameters()}
        self.logits = nn.ParameterList(
            torch.full_like(p, init) for name, p in self.tensors.items() if "weight" in name
        )

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`[steps, batch, in]` to `[steps, batch, hidden]` and the states of the last layer."""
        steps, batch, _ = x.shape
        y = x.view(steps, self.samples, -1, x.shape[-1])
        for layer in range(self.layers):
            w_ih, w_hh = (
                self.tensors[f"weight_{which}_l{layer}"]
                * gumbel_sigmoid(self.logits[2 * layer + n], self.samples)
                for n, which in enumerate(("ih", "hh"))
            )
            if self.samples == 1:
                w_ih, w_hh = w_ih.unsqueeze(0), w_hh.unsqueeze(0)
            bias = self.tensors[f"bias_ih_l{layer}"] + self.tensors[f"bias_hh_l{layer}"]
            h = c = y.new_zeros(self.samples, batch // self.samples, w_hh.shape[2])
            outputs = []
            for part in y:
                gates = torch.bmm(part, w_ih.transpose(1, 2)) + torch.bmm(h, w_hh.transpose(1, 2))
                i, f, g, o = (gates + bias).chunk(4, dim=-1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                outputs.append(h)
            y = torch.stack(outputs)
        return y.flatten(1, 2), (h.flatten(0, 1), c.flatten(0, 1))


def naive_masked_model(model: nn.Module, samples: int) -> nn.Module:
    """A frozen copy of `model` with naive masks over each `nn.Linear` and `nn.Conv2d`."""
    masked = copy.deepcopy(model)
    for parameter in masked.parameters():
        parameter.requires_grad_(False)
    for module in list(masked.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, NaiveMaskedLinear(child, samples))
            elif type(child) is nn.Conv2d:
                setattr(module, name, NaiveMaskedConv2d(child, samples))
    return masked


def neurosurgeon_linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The hard-concrete linear layer of the package NeuroSurgeon on given frozen parameters.

    Its masks are soft while training, come from another distribution and one per batch, so it
    can stand beside `samples=1` only.

    Raises:
        NotAvailableError: the package cannot be imported.
    """
    try:
        module: Any = importlib.import_module("NeuroSurgeon.Masking.hardconcrete_layer")
    except ImportError as error:
        raise NotAvailableError(
            f"NeuroSurgeon does not import ({error}); `pip install neurosurgeon` adds it"
        ) from error
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    layer: nn.Module = module.HardConcreteLinear.from_layer(linear, mask_init_percentage=0.88)
    layer.train(True)
    return layer
