"""The networks of the studies, as plain modules."""

from .feed_forward import FeedForward

__all__ = ["FeedForward"]
