"""Too little memory changes nothing but the time it takes: eviction, idle drops, preemption, slabs on the move."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roro_fast.engine import Request, Trajectory
from roro_fast.errors import CapacityError, ConfigError
from tests.engine import pairs
from tests.engine.pairs import Drawn, Planned, engine, pool, prompt, requests, run, tight

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("implementation")]


def workload() -> list[Request]:
    """14 requests of at most 71 tokens, equal prompts and sampled ones among them."""
    rows = requests(14)
    rows[5], rows[6] = (replace(rows[0], sample=i, tag={"id": i}) for i in (5, 6))
    hot = {"temperature": 1.0, "top_k": 40}
    return [replace(r, **(hot if i % 2 else {}), tag=r.tag | {"plan": [2, 0, 1]}) for i, r in enumerate(rows)]


POLICIES = {
    "next": lambda: Drawn("next"),
    "next-scout": lambda: Drawn("next", True),
    "regenerate": lambda: Drawn("regenerate"),
    "regenerate-scout": lambda: Drawn("regenerate", True),
    "switch": lambda: Planned("next", True),
}
LONGEST = max(len(r.prompt_ids) + r.max_new_tokens for r in workload())


def ample(policy: str) -> dict[int, Trajectory]:
    return _ample(policy, pairs.DTYPE)


@cache
def _ample(policy: str, dtype: torch.dtype) -> dict[int, Trajectory]:
    return run(engine(pool(3), max_num_seqs=16), workload(), POLICIES[policy]())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("page_size", [1, 8])
def test_the_smallest_arena_gives_the_same_answers(policy: str, page_size: int) -> None:
    e = tight(3, LONGEST, page_size, max_num_seqs=8)
    got = run(e, workload(), POLICIES[policy]())
    for i, t in ample(policy).items():
        pairs.assert_same(got[i], t)
    assert e.kv.stats.preemptions > 0 and e.kv.stats.idle_drops > 0 and e.kv.stats.evicted_pages > 0


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    page_size=st.sampled_from([1, 2, 3, 5, 16, 64]),
    seqs=st.integers(1, 9),
    room=st.integers(0, 400),
    batch=st.integers(0, 60),
    order=st.permutations(range(14)),
    n=st.integers(1, 14),
)
def test_no_setting_of_the_engine_changes_an_answer(
    policy: str, page_size: int, seqs: int, room: int, batch: int, order: list[int], n: int
) -> None:
    e = tight(3, LONGEST + room, page_size, max_num_seqs=seqs, max_batch_tokens=seqs + batch)
    rows = workload()
    got = run(e, [rows[i] for i in order[:n]], POLICIES[policy]())
    assert sorted(got) == sorted(order[:n])
    for i, t in got.items():
        pairs.assert_same(t, ample(policy)[i])


@pytest.mark.parametrize("space", ["next", "regenerate"])
def test_pages_stay_right_under_pressure(space: str) -> None:
    e = tight(3, LONGEST, 4, max_num_seqs=6, max_batch_tokens=12)
    for r in workload():
        e.add(r, Drawn(space, True))
    compared = 0
    while e.has_work:
        e.step()
        compared += pairs.check_kv(e) if e.iterations % 4 == 0 else 0
    assert compared > 500 and e.kv.stats.preemptions > 0
    pairs.assert_clean(e)


def test_many_equal_prompts_that_switch_at_every_step() -> None:
    """The adversary of the prefix cache: everybody wants the same pages, for all models in turn, in no memory."""
    same = Request(prompt(5, 40), max_new_tokens=30, max_step_tokens=3, temperature=1.0)
    rows = [replace(same, sample=i, tag={"id": i, "plan": [i % 3, (i + 1) % 3, 2]}) for i in range(24)]
    want = run(engine(pool(3), max_num_seqs=24), rows, Planned("next"))
    e = tight(3, 70, 4, max_num_seqs=12)
    got = run(e, rows, Planned("next"))
    for i, t in want.items():
        pairs.assert_same(got[i], t)
    assert e.kv.stats.preemptions > 0


def test_forks_under_pressure() -> None:
    """Shared pages and copies on write when there is hardly a page to copy to."""
    for seqs in (4, 8):
        e = tight(2, 70, 4, max_num_seqs=seqs)
        policy = Drawn("regenerate", True)
        source = Request(prompt(2, 30), max_new_tokens=40, max_step_tokens=6, temperature=1.0, tag={"id": 0})
        rid = e.add(source, policy)
        done = []
        for _ in range(4):
            done += e.step()
        for j in range(1, 4):
            e.fork(rid, replace(source, sample=j, max_new_tokens=20, tag={"id": j}), policy)
        while e.has_work:
            done += e.step()
        pairs.assert_clean(e)
        assert len(done) == 4
        for t in done:
            alone = replace(source, prompt_ids=t.prompt_ids, sample=t.sample, tag={"id": 0})
            if t.sample:
                alone.max_new_tokens = 20
            pairs.assert_same(t, run(engine(pool(2)), [alone], policy)[0])


def test_a_full_sequence_can_still_copy_a_page_that_only_the_cache_shares() -> None:
    """The arena holds exactly this sequence; its last page is also in the prefix cache and must be written again."""
    rows = [Request(prompt(i, 12), max_new_tokens=4, tag={"id": i}) for i in range(9)]
    want = next(t for t in run(engine(pool(1)), rows).values() if len(t.token_ids) == 4)
    e = tight(1, 16, 4, max_num_seqs=1)
    e.add(rows[want.meta["id"]])
    e.step(), e.step()
    assert e.kv.pool.available(0) == 0 and [e.kv.pool.refcount(0, p) for p in e.kv.table[0, 0]][:4] == [2, 2, 2, 1]
    e.kv.truncate(0, 9)
    done = []
    while e.has_work:
        done += e.step()
    pairs.assert_same(done[0], want)


def test_slabs_move_between_models() -> None:
    e = tight(2, 64, 16, max_num_seqs=2)
    whole = e.kv.capacity
    for m in (0, 1, 0):
        e.generate([prompt(m, 30), prompt(m + 5, 20)], max_new_tokens=30, model=m)
        assert e.kv.pool.used(m) > 0
        for j in range(2):
            e.kv.clear_prefixes(j)
        assert [e.kv.pool.available(j) for j in range(2)] == whole


def test_a_preempted_sequence_is_not_starved_by_newcomers() -> None:
    """Short requests keep coming; long ones that lost their memory must finish before most of them."""
    e = tight(2, 100, 4, max_num_seqs=12)
    e.eos_ids = [np.array([-1])] * e.num_models  # nobody ends early
    long = [Request(prompt(i, 60), max_new_tokens=40, max_step_tokens=4, tag={"id": i}) for i in range(3)]
    short = [
        Request(prompt(i, 24), max_new_tokens=20, max_step_tokens=2, temperature=1.5, tag={"id": i})
        for i in range(3, 80)
    ]
    order = [t.meta["id"] for t in e.rollout(short[:12] + long + short[12:], Drawn())]
    assert sorted(order) == list(range(80)) and e.kv.stats.preemptions > 0
    assert max(order.index(i) for i in range(3)) < 40


def test_what_can_never_fit_is_refused_at_once() -> None:
    e = tight(3, 48, 4)
    e.add(Request(prompt(1, 30), max_new_tokens=18))
    with pytest.raises(CapacityError, match=r"request.max_new_tokens.*engine.kv_bytes"):
        e.add(Request(prompt(1, 30), max_new_tokens=19 + 4 * max(e.kv.pool.pages_per_slab)))
    with pytest.raises(ConfigError, match="engine.kv_bytes"):
        engine(pool(3), kv_bytes=1000)
    while e.has_work:
        e.step()
    pairs.assert_clean(e)


def test_streams_meet_before_memory_changes_hands(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward in flight may still be using it: preempted, aborted and, with new weights, all pages."""
    e = tight(2, 80, 4, max_num_seqs=6)
    met: list[str] = []
    monkeypatch.setattr(e.memory, "taken", lambda: met.append("preempted"))
    monkeypatch.setattr(e.forward, "settle", lambda: met.append("met"))
    run(e, requests(9), Drawn("next", True))
    assert met == ["preempted"] * e.kv.stats.preemptions and met
    e.abort(e.add(requests(1)[0], Drawn()))
    assert met[-1] == "preempted", "it never ran"
    running = e.add(requests(1)[0], Drawn())
    e.step()
    e.abort(running)
    e.update_weights(1)
    assert met[-2:] == ["met", "met"]
