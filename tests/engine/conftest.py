"""What can serve the engine on a CPU: the references, and the C++ kernels with the whole forward in one call."""

from __future__ import annotations

import pytest
import torch

from roro_fast.ops import native
from tests.engine import pairs


@pytest.fixture(params=["reference", "cpu"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pools of `pairs` that the implementation of this name serves."""
    if request.param == "cpu":
        if not native.available():
            pytest.skip(native.why_not())
        monkeypatch.setattr(pairs, "DTYPE", torch.float32)
    name: str = request.param
    return name
