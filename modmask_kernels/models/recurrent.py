"""The LSTM of the arithmetic studies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Recurrent(nn.Module):
    """LSTM layers with a linear layer on the states of chosen steps (arXiv 2010.02066).

    The parts are `lstm`, a `torch.nn.LSTM`, and `output`. Each cell has one bias vector as in the
    study: of PyTorch's two, `bias_hh` stays 0 and is not trained. Initial values are
    those of the study: hidden-hidden weights N(0, 1 / (2 H)), the candidate's block orthogonal
    with gain 5/3 / sqrt(2); input-hidden weights N(0, 1 / (I + H)), the candidate's block times
    5/3; biases 0, those of the forget gate 1. The output layer starts as `torch.nn.Linear`.

    Args:
        in_features: size of an input vector.
        hidden_size: units of every layer.
        out_features: size of an output vector.
        num_layers: LSTM layers.
        repeat: steps for which each input vector is shown.
        read: steps at which the output is read; negative ones count from the end.
        generator: source of the initial values (default: PyTorch's own).
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        [batch, in_features] or [batch, vectors, in_features] to [batch, len(read), out_features].

    Raises:
        ValueError: if a size is below 1, or there is no step to read.

    Equivalent to::

        x = x.repeat_interleave(repeat, dim=1)  # [batch, vectors * repeat, in_features]
        states, _ = lstm(x)
        output(states[:, read])
    """

    def __init__(
        self,
        in_features: int,
        hidden_size: int,
        out_features: int,
        *,
        num_layers: int = 2,
        repeat: int = 1,
        read: Sequence[int] = (-1,),
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "in_features": in_features,
            "hidden_size": hidden_size,
            "out_features": out_features,
            "num_layers": num_layers,
            "repeat": repeat,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not read:
            raise ValueError("read must name at least one step, got none")
        self.repeat = repeat
        self.read = list(read)
        self.lstm = nn.LSTM(
            in_features, hidden_size, num_layers, batch_first=True, device=device, dtype=dtype
        )
        self.output = nn.Linear(hidden_size, out_features, device=device, dtype=dtype)
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("bias_hh"):
                parameter.requires_grad_(False)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, layer by layer, input-hidden before hidden-hidden."""
        hidden = self.lstm.hidden_size
        candidate = slice(2 * hidden, 3 * hidden)  # gates: input, forget, candidate, output
        for layer in range(self.lstm.num_layers):
            weight_ih = self.lstm.get_parameter(f"weight_ih_l{layer}")
            weight_hh = self.lstm.get_parameter(f"weight_hh_l{layer}")
            fan = weight_ih.shape[1] + hidden
            weight_ih.normal_(std=1 / math.sqrt(fan), generator=generator)
            weight_ih[candidate].mul_(5 / 3)
            weight_hh.normal_(std=1 / math.sqrt(2 * hidden), generator=generator)
            nn.init.orthogonal_(
                weight_hh[candidate], gain=5 / 3 / math.sqrt(2), generator=generator
            )
            self.lstm.get_parameter(f"bias_hh_l{layer}").zero_()
            bias = self.lstm.get_parameter(f"bias_ih_l{layer}").zero_()
            bias[hidden : 2 * hidden].fill_(1)
        bound = 1 / math.sqrt(hidden)
        self.output.weight.uniform_(-bound, bound, generator=generator)
        self.output.bias.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs at the steps `read`."""
        if x.dim() == 2:
            x = x.unsqueeze(1)
        states, _ = self.lstm(x.repeat_interleave(self.repeat, dim=1))
        out: Tensor = self.output(states[:, self.read])
        return out
