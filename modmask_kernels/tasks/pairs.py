"""Double addition: two pairs of numbers, each added modulo 10**n_digits.

Csordás et al., "Are Neural Nets Modular?", ICLR 2021 (arXiv 2010.02066), double addition. The same
function twice, on disjoint inputs and outputs: does a network compute it with the same weights?
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arithmetic import encode_digits

PAIRS = ("first", "second")

# more combinations of both pairs than this are not enumerated
_MAX_ROWS = 10_000


class IOMode(NamedTuple):
    """Where a recurrent network meets the pairs.

    Attributes:
        vectors: input vectors of an example, shown one after the other.
        input_slots: input slot of each pair.
        shown_in: vectors in which each pair is shown.
        output_slots: output slot of each pair.
        read_at: number of the reading at which each pair's result is read.
    """

    vectors: int
    input_slots: tuple[int, int]
    shown_in: tuple[tuple[int, ...], tuple[int, ...]]
    output_slots: tuple[int, int]
    read_at: tuple[int, int]


_BOTH, _TURNS, _END = ((0,), (0,)), ((0,), (1,)), (0, 0)

# the first two are those of the published runs
IO_MODES: dict[str, IOMode] = {
    # both pairs all the time, both results at the end
    "together": IOMode(1, (0, 1), _BOTH, (0, 1), _END),
    # each pair in its own half of the steps, its result at the end of that half
    "only_one_io": IOMode(2, (0, 1), _TURNS, (0, 1), (0, 1)),
    # each pair in its own half of the steps, both results at the end
    "only_one": IOMode(2, (0, 1), _TURNS, (0, 1), _END),
    # both pairs all the time, the results from one slot, one after the other
    "same_output": IOMode(1, (0, 1), _BOTH, (0, 0), (0, 1)),
    # the pairs in one slot, one after the other, both results at the end
    "same_input": IOMode(2, (0, 0), _TURNS, (0, 1), _END),
    # one slot in, one slot out, one pair after the other: literally the same function twice
    "same_io": IOMode(2, (0, 0), _TURNS, (0, 0), (0, 1)),
}


class _AddPairs:
    """What both kinds of data have in common; see there."""

    def __init__(
        self,
        n_digits: int,
        pairs: Sequence[str],
        batch_size: int,
        device: torch.device | str,
    ) -> None:
        if not 1 <= n_digits <= 2:
            raise ValueError(f"n_digits must be 1 or 2, got {n_digits}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        unknown = [name for name in pairs if name not in PAIRS]
        if unknown or not pairs or len(set(pairs)) != len(pairs):
            raise ValueError(
                f"pairs must be distinct names of {', '.join(PAIRS)}, got {list(pairs)}"
            )
        self.n_digits = n_digits
        self.pairs = tuple(sorted(pairs, key=PAIRS.index))
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.modulus: int = 10**n_digits
        self.combinations: int = self.modulus**2
        self.width = 2 * n_digits * 10
        self._index = [PAIRS.index(name) for name in self.pairs]
        # all argument pairs: one-hot inputs and digits of the result
        both = torch.arange(self.combinations, device=self.device)
        first, second = both // self.modulus, both % self.modulus
        digits = encode_digits(torch.stack((first, second), dim=-1), n_digits).flatten(-2)
        self._inputs = F.one_hot(digits, 10).flatten(-2).float()
        self._targets = encode_digits((first + second) % self.modulus, n_digits)

    def _draw(self, generator: torch.Generator) -> Tensor:
        """Argument pairs of a batch: int64 [batch, drawn pairs]."""
        return torch.randint(
            self.combinations,
            (self.batch_size, len(self.pairs)),
            generator=generator,
            device=generator.device,
        ).to(self.device)


class AddPairsApart(_AddPairs):
    """Rows that hold one pair each: a feed-forward network never sees both pairs together.

    An input row has a slot per pair, each 2 * n_digits digits one-hot; the slot of the other pair
    is zero. With both pairs, an example makes two rows, one after the other, so that it stays in
    one part when a batch is cut over mask samples.

    An instance is a data source of `learn_masks`; the generator alone decides.

    Args:
        n_digits: digits of every number, 1 or 2 (published: 2).
        pairs: which pairs are drawn, of `PAIRS`.
        batch_size: examples of a batch.
        device: where the batches live.

    Raises:
        ValueError: for a number of digits, a pair or a batch size that cannot be.
    """

    def __init__(
        self,
        n_digits: int = 2,
        pairs: Sequence[str] = PAIRS,
        batch_size: int = 128,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(n_digits, pairs, batch_size, device)
        self.in_features = len(PAIRS) * self.width
        self.out_features = len(PAIRS) * n_digits * 10

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A batch: inputs [rows, in_features], targets int64 [rows, n_digits], pair int64 [rows].

        rows = batch_size * drawn pairs.
        """
        index = self._draw(generator)
        pair = torch.tensor(self._index, device=self.device).expand_as(index)
        return self.rows(index.flatten(), pair.flatten())

    def rows(self, index: Tensor, pair: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows with argument pairs `index` (first * modulus + second) in the slots `pair`."""
        inputs = torch.zeros(len(index), len(PAIRS), self.width, device=index.device)
        inputs[torch.arange(len(index), device=index.device), pair] = self._inputs[index]
        return inputs.flatten(1), self._targets[index], pair

    def all_rows(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """All argument pairs in the slot of one pair."""
        index = torch.arange(self.combinations, device=self.device)
        return self.rows(index, torch.full_like(index, PAIRS.index(name)))

    def answers(self, output: Tensor, pair: Tensor) -> Tensor:
        """The slot of each row's pair: [rows, out_features] to [rows, n_digits, 10]."""
        slots = output.reshape(len(output), len(PAIRS), self.n_digits, 10)
        return slots[torch.arange(len(slots), device=slots.device), pair]

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Cross-entropy of the digits of each row's own slot, averaged."""
        answers = self.answers(output, batch[2])
        return F.cross_entropy(answers.reshape(-1, 10), batch[1].reshape(-1))

    def right(self, output: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Whether all digits of a row are right: bool [rows]."""
        found: Tensor = (self.answers(output, batch[2]).argmax(-1) == batch[1]).all(-1)
        return found


class AddPairsInTime(_AddPairs):
    """Both pairs for a recurrent network, in one of six modes of input and output (`IO_MODES`).

    An example is one or two input vectors, each shown for half of the steps (a single one: for all
    of them); the outputs are read at the end of each half, or at the end only. What is drawn are
    the pairs of `pairs`; the inputs of the other pair are zero and its result is not in the loss.

    An instance is a data source of `learn_masks`; the generator alone decides.

    Args:
        n_digits: digits of every number, 1 or 2 (published: 2).
        pairs: which pairs are drawn, of `PAIRS`.
        batch_size: examples of a batch.
        device: where the batches live.
        mode: a name of `IO_MODES`.

    Raises:
        ValueError: for a number of digits, a pair, a batch size or a mode that cannot be.
    """

    def __init__(
        self,
        n_digits: int = 2,
        pairs: Sequence[str] = PAIRS,
        batch_size: int = 128,
        device: torch.device | str = "cpu",
        mode: str = "together",
    ) -> None:
        super().__init__(n_digits, pairs, batch_size, device)
        if mode not in IO_MODES:
            raise ValueError(f"mode must be one of {', '.join(IO_MODES)}, got {mode!r}")
        self.mode = IO_MODES[mode]
        self.in_features = (1 + max(self.mode.input_slots)) * self.width
        self.out_features = (1 + max(self.mode.output_slots)) * n_digits * 10
        self.readings = 1 + max(self.mode.read_at)

    def read_steps(self, steps: int) -> list[int]:
        """The steps to read, of an even number of steps: the last one, or that of each half."""
        return [steps - 1] if self.readings == 1 else [steps // 2 - 1, steps - 1]

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A batch: inputs [batch, vectors, in_features], targets int64 [batch, 2, n_digits].

        Targets of a pair that is not drawn are -1.
        """
        index = self._draw(generator)
        whole = index.new_full((len(index), len(PAIRS)), -1)
        whole[:, self._index] = index
        return self.rows(whole)

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The examples with argument pairs `index` [n, 2] (first * modulus + second; -1: none)."""
        there = index >= 0
        inputs = self._inputs[index.clamp(min=0)] * there.unsqueeze(-1)
        slots = self.in_features // self.width
        x = torch.zeros(len(index), self.mode.vectors, slots, self.width, device=index.device)
        for pair, slot in enumerate(self.mode.input_slots):
            for vector in self.mode.shown_in[pair]:
                x[:, vector, slot] = inputs[:, pair]
        targets = self._targets[index.clamp(min=0)].masked_fill(~there.unsqueeze(-1), -1)
        return x.flatten(2), targets

    def all_rows(self) -> tuple[Tensor, Tensor]:
        """Every argument pair in either slot.

        All combinations of both pairs where there are at most 10,000; else as many rows as argument
        pairs, the second pair in an order of its own that is always the same.
        """
        count = self.combinations
        every = torch.arange(count, device=self.device)
        if count**2 <= _MAX_ROWS:
            return self.rows(torch.cartesian_prod(every, every))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        return self.rows(torch.stack((every, order.to(self.device)), dim=-1))

    def answers(self, output: Tensor) -> Tensor:
        """What is read for each pair: [n, readings, out_features] to [n, 2, n_digits, 10]."""
        slots = output.reshape(len(output), self.readings, -1, self.n_digits, 10)
        read = [
            slots[:, reading, slot]
            for reading, slot in zip(self.mode.read_at, self.mode.output_slots, strict=True)
        ]
        return torch.stack(read, dim=1)

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of all digits of the drawn pairs, averaged."""
        answers = self.answers(output)[:, self._index]
        return F.cross_entropy(answers.reshape(-1, 10), batch[1][:, self._index].reshape(-1))

    def right(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Whether all digits of a pair are right: bool [n, 2]."""
        found: Tensor = (self.answers(output).argmax(-1) == batch[1]).all(-1)
        return found
