"""Seed rubrics find the steps that matter, from the pairs alone."""

from __future__ import annotations

import pytest

from roro_fast.rubric.format import AXES, HARD_RULE, Rubric, parse
from roro_fast.rubric.grammar import checker, read, truth, verbs_of
from roro_fast.rubric.pairs import build_pairs
from roro_fast.rubric.seeds import SeedConfig, group_by_query, seed_rubrics
from tests.rubric.samples import POOL, queries, routed

HARD_KINDS = ("add2", "sub2", "mul")


def hard_lines(q) -> set[int]:
    return {i for i, k in enumerate(q.meta["kinds"]) if k in HARD_KINDS}


@pytest.fixture(scope="module")
def pairs():
    """The large model is needed on exactly the lines of three kinds."""
    qs = [q for q in queries(120) if hard_lines(q)]
    return build_pairs({q.id: q for q in qs}, [t for q in qs for t in routed(q, 10, hard_lines(q))], POOL)[0]


@pytest.fixture(scope="module")
def seeds(pairs):
    return seed_rubrics(pairs, POOL.labels)


def score(rubric: Rubric, prompt: str, view) -> float:
    held = [truth(read(c.sentence), view, verbs_of(prompt), POOL.labels) for c in rubric.criteria]
    return sum(c.weight * (1 if h else -1) for c, h in zip(rubric.criteria, held, strict=True))


def test_every_seed_is_a_well_formed_rubric_about_its_query(pairs, seeds):
    prompts = {p.query_id: p.prompt for p in pairs}
    assert set(seeds) == set(prompts)
    for q, rubric in seeds.items():
        assert parse(str(rubric), checker(prompts[q], POOL.labels)) == rubric
        assert {c.axis for c in rubric.criteria} <= set(AXES)


def test_hard_rules_ask_for_the_large_model_where_it_is_needed(pairs, seeds):
    by_id = {q.id: q for q in queries(120)}
    named = wrong = 0
    for q, rubric in seeds.items():
        verbs, lines = verbs_of(by_id[q].prompt), hard_lines(by_id[q])
        for c in rubric.criteria:
            claim = read(c.sentence)
            if c.tag != HARD_RULE or claim.label != "large" or claim.kind not in ("writes line", "writes every"):
                continue
            about = (
                [claim.number - 1]
                if claim.kind == "writes line"
                else [i for i, v in enumerate(verbs) if v == claim.verb]
            )
            named += 1
            wrong += not set(about) <= lines
    assert named > len(seeds) / 2 and wrong / named < 0.1


def test_seeds_order_their_pairs(pairs, seeds):
    groups = group_by_query(pairs)
    gains = [
        (p.rule, score(seeds[q], p.prompt, p.chosen.view) - score(seeds[q], p.prompt, p.rejected.view))
        for q, group in groups.items()
        for p in group
    ]
    outcome = [g for rule, g in gains if rule == "outcome"]
    assert sum(g > 0 for g in outcome) / len(outcome) > 0.9
    assert sum(g > 0 for _, g in gains) / len(gains) > 0.7


def test_swapping_the_preferences_turns_the_rubrics_round(pairs, seeds):
    from dataclasses import replace

    turned = seed_rubrics([replace(p, chosen=p.rejected, rejected=p.chosen) for p in pairs], POOL.labels)
    gains = [
        score(turned[p.query_id], p.prompt, p.chosen.view) - score(turned[p.query_id], p.prompt, p.rejected.view)
        for p in pairs
    ]
    assert sum(g > 0 for g in gains) / len(gains) < 0.3


def test_deterministic_and_capped(pairs, seeds):
    assert seed_rubrics(pairs, POOL.labels) == seeds
    assert max(len(r) for r in seed_rubrics(pairs, POOL.labels, most=4).values()) <= 4


def test_other_tasks_get_rubrics_about_line_numbers(pairs):
    from dataclasses import replace

    plain = [replace(p, prompt="What is 2 + 2?") for p in pairs if p.query_id == pairs[0].query_id]
    (rubric,) = seed_rubrics(plain, POOL.labels).values()
    assert all(read(c.sentence).kind != "writes every" for c in rubric.criteria)


def test_queries_without_pairs_get_what_the_corpus_says(pairs, seeds):
    others = {q.id: q.prompt for q in queries(200)[120:]}
    found = seed_rubrics(pairs, POOL.labels, others=others)
    assert {q: found[q] for q in seeds} == seeds and set(found) == set(seeds) | set(others)
    by_id = {q.id: q for q in queries(200)}
    asked = {
        ((*by_id[q].meta["kinds"], "total")[claim.number - 1], claim.label)
        for q in others
        for claim in (read(c.sentence) for c in found[q].criteria if c.tag == HARD_RULE)
        if claim.kind == "writes line"
    }
    assert asked == {(kind, "large") for kind in HARD_KINDS}


def test_kinds_of_sentence_are_a_setting(pairs):
    def kinds(config):
        return {read(c.sentence).kind for r in seed_rubrics(pairs, POOL.labels, config).values() for c in r.criteria}

    assert "writes every" not in kinds(None) and len(kinds(None)) >= 3
    assert kinds(SeedConfig(kinds=("writes every",))) == {"writes every"}


def test_what_only_rides_along_with_a_needed_escalation_earns_nothing(pairs):
    """The corpus alone, for queries without pairs: large where it is needed, small elsewhere."""
    others = {q.id: q.prompt for q in queries(220)[120:]}
    found = seed_rubrics(pairs, POOL.labels, others=others)
    by_id = {q.id: q for q in queries(220)}
    right, wrong = {"large": 0, "small": 0}, {"large": 0, "small": 0}
    for q in others:
        for c in found[q].criteria:
            claim = read(c.sentence)
            if claim.kind == "writes line":
                needed = claim.number - 1 in hard_lines(by_id[q])
                (right if needed == (claim.label == "large") else wrong)[claim.label] += 1
    assert min(right.values()) > 50
    assert all(wrong[x] < 0.05 * right[x] for x in right)


def test_two_needed_lines_of_one_verb_are_both_named(pairs):
    prompt = "Ada's ledger of coins starts at 5 #0 banks 42 #1 earns 3 #2 banks 71 #3 earns 1 #4 Total?\n\n"
    rubric = seed_rubrics(pairs, POOL.labels, others={"twice": prompt})["twice"]
    assert {"the large model writes line #1", "the large model writes line #3"} <= {c.sentence for c in rubric.criteria}


def test_a_rubric_has_one_limit_of_each_kind(seeds):
    for rubric in seeds.values():
        kinds = [read(c.sentence).kind for c in rubric.criteria]
        assert kinds.count("switches") <= 1 and kinds.count("writes at most") <= 1
