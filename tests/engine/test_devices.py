"""Models on devices of their own: each device has an arena, and memory pressure on one leaves the others alone.

There is one device here, so two models on it are told apart by hand; what a second device adds is copies, not logic.
"""

from __future__ import annotations

import math

import pytest

from roro_fast.engine import arena
from tests.engine import pairs
from tests.engine.pairs import Drawn, assert_same, requests, run


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "device_groups", lambda models: [m % 2 for m in range(len(models))])


def test_models_of_one_device_are_one_group() -> None:
    assert arena.device_groups(pairs.pool(3)) == [0, 0, 0]


@pytest.mark.usefixtures("two_devices")
def test_each_device_has_its_own_memory() -> None:
    shared = arena.Arena(pairs.pool(3), 8 << 20, 16)
    assert shared.group == [0, 1, 0]
    assert shared.pages[0].untyped_storage().data_ptr() == shared.pages[2].untyped_storage().data_ptr()
    assert shared.pages[0].untyped_storage().data_ptr() != shared.pages[1].untyped_storage().data_ptr()
    before = [shared.pool.available(m) for m in range(3)]
    held = shared.pool.alloc(0, before[0])
    assert len(held) == before[0] and [shared.pool.available(m) for m in range(3)] == [0, before[1], 0]
    other = shared.pool.alloc(1, 1)
    shared.pool.incref(1, other)
    assert shared.pool.refcount(1, other[0]) == 2 and shared.pool.used(0) == before[0] and shared.pool.used(1) == 1
    shared.pool.decref(0, held)
    assert [shared.pool.available(m) for m in range(3)] == [before[0], before[1] - 1, before[2]]


@pytest.mark.parametrize("overlap", [False, True])
def test_rollouts_do_not_depend_on_where_models_are(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = requests(12, temperature=0.8, max_new_tokens=40)
    want = run(pairs.engine(pairs.pool(3), max_num_seqs=5), rows, Drawn("regenerate", True))
    monkeypatch.setattr(arena, "device_groups", lambda models: [0, 1, 1])
    page_bytes = pairs.engine(pairs.pool(3), page_size=4, kv_bytes=64 << 20).kv.page_bytes
    size = 20 * max(page_bytes) + math.lcm(*page_bytes[1:])  # little more than one sequence of 80 tokens
    e = pairs.engine(pairs.pool(3), max_num_seqs=12, page_size=4, kv_bytes=size, overlap=overlap)
    got = run(e, rows, Drawn("regenerate", True))
    assert e.kv.stats.preemptions > 0
    for i in want:
        assert_same(want[i], got[i])
