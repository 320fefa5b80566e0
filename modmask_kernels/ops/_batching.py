"""Batching rules of `torch.vmap` that take all elements in one call.

Elements that share the weight are groups of one batch. Where they share the logits too, their seeds
are draws of the sets (seed `[sets, draws]`, whose groups follow each other within a set), so that
the gradient of the logits is summed by the kernel. Where every element has its own logits, or its
own gradient of them, the elements are sets, of logits expanded with a stride of 0, which the
kernels read where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Dims = Sequence[int | None]
# arguments and dimensions of them to a result and its dimension; None where a call per element is
# needed
Rule = Callable[[Callable[..., Any], int, Dims, Sequence[Any]], "tuple[Any, Any] | None"]

_OPERANDS = 6  # x, weight, logits, bias, bias_logits, seed


def masks_per_set(seed: Tensor | None, samples: int) -> int:
    """How many masks are drawn of a set; of a seed [sets, draws], `samples` for each draw."""
    if seed is None:
        return 1
    return samples * (seed.shape[1] if seed.dim() == 2 else 1)


def _each(t: Tensor, dim: int | None, n: int) -> Tensor:
    """[n, *t of an element], without a copy."""
    return t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)


def _as_sets(t: Tensor, dim: int | None, n: int, dims: int) -> Tensor:
    """Logits of all elements as sets: [n * sets, *parameter], of a parameter of `dims`."""
    every = _each(t, dim, n)
    return every if every.dim() == dims + 1 else every.flatten(0, 1)


def _seeds(seed: Tensor, dim: int | None, n: int, sets: int) -> Tensor:
    """[n, sets, draws]."""
    every = _each(seed, dim, n)
    every = every.reshape(n, *every.shape[1:], *[1] * (3 - every.dim()))
    return every.expand(n, sets, every.shape[2])


def _seeds_of_sets(seed: Tensor | None, dim: int | None, n: int, sets: int) -> Tensor | None:
    """The seeds where every element has its own sets."""
    if seed is None or (dim is None and not seed.dim()):
        return seed
    seeds = _seeds(seed, dim, n, sets).reshape(n * sets, -1)
    return seeds.squeeze(1) if seeds.shape[1] == 1 else seeds


def _sets(logits: Tensor, dim: int | None, dims: int) -> int:
    element = _each(logits, dim, 1).shape[1:]
    return element[0] if len(element) > dims else 1


def _split(t: Tensor, parts: int) -> Tensor:
    return t.reshape(parts, t.shape[0] // parts, *t.shape[1:])


def _swap(t: Tensor, outer: int, inner: int) -> Tensor:
    """Rows [outer, inner, ...] as rows [inner, outer, ...]."""
    if outer == 1 or inner == 1:
        return t
    parts = t.reshape(outer, inner, t.shape[0] // (outer * inner), *t.shape[1:])
    return parts.transpose(0, 1).reshape(t.shape)


def product(samples_at: int) -> Rule:
    """The rule of a masked product; `samples_at`: position of `samples` among its arguments."""

    def rule(
        call: Callable[..., Any], n: int, in_dims: Dims, arguments: Sequence[Any]
    ) -> tuple[Any, Any] | None:
        x, weight, logits, bias, bias_logits, seed = arguments[:_OPERANDS]
        of_x, of_weight, of_logits, of_bias, of_bias_logits, of_seed = in_dims[:_OPERANDS]
        if of_weight is not None or of_bias is not None:
            return None
        rest = arguments[_OPERANDS:]
        sets = _sets(logits, of_logits, weight.dim())
        rows = _each(x, of_x, n).flatten(0, 1)
        if of_logits is not None or of_bias_logits is not None:
            y = call(
                rows,
                weight,
                _as_sets(logits, of_logits, n, weight.dim()),
                bias,
                None if bias_logits is None else _as_sets(bias_logits, of_bias_logits, n, 1),
                _seeds_of_sets(seed, of_seed, n, sets),
                *rest,
            )
            return _split(y, n), 0
        if of_seed is not None:
            inner = sets
            seed = _seeds(seed, of_seed, n, sets).transpose(0, 1).reshape(sets, -1)
        else:
            inner = sets * masks_per_set(seed, arguments[samples_at])
        y = call(_swap(rows, n, inner), weight, logits, bias, bias_logits, seed, *rest)
        return _split(_swap(y, inner, n), n), 0

    return rule


def product_backward(
    call: Callable[..., Any], n: int, in_dims: Dims, arguments: Sequence[Any]
) -> tuple[Any, Any] | None:
    """The rule of the gradient of a masked product, where that of the weight is not wanted."""
    dy, x, weight, logits, bias, bias_logits, seed = arguments[: 1 + _OPERANDS]
    of_dy, of_x, of_weight, of_logits, of_bias, of_bias_logits, of_seed = in_dims[: 1 + _OPERANDS]
    need_x, need_weight, need_logits, need_bias, need_bias_logits = arguments[-5:]
    if of_weight is not None or of_bias is not None or need_weight or need_bias:
        return None
    sets = _sets(logits, of_logits, weight.dim())
    dx, dweight, dlogits, dbias, dbias_logits = call(
        _each(dy, of_dy, n).flatten(0, 1),
        _each(x, of_x, n).flatten(0, 1),
        weight,
        _as_sets(logits, of_logits, n, weight.dim()),
        bias,
        None if bias_logits is None else _as_sets(bias_logits, of_bias_logits, n, 1),
        _seeds_of_sets(seed, of_seed, n, sets),
        *arguments[1 + _OPERANDS :],
    )
    grads = [dx, dweight, dlogits, dbias, dbias_logits]
    dims: list[int | None] = [None] * 5
    for i, like, of, need in (
        (0, x, of_x, need_x),
        (2, logits, of_logits, need_logits),
        (4, bias_logits, of_bias_logits, need_bias_logits),
    ):
        if need:
            grads[i], dims[i] = grads[i].reshape(_each(like, of, n).shape), 0
    return tuple(grads), tuple(dims)


def _has_sets(seed: Tensor | None, dim: int | None) -> bool:
    """Whether the seed of an element has a dimension of sets."""
    return seed is not None and seed.dim() > (0 if dim is None else 1)


def samples(elementwise: Callable[[Sequence[Any]], bool]) -> Rule:
    """The rule of drawing masks: of logits and seed, `[samples, *logits.shape]` or packed.

    `elementwise`: whether logits without a seed may be taken as more than one parameter.
    """

    def rule(
        call: Callable[..., Any], n: int, in_dims: Dims, arguments: Sequence[Any]
    ) -> tuple[Any, Any] | None:
        logits, seed = arguments[:2]
        of_logits, of_seed = in_dims[:2]
        rest = arguments[2:]
        if seed is None:
            if not elementwise(arguments):
                return None
            return call(_each(logits, of_logits, n), None, *rest), 1
        with_sets = _has_sets(seed, of_seed)
        if of_logits is None:
            own = logits if with_sets else logits.unsqueeze(0)
            seeds = _seeds(seed, of_seed, n, own.shape[0]).transpose(0, 1)
            drawn = call(own, seeds.reshape(own.shape[0], -1), *rest)
            return _split(drawn if with_sets else drawn.squeeze(1), n), 0
        every = _each(logits, of_logits, n)
        sets = every.shape[1] if with_sets else 1
        seeds = _seeds(seed, of_seed, n, sets).reshape(n * sets, -1)
        drawn = call(every.flatten(0, 1) if with_sets else every, seeds, *rest)
        return (drawn.unflatten(1, (n, sets)) if with_sets else drawn), 1

    return rule


def samples_backward(elementwise: Callable[[Sequence[Any]], bool]) -> Rule:
    """The rule of the gradient of `samples`, which takes that of the masks first."""

    def rule(
        call: Callable[..., Any], n: int, in_dims: Dims, arguments: Sequence[Any]
    ) -> tuple[Any, Any] | None:
        dvalues, logits, seed = arguments[:3]
        of_dvalues, of_logits, of_seed = in_dims[:3]
        every, dvalues = _each(logits, of_logits, n), _each(dvalues, of_dvalues, n).transpose(0, 1)
        if seed is None:
            if not elementwise(arguments):
                return None
            return call(dvalues, every, None, *arguments[3:]), 0
        shape, sets = every.shape, 1
        if _has_sets(seed, of_seed):
            sets = every.shape[1]
            every, dvalues = every.flatten(0, 1), dvalues.flatten(1, 2)
        seeds = _seeds(seed, of_seed, n, sets).reshape(n * sets, -1)
        return call(dvalues, every, seeds, *arguments[3:]).reshape(shape), 0

    return rule


_LOGITS_OF_RNN = {5: 2, 6: 2, 9: 1, 10: 1}  # position among the operands: dimensions of a set
_FROZEN_OF_RNN = (3, 4, 7, 8)  # weights and biases
_OPERANDS_OF_RNN = 13


def _rows_of_rnn(t: Tensor | None, dim: int | None, n: int, at: int) -> Tensor | None:
    """The batches of all elements, which are in dimension `at` of each, as one."""
    return None if t is None else _each(t, dim, n).movedim(0, at).flatten(at, at + 1)


def _merged_rnn(n: int, in_dims: Dims, operands: Sequence[Any], own: bool) -> list[Any]:
    """The operands of a masked recurrent layer; `own`: elements are sets, else draws of one."""
    merged = list(operands)
    for i, at in ((0, 1), (1, 0), (2, 0), (12, 0)):
        merged[i] = _rows_of_rnn(operands[i], in_dims[i], n, at)
    seed, of_seed = operands[11], in_dims[11]
    sets = _sets(operands[5], in_dims[5], 2)
    if not own:
        merged[11] = _seeds(seed, of_seed, n, 1).reshape(1, -1)
        return merged
    merged[11] = _seeds_of_sets(seed, of_seed, n, sets)
    for i, dims in _LOGITS_OF_RNN.items():
        if operands[i] is not None:
            merged[i] = _as_sets(operands[i], in_dims[i], n, dims)
    return merged


def recurrent(
    call: Callable[..., Any], n: int, in_dims: Dims, arguments: Sequence[Any]
) -> tuple[Any, Any] | None:
    """The rule of a masked recurrent layer; the saved values stay those of all elements."""
    own = any(in_dims[i] is not None for i in _LOGITS_OF_RNN)
    one_set = _sets(arguments[5], in_dims[5], 2) == 1 and arguments[11] is not None
    if any(in_dims[i] is not None for i in _FROZEN_OF_RNN) or not (own or one_set):
        return None
    operands = _merged_rnn(n, in_dims, arguments[:_OPERANDS_OF_RNN], own)
    y, h_n, c_n, saved = call(*operands, *arguments[_OPERANDS_OF_RNN:])
    y = y.unflatten(1, (n, y.shape[1] // n))
    return (y, _split(h_n, n), _split(c_n, n), saved), (1, 0, 0, None)


def recurrent_backward(
    call: Callable[..., Any], n: int, in_dims: Dims, arguments: Sequence[Any]
) -> tuple[Any, Any] | None:
    """The rule of the gradient of `recurrent`, which takes dy, dh_n, dc_n, y and saved first."""
    results, saved, operands = arguments[:4], arguments[4], arguments[5 : 5 + _OPERANDS_OF_RNN]
    if in_dims[4] is not None or in_dims[3] is None:
        return None  # the forward pass was not one call
    rest, needs = arguments[5 + _OPERANDS_OF_RNN :], arguments[-1]
    of_operands = in_dims[5 : 5 + _OPERANDS_OF_RNN]
    if any(needs >> i & 1 for i in _FROZEN_OF_RNN):
        values, mark = saved[:-1], saved[-1:]
        each = [
            call(
                *(
                    t if t is None else _each(t, d, n)[e]
                    for t, d in zip(results, in_dims[:4], strict=True)
                ),
                torch.cat([_split(values, n)[e], mark]),
                *(
                    t if t is None else _each(t, d, n)[e]
                    for t, d in zip(operands, of_operands, strict=True)
                ),
                *rest,
            )
            for e in range(n)
        ]
        return tuple(torch.stack(of) for of in zip(*each, strict=True)), (0,) * len(each[0])
    merged = [
        _rows_of_rnn(t, d, n, at)
        for t, d, at in zip(results, in_dims[:4], (1, 0, 0, 1), strict=True)
    ]
    found = call(*merged, saved, *_merged_rnn(n, of_operands, operands, own=True), *rest)
    grads = list(found)
    dims: list[int | None] = [None] * len(found)
    for i, grad in enumerate(found):
        if operands[i] is None or not needs >> i & 1:
            continue
        dims[i] = 1 if i == 0 else 0
        shape = _each(operands[i], of_operands[i], n).shape
        grads[i] = grad.unflatten(1, (n, shape[2])) if i == 0 else grad.reshape(shape)
    return tuple(grads), tuple(dims)
