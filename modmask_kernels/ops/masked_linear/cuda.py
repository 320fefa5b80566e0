"""`masked_linear` in CUDA C++ for few rows of a group, with the functions of `triton.py`.

A block draws a tile of masks for all samples of a set while it has the tile of the weight, so that
the weight and its logits are read once, whatever the samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library, estimators
from .._gpu_masks import Masks

_DRAW = (
    "int tensor_id, int bias_tensor_id, SymInt sample_offset, SymInt element_offset, "
    f"int samples, float tau, bool hard, {estimators.SCHEMA}"
)
_library.define_on_cuda(
    "masked_product_cuda(Tensor a, Tensor weight, Tensor logits, Tensor? bias, "
    f"Tensor? bias_logits, Tensor? seed, Tensor? words, bool backward, {_DRAW}) -> Tensor"
)
_library.define_on_cuda(
    "masked_gradients_cuda(Tensor dy, Tensor x, Tensor weight, Tensor logits, Tensor? seed, "
    f"Tensor? words, bool need_weight, bool need_logits, {_DRAW}) -> (Tensor, Tensor)"
)
_library.define_on_cuda(
    "masked_bias_gradients_cuda(Tensor sums, Tensor bias, Tensor bias_logits, Tensor? seed, "
    f"bool need_bias, bool need_logits, {_DRAW}) -> (Tensor, Tensor)"
)


def _draw(masks: Masks) -> tuple[Any, ...]:
    return masks[3:]


def product(
    a: Tensor,
    weight: Tensor,
    masks: Masks,
    bias: Tensor | None = None,
    words: Tensor | None = None,
    *,
    backward: bool = False,
    tf32: bool = False,
) -> Tensor:
    """x (W*M)^T + bias of every group, or with `backward` dy (W*M); float32 sums.

    Args:
        a: `[groups * rows, inputs]`, or `[groups * rows, outputs]` with `backward`.
        weight: `[outputs, inputs]`, dtype of `a`.
        masks: what is drawn; its bias is masked where it has logits of it.
        words: packed masks of `mask_words`, which all need but hard ones of Gumbel noise and soft
            ones.
        tf32: of no effect.
    """
    y: Tensor = torch.ops.modmask.masked_product_cuda(
        *(a, weight, masks.logits, bias, masks.bias_logits, masks.seed, words, backward),
        *_draw(masks),
    )
    return y


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    masks: Masks,
    *,
    need_weight: bool = False,
    need_logits: bool = True,
    tf32: bool = False,
    words: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dlogits [sets, outputs, inputs]), each where it is needed.

    Args:
        dy: `[groups * rows, outputs]`. x: `[groups * rows, inputs]`.
        words: packed masks, which dweight needs for n of m and top_k.
        weight, masks, tf32: as in `product`.
    """
    dweight, dlogits = torch.ops.modmask.masked_gradients_cuda(
        dy, x, weight, masks.logits, masks.seed, words, need_weight, need_logits, *_draw(masks)
    )
    return dweight if need_weight else None, dlogits if need_logits else None


def masked_bias_gradients(
    dy: Tensor, bias: Tensor, masks: Masks, *, need_bias: bool = True, need_logits: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """(dbias, dbias_logits [sets, outputs]) of a masked bias, each where it is needed.

    Args:
        dy: the gradient summed over the rows of each group, `[groups, outputs]`, float32.
    """
    dbias, dlogits = torch.ops.modmask.masked_bias_gradients_cuda(
        dy, bias, masks.bias_logits, masks.seed, need_bias, need_logits, *_draw(masks)
    )
    return dbias if need_bias else None, dlogits if need_logits else None
