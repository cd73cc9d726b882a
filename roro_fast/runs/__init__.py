"""Run directories: atomic files, append-only stores, checkpoints, provenance."""

from roro_fast.runs.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from roro_fast.runs.directory import RunDirectory, StageMark
from roro_fast.runs.store import JsonlStore, export_parquet, trajectory_key

__all__ = [
    "JsonlStore",
    "RunDirectory",
    "StageMark",
    "checkpoints",
    "export_parquet",
    "load_checkpoint",
    "save_checkpoint",
    "trajectory_key",
]
