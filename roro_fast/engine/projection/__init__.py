"""Approximate KV handoff between different models: linear maps, fitted, gated, and only then used. Off by default."""

from roro_fast.engine.projection.artifact import Gate, KVProjection, fingerprint
from roro_fast.engine.projection.fit import fit
from roro_fast.engine.projection.gate import gate, measure
from roro_fast.engine.projection.pool import load_projections
from roro_fast.engine.projection.record import RecordedKV, record_kv

__all__ = [
    "Gate", "KVProjection", "RecordedKV", "fingerprint", "fit", "gate", "load_projections", "measure", "record_kv",
]  # fmt: skip
