"""Thoughts: delimited into steps as everything else, and never taken for an answer."""

from __future__ import annotations

import pytest

from roro_fast.config_io import load_config
from roro_fast.engine.finish import decode
from roro_fast.models.delimiter import StepBoundary
from roro_fast.tasks.answers import check_answer, extract_final_answer
from roro_fast.tasks.base import Query
from roro_fast.tasks.benchmarks import Benchmark
from roro_fast.tasks.gym import Gym
from roro_fast.tasks.thinking import after_thinking, in_thought, opens_thought
from roro_fast.train.setup import Workbench
from tests import chat

THOUGHT = "<think>\nTry \\boxed{7}.\n\nNo, 3 + 1 = 4.\n</think>\n\n"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (THOUGHT + "The answer is 4.", "4"),
        (THOUGHT + "So 3 + 1 = 4", "4"),
        (THOUGHT, None),
        (THOUGHT[: THOUGHT.index("</think>")], None),
        ("Try \\boxed{7}.\n</think>\n\n\\boxed{4}", "4"),
        ("<think>\n\n</think>\n\n#### 4", "4"),
        (THOUGHT + "\\boxed{9} <think>or 8</think> rather \\boxed{4}", "4"),
        ("I think \\boxed{4}", "4"),
    ],
)
def test_only_what_follows_the_thought_is_an_answer(text: str, answer: str | None) -> None:
    assert extract_final_answer(text) == answer
    verdict = check_answer(text, "4")
    assert verdict.correct == (answer == "4") and (answer is not None or verdict.error == "no answer")


def test_text_without_a_number_is_compared_after_the_thought() -> None:
    assert check_answer(THOUGHT + "blue", "blue").correct and not check_answer("<think>blue", "blue").correct


@pytest.mark.parametrize("task", [Benchmark("b", {}), Gym("chain_sum")])
def test_a_thought_the_prompt_opened_counts_as_one(task: Benchmark | Gym) -> None:
    query = Query("q", "p", "7", "b")
    cut = ["Try \\boxed{7}.\n\n", "Or is it"]
    assert task.verify(query, cut).correct
    assert not task.verify(in_thought(query), cut).correct
    assert task.verify(in_thought(query), [*cut, "8?\n</think>\n\n", "\\boxed{7}"]).correct


def test_gym_answers_in_words_come_after_the_thought() -> None:
    task = Gym("spell_backward")
    query = task.queries("test", 1)[0]
    assert task.verify(query, ["<think>\n", "wrong\n\n", "</think>\n\n", query.answer]).correct
    assert not task.verify(query, ["<think>\n", query.answer]).correct


def test_steps_inside_a_thought_are_delimited_as_everywhere() -> None:
    tok = chat.tokenizer()
    ids = tok(THOUGHT + "So 4.\n\nDone", add_special_tokens=False)["input_ids"]
    ends = StepBoundary(tok, "\n\n").ends(ids)
    cuts = [0, *ends, len(ids)]
    steps = decode(tok, [ids[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)])
    assert steps == ["<think>\nTry \\boxed{7}.\n\n", "No, 3 + 1 = 4.\n</think>\n\n", "So 4.\n\n", "Done"]
    assert Benchmark("b", {}).verify(Query("q", "p", "4", "b"), steps).correct


def test_templates_that_open_the_thought_are_recognised(tmp_path) -> None:
    pair = chat.save_pair(tmp_path)
    opening = chat.TEMPLATE.replace("'<|assistant|>'", "'<|assistant|><think>\\n'")
    rows = '{"id": 1, "problem": "p", "answer": 7}\n'
    (tmp_path / "b.jsonl").write_text(rows)
    settings = [f"models.paths=[{pair[0]}, {pair[1]}]", f"task.name={tmp_path / 'b.jsonl'}", "task.split_by=test"]
    for switch, template, opens in (("true", opening, True), ("false", opening, False), ("true", None, False)):
        bench = Workbench(load_config("nano", [*settings, f"task.chat.enable_thinking={switch}"]))
        bench.tokenizer.chat_template = template or chat.TEMPLATE
        assert opens_thought(bench.tokenizer, bench.config.task.chat) == opens
        (query,) = bench.queries("test")
        assert bench.task.verify(query, ["Is it 7"]).correct != opens
        assert bench.encode(query)[-1] == bench.tokenizer("\n" if opens or switch == "false" else ">")["input_ids"][0]


def test_thoughts_are_cut_in_linear_time() -> None:
    assert after_thinking("<think>" * 200_000 + "</think>4") == "4"
