"""Both action spaces, the caps, and what a trajectory says it cost."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from roro_fast.engine import Request, StepEngine, Trajectory
from tests.engine import pairs
from tests.engine.pairs import CONTEXT, Drawn, Planned, audit, engine, pool, prompt, requests, run

EOS = 2


def planned(plan: list[int], n: int = 8, **settings: object) -> list[Request]:
    rows = [replace(r, prompt_ids=prompt(i, 9 + i), **settings) for i, r in enumerate(requests(n))]
    return [replace(r, tag=r.tag | {"plan": plan}) for r in rows]


def distinct(n: int) -> list[Request]:
    """Requests without a common prefix, so that the prefix cache saves nothing."""
    return [replace(r, prompt_ids=[50 + i, *prompt(i, 20 + i)]) for i, r in enumerate(requests(n))]


def attention_flops(e: StepEngine, m: int, tokens: int) -> float:
    c = e.models[m].config
    weights = sum(p.numel() for p in e.models[m].parameters())
    pairs_ = tokens * (tokens + 1) / 2
    return 2.0 * weights * tokens + 4.0 * c.num_layers * c.num_heads * c.head_dim * pairs_


def test_next_writes_each_step_by_the_chosen_model() -> None:
    e = engine(pool(3))
    for t in run(e, planned([2, 0, 1, 1]), Planned()).values():
        assert t.models == ([2, 0, 1, 1] * 9)[: len(t.steps)]
        assert [(d.step, d.action, d.kind) for d in t.decisions] == [(i, m, "next") for i, m in enumerate(t.models)]
        assert t.action_space == "next" and t.cost.discarded_tokens == 0 and t.arm == "planned"
        audit(e, t, greedy=True)


def test_ignore_eos_leaves_every_ending_to_the_caps() -> None:
    e = engine(pool(2))
    forced = {"ignore_eos": True, "max_step_tokens": 7, "max_new_tokens": 40, "temperature": 1.0}
    tokens = []
    for t in run(e, planned([1, 0], n=12, **forced), Planned()).values():
        assert [s.end - s.start for s in t.steps] == [7, 7, 7, 7, 7, 5] and t.finish_reason == "length"
        assert t.models == [1, 0] * 3 and not any(s.closed for s in t.steps)
        tokens += t.token_ids
    assert EOS in tokens and pairs.tokenizer().convert_tokens_to_ids("\n\n") in tokens  # there was something to ignore


@pytest.mark.parametrize("scout", [False, True])
def test_regenerate_keeps_or_rewrites(scout: bool) -> None:
    e = engine(pool(3))
    policy = Planned("regenerate", scout)
    kept = run(e, planned([0]), policy)
    alone = run(e, [replace(r, model=0) for r in planned([0])])
    for i, t in kept.items():
        assert t.token_ids == alone[i].token_ids and set(t.models) == {0} and t.cost.discarded_tokens == 0
        assert len(t.decisions) == len(t.steps) and {d.kind for d in t.decisions} == {"regenerate"}
    rewritten = run(e, planned([2]), policy)
    large = run(e, [replace(r, model=2) for r in planned([0])])
    for i, t in rewritten.items():
        assert t.token_ids == large[i].token_ids and set(t.models) == {2}
        assert t.cost.discarded_tokens >= len(t.steps) and t.cost.generated_tokens == [0, 0, len(t.token_ids)]
    for t in run(e, planned([0, 2, 1]), policy).values():
        assert t.models == ([0, 2, 1] * 11)[: len(t.steps)] and t.action_space == "regenerate"
        assert [(d.step, d.action) for d in t.decisions] == list(enumerate(t.models))
        audit(e, t, greedy=True)


def test_a_draft_that_ended_the_answer_is_kept_or_rewritten() -> None:
    e = engine(pool(2))
    small = run(e, [replace(r, model=0) for r in planned([0])])
    short = [i for i, t in small.items() if t.finish_reason == "eos" and len(t.steps) == 1]
    assert short, "some answer should end within its first step"
    for i in short:
        (row,) = (r for r in planned([1, 0]) if r.tag["id"] == i)
        kept = run(e, [replace(row, tag={"id": 0, "plan": [0]})], Planned("regenerate"))[0]
        assert kept.finish_reason == "eos" and kept.token_ids == small[i].token_ids and kept.token_ids[-1] == EOS
        other = run(e, [row], Planned("regenerate"))[i]
        assert other.models[0] == 1 and other.cost.discarded_tokens >= len(small[i].token_ids)
        audit(e, other, greedy=True)


def test_a_rewritten_step_draws_fresh_numbers() -> None:
    """Draft and rewrite by models of equal weights must differ when sampling: the draft's luck is not replayed."""
    twins = [pairs.exact(0), pairs.exact(0)]
    rows = planned([1], max_steps=1, temperature=1.0, max_step_tokens=12)
    same = 0
    for scout in (False, True):
        kept = run(engine(twins), [replace(r, tag=r.tag | {"plan": [0]}) for r in rows], Planned("regenerate", scout))
        redone = run(engine(twins), rows, Planned("regenerate", scout))
        same += sum(kept[i].token_ids == redone[i].token_ids for i in kept)
    assert same <= 2


