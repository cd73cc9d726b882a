"""Preference pairs of four queries of four lines, and their seed rubrics."""

from __future__ import annotations

import pytest

from roro_fast.rubric.pairs import build_pairs
from roro_fast.rubric.seeds import seed_rubrics
from tests.rubric.samples import POOL, queries, routed


@pytest.fixture(scope="module")
def pairs():
    qs = [q for q in queries(30) if len(q.meta["kinds"]) == 4][:4]
    return build_pairs({q.id: q for q in qs}, [t for q in qs for t in routed(q, 6, {1})], POOL)[0]


@pytest.fixture(scope="module")
def seeds(pairs):
    return seed_rubrics(pairs, POOL.labels)
