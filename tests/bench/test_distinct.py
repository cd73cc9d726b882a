"""The bench's count of the pages that running sequences hold."""

from __future__ import annotations

import numpy as np
import pytest

from bench.peers.ours import distinct


@pytest.mark.parametrize("seed", range(5))
def test_pages_are_counted_once_and_only_where_they_are_held(seed) -> None:
    rng = np.random.default_rng(seed)
    table, held = rng.integers(0, 40, (8, 12)), rng.integers(0, 13, 8)
    assert distinct(table, held) == len({int(p) for row, n in zip(table, held, strict=True) for p in row[:n]})
    assert distinct(table, np.zeros(8, np.int64)) == 0
