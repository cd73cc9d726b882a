"""What can serve the engine on a CPU: the references, and the C++ kernels with the whole forward in one call.

And page accounting at zero at the end of every test of the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from roro_fast.engine import StepEngine
from roro_fast.ops import native
from tests.engine import pairs

KEPT = 8  # engines of a test that are held until its end; of those before, idle ones are checked and let go


@pytest.fixture(params=["reference", "cpu"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pools of `pairs` that the implementation of this name serves."""
    if request.param == "cpu":
        if not native.available():
            pytest.skip(native.why_not())
        monkeypatch.setattr(pairs, "DTYPE", torch.float32)
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def no_page_is_lost(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every engine that a test makes ends with no page unaccounted for, and with none at all once it is emptied."""
    made: list[StepEngine] = []
    initialise = StepEngine.__init__

    def remembered(self: StepEngine, *args: Any, **settings: Any) -> None:
        initialise(self, *args, **settings)
        for e in [e for e in made[:-KEPT] if not e.has_work]:
            empty(e)
            made.remove(e)
        made.append(self)

    monkeypatch.setattr(StepEngine, "__init__", remembered)
    yield
    for e in made:
        empty(e)


def empty(e: StepEngine) -> None:
    """Cancel what is left of an engine's work and account for its pages."""
    assert e.kv.leaked_pages() == 0, "pages that neither a sequence nor the prefix cache holds"
    for request_id in [*(rid for rid, _, _ in e.waiting), *e.slots.request_id[e.slots.request_id >= 0].tolist()]:
        assert e.abort(request_id)
    assert not e.waiting and not np.any(e.kv.num_pages)
    for part in range(e.kv.num_parts):
        e.kv.clear_prefixes(part)
        assert e.kv.pool.used(part) == 0, f"pages of part {part} are held by nobody"
