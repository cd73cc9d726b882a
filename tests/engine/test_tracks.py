"""Pools of several tokenizers keep the exactness contract, each model on its own track."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from roro_fast.engine import Request, StepEngine, Trajectory
from roro_fast.engine.slots import Phase
from roro_fast.errors import CapacityError, ConfigError
from roro_fast.models.token_bytes import TokenBytes
from roro_fast.tasks.prompting import Prompt
from tests.engine import cross, pairs
from tests.engine.pairs import Constant, Drawn, Planned, run

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("scout", [False, True])
@pytest.mark.parametrize("space", ["next", "regenerate"])
def test_any_interleaving_equals_cold_prefills_of_each_track(space: str, scout: bool, k: int) -> None:
    e = cross.engine(k)
    policy = Drawn(space, scout)
    done = run(e, cross.requests(12), policy)
    assert {m for t in done.values() for m in t.models} == set(range(k))
    for t in done.values():
        cross.audit(e, t, greedy=True)
    if scout and space == "next":
        for (i, n), row in policy.seen.items():
            start = done[i].steps[n].start
            ids = done[i].prompt_ids + done[i].token_ids[:start]
            hidden = pairs.cold_hidden(e.models[0], ids)
            np.testing.assert_allclose(row["hidden"], hidden, atol=pairs.TOLERANCE)
            assert row["prefix"] == done[i].step_texts[:n]


def test_the_audit_has_seen_every_hard_case() -> None:
    """Sampling: half characters at a step's end, EOS, caps and blank lines in both tokenizers."""
    e = cross.engine(3)
    done = run(e, cross.requests(60, temperature=1.5, max_step_tokens=5), Drawn("regenerate"))
    for t in done.values():
        cross.audit(e, t, greedy=False)
    codec = TokenBytes(cross.tokenizers()[0])
    cut = 0
    for t in done.values():
        for s in t.steps:
            try:
                codec.decode(t.token_ids[s.start : s.end]).decode()
            except UnicodeDecodeError:
                cut += 1
    ended = [t.steps[-1].model % 2 for t in done.values() if t.finish_reason == "eos"]
    assert cut > 10 and {0, 1} <= set(ended)
    assert {s.closed for t in done.values() for s in t.steps} == {True, False}
    assert any(t.cost.discarded_tokens for t in done.values())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("scout", [False, True])
def test_all_to_one_model_equals_that_model_alone(scout: bool, temperature: float) -> None:
    e = cross.engine(3)
    for m, tok in enumerate(cross.tokenizers(3)):
        same = [j for j in range(3) if j % 2 == m % 2]  # their vocabularies cap each other's
        alone = StepEngine([cross.pool(3)[j] for j in same], tok, max_num_seqs=8, kv_bytes=8 << 20)
        rows = cross.requests(8, temperature=temperature)
        prompts = [[list(p), *p.others][m % 2] for p in map(cross.prompt, range(8))]
        mine = [replace(r, prompt_ids=p, model=same.index(m)) for r, p in zip(rows, prompts, strict=True)]
        want = run(alone, mine)
        assert len({t.finish_reason for t in want.values()}) > 1 or temperature == 0
        got = run(e, rows, Constant(m, needs_scout=scout))
        unrouted = run(e, [replace(r, model=m) for r in mine])
        for i, t in want.items():
            assert cross.tracks(got[i], 3)[m][1] == t.token_ids == unrouted[i].token_ids
            assert unrouted[i].prompt_ids == t.prompt_ids
            broken = any("\ufffd" in text for text in t.step_texts)  # of these the tokenizer's own decoder says less
            assert broken or unrouted[i].step_texts == got[i].step_texts == t.step_texts


