"""The feed-forward network of the arithmetic studies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Linear layers with ReLU between them and none after the last (arXiv 2010.02066).

    Weights and biases start as in `torch.nn.Linear`, uniform in +-1/sqrt(fan_in). The layers are
    `layers.0`, `layers.1`, ... .

    Args:
        in_features: size of the input.
        hidden: widths of the hidden layers; empty for a single linear layer.
        out_features: size of the output.
        generator: source of the initial values (default: PyTorch's own).
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if a size is below 1.

    Equivalent to:
        sizes = [in_features, *hidden, out_features]
        modules = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.ReLU())]
        nn.Sequential(*modules[:-1])
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (in_features, *hidden, out_features)
        if min(sizes) < 1:
            raise ValueError(
                f"in_features, hidden and out_features must be at least 1, got {sizes}"
            )
        # on the meta device first, since these initial values are drawn from `generator`
        self.layers = nn.ModuleList(
            nn.Linear(i, o, device="meta", dtype=dtype) for i, o in itertools.pairwise(sizes)
        )
        self.to_empty(device=device or "cpu")
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights and biases anew, layer by layer, the weight before the bias."""
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            bound = 1 / math.sqrt(layer.in_features)
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        *inner, last = self.layers
        for layer in inner:
            x = torch.relu(layer(x))
        out: Tensor = last(x)
        return out