def test_batches_describe_the_step_under_decision() -> None:
    for space in ("next", "regenerate"):
        e, policy = engine(pool(3)), Drawn(space)
        done = run(e, requests(9), policy)
        for (i, n), row in policy.seen.items():
            t = done[i]
            assert row["step_index"] == n and row["actions"] == [d.action for d in t.decisions[:n]]
            before = t.steps[:n]
            total = before[-1].end if before else 0
            if space == "next":
                assert row["step_tokens"] == (before[-1].end - before[-1].start if before else 0)
                assert float(row["mean_logprob"]) == pytest.approx(before[-1].mean_logprob if before else 0.0)
                large = sum(s.end - s.start for s in before if s.model) / max(total, 1)
                assert float(row["large_share"]) == pytest.approx(large)
                assert row["prefix"] == t.step_texts[:n]
            else:
                assert row["prefix"][:-1] == t.step_texts[:n] and len(row["prefix"]) == n + 1
                if t.steps[n].model == 0:
                    assert float(row["mean_logprob"]) == pytest.approx(t.steps[n].mean_logprob)


@pytest.mark.parametrize("space", ["next", "regenerate"])
@pytest.mark.parametrize(
    ("cap", "reason"),
    [
        ({"max_new_tokens": 1}, "length"),
        ({"max_new_tokens": 13}, "length"),
        ({"max_steps": 1}, "steps"),
        ({"max_steps": 3, "max_step_tokens": 1}, "steps"),
        ({"max_new_tokens": 500}, "context"),
    ],
)
def test_caps_are_never_exceeded(space: str, cap: dict[str, int], reason: str) -> None:
    e = engine(pool(3))
    rows = [replace(r, **({"max_step_tokens": 5} | cap), temperature=2.0) for r in requests(12)]
    reasons = set()
    for t in run(e, rows, Drawn(space, True)).values():
        r = rows[t.meta["id"]]
        reasons.add(t.finish_reason)
        assert len(t.token_ids) <= r.max_new_tokens and len(t.steps) <= r.max_steps
        assert len(t.prompt_ids) + len(t.token_ids) <= CONTEXT
        assert all(s.end - s.start <= r.max_step_tokens for s in t.steps)
        assert (t.finish_reason == "eos") == (t.token_ids[-1] == EOS) and EOS not in t.token_ids[:-1]
        if t.finish_reason == "length":
            assert len(t.token_ids) == r.max_new_tokens
        if t.finish_reason == "steps":
            assert len(t.steps) == r.max_steps
        if t.finish_reason == "context":
            assert len(t.prompt_ids) + len(t.token_ids) == CONTEXT
    assert reasons <= {"eos", reason} and reason in reasons


def test_a_step_may_span_tokens_of_a_spelled_delimiter() -> None:
    """Every step ends with the first token that completes the text, however many tokens that takes."""
    models = copy.deepcopy(pool(2))
    for m in models:
        m.head.weight[pairs.tokenizer().convert_tokens_to_ids("\n\n")] *= 2
    e = engine(models, delimiter="\n" * 4)
    rows = [replace(r, max_step_tokens=0, max_new_tokens=100, temperature=1.0) for r in requests(20)]
    closed = 0
    for t in run(e, rows, Drawn()).values():
        for text, step in zip(t.step_texts, t.steps, strict=True):
            assert "\n" * 4 not in text[:-1]
            if step.closed and t.token_ids[step.end - 1] != EOS:
                assert text.endswith("\n" * 4)
                closed += 1
    assert closed > 10


