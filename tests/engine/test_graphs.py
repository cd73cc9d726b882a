"""Batches padded to a graph's shape: what sequences see, write and sample is what they would without padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from roro_fast.engine import Request, StepEngine, Trajectory
from roro_fast.engine import graphs as replayed
from roro_fast.engine import padding as shapes
from roro_fast.engine.graphs import replayable
from roro_fast.engine.padding import Bucket, Shapes, StepRows, all_in_groups, padded
from roro_fast.errors import RoroError
from tests.engine import pairs
from tests.engine.pairs import Drawn, assert_same, check_kv, prompt, requests, run

pytestmark = pytest.mark.usefixtures("implementation")

SHAPES = Shapes(4, 24, 10)


def columns(n: int, pages: int, tokens: int = 0) -> StepRows:
    """n rows of one token, or the last of them of what is missing to `tokens`, each with its last token wanted."""
    counts = np.ones(n, np.int64)
    counts[-1] += max(tokens - n, 0)
    flat, i, f = np.zeros(counts.sum(), np.int64), np.zeros(n, np.int64), np.zeros(n, np.float32)
    ends = counts.cumsum()
    cu = np.concatenate(([0], ends))
    return StepRows(flat, flat, flat, np.zeros((n, pages), np.int64), counts, cu, ends - 1, f, f, i, f + 1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets that tiny pools fill, and overflow."""
    monkeypatch.setattr(shapes, "MIXED_TOKENS", (8, 12, 24, 40))


def buckets(e: StepEngine) -> list[set[Bucket]]:
    return [set(g._ready) for g in e.forward._graphs if g is not None]


@pytest.mark.parametrize(
    ("n", "pages", "rows", "width"),
    [(1, 1, 1, 16), (3, 3, 4, 16), (8, 40, 8, 50), (9, 1, 10, 16), (17, 17, 20, 32), (23, 2, 24, 16)],
)
def test_a_decode_bucket_is_little_larger_than_its_batch(n: int, pages: int, rows: int, width: int) -> None:
    assert Shapes(4, 24, 50).bucket(columns(n, pages)) == (rows, 0, width, False, False)


@pytest.mark.parametrize(
    ("n", "tokens", "pages", "bucket"),
    [(1, 2, 1, (16, 64, 16)), (16, 64, 3, (16, 64, 16)), (17, 65, 20, (64, 96, 32)), (64, 512, 9, (64, 512, 128)),
     (65, 130, 9, (100, 192, 48))],
)  # fmt: skip
def test_a_mixed_bucket_has_room_for_its_batch(n: int, tokens: int, pages: int, bucket: tuple[int, int, int]) -> None:
    assert Shapes(4, 100, 50).bucket(columns(n, pages, tokens)) == (*bucket, False, False)


def test_long_prefills_have_no_bucket() -> None:
    assert SHAPES.fits(4, 512, 4) and not SHAPES.fits(4, 513, 4) and not SHAPES.fits(25, 25, 25)
    assert Shapes(4, 600, 10).fits(600, 600, 600)  # a decode batch may be as wide as the engine


def test_a_bucket_knows_what_is_switched_on() -> None:
    rows = columns(2, 1)
    assert SHAPES.bucket(rows._replace(top_k=np.array([0, 5]))).truncated
    assert SHAPES.bucket(rows._replace(top_p=np.array([1, 0.5], np.float32))).truncated
    group = (np.array([0, 1]), np.array([0, 2]), np.array([64]))
    assert SHAPES.bucket(rows._replace(prefix=group)).shared


