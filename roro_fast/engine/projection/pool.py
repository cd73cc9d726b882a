"""Saved projections for the models of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from roro_fast.engine.projection.artifact import KVProjection, fingerprint
from roro_fast.errors import ConfigError
from roro_fast.models.decoder import Decoder


def load_projections(
    directories: Sequence[str | Path], models: Sequence[Decoder], max_kl: float
) -> dict[tuple[int, int], KVProjection]:
    """{(source, receiver): projection} as `StepEngine` takes it; each finds its models by their fingerprints.

    Raises ConfigError for one whose models are not in the pool, that is not gated, or whose KL is above `max_kl`.
    """
    known = [fingerprint(m) for m in models] if directories else []
    found: dict[tuple[int, int], KVProjection] = {}
    for directory in directories:
        p = KVProjection.load(directory)
        if p.source not in known or p.target not in known:
            role = "source" if p.source not in known else "target"
            raise ConfigError(f"projection.maps: the {role} of {directory} is no model of this pool; fit it again")
        try:
            found[known.index(p.source), known.index(p.target)] = p.accept(max_kl)
        except ConfigError as e:
            raise ConfigError(f"projection.maps: {directory}: {e}") from None
    return found
