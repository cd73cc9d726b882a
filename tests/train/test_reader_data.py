"""The reader's data: only train-split queries, true verdicts, answers where the batch says they are."""

from __future__ import annotations

import random

import pytest

from roro_fast.rubric.format import Rubric, parse
from roro_fast.rubric.grammar import checker, read, truth, verbs_of
from roro_fast.rubric.prompts import PromptEncoder
from roro_fast.rubric.render import View
from roro_fast.tasks.ledger import parse_query, split_of
from roro_fast.train.reader_data import LABELS, make_batch, sample_query, sample_rubric, sample_view
from tests.rubric.samples import tokenizer_at


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer_at(tmp_path_factory.mktemp("tok"))


@pytest.fixture(scope="module")
def batch(tok):
    return make_batch(PromptEncoder(tok, LABELS), tok.pad_token_id, 0, 1, read=12, write=6)


def read_back(text: str) -> tuple[str, View, list[str]]:
    """(prompt, view, sentences) of a decoded Judge prompt."""
    query, rest = text.removeprefix("Query:\n").split("\nTrajectory:\n")
    steps, rubric = rest.split("Rubric:\n")
    rows = [line.split(": ", 1) for line in steps.strip().split("\n")]
    heads = [head.split() for head, _ in rows]  # - line #1 small cost 3
    view = View(tuple(t for _, t in rows), tuple(LABELS.index(h[3]) for h in heads), tuple(int(h[5]) for h in heads))
    return query, view, [x.split(") ", 1)[1].removesuffix(" Verdict:") for x in rubric.split("\n") if "Verdict:" in x]


def test_verdicts_are_the_truth_of_what_is_written(tok, batch):
    width, checked = batch.read.shape[1], 0
    for b, row in enumerate(batch.read):
        prompt, view, sentences = read_back(tok.decode(row[row != tok.pad_token_id]))
        mine = (batch.rows // width == b).nonzero().flatten().tolist()
        assert len(mine) == len(sentences)
        for i, sentence in zip(mine, sentences, strict=True):
            r = int(batch.rows[i]) % width
            assert tok.decode(row[: r + 1]).endswith(f"{sentence} Verdict:")
            assert truth(read(sentence), view, verbs_of(prompt), LABELS) == bool(batch.verdicts[i])
            checked += 1
    assert checked == len(batch.verdicts) > 60
    assert 0.35 < batch.verdicts.float().mean() < 0.65


def test_recited_answers_are_the_next_tokens(tok, batch):
    flat = batch.read.flatten()
    assert (flat[batch.recited[:, 0] + 1] == batch.recited[:, 1]).all()
    words = set(tok.convert_ids_to_tokens(batch.recited[:, 1].tolist()))
    assert {" small", " large", " last", " or"} <= words


def test_rubrics_to_write_are_well_formed(tok, batch):
    for ids in batch.write:
        text = tok.decode(ids[ids != tok.pad_token_id])
        prompt, rubric = text.removeprefix("Query:\n").split("\nRubric:\n")
        assert isinstance(parse(rubric, checker(prompt, LABELS)), Rubric)


def test_a_batch_is_a_function_of_seed_and_step(tok, batch):
    encoder = PromptEncoder(tok, LABELS)
    again = make_batch(encoder, tok.pad_token_id, 0, 1, read=12, write=6)
    assert (again.read == batch.read).all() and (again.write == batch.write).all()
    other = make_batch(encoder, tok.pad_token_id, 0, 2, read=12, write=6)
    assert other.read.shape != batch.read.shape or (other.read != batch.read).any()


def test_queries_are_of_the_train_split():
    rng = random.Random(0)
    for lines in (4, 8):
        prompt, steps = sample_query(rng, lines)
        kinds = [x.kind.name for x in parse_query(prompt)[1]]
        assert split_of(kinds) == "train" and len(kinds) == lines and len(steps) == lines + 1


def test_all_kinds_of_routes_occur():
    rng = random.Random(0)
    prompt, steps = sample_query(rng, 6)
    views = [sample_view(rng, steps, verbs_of(prompt), 2) for _ in range(300)]
    switches = [v.switches for v in views]
    shares = [sum(v.models) / len(v.models) for v in views]
    assert min(switches) == 0 and max(switches) >= 5 and min(shares) == 0 and max(shares) == 1
    assert all(0 <= c <= 100 for v in views for c in v.costs)


def test_random_rubrics_are_about_the_query():
    rng = random.Random(0)
    prompt, _ = sample_query(rng, 4)
    rubrics = [sample_rubric(rng, prompt) for _ in range(50)]
    assert all(parse(str(r), checker(prompt, LABELS)) == r for r in rubrics)
    assert not any("writes every" in str(r) for r in rubrics)
    assert {len(r) for r in rubrics} == {3, 4, 5, 6} and len(set(rubrics)) == 50
