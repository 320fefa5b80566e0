"""Multi-head attention under one or several learned masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .mask_options import MaskOptions, takes_mask_options
from .masked_module import MaskedModule

if TYPE_CHECKING:
    from typing_extensions import Unpack


_OPTIONS = (
    "embed_dim",
    "kdim",
    "vdim",
    "_qkv_same_embed_dim",
    "num_heads",
    "dropout",
    "batch_first",
    "head_dim",
    "add_zero_attn",
)


class MaskedMultiheadAttention(MaskedModule):
    """`torch.nn.MultiheadAttention` whose projections stand under one mask per set.

    The batch is cut into ``active sets * samples`` equal contiguous groups; group
    ``g = set * samples + sample`` sees its own draw of the masks of its set (Csordás et al. 2021,
    section 2). The projections are fused (`ops.masked_linear`), between them stands
    `scaled_dot_product_attention` (Vaswani et al. 2017, section 3.2).

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first,
            device, dtype: as in `torch.nn.MultiheadAttention`, all of them.
        options: sets, samples, tau, mask_bias, init, tensor_id, granularity: see `MaskOptions`. The
            biases are in_proj_bias, out_proj.bias, bias_k and bias_v.

    Parameters:
        in_proj_weight: [3 * embed_dim, embed_dim], or q_proj_weight, k_proj_weight, v_proj_weight.
        in_proj_bias, out_proj.weight, out_proj.bias, bias_k, bias_v as in the plain layer.
        ``<name>_logits``: [sets, *shape], float32, or smaller with a coarser granularity, beside
            each masked parameter.

    Attributes:
        mode, active_sets, samples, tau, set_names, sample_offset, seed, tensor_ids: see
            `MaskedModule`; all may be changed at any time. The batch dimension is that of
            `batch_first`; `batch_dim` has no say.

    Shape:
        As the plain layer. In mode "threshold" with one active set the batch dimension may be
        absent.

    Raises:
        ValueError: for options that the plain layer rejects, wrong modes, selections of sets or
            numbers of sets, masks and inputs that do not fit, and batches that do not divide.
        TypeError: for masks that are neither bool nor floating point, and nested tensors.

    Equivalent to::

        for g, (q, k, v) in enumerate(groups of query, key, value):
            masked = {n: p * sample_mask(logits of n, seed=seed, samples=samples,
                                         tensor_id=tensor_ids[n])[g % samples, g // samples]}
            y.append(functional_call(attention, masked, (q, k, v), options)[0])
        return torch.cat(y, dim=batch dimension)
    """

    dense_type: ClassVar[Any] = nn.MultiheadAttention

    embed_dim: int
    kdim: int
    vdim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: nn.Linear

    @takes_mask_options
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[MaskOptions],
    ) -> None:
        super().__init__()
        if embed_dim > 0 and num_heads > 0 and embed_dim % num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim={embed_dim}, got {num_heads}"
            )
        plain = nn.MultiheadAttention(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self._take(plain)
        self._add_masks(options)

    def _take(self, plain: nn.MultiheadAttention) -> None:
        """Take over options, Parameters and the output projection of a plain layer."""
        for name in _OPTIONS:
            setattr(self, name, getattr(plain, name))
        for name, parameter in plain._parameters.items():
            self.register_parameter(name, parameter)
        if plain.bias_k is None:
            self.bias_k = self.bias_v = None
        self.out_proj = plain.out_proj

    @classmethod
    @takes_mask_options
    def from_dense(
        cls,
        attention: nn.MultiheadAttention,
        **options: Unpack[MaskOptions],
    ) -> MaskedMultiheadAttention:
        """A masked layer over the very parameters of `attention`, which are frozen by this.

        Args:
            attention: the plain layer; its Parameters and its output projection are shared.
            options: see `MaskOptions`.
        """
        if not isinstance(attention, nn.MultiheadAttention):
            raise TypeError(
                f"attention: expected a torch.nn.MultiheadAttention, got {type(attention).__name__}"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(attention)
        layer._add_masks(options, frozen=True)
        return layer.train(attention.training)

    def dense_shell(self) -> nn.Module:
        """A plain layer of these sizes and options on the meta device, for other Parameters."""
        return nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            self.in_proj_bias is not None,
            self.bias_k is not None,
            self.add_zero_attn,
            self.kdim,
            self.vdim,
            self.batch_first,
            device="meta",
        )

    def batch_dim_of(self, x: Tensor) -> int:
        """See `MaskedModule`."""
        return 0 if self.batch_first or x.dim() < 3 else 1

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention and, if asked, its weights, as `torch.nn.MultiheadAttention.forward`.

        Args:
            query: [L, N, embed_dim], [N, L, embed_dim] with `batch_first`, or [L, embed_dim].
            key: the same with length S and `kdim`. value: with `vdim`.
            key_padding_mask: [N, S], bool (True is left out) or added to the scores.
            need_weights: whether the weights are returned.
            attn_mask: [L, S] or [N * num_heads, L, S], bool or added to the scores.
            average_attn_weights: whether the returned weights are the mean over the heads.
            is_causal: a hint that `attn_mask` is the causal mask.

        Returns:
            The output in the layout of `query`, and None or weights [N, L, S], with heads
            [N, num_heads, L, S]; without batch dimension as the input.
        """
        batched = self._check(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask: expected the causal mask beside is_causal, got None")
        batch = self.batch_dim_of(query)
        inputs = [
            t.unsqueeze(0) if not batched else t.transpose(0, batch) for t in (query, key, value)
        ]
        if key is query:
            inputs[1] = inputs[0]
        if value is key:
            inputs[2] = inputs[1]
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)

        mode = self.effective_mode
        seed = None if mode == "off" else self._rule(mode)["seed"]
        n, length, _ = inputs[0].shape
        source = inputs[1].shape[1]
        causal = is_causal and key_padding_mask is None and not need_weights
        added = self._added(
            None if causal else attn_mask, key_padding_mask, n, length, source, query.dtype
        )
        q, k, v = self._project_in(inputs, mode, seed)
        if self.bias_k is not None:
            k, v = (
                torch.cat([t, self._of_rows(name, n, mode, seed).view(-1, 1, self.embed_dim)], 1)
                for t, name in ((k, "bias_k"), (v, "bias_v"))
            )
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        if added is not None:
            added = F.pad(added, (0, k.shape[1] - source))
        q, k, v = (
            t.view(*t.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k, v)
        )

        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout(
                torch.softmax(scores if added is None else scores + added, -1), dropout
            )
            mixed = weights @ v
            if average_attn_weights:
                weights = weights.mean(1)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, added, dropout, causal)
        mixed = mixed.transpose(1, 2).flatten(2)
        y = self._product(mixed, "out_proj.weight", "out_proj.bias", mode, seed)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y.transpose(0, batch), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Raise unless the inputs fit; whether they have a batch dimension."""
        widths = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, width), t in zip(widths.items(), (query, key, value), strict=True):
            if not isinstance(t, Tensor) or t.is_nested:
                kind = "a nested tensor" if isinstance(t, Tensor) else type(t).__name__
                raise TypeError(f"{name}: expected a dense tensor, got {kind}")
            if t.dim() not in (2, 3) or t.shape[-1] != width or t.dim() != query.dim():
                raise ValueError(
                    f"{name}: expected shape [..., {width}] with 2 or 3 dimensions, as many as "
                    f"query has, got {list(t.shape)}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value: expected length and batch of key {list(key.shape)}, "
                f"got {list(value.shape)}"
            )
        rows = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[rows] != key.shape[rows]:
            raise ValueError(
                f"key: expected a batch of {query.shape[rows]} as query has, got {list(key.shape)}"
            )
        return query.dim() == 3

    def _added(
        self,
        attn_mask: Tensor | None,
        padding: Tensor | None,
        n: int,
        length: int,
        source: int,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """What is added to the scores: [n or 1, num_heads or 1, length or 1, source], or None."""
        added: Tensor | None = None
        if attn_mask is not None:
            shapes = [(length, source), (n * self.num_heads, length, source)]
            if attn_mask.shape not in shapes:
                raise ValueError(
                    f"attn_mask: expected shape {list(shapes[0])} or {list(shapes[1])}, "
                    f"got {list(attn_mask.shape)}"
                )
            added = _additive("attn_mask", attn_mask, dtype)
            heads = self.num_heads if attn_mask.dim() == 3 else 1
            added = added.view(-1, heads, length, source) if n else added.new_zeros(1, 1, 1, source)
        if padding is not None:
            if padding.shape != (n, source):
                raise ValueError(
                    f"key_padding_mask: expected shape [{n}, {source}], got {list(padding.shape)}"
                )
            row = _additive("key_padding_mask", padding, dtype)[:, None, None]
            added = row if added is None else added + row
        return added

    def _project_in(
        self, inputs: Sequence[Tensor], mode: str, seed: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Query, key and value of all heads: [batch, length, embed_dim] each."""
        query, key, value = inputs
        e = self.embed_dim
        bias = "in_proj_bias"
        if not self._qkv_same_embed_dim:
            return tuple(
                self._product(x, f"{letter}_proj_weight", bias, mode, seed, None, (i * e, e))
                for i, (letter, x) in enumerate(zip("qkv", inputs, strict=True))
            )

        def rows(x: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
            of = None if count == 3 else (first * e, count * e)
            return self._product(x, "in_proj_weight", bias, mode, seed, of, of).chunk(count, -1)

        if query is key and key is value:
            return rows(query, 0, 3)
        if key is value:
            return (*rows(query, 0, 1), *rows(key, 1, 2))
        return tuple(rows(x, i, 1)[0] for i, x in enumerate(inputs))

    def _product(
        self,
        x: Tensor,
        weight_name: str,
        bias_name: str,
        mode: str,
        seed: Tensor | None,
        weight_rows: tuple[int, int] | None = None,
        bias_rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """x [batch, length, in] times some rows (first, count) of a masked weight."""
        weight: Tensor = self._parameter(weight_name)
        logits = self._logits(weight_name)
        assert logits is not None
        prefix, _, leaf = bias_name.rpartition(".")
        bias: Tensor | None = getattr(self.get_submodule(prefix), leaf)
        bias_logits = self._logits(bias_name)
        offset = 0
        of_result: tuple[int, int] | None = None
        if weight_rows is not None:
            first, count = weight_rows
            block = weight.shape[0] // logits.shape[1]  # rows that share their logits
            low, high = first // block, -(-(first + count) // block)
            cut = high - low > 1 and (first % block or count % block)
            # top_k ranks the logits of the whole parameter
            if mode != "off" and (cut or self.estimator.name == "top_k"):
                of_result, bias_rows = weight_rows, None
            else:
                weight, logits = weight.narrow(0, *weight_rows), logits.narrow(1, low, high - low)
                offset = low * logits.shape[2]
        later: Tensor | None = None
        if bias is not None and bias_rows is not None:
            if bias_logits is not None and mode != "off":
                # the noise of a bias is numbered from its first row on
                later = self._of_rows(bias_name, x.shape[0], mode, seed)
                later = later.narrow(-1, *bias_rows).unsqueeze(1)
                bias, bias_logits = None, None
            else:
                bias = bias.narrow(0, *bias_rows)
        if mode == "off":
            return F.linear(x, weight, bias)
        y = ops.masked_linear(
            x,
            weight,
            logits,
            bias,
            bias_logits,
            tensor_id=self.tensor_ids[weight_name],
            bias_tensor_id=self.tensor_ids.get(bias_name),
            sample_offset=self.sample_offset,
            element_offset=offset,
            samples=self.samples,
            n_of_m=self.n_of_m(weight_name),
            **{**self._rule(mode), "seed": seed},
        )
        if of_result is not None:
            y = y.narrow(-1, *of_result)
        return y if later is None else y + later.to(y.dtype)

    def _of_rows(self, name: str, n: int, mode: str, seed: Tensor | None) -> Tensor:
        """A small parameter for every row of the batch, [n, embed_dim or so], masked if it is."""
        if name not in self.masked or mode == "off":
            return self._parameter(name).flatten().expand(n, -1)
        groups = math.prod(self._groups(mode, seed))
        of_groups = torch.stack(
            [self._masked_group(g, mode, seed, [name])[name].flatten() for g in range(groups)]
        )
        return of_groups.repeat_interleave(n // groups, 0)

    def extra_repr(self) -> str:
        """The sizes, the sets, and the options that are not at their defaults."""
        shown = [f"{self.embed_dim}, {self.num_heads}"]
        for name, default in (
            ("dropout", 0.0),
            ("add_zero_attn", False),
            ("kdim", self.embed_dim),
            ("vdim", self.embed_dim),
            ("batch_first", False),
        ):
            if getattr(self, name) != default:
                shown.append(f"{name}={getattr(self, name)}")
        return ", ".join([*shown, self._mask_repr()])


def _additive(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the scores: minus infinity where a bool one is True."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
    if not mask.is_floating_point():
        raise TypeError(f"{name}: expected bool or floating point, got {mask.dtype}")
    return mask.to(dtype)
