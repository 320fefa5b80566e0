"""The networks of the studies, as plain modules."""

from .feed_forward import FeedForward
from .recurrent import Recurrent

__all__ = ["FeedForward", "Recurrent"]
