"""The exactness contract: Hugging Face greedy, cold prefills, and independence of batching."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from roro_fast.engine import Request
from roro_fast.engine.slots import Phase
from tests.engine import pairs
from tests.engine.pairs import Constant, Drawn, Planned, audit, check_kv, engine, pool, prompt, requests, run, tight

pytestmark = pytest.mark.usefixtures("implementation")

PROMPTS = [prompt(i, n) for i, n in enumerate((1, 5, 16, 17, 33, 48, 5))]
SAMPLING = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
]


def mixed(n: int, **settings: object) -> list[Request]:
    """Requests that sample in different ways, greedy ones among them."""
    return [replace(r, **SAMPLING[i % len(SAMPLING)], **settings) for i, r in enumerate(requests(n))]


def hugging_face(model: torch.nn.Module, ids: list[int], n: int, vocab_size: int) -> list[int]:
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=n,
        do_sample=False,
        suppress_tokens=list(range(vocab_size, model.config.vocab_size)) or None,
    )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_one_model_equals_hugging_face_greedy(family: str) -> None:
    both = [pairs.model_pair(i, family) for i in range(3)]
    e = engine([ours for _, ours in both])
    lengths = set()
    for m, (theirs, _) in enumerate(both):
        want = [hugging_face(theirs, p, 40, e.vocab_size) for p in PROMPTS]
        lengths |= {len(w) for w in want}
        assert [c[0] for c in e.generate(PROMPTS, max_new_tokens=40, model=m)] == want
        rows = [Request(p, max_new_tokens=40, tag={"id": i}) for i, p in enumerate(PROMPTS)]
        for scout in (False, True):
            got = run(e, rows, Constant(m, needs_scout=scout))
            assert [got[i].token_ids for i in range(len(PROMPTS))] == want
            assert all(set(t.models) == {m} for t in got.values())
    assert max(lengths) == 40 and len(lengths) > 3, "some answers should end early"
    for t in run(e, requests(8), Drawn()).values():
        audit(e, t, greedy=True)


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("scout", [False, True])
@pytest.mark.parametrize("space", ["next", "regenerate"])
def test_any_interleaving_equals_a_cold_prefill(space: str, scout: bool, k: int) -> None:
    e = engine(pool(k))
    policy = Drawn(space, scout)
    rows = requests(12)
    done = run(e, rows, policy)
    assert {m for t in done.values() for m in t.models} == set(range(k))
    assert {s.closed for t in done.values() for s in t.steps} == {True, False}
    for t in done.values():
        audit(e, t, greedy=True)
    if scout and space == "next":
        for (i, n), row in policy.seen.items():
            t = done[i]
            ids = t.prompt_ids + t.token_ids[: t.steps[n].start]
            hidden = e.models[0].dense(torch.tensor([ids]))[0, -1]
            torch.testing.assert_close(row["hidden"], hidden.float(), atol=pairs.TOLERANCE, rtol=0)
            p = e.models[0].logits(hidden)[: e.vocab_size].softmax(-1)
            assert float(row["scout_maxprob"]) == pytest.approx(float(p.max()), abs=pairs.TOLERANCE)
            assert float(row["scout_entropy"]) == pytest.approx(float(-(p * p.log()).sum()), abs=pairs.TOLERANCE)


@pytest.mark.parametrize("memory", ["ample", "chunked", "tight"])
def test_a_draft_is_judged_from_the_boundary_it_began_at(memory: str) -> None:
    chunks = {"max_batch_tokens": 8, "page_size": 3} if memory == "chunked" else {}
    e = tight(3, 80, 4) if memory == "tight" else engine(pool(3), **chunks)
    policy = Drawn("regenerate", True)
    done = run(e, mixed(14), policy)
    assert memory != "tight" or e.kv.stats.preemptions > 3  # in the middle of drafts
    compared = 0
    for (i, n), row in policy.seen.items():
        t = done[i]
        decision = t.decisions[n]
        ids = t.prompt_ids + t.token_ids[: t.steps[decision.step].start]
        want = e.models[0].dense(torch.tensor([ids]))[0, -1].float()
        torch.testing.assert_close(row["hidden"], want, atol=pairs.TOLERANCE, rtol=0)
        compared += 1
    assert compared > 40


@pytest.mark.parametrize("scout", [False, True])
@pytest.mark.parametrize("space", ["next", "regenerate"])
def test_pages_hold_what_a_cold_prefill_computes(space: str, scout: bool) -> None:
    e = engine(pool(3), max_batch_tokens=24, page_size=4)
    for r in mixed(10):
        e.add(r, Drawn(space, scout))
    compared = 0
    while e.has_work:
        e.step()
        if e.iterations % 3 == 0:
            compared += check_kv(e)
    assert compared > 1000
    pairs.assert_clean(e)


def test_windows_hold_across_pages_chunks_and_cached_prefixes() -> None:
    models = [copy.deepcopy(pairs.model_pair(i, "gemma3")[1]).to(pairs.DTYPE) for i in range(2)]
    e = engine(models, max_batch_tokens=24, page_size=4)
    for r in mixed(10):
        e.add(r, Drawn())
    compared = 0
    while e.has_work:
        e.step()
        if e.iterations % 3 == 0:
            compared += check_kv(e)
    assert compared > 1000 and e.kv.stats.hit_tokens
    pairs.assert_clean(e)
    (t,) = run(e, [Request(prompt(1, 30), max_new_tokens=9, ignore_eos=True, model=1, tag={"id": 0})]).values()
    assert t.cost.total_flops == pytest.approx(models[1].config.forward_flops(38, 38))


def test_sampling_draws_are_audited() -> None:
    e = engine(pool(3))
    done = run(e, mixed(15), Drawn("regenerate"))
    for t in done.values():
        audit(e, t, greedy=False)
    assert run(e, [replace(r, seed=8) for r in mixed(15)], Drawn("regenerate"))[1].token_ids != done[1].token_ids


def test_sampling_follows_the_distribution() -> None:
    """First tokens of 1500 samples of one prompt against the model's own truncated softmax."""
    e = engine(max_num_seqs=256)
    p = prompt(3, 9)
    logp = pairs.cold_logits(e.models[1], p)[-1, : e.vocab_size].div(3.0)
    for top_k, top_p in ((0, 1.0), (4, 1.0), (0, 0.5)):
        rows = [
            Request(p, sample=i, max_new_tokens=1, temperature=3.0, top_k=top_k, top_p=top_p, model=1, tag={"id": i})
            for i in range(1500)
        ]
        counts = np.bincount([t.token_ids[0] for t in run(e, rows).values()], minlength=e.vocab_size)
        order = logp.argsort(descending=True)
        probs = logp.softmax(-1)
        keep = order[:top_k] if top_k else order[: 1 + int((probs[order].cumsum(0) < top_p).sum())]
        truth = torch.zeros_like(probs)
        truth[keep] = probs[keep] / probs[keep].sum()
        assert counts[truth.numpy() == 0].sum() == 0
        assert 0.5 * np.abs(counts / 1500 - truth.numpy()).sum() < 0.2