@pytest.mark.parametrize("scout", [False, True])
def test_next_runs_every_token_once_through_each_model_that_needs_it(scout: bool) -> None:
    e = engine(pool(3))
    for t in run(e, distinct(8), Drawn("next", scout)).values():
        n = len(t.prompt_ids)
        want = [max([n + s.end - 1 for s in t.steps if s.model == m], default=0) for m in range(3)]
        if scout:
            want[0] = max(want[0], n + t.steps[-1].start)
        check_costs(e, t, want)


@pytest.mark.parametrize("scout", [False, True])
def test_regenerate_counts_drafts_and_what_follows_them(scout: bool) -> None:
    e, policy = engine(pool(3)), Drawn("regenerate", scout)
    for i, t in run(e, distinct(8), policy).items():
        n, known, small, discarded = len(t.prompt_ids), 0, 0, 0
        spans = []
        for k, step in enumerate(t.steps):
            draft = int(policy.seen[i, k]["step_tokens"])
            seen = n + step.start + draft - 1 + scout
            spans.append((known, seen))
            small += seen - known
            known = seen if step.model == 0 else n + step.start
            discarded += draft if step.model else 0
        assert t.cost.discarded_tokens == discarded
        want = [small, *(max([n + s.end - 1 for s in t.steps if s.model == m], default=0) for m in (1, 2))]
        check_costs(e, t, want, spans)


def check_costs(e: StepEngine, t: Trajectory, tokens: list[int], small: list[tuple[int, int]] | None = None) -> None:
    """`small`: the spans of positions that model 0 ran, when it ran some of them again."""
    assert t.cost.forward_tokens == tokens
    sizes = [sum(p.numel() for p in m.parameters()) for m in e.models]
    kept = [sum(s.end - s.start for s in t.steps if s.model == m) for m in range(len(sizes))]
    assert t.cost.generated_flops == sum(2.0 * n * k for n, k in zip(sizes, kept, strict=True))
    total = [attention_flops(e, m, n) for m, n in enumerate(tokens)]
    if small is not None:
        total[0] = sum(attention_flops(e, 0, b) - attention_flops(e, 0, a) for a, b in small)
    assert t.cost.total_flops == pytest.approx(sum(total), rel=1e-12)
    assert t.cost.seconds > 0


def test_chunks_and_preemption_are_paid_for_honestly() -> None:
    """Chunking costs nothing more; recomputing after preemption is counted."""
    rows = distinct(6)
    plain = run(engine(pool(3)), rows, Drawn())
    chunked = run(engine(pool(3), max_batch_tokens=8), rows, Drawn())
    for i, t in plain.items():
        assert chunked[i].cost.forward_tokens == t.cost.forward_tokens
        assert chunked[i].cost.total_flops == pytest.approx(t.cost.total_flops, rel=1e-12)
    e = engine(pool(3), page_size=4, kv_bytes=300_000)
    pressed = run(e, rows, Drawn())
    assert e.kv.stats.idle_drops + e.kv.stats.preemptions > 0
    assert sum(sum(t.cost.forward_tokens) for t in pressed.values()) > sum(
        sum(t.cost.forward_tokens) for t in plain.values()
    )


def test_per_request_policies_ride_together() -> None:
    e = engine(pool(3), max_num_seqs=12)
    rows = requests(12)
    mix = [replace(r, policy=Drawn("regenerate", True) if i % 3 == 0 else Planned()) for i, r in enumerate(rows)]
    mix = [replace(r, tag=r.tag | {"plan": [1, 2]}) for r in mix]
    got = run(e, [replace(r, policy=None) if i % 3 == 2 else r for i, r in enumerate(mix)], None)
    for i, r in enumerate(mix):
        alone = run(e, [replace(r, policy=None)], r.policy if i % 3 < 2 else None)[i]
        pairs.assert_same(got[i], alone)
        assert got[i].action_space == ("regenerate", "next", "")[i % 3]


def test_weights_are_ours_to_count() -> None:
    assert all(m.config.num_params == sum(p.numel() for p in m.parameters()) for m in pool(4))