@pytest.mark.parametrize("tokens", [0, 19, 64])
def test_padding_owns_what_the_batch_leaves_over(tokens: int) -> None:
    rows = columns(5, 2, tokens)
    bucket = SHAPES.bucket(rows)
    ids, _, slots, table, lens, cu, wanted, draws, _, _, top_p = padded(rows, bucket, 4, scratch=7)
    used, counts = len(rows.ids), np.diff(cu)
    assert len(ids) == len(slots) == cu[-1] == (bucket.tokens or bucket.rows)
    assert len(table) == len(lens) == len(counts) == bucket.sequences > 5
    assert len(wanted) == len(draws) == len(top_p) == bucket.rows
    assert (slots[used:] == 28).all() and (table[5:] == 7).all() and (table[:5, 2:] == 7).all()
    assert (cu[:6] == rows.cu_seqlens).all() and (counts >= 0).all() and counts[5:].max() - counts[5:].min() <= 1
    assert (lens >= counts).all() and (lens > 0).all() and (lens <= table.shape[1] * 4).all()
    assert (wanted[:5] == rows.wanted).all() and (wanted < len(ids)).all() and (top_p == 1).all()


def test_groups_of_fixed_shape_hold_every_row_once() -> None:
    members, offsets, lengths = all_in_groups(np.array([5, 1, 3, 2]), np.array([0, 2, 4]), np.array([64, 16]), 7)
    assert members.tolist() == [5, 1, 3, 2, 0, 4, 6]
    assert offsets.tolist() == [0, 2, 4, 7, 7, 7, 7, 7] and lengths.tolist() == [64, 16, 0, 0, 0, 0, 0]
    members, offsets, lengths = all_in_groups(np.array([1, 0]), np.array([0, 2]), np.array([64]), 2)
    assert members.tolist() == [1, 0] and offsets.tolist() == [0, 2, 2] and lengths.tolist() == [64, 0]


def assert_alike(plain: dict[int, Trajectory], other: dict[int, Trajectory]) -> None:
    """The same answers at the same cost."""
    for i in plain:
        assert_same(plain[i], other[i])
        a, b = (replace(t.cost, seconds=0, routing_seconds=0) for t in (plain[i], other[i]))
        assert a == b


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_padded_rollouts_are_the_same(overlap: bool, temperature: float) -> None:
    """Catch-up of drawn lengths, prompts that extend others, and some in chunks."""
    rows = requests(14, temperature=temperature, top_k=5 if overlap else 0)
    sizes: dict[str, Any] = {"max_num_seqs": 6, "max_batch_tokens": 30, "overlap": overlap}
    plain = run(pairs.engine(graphs=False, **sizes), rows, Drawn("regenerate", True))
    e = pairs.engine(graphs=True, **sizes)
    assert_alike(plain, run(e, rows, Drawn("regenerate", True)))
    seen = [{b.tokens for b in mine} for mine in buckets(e)]
    assert all({0, 8} < mine for mine in seen) and len(seen[0] | seen[1]) >= 4
    assert any(len(set(t.models)) == 2 for t in plain.values())


@pytest.mark.usefixtures("small")
def test_preempted_sequences_come_back_in_padded_batches() -> None:
    rows = requests(10, max_new_tokens=40)
    engines = [pairs.tight(2, 90, 4, max_num_seqs=5, graphs=graphs) for graphs in (False, True)]
    plain, other = (run(e, rows, Drawn()) for e in engines)
    assert_alike(plain, other)
    assert engines[1].kv.stats.preemptions > 0 and engines[0].kv.stats == engines[1].kv.stats


def forks(prompts: int = 2) -> list[Request]:
    fields: dict[str, Any] = {"seed": 3, "max_new_tokens": 20, "max_step_tokens": 5, "temperature": 0.8}
    return [Request(prompt(i % prompts, 80), sample=i, tag={"id": i}, **fields) for i in range(10)]


@pytest.mark.usefixtures("small")
def test_shared_prefixes_ride_in_a_padded_batch() -> None:
    """Groups of one prompt whose batches name a prefix; fp32, so that the C++ kernels serve where they can."""
    models = [pairs.model_pair(i)[1] for i in (0, 1)]
    e = pairs.engine(models, max_num_seqs=12, graphs=True)
    other = run(e, forks(), Drawn())
    shared = {b for seen in buckets(e) for b in seen if b.shared}
    assert any(b.tokens for b in shared) and any(not b.tokens and b.rows > 4 for b in shared)
    plain = run(pairs.engine(models, max_num_seqs=12, graphs=False), forks(), Drawn())
    assert sum(plain[i].token_ids == other[i].token_ids for i in plain) >= 9  # rounding may flip a close draw