@pytest.mark.parametrize("scout", [False, True])
@pytest.mark.parametrize("space", ["next", "regenerate"])
def test_batched_equals_alone(space: str, scout: bool) -> None:
    rows = mixed(14)
    together = run(engine(pool(3), max_num_seqs=16), rows, Drawn(space, scout))
    e = engine(pool(3), max_num_seqs=1)
    for r in rows:
        (alone,) = run(e, [r], Drawn(space, scout)).values()
        pairs.assert_same(alone, together[r.tag["id"]])
    backwards = run(engine(pool(3), max_num_seqs=5), rows[::-1], Drawn(space, scout))
    for i, t in backwards.items():
        pairs.assert_same(t, together[i])


@pytest.mark.parametrize("settings", [{"max_batch_tokens": 8}, {"page_size": 1}, {"page_size": 3}, {"page_size": 64}])
@pytest.mark.parametrize("space", ["next", "regenerate"])
def test_chunking_and_page_size_change_nothing(space: str, settings: dict[str, int]) -> None:
    rows = mixed(12)
    want = run(engine(pool(3)), rows, Drawn(space, True))
    got = run(engine(pool(3), **settings), rows, Drawn(space, True))
    for i, t in want.items():
        pairs.assert_same(t, got[i])


def test_different_step_caps_do_not_mix() -> None:
    policy = Drawn()
    run(engine(), [replace(r, max_steps=3 + i % 3) for i, r in enumerate(requests(9))], policy)
    assert {row["step_cap"] for (i, _), row in policy.seen.items() if i % 3 == 1} == {4}


