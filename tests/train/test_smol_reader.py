"""What SmolLM2 is taught to read: worked solutions of the right split, and what must be found to judge a claim."""

from __future__ import annotations

import random

import pytest

from roro_fast.rubric.format import parse
from roro_fast.rubric.grammar import Claim, claims, read, truth
from roro_fast.rubric.render import View
from roro_fast.tasks.mixture import Mixture
from roro_fast.train.reader_data import LABELS, make_batch, sample_rubric
from roro_fast.train.smol_reader import TASK, WORDS, WorkedSource, facts

pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def source() -> WorkedSource:
    return WorkedSource("train", 40)


def test_questions_are_of_the_split_and_as_long_as_asked(source):
    asked = {q.prompt for q in Mixture(TASK).queries("train", 40, 0)}
    rng = random.Random(0)
    lengths = [source.size(rng) for _ in range(200)]
    assert {n: lengths.count(n) > 0 for n in source.by_steps} == dict.fromkeys(source.by_steps, True)
    for n in lengths[:20]:
        prompt, steps = source.draw(rng, n)
        assert prompt in asked and len(steps) == n and steps[-1].startswith("####")


def test_facts_decide_every_claim(source):
    """From the facts and the claim's own words alone: what is asked beside the verdict is enough for it."""
    rng = random.Random(1)
    for _ in range(30):
        models = tuple(rng.randrange(2) for _ in range(rng.randint(2, 6)))
        view = View(("x",) * len(models), models, (1,) * len(models))
        for c in claims((), LABELS, len(models) + 1):
            found = {words: WORDS[words][at].strip() for words, at in facts(c, view) if c.number <= len(models)}
            if not found:
                continue
            if c.kind in ("switches", "writes at most"):
                holds = int(found["number"]) <= c.number
            else:
                holds = found["writer"] == c.label
                if c.kind == "takes over after":
                    holds = holds and found["writer before"].lower() != c.label
            assert holds == truth(c, view, (), LABELS), (c, models)


def test_a_batch_without_verbs(source):
    """The nano tokenizer cannot spell the questions, but writes what is said about them."""
    from transformers import AutoTokenizer

    from roro_fast.models import nano
    from roro_fast.rubric.prompts import PromptEncoder

    tok = AutoTokenizer.from_pretrained(nano.path("small"))
    b = make_batch(PromptEncoder(tok, LABELS), 0, 0, 3, read=6, write=4, count=(8, 12), source=source)
    assert len(b.judged) == len(b.rows) == len(b.verdicts)
    assert [truth(c, v, (), LABELS) for c, v in b.judged] == b.verdicts.tolist()
    assert 0.3 < b.verdicts.float().mean() < 0.7
    assert not any(c.kind == "writes every" for c, _ in b.judged)


def test_rubrics_about_questions_without_verbs():
    for i in range(20):
        rubric = sample_rubric(random.Random(i), "What is 2 + 2?", steps=2)
        said = [read(c.sentence) for c in rubric.criteria]
        assert parse(str(rubric)) == rubric and all(isinstance(c, Claim) and c.number <= 2 for c in said)
