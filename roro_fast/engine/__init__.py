"""Stepwise-routed generation over a pool of models."""

from roro_fast.engine.core import StepEngine
from roro_fast.engine.policy import BoundaryBatch, Decisions, RoutingPolicy
from roro_fast.engine.request import Request
from roro_fast.engine.trajectory import Cost, Decision, Step, Trajectory

__all__ = [
    "BoundaryBatch", "Cost", "Decision", "Decisions", "Request", "RoutingPolicy", "Step", "StepEngine", "Trajectory",
]  # fmt: skip
