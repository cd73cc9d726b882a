"""The prefix cache: what is shared, what is copied before it is written, what a new weight version forgets."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from roro_fast.engine import Request, StepEngine, kv
from roro_fast.engine.slots import Phase
from tests.engine import pairs
from tests.engine.pairs import Drawn, audit, engine, model_pair, pool, prompt, requests, run

COMMON = prompt(1, 33)


def group(n: int) -> list[Request]:
    settings = {"max_new_tokens": 20, "max_step_tokens": 5, "temperature": 1.0, "seed": 3}
    return [Request(COMMON + prompt(i, i % 4), sample=i, tag={"id": i}, **settings) for i in range(n)]


def forwarded(e: StepEngine, rows: list[Request]) -> list[int]:
    """Tokens really run through each model: what the answers are charged for, less what came from the cache."""
    done = run(e, rows, None)
    charged = np.sum([t.cost.forward_tokens for t in done.values()], 0)
    charged[0] -= sum(t.cost.cached_tokens for t in done.values())
    return charged.tolist()


def test_costs_do_not_depend_on_the_batch() -> None:
    rows = [Request(COMMON, sample=i, max_new_tokens=9, temperature=1.0, tag={"id": i}) for i in range(6)]
    together = run(engine(pool(2), page_size=4), rows, Drawn())
    assert any(t.cost.cached_tokens for t in together.values())
    for r in rows:
        alone = run(engine(pool(2), page_size=4), [r], Drawn())[r.tag["id"]]
        assert alone.cost.cached_tokens == 0
        assert alone.cost.forward_tokens == together[r.tag["id"]].cost.forward_tokens
        assert alone.cost.total_flops == together[r.tag["id"]].cost.total_flops


@pytest.mark.parametrize("space", ["next", "regenerate"])
def test_hit_equals_miss(space: str) -> None:
    e = engine(pool(3), page_size=4)
    policy = Drawn(space, True)
    cold = {r.tag["id"]: run(engine(pool(3), page_size=4), [r], policy)[r.tag["id"]] for r in group(8)}
    for _ in range(2):
        done = {t.meta["id"]: t for t in e.rollout(group(8), policy)}
        for i, t in cold.items():
            pairs.assert_same(done[i], t)
        assert e.kv.leaked_pages() == 0
    assert e.kv.stats.hit_tokens > 2 * 7 * 32
    pairs.assert_clean(e)


def test_a_group_computes_its_common_prompt_once() -> None:
    """16 equal prompts: one sequence prefills, the others take its pages and run just what is left."""
    same = [Request(COMMON, sample=i, max_new_tokens=1, temperature=1.0, tag={"id": i}) for i in range(16)]
    e = engine(max_num_seqs=16, page_size=8)
    assert forwarded(e, same)[0] == 33 + 15 * 1
    assert e.kv.stats.hit_tokens == 15 * 32
    e = engine(max_num_seqs=16, page_size=16)
    whole_pages = [replace(r, prompt_ids=COMMON[:32]) for r in same]
    assert forwarded(e, whole_pages)[0] == 32 + 15 * 16, "the last token is always left to compute"


def test_hits_are_counted_once_however_long_a_row_waits() -> None:
    e = engine(max_num_seqs=4, page_size=8, max_batch_tokens=8)
    rows = [Request(COMMON, sample=i, max_new_tokens=1, temperature=1.0, tag={"id": i}) for i in range(4)]
    done = run(e, rows)
    ran = sum(t.cost.forward_tokens[0] - t.cost.cached_tokens for t in done.values())
    assert ran + e.kv.stats.hit_tokens == 4 * 33


def test_a_page_cut_by_a_chunk_is_not_shared_yet() -> None:
    """The leader leaves after a first chunk that ended inside a page: nobody may find that half-written page."""
    rows = [Request(COMMON, sample=i, max_new_tokens=8, tag={"id": i}) for i in range(4)]
    want = run(engine(), rows[:1])[0]
    e = engine(max_num_seqs=4, page_size=8, max_batch_tokens=13)
    leader, *_ = [e.add(r) for r in rows]
    done = e.step()
    assert e.abort(leader)
    while e.has_work:
        done += e.step()
    assert [t.token_ids for t in done] == [want.token_ids] * 3
    for t in done:
        audit(e, t, greedy=True)
    assert e.kv.stats.hit_tokens > 0


def test_different_models_do_not_share_pages() -> None:
    e = engine([pairs.exact(0), pairs.exact(0)], page_size=4, share_layers=False)
    assert forwarded(e, [Request(COMMON, max_new_tokens=1, tag={"id": 0})]) == [33, 0]
    before = e.kv.stats.hit_tokens
    run_ = list(e.rollout([Request(COMMON, max_new_tokens=1, model=1, tag={"id": 1})]))
    assert run_[0].cost.forward_tokens == [0, 33] and e.kv.stats.hit_tokens == before


def test_colliding_keys_do_not_share_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are 64-bit hashes; here every page has the same one."""
    monkeypatch.setattr(kv, "chain_hashes", lambda root, tokens, size: [root] * (len(tokens) // size))
    rows = requests(12)
    got = run(engine(pool(2), page_size=4), rows, Drawn())
    for t in got.values():
        audit(engine(pool(2)), t, greedy=True)


def test_new_weights_forget_everything_computed_by_the_old_ones() -> None:
    models = [copy.deepcopy(m) for m in pool(2)]
    e = engine(models, page_size=4)
    rows = [replace(r, prompt_ids=COMMON) for r in requests(3)]
    list(e.rollout(rows, Drawn()))
    for m, model in enumerate(models):
        with torch.no_grad():
            model.layers[0].qkv.weight.mul_(-1.1)
        e.update_weights(m)
        done = {t.meta["id"]: t for t in e.rollout(rows, Drawn())}
        for t in done.values():
            audit(e, t, greedy=True)
    e.update_weights(0)
    assert e.kv.leaked_pages() == 0 and e.kv.pool.used(0) == 0


def test_new_weights_are_read_even_where_torch_does_not_see_them_change() -> None:
    model = copy.deepcopy(model_pair(0)[1])  # float32: the C++ forward, on packed weights
    e = engine([model])
    prompts = [prompt(i, 20) for i in range(3)]
    before = e.generate(prompts, max_new_tokens=12)
    model.layers[0].qkv.weight.data.mul_(-1.1)
    e.update_weights(0)
    after = e.generate(prompts, max_new_tokens=12)
    assert after == engine([copy.deepcopy(model)]).generate(prompts, max_new_tokens=12) != before


@pytest.mark.parametrize("stepped", [True, False])
def test_weights_changed_in_place_between_steps_are_read(stepped: bool) -> None:
    """By `step` at once, by `rollout` when it goes on after a trajectory."""
    model = copy.deepcopy(model_pair(0)[1])  # float32: the C++ forward, on packed weights
    e = pairs.engine([model], max_num_seqs=2)
    rows = [Request(prompt(i, 6), max_new_tokens=n, ignore_eos=True, tag={"id": i}) for i, n in enumerate((3, 12))]

    def change() -> None:
        with torch.no_grad():
            model.head.weight.mul_(-1)

    if stepped:
        for r in rows:
            e.add(r)
        done = [*e.step(), *e.step(), *e.step()]
        assert len(done) == 1
        change()
        while e.has_work:
            done += e.step()
    else:
        rollout = e.rollout(rows)
        done = [next(rollout)]
        change()
        done += rollout
    long = done[1]
    logits = pairs.cold_logits(model, long.prompt_ids + long.token_ids)[5:-1]
    assert (logits[:3].argmin(-1).tolist(), logits[3:].argmax(-1).tolist()) == (long.token_ids[:3], long.token_ids[3:])


def test_new_weights_reach_running_sequences() -> None:
    models = [copy.deepcopy(m) for m in pool(2)]
    e = engine(models, page_size=4)
    for r in requests(6):
        e.add(replace(r, model=0, max_new_tokens=20))
    for _ in range(5):
        e.step()
    with torch.no_grad():
        models[0].layers[1].qkv.weight.mul_(-1.1)
    e.update_weights(0)
    compared = 0
    while e.has_work:
        e.step()
        compared += pairs.check_kv(e)
    assert compared > 200
    pairs.assert_clean(e)


def test_a_rewritten_draft_never_writes_to_a_published_page() -> None:
    """Drop model 0 in mid draft: when it comes back, draft tokens are published; what replaces them must be a copy."""
    e = engine(pool(2), page_size=2)
    policy = pairs.Planned("regenerate", True)
    rows = [replace(r, max_step_tokens=8, temperature=1.0, tag=r.tag | {"plan": [1, 0]}) for r in requests(6)]
    want = run(engine(pool(2)), rows, policy)
    for r in rows:
        e.add(r, policy)
    done = []
    while e.has_work:
        done += e.step()
        s = e.slots
        for slot in np.nonzero(s.drafting & (s.phase != Phase.FREE) & (s.length - s.step_start == 4))[0]:
            e.kv.drop(0, int(slot))
        pairs.check_kv(e)
        for m in range(2):
            for key, entry in e.kv._cached[m].items():
                assert key and len(entry.tokens) == 16
    assert e.kv.stats.cow_pages > 0
    for t in done:
        pairs.assert_same(t, want[t.meta["id"]])
    again = run(e, rows, policy)
    for i, t in want.items():
        pairs.assert_same(again[i], t)


def test_least_recently_used_pages_go_first() -> None:
    e = engine([pairs.exact(0)], page_size=4, kv_bytes=24 * 4 * pairs.exact(0).config.kv_bytes_per_token(8))
    old, kept = prompt(11, 20), prompt(12, 20)
    for p in (old, kept):
        e.generate([p], max_new_tokens=1)
    e.generate([old], max_new_tokens=1)
    hits = e.kv.stats.hit_tokens
    e.generate([prompt(13, 60)], max_new_tokens=1)
    assert e.kv.stats.evicted_pages > 0
    e.generate([old], max_new_tokens=1)
    assert e.kv.stats.hit_tokens - hits == 16
    e.generate([kept], max_new_tokens=1)
    assert e.kv.stats.hit_tokens - hits == 16
