from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roro_fast.errors import ConfigError, DataError
from roro_fast.models import nano_tokenizer
from roro_fast.tasks import ledger
from roro_fast.tasks.base import SPLITS
from roro_fast.tasks.ledger import DELIMITER, KINDS, Ledger, Line, parse_query, render_query, render_steps, split_of

TASK = Ledger()


@st.composite
def problems(draw):
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=ledger.MIN_LINES, max_size=ledger.MAX_LINES))
    lines = [
        Line(k, draw(st.sampled_from(k.verbs)), draw(st.integers(*k.operands)) if k.operands else 0) for k in kinds
    ]
    start = draw(st.integers(0, ledger.MODULUS - 1))
    name, item = draw(st.sampled_from(ledger.NAMES)), draw(st.sampled_from(ledger.ITEMS))
    return render_query(name, item, start, lines), start, lines


def as_query(prompt: str, answer: str) -> ledger.Query:
    return ledger.Query("q", prompt, answer, "ledger")


def gold_steps(query: ledger.Query) -> list[str]:
    return render_steps(*parse_query(query.prompt))


@given(problems())
def test_prompts_read_back(problem):
    prompt, start, lines = problem
    assert parse_query(prompt) == (start, lines)


@given(problems())
def test_reference_answers_verify(problem):
    prompt, start, lines = problem
    steps = render_steps(start, lines)
    value = start
    for line in lines:
        value = line.kind.apply(value, line.operand)
        assert 0 <= value < ledger.MODULUS
    outcome = TASK.verify(as_query(prompt, str(value)), steps)
    assert outcome.correct and outcome.predicted == str(value) and outcome.error == ""
    assert outcome.steps == (True,) * (len(lines) + 1)


@given(problems(), st.data())
def test_one_wrong_result_is_one_wrong_step(problem, data):
    """A result that is wrong and carried on correctly: only the step that made it is wrong."""
    prompt, start, lines = problem
    bad = data.draw(st.integers(0, len(lines) - 1))
    values = [start]
    for i, line in enumerate(lines):
        value = line.kind.apply(values[-1], line.operand)
        if i == bad:
            value = (value + data.draw(st.integers(1, ledger.MODULUS - 1))) % ledger.MODULUS
        values.append(value)
    steps = [
        f" {line}: {a} gives {b} #{i}{DELIMITER}"
        for i, (line, a, b) in enumerate(zip(lines, values[:-1], values[1:], strict=True), 1)
    ]
    truth = render_steps(start, lines)[-1].split()[-1]
    outcome = TASK.verify(as_query(prompt, truth), [*steps, f" Total {values[-1]}"])
    assert outcome.steps == tuple(i != bad for i in range(len(lines) + 1))
    assert outcome.correct == (str(values[-1]) == truth)


@given(problems(), st.data())
def test_a_value_not_copied_from_the_last_step_is_wrong(problem, data):
    prompt, start, lines = problem
    steps = render_steps(start, lines)
    bad = data.draw(st.integers(0, len(lines) - 1))
    before = int(steps[bad].split(": ")[1].split()[0])
    other = (before + data.draw(st.integers(1, ledger.MODULUS - 1))) % ledger.MODULUS
    after = lines[bad].kind.apply(other, lines[bad].operand)
    steps[bad] = f" {lines[bad]}: {other} gives {after} #{bad + 1}{DELIMITER}"
    flags = TASK.verify(as_query(prompt, "0"), steps).steps
    assert not flags[bad]
    assert all(flags[:bad])


@pytest.fixture(scope="module")
def query() -> ledger.Query:
    """Lines: add1, add2, swap, mul; start 37."""
    by_name = {k.name: k for k in KINDS}
    lines = [
        Line(by_name["add1"], "earns", 5),
        Line(by_name["add2"], "banks", 48),
        Line(by_name["swap"], "swaps", 0),
        Line(by_name["mul"], "scales", 3),
    ]
    return as_query(render_query("Ada", "coins", 37, lines), "27")


def test_the_worked_example(query):
    assert gold_steps(query) == [
        " earns 5: 37 gives 42 #1\n\n",
        " banks 48: 42 gives 90 #2\n\n",
        " swaps: 90 gives 9 #3\n\n",
        " scales 3: 9 gives 27 #4\n\n",
        " Total 27",
    ]


