"""Decode batches padded to a graph's shape: what sequences see, write and sample is what they would without padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from roro_fast.engine import Request
from roro_fast.engine.graphs import DecodeGraphs, DecodeRows, all_in_groups
from tests.engine import pairs
from tests.engine.pairs import Drawn, assert_same, check_kv, prompt, requests, run

pytestmark = pytest.mark.usefixtures("implementation")


def columns(n: int, pages: int) -> DecodeRows:
    i, f = np.zeros(n, np.int64), np.zeros(n, np.float32)
    return DecodeRows(i, i, i, np.zeros((n, pages), np.int64), i + 1, f, f, i, f + 1)


def graphs(**limits: int) -> DecodeGraphs:
    model = pairs.pool()[0]
    return DecodeGraphs(model, torch.empty(0), 4, 0, 99, **({"max_rows": 24, "max_pages": 10} | limits), capture=False)


@pytest.mark.parametrize(
    ("n", "pages", "rows", "width"),
    [(1, 1, 1, 1), (3, 3, 4, 4), (8, 9, 8, 10), (9, 1, 10, 1), (17, 5, 20, 8), (23, 2, 24, 2)],
)
def test_a_bucket_is_little_larger_than_its_batch(n: int, pages: int, rows: int, width: int) -> None:
    assert graphs().bucket(columns(n, pages)) == (rows, width, False, False)


def test_a_bucket_knows_what_is_switched_on() -> None:
    rows = columns(2, 1)
    assert graphs().bucket(rows._replace(top_k=np.array([0, 5]))).truncated
    assert graphs().bucket(rows._replace(top_p=np.array([1, 0.5], np.float32))).truncated
    group = (np.array([0, 1]), np.array([0, 2]), np.array([64]))
    assert graphs().bucket(rows._replace(prefix=group)).shared


def test_groups_of_fixed_shape_hold_every_row_once() -> None:
    members, offsets, lengths = all_in_groups(np.array([5, 1, 3, 2]), np.array([0, 2, 4]), np.array([64, 16]), 7)
    assert members.tolist() == [5, 1, 3, 2, 0, 4, 6]
    assert offsets.tolist() == [0, 2, 4, 7, 7, 7, 7, 7] and lengths.tolist() == [64, 16, 0, 0, 0, 0, 0]
    members, offsets, lengths = all_in_groups(np.array([1, 0]), np.array([0, 2]), np.array([64]), 2)
    assert members.tolist() == [1, 0] and offsets.tolist() == [0, 2, 2] and lengths.tolist() == [64, 0]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_padded_rollouts_are_the_same(overlap: bool, temperature: float) -> None:
    rows = requests(14, temperature=temperature, top_k=5 if overlap else 0)
    plain = run(pairs.engine(max_num_seqs=6, graphs=False), rows, Drawn("regenerate", True))
    padded = run(pairs.engine(max_num_seqs=6, graphs=True, overlap=overlap), rows, Drawn("regenerate", True))
    for i in plain:
        assert_same(plain[i], padded[i])


def test_shared_prefixes_ride_in_a_padded_batch() -> None:
    """Groups of one prompt whose decode batches name a prefix; fp32, so that the C++ kernels serve where they can."""
    models = [pairs.model_pair(i)[1] for i in (0, 1)]
    rows = [
        Request(
            prompt(i % 2, 80), sample=i, seed=3, max_new_tokens=20, max_step_tokens=5, temperature=0.8, tag={"id": i}
        )
        for i in range(10)
    ]
    e = pairs.engine(models, max_num_seqs=12, graphs=True)
    padded = run(e, rows, Drawn())
    shapes = {b for g in e.forward._graphs if g is not None for b in g._ready}
    assert any(b.shared for b in shapes) and any(b.rows > 4 for b in shapes)
    plain = run(pairs.engine(models, max_num_seqs=12, graphs=False), rows, Drawn())
    assert sum(plain[i].token_ids == padded[i].token_ids for i in plain) >= 9  # rounding may flip a close draw


def test_padded_rows_touch_no_page_of_a_sequence() -> None:
    e = pairs.engine(graphs=True, max_num_seqs=5)
    for r in requests(7):
        e.add(r, Drawn("regenerate", True))
    compared = 0
    while e.has_work:
        e.step()
        compared += check_kv(e)
    assert compared > 1500
    assert all(page == e.kv.capacity[m] for m, page in enumerate(e.kv.scratch))
