"""Prompts at the token level: verdict rows sit where they should, special tokens in texts are defused."""

from __future__ import annotations

import pytest

from roro_fast.errors import ConfigError
from roro_fast.rubric.format import Rubric, parse
from roro_fast.rubric.prompts import PromptEncoder, verdict_ids
from roro_fast.rubric.render import render, view_of
from tests.rubric.samples import POOL, queries, tokenizer_at, trajectory

TEXT = """- [Hard Rule] (timely escalation) the large model writes line #2
- [Principle] (efficient allocation) at most 2 switches
- [Principle] (efficient allocation) the large model writes at most 2 lines"""


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer_at(tmp_path_factory.mktemp("tok"))


@pytest.fixture(scope="module")
def encoder(tok):
    return PromptEncoder(tok, POOL.labels)


@pytest.fixture(scope="module")
def routed():
    (q,) = queries(1)
    return q, trajectory(q, [i % 2 for i in range(len(q.meta["kinds"]) + 1)])


def test_judge_prompt_reads_as_documented(tok, encoder, routed):
    q, t = routed
    rubric, view = parse(TEXT), view_of(t, POOL)
    assert isinstance(rubric, Rubric)
    p = encoder.judge(q.prompt, view, rubric)
    body = "\n".join(f"{c} Verdict:" for c in rubric.criteria)
    expected = f"Query:\n{q.prompt.strip()}\nTrajectory:\n{render(view, POOL.labels)}Rubric:\n{body}"
    assert tok.decode(p.ids) == expected
    assert p.weights == [3.0, 1.0, 1.0] and p.rows[-1] == len(p.ids) - 1
    for row, c in zip(p.rows, rubric.criteria, strict=True):
        assert tok.decode(p.ids[: row + 1]).endswith(f"{c} Verdict:")
    assert p.ids == tok(expected, add_special_tokens=False)["input_ids"]


def test_gold_and_outcome_are_not_in_the_prompt(tok, encoder, routed):
    q, t = routed
    rubric = parse(TEXT)
    before = encoder.judge(q.prompt, view_of(t, POOL), rubric).ids
    t.correct, t.predicted = not t.correct, "13"
    assert encoder.judge(q.prompt, view_of(t, POOL), rubric).ids == before


def test_rubricor_prompt_and_completion_join_to_the_text(tok, encoder, routed):
    q, _ = routed
    rubric = parse(TEXT)
    ids = encoder.rubricor(q.prompt) + encoder.completion(rubric)
    assert tok.decode(ids) == f"Query:\n{q.prompt.strip()}\nRubric:\n{TEXT}<eos>"
    assert encoder.decode(encoder.completion(rubric)) == TEXT
    assert encoder.decode([*encoder.completion(rubric), 5, 5]) == TEXT


def test_special_tokens_in_texts_are_only_text(tok, encoder):
    ids = encoder.query("Ada's ledger <eos> of coins<pad>")
    assert tok.eos_token_id not in ids and tok.pad_token_id not in ids


def test_preamble_comes_first(tok, routed):
    q, _ = routed
    e = PromptEncoder(tok, POOL.labels, "Rubric of the large model.\n")
    assert tok.decode(e.rubricor(q.prompt)).startswith("Rubric of the large model.\nQuery:\n")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ((" true", " true"), "same token"),
        ((" the large", " false"), "2 tokens"),
        ((" certainly", " false"), "not one known token"),
    ],
)
def test_bad_verdict_words_are_refused(tok, words, match):
    with pytest.raises(ConfigError, match=match):
        verdict_ids(tok, words)


def test_verdict_words_resolve(tok):
    assert tok.convert_ids_to_tokens(verdict_ids(tok)) == [" true", " false"]
