"""Trajectories come out as they finish, requests go in as slots come free, and whoever leaves takes nothing along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from roro_fast.engine import BoundaryBatch, Decisions, Request, StepEngine
from roro_fast.errors import CapacityError, ConfigError
from tests.engine import pairs
from tests.engine.pairs import CONTEXT, Drawn, engine, pool, prompt, requests, run


def test_short_answers_come_out_before_long_ones() -> None:
    rows = [Request(prompt(20 + i, 8), max_new_tokens=n) for i, n in enumerate((60, 1, 20, 2, 60, 3, 60, 60))]
    written = [len(t.token_ids) for t in engine().rollout(rows)]
    assert written == sorted(written) and written[0] == 1 and written[-1] > 20
    stream = engine().rollout([rows[0], rows[1]])
    assert len(next(stream).token_ids) == 1


def test_requests_are_pulled_as_slots_come_free() -> None:
    e = engine(max_num_seqs=3)
    pulled = 0

    def source() -> Iterator[Request]:
        nonlocal pulled
        for r in requests(30):
            pulled += 1
            yield r

    finished = 0
    for _ in e.rollout(source(), Drawn()):
        finished += 1
        assert pulled <= finished + 3
    assert finished == pulled == 30
    pairs.assert_clean(e)


def test_a_source_may_depend_on_what_came_out() -> None:
    """The next request extends the last answer: impossible for an engine that reads ahead."""
    e = engine(max_num_seqs=1)
    seen: list[list[int]] = []

    def source() -> Iterator[Request]:
        yield Request(prompt(1, 5), max_new_tokens=5, tag={"id": 0})
        for i in range(1, 5):
            yield Request(seen[-1], max_new_tokens=5, temperature=1.0, sample=i, tag={"id": i})

    for t in e.rollout(source()):
        seen.append(t.prompt_ids + t.token_ids)
    assert len(seen) == 5 and all(b[: len(a)] == a for a, b in zip(seen, seen[1:], strict=False))


def test_leaving_early_frees_everything() -> None:
    e = engine(max_num_seqs=4)
    for stop in (1, 3):
        stream = e.rollout(requests(20), Drawn("regenerate", True))
        for _ in range(stop):
            next(stream)
        stream.close()
        pairs.assert_clean(e)
    assert len(run(e, requests(6), Drawn())) == 6


@pytest.mark.parametrize("when", [0, 1, 3, 6])
def test_abort(when: int) -> None:
    """Queued, prefilling, at a boundary, in mid step: the others never notice."""
    e = engine(max_num_seqs=4, max_batch_tokens=8, page_size=4)
    policy = Drawn("regenerate", True)
    rows = requests(8)
    want = run(e, rows, policy)
    ids = {e.add(r, policy): r.tag["id"] for r in rows}
    done = []
    for _ in range(when):
        done += e.step()
    gone = set()
    for rid in list(ids)[::2]:
        if e.abort(rid):
            gone.add(ids[rid])
            assert not e.abort(rid), "already gone"
    assert gone and not e.abort(10**9)
    while e.has_work:
        done += e.step()
    got = {t.meta["id"]: t for t in done}
    assert gone.isdisjoint(got) and gone | set(got) == set(range(8))
    for i, t in got.items():
        pairs.assert_same(t, want[i])
    pairs.assert_clean(e)


def test_a_request_aborted_from_outside_does_not_hang_its_rollout() -> None:
    e = engine(max_num_seqs=2)
    stream = e.rollout(requests(6), Drawn())
    first = next(stream)
    running = [int(i) for i in e.slots.request_id if i >= 0]
    for rid in running:
        assert e.abort(rid)
    rest = list(stream)
    assert 1 + len(rest) == 6 - len(running) and first.meta["id"] not in {t.meta["id"] for t in rest}
    pairs.assert_clean(e)


class Hostile(Drawn):
    """Aborts a sequence in the middle of deciding about it."""

    def __init__(self, e: StepEngine, **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        self.engine, self.victims = e, 3

    def decide(self, batch: BoundaryBatch) -> Decisions:
        out = super().decide(batch)
        rid = int(self.engine.slots.request_id.max())
        if self.victims and rid >= 0 and self.engine.abort(rid):
            self.victims -= 1
        return out


@pytest.mark.parametrize("scout", [False, True])
@pytest.mark.parametrize("space", ["next", "regenerate"])
def test_a_policy_may_abort(space: str, scout: bool) -> None:
    e = engine(pool(2), max_num_seqs=4)
    got = run(e, requests(10), Hostile(e, action_space=space, needs_scout=scout))
    want = run(engine(pool(2)), requests(10), Drawn(space, scout))
    assert len(got) == 7
    for i, t in got.items():
        pairs.assert_same(t, want[i])


def test_refused_requests_are_reported_and_the_run_goes_on() -> None:
    e = engine(max_num_seqs=2)
    rows = requests(5)
    rows.insert(2, Request(prompt(1, CONTEXT), tag={"id": 90}, arm="x", sample=4))
    rows.insert(4, Request([], tag={"id": 91}))
    got = {t.meta["id"]: t for t in e.rollout(rows, Drawn(), on_error="skip")}
    assert set(got) == {0, 1, 2, 3, 4, 90, 91}
    assert got[90].finish_reason == "refused" and "context" in got[90].meta["error"]
    assert got[90].arm == "x" and got[90].sample == 4 and got[91].token_ids == []
    with pytest.raises(CapacityError, match="prompt_ids"):
        list(e.rollout(rows, Drawn()))
    pairs.assert_clean(e)
    with pytest.raises(ConfigError, match="on_error"):
        e.rollout(rows, Drawn(), on_error="ignore")


def test_two_rollouts_on_one_engine_get_their_own() -> None:
    e = engine(max_num_seqs=3)
    want = run(e, requests(12), Drawn())
    outer = e.rollout(requests(12)[:6], Drawn())
    got = [next(outer)]
    inner = list(e.rollout(requests(12)[6:], Drawn()))
    assert {t.meta["id"] for t in inner} == set(range(6, 12))
    assert e.generate([prompt(3, 7)], max_new_tokens=9) == engine().generate([prompt(3, 7)], max_new_tokens=9)
    got += outer
    assert {t.meta["id"] for t in got} == set(range(6))
    for t in got + inner:
        pairs.assert_same(t, want[t.meta["id"]])
    pairs.assert_clean(e)


def test_generate_gives_n_completions_per_prompt() -> None:
    e = engine()
    prompts = [prompt(i, 6 + i) for i in range(3)]
    out = e.generate(prompts, n=4, max_new_tokens=12, temperature=1.0, seed=1, model=1)
    assert [len(g) for g in out] == [4, 4, 4] and all(len({tuple(c) for c in g}) > 1 for g in out)
    assert out == engine(max_num_seqs=1).generate(prompts, n=4, max_new_tokens=12, temperature=1.0, seed=1, model=1)
    assert out != e.generate(prompts, n=4, max_new_tokens=12, temperature=1.0, seed=2, model=1)
    twice = e.generate([prompts[0]] * 2, max_new_tokens=12, temperature=1.0)
    assert twice[0] != twice[1], "equal prompts get different draws"
    assert e.generate([], max_new_tokens=3) == [] and all(2 not in c[:-1] for g in out for c in g)


def test_what_went_in_comes_back() -> None:
    r = replace(requests(3)[2], arm="probe", sample=5, seed=9, tag={"id": 2, "note": "x"})
    t = run(engine(), [r], Drawn())[2]
    assert (t.arm, t.sample, t.seed, t.meta) == ("probe", 5, 9, {"id": 2, "note": "x"})
    assert t.prompt_ids == r.prompt_ids and t.query_id == "" and t.correct is None
    assert "".join(t.step_texts) == pairs.tokenizer().decode(t.token_ids, skip_special_tokens=True)
