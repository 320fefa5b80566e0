from __future__ import annotations
import torch
from torch import Tensor
from . import reference


def sample_mask(logits: Tensor, *, seed: Tensor, samples: int = 1, tau: float = 1.0, hard: bool = True,
                tensor_id: int = 0, sample_offset: int = 0, element_offset: int = 0) -> Tensor:
    return reference.sample_mask(logits, seed=seed, samples=samples, tau=tau, hard=hard, tensor_id=tensor_id,
                                 sample_offset=sample_offset, element_offset=element_offset)


def pack_bits(mask: Tensor) -> Tensor:
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.reshape(-1)[: torch.Size(shape).numel()].bool().view(shape)


def sample_mask_packed(logits: Tensor, *, seed: Tensor, samples: int = 1, tensor_id: int = 0,
                       sample_offset: int = 0, element_offset: int = 0) -> Tensor:
    raise NotImplementedError
