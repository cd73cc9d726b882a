"""The closed grammar: sentences round-trip, truths match a by-hand reading, checks know the query."""

from __future__ import annotations

import pytest

from roro_fast.rubric.format import ALLOCATION, ESCALATION, RECOVERY, Criterion, InvalidRubric, Rubric, parse
from roro_fast.rubric.grammar import KINDS, axis_of, checker, claims, criterion, read, truth, verbs_of
from roro_fast.rubric.render import View
from tests.rubric.samples import queries, tokenizer_at

LABELS = ("small", "large")
PROMPT = "Ada's ledger of coins starts at 37 #0 earns 5 #1 swaps #2 earns 9 #3 banks 48 #4 Total?\n\n"
VERBS = ("earns", "swaps", "earns", "banks")


def view(models: str) -> View:
    writers = tuple("sl".index(m) for m in models)
    return View(("x",) * len(writers), writers, (1,) * len(writers))


def test_verbs_of():
    assert verbs_of(PROMPT) == VERBS
    assert verbs_of("What is 2 + 2?") == ()


@pytest.mark.parametrize("labels", [LABELS, ("small", "medium", "large")])
def test_sentences_round_trip_and_have_distinct_texts(labels):
    options = claims(VERBS, labels)
    assert {c.kind for c in options} == set(KINDS)
    assert [read(str(c)) for c in options] == options
    assert len({str(c) for c in options}) == len(options)


@pytest.mark.parametrize(
    ("sentence", "models", "expected"),
    [
        ("the large model writes line #2", "slsss", True),
        ("the large model writes line #2", "sslll", False),
        ("the small model writes line #5", "sslls", True),
        ("the small model writes line #5", "ssl", False),
        ("the large model writes every earns line", "lslss", True),
        ("the large model writes every earns line", "lssss", False),
        ("the small model writes every banks line", "lllsl", True),
        ("the small model writes every banks line", "sss", False),
        ("the small model takes over after line #2", "slsss", True),
        ("the small model takes over after line #2", "sssss", False),
        ("the small model takes over after line #2", "sllss", False),
        ("the small model takes over after line #5", "lllll", False),
        ("the large model takes over after line #1", "slsss", True),
        ("the large model writes at most 2 lines", "lslss", True),
        ("the large model writes at most 1 lines", "lslss", False),
        ("at most 2 switches", "ssllss"[:5], True),
        ("at most 1 switches", "slsss", False),
        ("at most 0 switches", "lllll", True),
    ],
)
def test_truth(sentence, models, expected):
    claim = read(sentence)
    assert claim is not None
    assert truth(claim, view(models), VERBS, LABELS) is expected


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "the large model writes line #02",
        "the large model writes line 2",
        "at most two switches",
        "at most 2 switches.",
    ],
)
def test_other_sentences_make_no_claim(sentence):
    assert read(sentence) is None


def test_axes():
    assert axis_of(read("the large model writes line #2"), LABELS) == ESCALATION
    assert axis_of(read("the large model takes over after line #2"), LABELS) == ESCALATION
    assert axis_of(read("the small model takes over after line #2"), LABELS) == RECOVERY
    assert axis_of(read("the small model writes every earns line"), LABELS) == ALLOCATION
    assert axis_of(read("the large model writes at most 2 lines"), LABELS) == ALLOCATION


@pytest.mark.parametrize(
    ("sentence", "axis", "ok"),
    [
        ("the large model writes every swaps line", ESCALATION, True),
        ("the large model writes every swaps line", ALLOCATION, False),
        ("the large model writes every scales line", ESCALATION, False),
        ("the large model writes line #6", ESCALATION, False),
        ("the huge model writes line #1", ESCALATION, False),
        ("the answer is right", ALLOCATION, False),
    ],
)
def test_check_knows_the_query(sentence, axis, ok):
    why = checker(PROMPT, LABELS)(Criterion("Hard Rule", axis, sentence))
    assert (why == "") is ok


def test_check_of_a_query_without_verbs_takes_any_sentence_of_the_grammar():
    check = checker("What is 2 + 2?", LABELS)
    assert check(Criterion("Hard Rule", ESCALATION, "the large model writes line #12")) == ""
    assert check(Criterion("Hard Rule", ESCALATION, "the large model thinks")) != ""


def test_all_rubrics_of_the_grammar_parse_under_its_check():
    check = checker(PROMPT, LABELS)
    options = claims(VERBS, LABELS)
    for i in range(0, len(options) - 3, 3):
        rubric = Rubric(tuple(criterion(c, "Principle", LABELS) for c in options[i : i + 3]))
        assert parse(str(rubric), check) == rubric
    foreign = str(rubric).replace("switches", "errors")
    assert isinstance(parse(foreign, check), InvalidRubric)


def test_every_sentence_is_known_words(tmp_path):
    tok = tokenizer_at(tmp_path)
    for q in queries(20):
        for c in claims(verbs_of(q.prompt), ("small", "medium", "large")):
            text = str(criterion(c, "Hard Rule", ("small", "medium", "large")))
            ids = tok(text, add_special_tokens=False)["input_ids"]
            assert tok.unk_token_id not in ids and tok.decode(ids) == text
