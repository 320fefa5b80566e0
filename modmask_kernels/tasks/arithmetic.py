"""Addition and multiplication modulo 10**n_digits, one-hot digits in and out.

Csordás et al., "Are Neural Nets Modular?", ICLR 2021 (arXiv 2010.02066), addition / multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

OPERATIONS = ("add", "mul")

# up to 2 digits all rows of an operation are a few MB, and a batch is one gather from them
_TABLE_DIGITS = 2
_MAX_DIGITS = 4


def encode_digits(numbers: Tensor, n_digits: int) -> Tensor:
    """Decimal digits, units first.

    Args:
        numbers: int64 tensor of any shape, values in [0, 10**n_digits).
        n_digits: number of digits.

    Returns:
        int64 tensor [*numbers.shape, n_digits]; 42 with three digits is [2, 4, 0].
    """
    powers = 10 ** torch.arange(n_digits, device=numbers.device)
    return torch.div(numbers.unsqueeze(-1), powers, rounding_mode="floor") % 10


def decode_digits(digits: Tensor) -> Tensor:
    """The numbers that `encode_digits` wrote: int64 [..., n_digits] to int64 [...]."""
    powers = 10 ** torch.arange(digits.shape[-1], device=digits.device)
    return (digits * powers).sum(-1)


def digit_loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Softmax cross-entropy of every digit, averaged over the batch and the digits.

    Args:
        output: floating point [batch, n_digits * 10].
        batch: (inputs, targets), targets int64 [batch, n_digits].

    Returns:
        scalar of the dtype of `output`.
    """
    return F.cross_entropy(output.reshape(-1, 10), batch[1].reshape(-1))


class AddMul:
    """Rows of the task: two arguments and an operation in, the result modulo 10**n_digits out.

    An input row is one-hot: the digits of the first argument, units first, the digits of the
    second, and the operation; with two digits 2 * 2 * 10 + 2 = 42 values. The operation is always
    coded with both slots, also when only one of them is drawn.

    An instance is a data source of `learn_masks`: called with a step and a generator it returns a
    batch drawn uniformly with replacement from all argument pairs of `operations`. It has no state
    of its own; the generator alone decides.

    Args:
        n_digits: digits of every argument and of the result, 1 to 4 (published: 2).
        operations: the operations that are drawn, a subset of `OPERATIONS`.
        batch_size: rows of a batch.
        device: where the batches live. Rows are drawn on the device of the generator.

    Raises:
        ValueError: for a number of digits, an operation or a batch size that cannot be.
    """

    def __init__(
        self,
        n_digits: int = 2,
        operations: Sequence[str] = OPERATIONS,
        batch_size: int = 128,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 1 <= n_digits <= _MAX_DIGITS:
            raise ValueError(f"n_digits must be between 1 and {_MAX_DIGITS}, got {n_digits}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        unknown = [name for name in operations if name not in OPERATIONS]
        if unknown or not operations or len(set(operations)) != len(operations):
            raise ValueError(
                f"operations must be distinct names of {', '.join(OPERATIONS)}, "
                f"got {list(operations)}"
            )
        self.n_digits = n_digits
        self.operations = tuple(operations)
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.modulus: int = 10**n_digits
        self.pairs: int = self.modulus**2
        self.in_features = 2 * n_digits * 10 + len(OPERATIONS)
        self.out_features = n_digits * 10
        self._codes = torch.tensor(
            [OPERATIONS.index(name) for name in self.operations], device=self.device
        )
        self._table: tuple[Tensor, Tensor] | None = None
        if n_digits <= _TABLE_DIGITS:
            self._table = self.rows(torch.arange(len(self), device=self.device))

    def __len__(self) -> int:
        """Number of different rows: all argument pairs of the drawn operations."""
        return len(self.operations) * self.pairs

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A batch: inputs float32 [batch, in_features] and targets int64 [batch, n_digits]."""
        index = torch.randint(
            len(self), (self.batch_size,), generator=generator, device=generator.device
        ).to(self.device)
        if self._table is None:
            return self.rows(index)
        inputs, targets = self._table
        return inputs.index_select(0, index), targets.index_select(0, index)

    def arguments(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First argument, second argument and position in `OPERATIONS` of the rows `index`.

        Row (position in `self.operations` * modulus + first) * modulus + second.
        """
        second = index % self.modulus
        rest = torch.div(index, self.modulus, rounding_mode="floor")
        which = torch.div(rest, self.modulus, rounding_mode="floor")
        return rest % self.modulus, second, self._codes[which]

    def results(self, first: Tensor, second: Tensor) -> Tensor:
        """Results of every operation of `OPERATIONS`, in its order: int64 [2, *first.shape]."""
        return torch.stack((first + second, first * second)).remainder(self.modulus)

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `index` [n]: inputs float32 [n, in_features] and targets int64 [n, n_digits]."""
        first, second, operation = self.arguments(index)
        digits = encode_digits(torch.stack((first, second), dim=-1), self.n_digits).flatten(-2)
        # column of the one in each block of ten, and in the block of the operation behind them
        columns = digits + 10 * torch.arange(2 * self.n_digits, device=digits.device)
        columns = torch.cat((columns, 20 * self.n_digits + operation.unsqueeze(-1)), dim=-1)
        inputs = torch.zeros(len(index), self.in_features, device=digits.device)
        inputs.scatter_(1, columns, 1.0)
        result = self.results(first, second).gather(0, operation.unsqueeze(0)).squeeze(0)
        return inputs, encode_digits(result, self.n_digits)

    def predictions(self, output: Tensor) -> Tensor:
        """Numbers that a network answered: [n, out_features] to int64 [n]."""
        return decode_digits(output.reshape(len(output), self.n_digits, 10).argmax(-1))