@pytest.mark.usefixtures("small")
def test_padding_touches_no_page_of_a_sequence() -> None:
    e = pairs.engine(graphs=True, max_num_seqs=5)
    for r in requests(7):
        e.add(r, Drawn("regenerate", True))
    compared = 0
    while e.has_work:
        e.step()
        compared += check_kv(e)
    assert compared > 1500 and any(b.tokens for b in buckets(e)[1])
    assert all(page == e.kv.capacity[m] for m, page in enumerate(e.kv.scratch))


def swapped(arrays: list[np.ndarray], field: int, value: np.ndarray) -> list[np.ndarray]:
    return [value if i == field else a for i, a in enumerate(arrays)]


FAULTS: dict[str, Callable[[list[np.ndarray], StepRows], list[np.ndarray]]] = {
    "a wanted token is another": lambda a, r: swapped(a, 6, np.maximum(a[6] - 1, 0)),
    "draws of other rows": lambda a, r: swapped(a, 7, np.roll(a[7], 1)),
    "padding writes to a page in use": lambda a, r: swapped(
        a, 2, np.where(np.arange(len(a[2])) < len(r.ids), a[2], r.slots[0])
    ),
    "padding belongs to the last row": lambda a, r: swapped(
        a, 5, np.where(np.arange(len(a[5])) < len(r.kv_lens), a[5], a[5][-1])
    ),
    "lengths without new tokens": lambda a, r: swapped(a, 4, np.maximum(a[4] - 1, 1)),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_in_padding_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = requests(8, temperature=0.9)
    plain = run(pairs.engine(max_num_seqs=6, graphs=False), rows, Drawn())

    def wrong(batch: StepRows, bucket: Bucket, page_size: int, scratch: int) -> list[np.ndarray]:
        arrays = padded(batch, bucket, page_size, scratch)
        return FAULTS[fault](arrays, batch) if bucket.tokens else arrays

    monkeypatch.setattr(replayed, "padded", wrong)
    with pytest.raises((AssertionError, RoroError)):
        assert_alike(plain, run(pairs.engine(max_num_seqs=6, graphs=True), rows, Drawn()))


@pytest.mark.usefixtures("small")
def test_after_a_warm_up_no_bucket_is_new() -> None:
    """Also while sequences run: it writes where none of them reads."""
    rows = requests(10)
    plain = run(pairs.engine(max_num_seqs=6, graphs=False), rows, Drawn())
    e = pairs.engine(max_num_seqs=6, graphs=True)
    stream = e.rollout(rows, Drawn())
    done = {t.meta["id"]: t for t in [next(stream)]}
    known = e.warm_up(pairs.CONTEXT)
    assert known == sum(map(len, buckets(e))) == e.warm_up(pairs.CONTEXT)
    done |= {t.meta["id"]: t for t in stream}
    assert_alike(plain, done)
    assert known == sum(map(len, buckets(e)))
    assert e.warm_up(20, truncated=True, shared=True) > known and pairs.engine(graphs=False).warm_up(9) == 0


def test_graphs_of_replaced_weights_are_forgotten() -> None:
    models = [pairs.exact(0), pairs.exact(1)]
    e = pairs.engine(models, graphs=True)
    first = run(e, requests(5), Drawn())
    known = buckets(e)
    with torch.no_grad():
        models[0].norm.weight.mul_(1.0)
        e.forward.look_at_weights()
        assert buckets(e) == known and all(known)
        old, models[0].norm.weight.data = models[0].norm.weight.data, models[0].norm.weight.data.clone()
        e.forward.look_at_weights()
        assert buckets(e) == [set(), known[1]]
    assert_alike(first, run(e, requests(5), Drawn()))
    models[0].norm.weight.data = old


def test_what_looks_at_the_device_is_not_captured() -> None:
    """Nothing but the references serves fp64."""
    config = pairs.exact(0).config
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float64, config=config)
    assert replayable(pairs.exact(0)) and not replayable(on_gpu)  # type: ignore[arg-type]
