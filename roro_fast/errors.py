"""Errors a user can act on: every message names the offending field and the fix."""


class RoroError(ValueError):
    """Base class of all bad-input errors raised by roro_fast."""


class ConfigError(RoroError):
    """A configuration key or value is not acceptable."""


class DataError(RoroError):
    """A dataset row, rubric or answer is malformed."""


class CheckpointError(RoroError):
    """A checkpoint directory is missing, corrupt or of an unsupported architecture."""


class CapacityError(RoroError):
    """A request can never fit: longer than the context, or larger than the KV pool."""
