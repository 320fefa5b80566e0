"""Fused kernels for learned weight masks, and the studies that stand on them."""

from . import ops

__version__ = "0.1.0.dev0"
__all__ = ["ops"]