@pytest.mark.parametrize("space", ["next", "regenerate"])
@pytest.mark.parametrize("memory", ["chunked", "tight", "overlap"])
def test_memory_and_order_change_nothing(memory: str, space: str) -> None:
    rows = cross.requests(12, temperature=1.0)
    policy = Drawn(space, True)
    want = run(cross.engine(3), rows, policy)
    if memory == "tight":
        probe = cross.engine(3, page_size=4)
        slab = probe.kv.page_bytes[0] * probe.kv.pool.pages_per_slab[0]
        slabs = max(-(-50 // n) for n in probe.kv.pool.pages_per_slab)
        e = cross.engine(3, page_size=4, kv_bytes=slabs * slab)
    else:
        e = cross.engine(3, **({"max_batch_tokens": 9, "page_size": 3} if memory == "chunked" else {"overlap": True}))
    got = run(e, rows, Drawn(space, True))
    assert memory != "tight" or e.kv.stats.preemptions > 3
    for i, t in want.items():
        pairs.assert_same(got[i], t)
        assert got[i].meta["tracks"] == t.meta["tracks"]


def test_keys_and_values_of_waiting_tracks_stay() -> None:
    """A switch brings the new step only: every token runs once through the model that needs it."""
    e = cross.engine()
    rows = cross.requests(4, max_step_tokens=4, max_new_tokens=24, ignore_eos=True)
    done = run(e, [replace(r, tag=r.tag | {"plan": [0, 1]}) for r in rows], Planned())
    for t in done.values():
        cross.audit(e, t, greedy=True)
        assert t.models == [0, 1, 0, 1, 0, 1]
        for m, (start, ids, ends) in enumerate(cross.tracks(t, 2)):
            read = len(start) + (ends[-2] if m == 0 else len(ids))  # model 0 never reads the last step
            assert t.cost.forward_tokens[m] == read - 1


def test_a_fork_goes_on_from_everything_written_in_every_track() -> None:
    e = cross.engine()
    policy = Drawn()
    first = e.add(cross.requests(1, max_new_tokens=60, ignore_eos=True)[0], policy)
    for _ in range(20):
        e.step()
    slot = int(np.flatnonzero(e.slots.request_id == first)[0])
    text = "".join(e.tracks.texts(slot, None)) if e.tracks else ""
    assert text
    second = e.fork(first, Request([], seed=3, max_new_tokens=20, ignore_eos=True, tag={"id": 1}), policy)
    done: dict[int, Trajectory] = {}
    while e.has_work:
        done |= {t.meta["request_id"]: t for t in e.step()}
    for t in done.values():
        cross.audit(e, t, greedy=True)
    codecs = [TokenBytes(tok) for tok in cross.tokenizers()]
    forked = [codec.decode(ids).decode(errors="replace") for codec, (ids, _, _) in
              zip(codecs, cross.tracks(done[second], 2), strict=True)]  # fmt: skip
    assert forked[0] == forked[1] and text in forked[0]
    pairs.assert_clean(e)


def test_a_track_that_is_full_ends_the_answer() -> None:
    e = cross.engine(max_model_len=96)
    done = run(e, cross.requests(6, max_new_tokens=90, ignore_eos=True), Drawn())
    assert {t.finish_reason for t in done.values()} == {"context"}
    for t in done.values():
        assert min(s.end - s.start for s in t.steps) >= 0 and t.cost.discarded_tokens == 0
        assert max(len(p) + len(ids) for p, ids, _ in cross.tracks(t, 2)) >= 90


def test_keys_of_tracks_differ() -> None:
    """Equal positions in two tracks must not share random numbers."""
    e = cross.engine()
    e.add(cross.requests(1, temperature=1.0)[0], Planned())
    assert e.tracks is not None
    e._admit(0, 1, cross.requests(1)[0], Drawn())
    keys = [int(e.slots.key[0])]
    assert e.tracks.activate(0, 1)
    assert int(e.slots.key[0]) not in keys
    e.slots.phase[0] = Phase.FREE


def test_what_a_pool_of_several_tokenizers_refuses() -> None:
    e = cross.engine()
    with pytest.raises(ConfigError, match="2 tokenizers.*Prompt"):
        e.add(Request([1, 2, 3]), Drawn())
    with pytest.raises(ConfigError, match="prompt_ids: empty"):
        e.add(Request(Prompt([1], [[]])), Drawn())
    with pytest.raises(CapacityError, match="prompt_ids"):
        e.add(Request(Prompt([1], [[5] * cross.CONTEXT])), Drawn())
    with pytest.raises(ConfigError, match="vocabulary"):
        e.add(Request(Prompt([1], [[10**6]])), Drawn())
    with pytest.raises(ConfigError, match="tokenizer: 1 for 2"):
        StepEngine(cross.pool(), cross.tokenizers(1))
    with pytest.raises(ConfigError, match="model 1.*byte"):
        StepEngine([*cross.pool(1), pairs.exact(0)], [*cross.tokenizers(1), pairs.tokenizer()])