@pytest.mark.parametrize(
    ("index", "fault"),
    [
        (0, " earns 6: 37 gives 43 #1\n\n"),  # another operand, with its right result
        (0, " finds 5: 37 gives 42 #1\n\n"),  # a synonym that the query does not use
        (0, " earns 5: 37 gives 42 #2\n\n"),  # another line number
        (0, " earns 5: 37 gives 42\n\n"),  # no line number
        (0, " earns 5: 37 gives 042 #1\n\n"),
        (0, " earns 5: 37 gives 42 #1 \n\n"),
        (0, " earns 5: 37 gives 42 #1\n\n\n"),
        (0, "  earns 5: 37 gives 42 #1\n\n"),
        (0, "x earns 5: 37 gives 42 #1\n\n"),
        (0, " earns 5: 37 gives \u0664\u0662 #1\n\n"),
        (0, " earns 5: 37 gives " + "9" * 5000 + " #1\n\n"),
        (0, "\n\n"),
        (0, ""),
        (1, " banks 48: 24 gives 90 #2\n\n"),  # a miscopied value, with the result of the right one
        (1, " banks 48: 42 gives 80 #2\n\n"),  # a forgotten carry
        (2, " swaps 0: 90 gives 9 #3\n\n"),  # an operand the line does not have
        (2, " swaps: 90 gives 90 #3\n\n"),
        (4, " Total 28"),
        (4, " Total 27.\n\n"),
        (4, " total 27"),
        (4, " Total " + "9" * 5000),
    ],
)
def test_planted_faults_are_caught(query, index, fault):
    steps = gold_steps(query)
    steps[index] = fault
    flags = TASK.verify(query, steps).steps
    assert not flags[index] and all(flags[:index])


def test_wrong_total_is_a_wrong_answer(query):
    outcome = TASK.verify(query, [*gold_steps(query)[:-1], " Total 28"])
    assert (outcome.correct, outcome.predicted, outcome.error) == (False, "28", "")


def test_missing_total_is_no_answer(query):
    for steps in (gold_steps(query)[:-1], gold_steps(query)[:2], []):
        outcome = TASK.verify(query, steps)
        assert (outcome.correct, outcome.predicted, outcome.error) == (False, None, "no answer")
        assert outcome.steps == (True,) * len(steps)


def test_a_total_written_too_early_is_no_answer(query):
    steps = gold_steps(query)
    outcome = TASK.verify(query, [*steps[:2], " Total 27"])
    assert not outcome.correct and outcome.steps == (True, True, False)


def test_extra_steps_are_wrong_steps(query):
    steps = gold_steps(query)
    assert TASK.verify(query, [*steps, " Total 27"]).steps == (True,) * 5 + (False,)
    assert TASK.verify(query, [*steps[:4], " earns 5: 27 gives 32 #5\n\n", " Total 32"]).steps[4:] == (False, False)
    after = TASK.verify(query, [*steps, " Total 28"])
    assert not after.correct and after.predicted == "28"


def test_splits_share_no_kind_sequence():
    seen = {s: {tuple(q.meta["kinds"]) for q in TASK.queries(s, 1500)} for s in SPLITS}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["calibrate"]
    assert not seen["test"] & seen["calibrate"]
    for split, sequences in seen.items():
        assert len(sequences) > 200
        assert {split_of(s) for s in sequences} == {split}


def test_split_sizes_are_as_documented():
    rng = random.Random(0)
    sequences = {tuple(x.kind.name for x in ledger.sample_problem(rng)[3]) for _ in range(4000)}
    share = Counter(split_of(s) for s in sequences)
    total = sum(share.values())
    assert abs(share["train"] / total - 0.7) < 0.04
    assert abs(share["calibrate"] / total - 0.1) < 0.03
    assert abs(share["test"] / total - 0.2) < 0.04


def test_queries_are_deterministic_and_a_prefix_of_longer_draws():
    assert TASK.queries("test", 20, seed=3) == TASK.queries("test", 20, seed=3) == TASK.queries("test", 50, seed=3)[:20]
    assert [q.prompt for q in TASK.queries("test", 20, seed=3)] != [q.prompt for q in TASK.queries("test", 20, seed=4)]
    # pinned: shipped weights were trained on this division
    pinned = {"add1 swap mul sub2": "train", "mul mul mul mul": "test", "swap add1 add1 sub1 add2": "train"}
    assert {k: split_of(k.split()) for k in pinned} == pinned


def test_queries_are_whole():
    queries = TASK.queries("calibrate", 200)
    assert len({q.id for q in queries}) == 200
    for q in queries:
        assert q.split == "calibrate" and q.task == "ledger"
        assert json.loads(json.dumps(q.meta)) == q.meta
        assert TASK.verify(q, gold_steps(q)).correct
        assert q.answer not in q.meta.values()
    assert {k for q in queries for k in q.meta["kinds"]} == {k.name for k in KINDS}


def test_every_text_survives_the_nano_tokenizer():
    tok = nano_tokenizer.build()
    unknown = tok.token_to_id("<unk>")
    for q in TASK.queries("train", 100):
        text = q.prompt + "".join(gold_steps(q))
        ids = tok.encode(text).ids
        assert unknown not in ids
        assert tok.decode(ids, skip_special_tokens=False) == text


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match=r"task\.split.*'dev'"):
        TASK.queries("dev", 1)
    with pytest.raises(DataError, match="not a ledger prompt"):
        parse_query("What is 1 + 1?")
    with pytest.raises(DataError, match="unknown ledger verb 'juggles'"):
        parse_query("Ada's ledger of coins starts at 37 #0 juggles 5 #1 Total?\n\n")
