"""Any module without children under learned masks: the general path."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import ops
from ..ops.sample_mask.reference import mask_of_sample
from .masked_module import MaskedModule


class MaskedAny(MaskedModule):
    """A module without children whose parameters stand under masks; it is run once per group.

    For every group one masked copy of each masked parameter is made, and the unmodified module runs
    with it on its part of the batch (`torch.func.functional_call`). That is right for any module
    whose output belongs to its input row by row, and costs what as many separate calls cost; linear
    layers and convolutions have fused layers instead. Made by `from_dense`.

    Parameters and buffers keep the names and tensors of the module; ``<name>_logits`` is
    ``[sets, *shape]`` in float32.

    Attributes:
        mode, active_sets, samples, tau, batch_dim, tensor_ids, set_names, sample_offset, seed: see
            `MaskedModule`; all may be changed at any time.

    Shape:
        As the module. Every tensor argument whose size along `batch_dim` is that of the first one
        is cut into groups; the outputs, one tensor each, are put together again.

    Raises:
        ValueError: for a batch that does not divide.
        TypeError: if the module returns something else than a tensor.

    Equivalent to::

        for g, part in enumerate(x.chunk(sets * samples, dim=batch_dim)):
            mask = sample_mask(logits, seed=seed, samples=samples)[g % samples, g // samples]
            parts.append(functional_call(module, {name: parameter * mask}, part))
        return torch.cat(parts, dim=batch_dim)
    """

    @classmethod
    def from_dense(
        cls,
        module: nn.Module,
        *,
        sets: int | Sequence[str] = 1,
        samples: int = 1,
        tau: float = 1.0,
        mask_bias: bool = False,
        init: float = 2.0,
        tensor_id: int = 0,
    ) -> MaskedAny:
        """Masks over the very parameters of `module`, which are frozen by this.

        Args:
            module: any module without children; its Parameters and buffers are shared, not copied.
            sets, samples, tau, init, tensor_id: as in `MaskedLinear`.
            mask_bias: whether a parameter named "bias" is masked as well.

        Raises:
            TypeError: for a module with children.
            ValueError: for one that has nothing to mask.
        """
        if not isinstance(module, nn.Module) or any(True for _ in module.children()):
            raise TypeError(
                f"module: expected a module without children, got {type(module).__name__}"
            )
        own = dict(module.named_parameters(recurse=False))
        masked = [name for name in own if mask_bias or name != "bias"]
        if not masked:
            raise ValueError(f"module: {type(module).__name__} has no parameter to mask")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for name, parameter in module._parameters.items():
            layer.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            kept = name not in module._non_persistent_buffers_set
            layer.register_buffer(name, buffer, persistent=kept)
        # not a child: names and state dict stay those of the module
        layer.__dict__["_plain"] = module
        layer._add_masks(masked, sets, samples, tau, init, tensor_id)
        for parameter in own.values():
            parameter.requires_grad_(False)
        return layer.train(module.training)

    def dense_shell(self) -> nn.Module:
        """The plain module again, for other Parameters."""
        plain: nn.Module = copy.copy(self.__dict__["_plain"])
        plain._parameters = dict(plain._parameters)
        plain._buffers = dict(plain._buffers)
        return plain

    def train(self, mode: bool = True) -> MaskedAny:
        """As `torch.nn.Module.train`."""
        self.__dict__["_plain"].train(mode)
        return super().train(mode)

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers that the plain module reads."""
        plain: nn.Module = self.__dict__["_plain"]
        all_of_it = {n: getattr(self, n) for n in (*plain._parameters, *plain._buffers)}
        return {name: tensor for name, tensor in all_of_it.items() if tensor is not None}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module group by group; see the class."""
        plain: nn.Module = self.__dict__["_plain"]
        tensors = self._tensors()
        mode = self.effective_mode
        if mode == "off":
            return functional_call(plain, tensors, args, kwargs)
        seed = None if mode == "threshold" else self._seed()
        samples = 1 if seed is None else self.samples
        sets = self.sets if self._active is None else self._active[1]
        groups = sets * samples
        dim = self.batch_dim
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if first is None or first.dim() <= dim or first.shape[dim] % groups:
            got = "no tensor" if first is None else f"shape {list(first.shape)}"
            raise ValueError(
                f"the batch of x, {got}, does not divide into {sets} sets * {samples} samples = "
                f"{groups} equal groups along dimension {dim}"
            )
        batch = first.shape[dim]

        def part(value: Any, g: int) -> Any:
            if isinstance(value, Tensor) and value.dim() > dim and value.shape[dim] == batch:
                return value.narrow(dim, g * (batch // groups), batch // groups)
            return value

        outputs = []
        for g in range(groups):
            chosen = {**tensors, **self._masked(tensors, *divmod(g, samples), seed, mode)}
            outputs.append(
                functional_call(
                    plain,
                    chosen,
                    tuple(part(a, g) for a in args),
                    {name: part(a, g) for name, a in kwargs.items()},
                )
            )
        if not isinstance(outputs[0], Tensor):
            raise TypeError(
                f"module: expected one output tensor of {type(plain).__name__}, "
                f"got {type(outputs[0]).__name__}"
            )
        return outputs[0] if groups == 1 else torch.cat(outputs, dim)

    def _masked(
        self, tensors: dict[str, Tensor], set: int, sample: int, seed: Tensor | None, mode: str
    ) -> dict[str, Tensor]:
        """The masked parameters of one group."""
        found = {}
        for name in self.masked:
            logits = self._logits(name)
            assert logits is not None
            if seed is None:
                mask = mask_of_sample(
                    logits[set],
                    seed=None,
                    sample=0,
                    tensor_id=self.tensor_ids[name],
                    tau=self.tau,
                    hard=True,
                )
            else:
                mask = ops.sample_mask(
                    logits[set],
                    seed=seed if seed.dim() == 0 else seed[set],
                    samples=1,
                    sample_offset=self.sample_offset + sample,
                    tensor_id=self.tensor_ids[name],
                    tau=self.tau,
                    hard=mode != "soft",
                )[0]
            found[name] = tensors[name] * mask.to(tensors[name].dtype)
        return found

    def extra_repr(self) -> str:
        """The plain module, the sets, and the options that are not at their defaults."""
        return f"{self.__dict__['_plain']!r}, {self._mask_repr()}"
