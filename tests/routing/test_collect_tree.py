"""What a collection tree costs: its branches have their prompt, and what they wrote alike, computed and kept once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from roro_fast.engine import Request, StepEngine, Trajectory, forward
from roro_fast.engine.batching import Batch
from roro_fast.ops import native
from roro_fast.routing.collect import first_wave, second_wave
from roro_fast.tasks.ledger import Ledger
from tests.engine import pairs

PAGE = 16
BRANCHES = 6
QUERY = Ledger().queries("train", 1)[0]
PROMPT = pairs.prompt(1, 81)  # five whole pages and one token
LIMITS: dict[str, Any] = {"max_new_tokens": 24, "max_step_tokens": 4, "ignore_eos": True}


class Watched:
    """An engine that notes the tokens its forwards really run, the batches and the shared prefixes found in them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.engine: StepEngine = pairs.engine(pairs.pool(2), max_num_seqs=16, page_size=PAGE, **settings)
        self.ran = np.zeros(2, np.int64)
        self.batches: list[Batch] = []
        self.groups: list[tuple[list[int], list[int]]] = []  # sizes and lengths found in a forward
        following, found = self.engine.forward._next, forward.shared_prefixes

        def counted(part: int) -> Any:
            batch, keys = following(part)
            if batch is not None:
                self.ran[part] += batch.tokens
                self.batches.append(batch)
            return batch, keys

        def noted(*args: Any, **more: Any) -> Any:
            groups = found(*args, **more)
            self.groups.append(([], []) if groups is None else (np.diff(groups[1]).tolist(), groups[2].tolist()))
            return groups

        monkeypatch.setattr(self.engine.forward, "_next", counted)
        monkeypatch.setattr(forward, "shared_prefixes", noted)

    def wave(self, rows: list[Request]) -> list[Trajectory]:
        self.ran[:] = 0
        self.batches.clear()
        self.groups.clear()
        return list(self.engine.rollout(rows))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    if native.available():
        monkeypatch.setattr(pairs, "DTYPE", pairs.torch.float32)
    return Watched(monkeypatch)


def branches(base: Trajectory, samples: int = BRANCHES) -> list[Request]:
    arms = ["random_budget"]
    return list(second_wave([(QUERY, PROMPT)], arms, {QUERY.id: base}, num_models=2, samples=samples, **LIMITS))


def all_small(watched: Watched) -> Trajectory:
    rows = first_wave([(QUERY, PROMPT)], ["all_small"], num_models=2, thresholds=[], **LIMITS)
    (base,) = watched.wave(list(rows))
    assert watched.ran.tolist() == [len(PROMPT) + 23, 0]
    return base


def run_by(t: Trajectory, m: int) -> int:
    """Tokens that model m has to see: all before the last that it writes."""
    ends = [step.end for step in t.steps if step.model == m]
    return len(PROMPT) + max(ends) - 1 if ends else 0


def shared_by(done: list[Trajectory], m: int, cached: list[int]) -> int:
    """Tokens in whole pages that model m need not run: another's first text, or `cached`, begins so."""
    firsts = [
        t.prompt_ids + t.token_ids[: next(s.start for s in t.steps if s.model == m)] for t in done if m in t.models
    ]
    known = {tuple(cached[:n]) for n in range(PAGE, len(cached) + 1, PAGE)}
    total = 0
    for text in sorted(firsts, key=len):
        pages = [tuple(text[:n]) for n in range(PAGE, len(text) + 1, PAGE)]
        total += PAGE * sum(p in known for p in pages if len(p) < len(text))
        known.update(pages)
    return total


def test_a_second_wave_computes_what_its_branches_share_once(watched: Watched) -> None:
    """The small model has the prompt from the first wave; the large one computes for one branch what others begin with,
    their common steps included."""
    base = all_small(watched)
    hits = watched.engine.kv.stats.hit_tokens
    done = watched.wave(branches(base))
    need = [sum(run_by(t, m) for t in done) for m in range(2)]
    shared = [shared_by(done, 0, PROMPT), shared_by(done, 1, [])]
    assert shared == [BRANCHES * 80, (BRANCHES - 1) * 80 + PAGE]  # two branches have a page of steps in common
    assert [sum(t.cost.forward_tokens[m] for t in done) for m in range(2)] == need
    assert watched.ran.tolist() == [n - s for n, s in zip(need, shared, strict=True)]
    assert watched.engine.kv.stats.hit_tokens - hits == sum(t.cost.cached_tokens for t in done) == sum(shared)


def test_branches_hold_the_pages_of_their_prompt_together(watched: Watched) -> None:
    e, base = watched.engine, all_small(watched)
    for r in branches(base):
        e.add(r)
    compared = 0
    while e.has_work:
        e.step()
        for m in range(2):
            held = e.kv.num_pages[m][e.kv.num_pages[m] > 0]
            if len(held) == BRANCHES:
                tables = e.kv.table[m][e.kv.num_pages[m] > 0]
                assert (tables[:, :5] == tables[0, :5]).all()
                assert e.kv.pool.used(m) == len({p for t, n in zip(tables, held, strict=True) for p in t[:n].tolist()})
                assert 5 + (held - 5).sum() - 1 <= e.kv.pool.used(m) <= 5 + (held - 5).sum() < held.sum() / 2
                compared += 1
    assert compared > 10


def test_attention_reads_what_branches_share_as_one_group(watched: Watched) -> None:
    base = all_small(watched)
    watched.wave(branches(base))
    together = [b for b in watched.batches if b.rows > 1]
    assert len(together) > 20 and all(b.alike for b in together)
    assert watched.groups == [([b.rows], [80]) for b in together]
    assert max(b.rows for b in together if b.tokens == b.rows) >= BRANCHES - 1, "in decode batches too"
