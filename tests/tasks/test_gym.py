from __future__ import annotations

import json

import pytest

from roro_fast.errors import ConfigError
from roro_fast.tasks import checkers
from roro_fast.tasks.base import SPLITS
from roro_fast.tasks.gym import CHUNK, Gym, names

pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module", autouse=True)
def close_workers():
    yield
    checkers.close_shared_pools()


@pytest.fixture(scope="module")
def gsm():
    return Gym("gsm_symbolic")


@pytest.fixture(scope="module")
def seventy(gsm):
    """A query whose gold answer is an integer of at least two digits."""
    return next(q for q in gsm.queries("test", 40) if q.answer.isdigit() and int(q.answer) > 9)


def test_splits_share_no_question():
    task = Gym("chain_sum", max_terms=2, max_digits=1)  # a small space, where seeds alone would collide
    prompts = {s: {q.prompt for q in task.queries(s, 12)} for s in SPLITS}
    assert all(len(v) == 12 for v in prompts.values())
    assert len(set().union(*prompts.values())) == 36


def test_no_generator_seed_is_used_twice():
    """Item i of a reasoning-gym data set is made from seed + i, whatever the data set it belongs to."""
    task = Gym("chain_sum")
    chunks = {s: {q.meta["seed"] for q in task.queries(s, 300)} for s in SPLITS}
    starts = sorted(start for split in chunks.values() for start in split)
    assert all(len(c) > 1 for c in chunks.values())
    assert all(b - a >= CHUNK for a, b in zip(starts, starts[1:], strict=False))


def test_queries_are_deterministic_prefixes(gsm):
    assert gsm.queries("train", 5, seed=1) == gsm.queries("train", 9, seed=1)[:5]
    a, b = gsm.queries("train", 5, seed=1), gsm.queries("train", 5, seed=2)
    assert not {q.prompt for q in a} & {q.prompt for q in b}
    assert gsm.queries("train", 0) == []
    for q in a:
        assert q.task == "gym:gsm_symbolic" and q.split == "train"
        assert json.loads(json.dumps(q.meta)) == q.meta
        assert q.meta["solution"].endswith(f"#### {q.answer}")


def test_number_answers_are_compared_whole(gsm, seventy):
    gold = int(seventy.answer)
    verify = lambda *steps: gsm.verify(seventy, steps).correct  # noqa: E731
    assert verify(f"The 3 of them make {gold}")
    assert verify("First 1.\n\n", f"<answer>{gold}.00</answer>")
    assert verify(f"\\boxed{{{gold:,}}}")
    assert not verify(f"-{gold}")
    assert not verify(f"{gold} of them make {gold + 1}")
    assert not verify(f"{gold}{gold}")
    assert gsm.verify(seventy, ["no idea"]).error == "no answer"


def test_their_worked_solutions_verify(gsm):
    for q in gsm.queries("calibrate", 20):
        assert gsm.verify(q, [q.meta["solution"]]).correct


def test_other_answers_go_to_the_tasks_own_scorer():
    task = Gym("word_sorting", timeout=30)
    query = task.queries("test", 1)[0]
    words = query.answer.split(", ")
    assert task.verify(query, ["thinking\n\n", query.answer]).correct
    assert task.verify(query, [f"<answer>{','.join(words)}</answer>"]).correct  # the scorer forgives spacing
    swapped = ", ".join([words[1], words[0], *words[2:]])
    assert not task.verify(query, [f"<answer>{swapped}</answer>"]).correct


def test_a_scorer_without_a_single_gold_answer():
    task = Gym("graph_color", timeout=30)
    query = task.queries("test", 1)[0]
    assert query.answer == ""
    outcome = task.verify(query, ['<answer>{"0": 1}</answer>'])
    assert not outcome.correct and outcome.predicted == '{"0": 1}'


def test_partial_credit_is_not_correct():
    task = Gym("number_sorting", timeout=30)
    query = task.queries("test", 1)[0]
    assert task.verify(query, [f"<answer>{query.answer}</answer>"]).correct
    assert not task.verify(query, [f"<answer>{query.answer} or so</answer>"]).correct


def test_a_hostile_answer_is_bounded():
    task = Gym("simple_integration", timeout=1.0)
    query = task.queries("test", 1)[0]
    outcome = task.verify(query, ["<answer>9**9**9**9*x</answer>"])
    assert not outcome.correct and outcome.error
    assert task.verify(query, ["<answer>" + "x" * 10**6 + "</answer>"]).error == "too long"


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match=r"no task 'sum'; did you mean .*gym:chain_sum"):
        Gym("sum")
    with pytest.raises(ConfigError, match=r"task\.options: gym:chain_sum refuses .*max_term"):
        Gym("chain_sum", max_term=3)
    with pytest.raises(ConfigError, match=r"task\.options: gym:chain_sum refuses"):
        Gym("chain_sum", min_terms=5, max_terms=2)
    with pytest.raises(ConfigError, match=r"task\.split: unknown split 'dev'"):
        Gym("chain_sum").queries("dev", 1)
    with pytest.raises(ConfigError, match=r"task\.n: gym:coin_flip gave only \d+ distinct test questions"):
        Gym("coin_flip", max_trials=4).queries("test", 200)
    assert "composite" not in names() and "gsm_symbolic" in names()