def test_equal_seeds_do_not_mean_equal_draws_for_all_prompts() -> None:
    rows = [Request(p, max_new_tokens=24, max_step_tokens=4, seed=1, tag={"id": i}) for i, p in enumerate(PROMPTS)]
    done = run(engine(), rows, Drawn())
    assert len({tuple(d.action for d in t.decisions[:3]) for t in done.values()}) > 2
    assert done[1].models != done[6].models or done[1].token_ids != done[6].token_ids or PROMPTS[1] == PROMPTS[6]


@pytest.mark.parametrize("space", ["next", "regenerate"])
@pytest.mark.parametrize("when", [1, 5, 13])
def test_forked_equals_alone(space: str, when: int) -> None:
    """A fork taken at any moment equals a new request with the text so far, and its source does not notice."""
    e = engine(pool(3), page_size=4)
    policy = Drawn(space, True)
    rows = mixed(12, max_new_tokens=40)
    want = run(e, rows, policy)
    source = max(rows, key=lambda r: len(want[r.tag["id"]].token_ids))
    others = [r for r in rows if r is not source][:3]
    ids = [e.add(r, policy) for r in (source, *others)]
    done = []
    for _ in range(when):
        done += e.step()
    assert e.slots.request_id.tolist().count(ids[0]) == 1
    fresh = Request([0], seed=5, sample=1, max_new_tokens=20, max_step_tokens=5, temperature=1.0, tag={"id": 50})
    children = [e.fork(ids[0], replace(fresh, sample=j, tag={"id": 50 + j}), policy) for j in range(3)]
    assert len(set(children)) == 3 and fresh.prompt_ids == [0]
    while e.has_work:
        done += e.step()
    assert e.kv.stats.cow_pages > 0 or when == 1
    got = {t.meta["id"]: t for t in done}
    for r in (source, *others):
        pairs.assert_same(got[r.tag["id"]], want[r.tag["id"]])
    pairs.assert_clean(e)
    for j in range(3):
        child = got[50 + j]
        alone = run(e, [replace(fresh, prompt_ids=child.prompt_ids, sample=j, tag={"id": 0})], policy)[0]
        pairs.assert_same(child, alone)


def test_fork_into_another_model() -> None:
    e = engine(page_size=4)
    rid = e.add(Request(prompt(7, 10), max_new_tokens=12, tag={"id": 0}))
    e.step(), e.step()
    e.fork(rid, Request([0], max_new_tokens=6, model=1, tag={"id": 1}))
    done = []
    while e.has_work:
        done += e.step()
    for t in done:
        audit(e, t, greedy=True)
    assert len(done) == 2 and len(done[0].prompt_ids + done[1].prompt_ids) == 22


def test_planned_switches_at_every_token() -> None:
    """Steps of one token: each model sees the whole text once, in pieces of K tokens."""
    e = engine(pool(4), page_size=3)
    rows = [replace(r, max_step_tokens=1, tag=r.tag | {"plan": [3, 1, 0, 2]}) for r in requests(6)]
    for t in run(e, rows, Planned()).values():
        audit(e, t, greedy=True)
        assert t.models[:4] == [3, 1, 0, 2][: len(t.models)]
    assert (e.slots.phase == Phase.FREE).all()


def test_different_dtypes_share_an_arena() -> None:
    """Bits that one model leaves behind may be NaN to another: never read memory before it is written."""
    models = [copy.deepcopy(pairs.model_pair(0)[1]).bfloat16(), pairs.model_pair(1)[1]]
    e = engine(models, max_num_seqs=3, kv_bytes=72_000, page_size=4)
    for t in run(e, requests(15), Drawn("next", True)).values():
        assert t.finish_reason != "nan"
    assert e.kv.stats.evicted_pages > 0
