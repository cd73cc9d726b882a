"""Stepwise model routing: roll out, train and serve a router that picks the model of every reasoning step."""

from roro_fast._version import __version__

__all__ = ["__version__"]
