"""Routing policies: the learned network, the baselines, collection arms and budget calibration."""

from roro_fast.routing.baselines import ConfidenceThreshold, Constant, Oracle, RandomRouter, Scripted
from roro_fast.routing.policy import PolicyConfig, PolicyNetwork
from roro_fast.routing.state import SIGNALS, signals

__all__ = [
    "SIGNALS", "ConfidenceThreshold", "Constant", "Oracle", "PolicyConfig", "PolicyNetwork", "RandomRouter", "Scripted",
    "signals",
]  # fmt: skip
