"""Layers whose weights stand under learned masks."""

from .masked_linear import MaskedLinear, Mode

__all__ = ["MaskedLinear", "Mode"]
