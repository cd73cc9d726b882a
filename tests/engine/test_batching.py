"""The C++ batcher against the Python one: the same answers, statistics and FLOP counts, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from roro_fast.engine import Request, StepEngine, batching
from roro_fast.engine.pages import HAVE_NATIVE
from roro_fast.engine.trajectory import Trajectory
from tests.engine import pairs
from tests.engine.pairs import Drawn, Planned, prompt, requests, run

pytestmark = pytest.mark.skipif(not HAVE_NATIVE, reason="roro_fast._host is not built here")


def group() -> list[Request]:
    common = prompt(3, 70)
    return [Request([*common, i], sample=i, max_new_tokens=20, temperature=0.9, tag={"id": i}) for i in range(9)]


WORKLOADS: dict[str, tuple[Callable[[], StepEngine], Callable[[], list[Request]], Any]] = {
    "drafts": (pairs.engine, lambda: requests(14, temperature=0.8), Drawn("regenerate", True)),
    "pages run out": (lambda: pairs.tight(2, 80, 4, max_num_seqs=6), lambda: requests(9), Drawn("next", True)),
    "shared layers": (
        lambda: pairs.engine(pairs.family("one of three"), page_size=4),
        lambda: requests(14, top_k=5, temperature=1.0),
        Drawn(),
    ),
    "windows": (
        lambda: pairs.engine([pairs.model_pair(i, "gemma3")[1] for i in (0, 2)]),
        lambda: requests(8, top_p=0.8, temperature=1.0),
        Drawn(),
    ),
    "group": (lambda: pairs.engine(page_size=4, max_num_seqs=9), group, Drawn()),
    "chunks": (
        lambda: pairs.engine(pairs.family("prefix"), max_batch_tokens=16),
        lambda: planned(14),
        Planned(),
    ),
}


def planned(n: int) -> list[Request]:
    rows = requests(n, ignore_eos=True)
    for r in rows:
        r.tag["plan"] = [1, 0, 0, 1]
    return rows


def record(t: Trajectory) -> dict[str, Any]:
    d = t.to_dict()
    for field in ("seconds", "routing_seconds"):
        d["cost"].pop(field)
    return d


@pytest.mark.parametrize("name", WORKLOADS)
def test_both_give_the_same_records(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, rows, policy = WORKLOADS[name]
    native = make()
    assert not isinstance(native.forward.batcher, batching.PythonBatcher)
    looked, schedule = [0], native.memory.schedule

    def counted(*args: Any) -> Any:
        looked[0] += 1
        return schedule(*args)

    monkeypatch.setattr(native.memory, "schedule", counted)
    got = run(native, rows(), policy)
    assert looked[0] < native.iterations, "Python had to look at every forward"
    monkeypatch.setattr(batching, "native_module", lambda: None)
    python = make()
    assert isinstance(python.forward.batcher, batching.PythonBatcher)
    want = run(python, rows(), policy)
    assert native.iterations == python.iterations
    assert {i: record(t) for i, t in got.items()} == {i: record(t) for i, t in want.items()}
