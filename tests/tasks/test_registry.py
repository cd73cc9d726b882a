from __future__ import annotations

import pytest

from roro_fast.errors import ConfigError
from roro_fast.tasks.benchmarks import HUB, Benchmark
from roro_fast.tasks.ledger import Ledger
from roro_fast.tasks.registry import load_task


def test_ledger_and_hub_names():
    assert isinstance(load_task("ledger"), Ledger)
    for name in HUB:
        task = load_task(name)
        assert isinstance(task, Benchmark) and task.name == name


def test_a_ledger_of_some_kinds():
    task = load_task("ledger:mul+add1")
    found = task.queries("test", 30)
    assert {k for q in found for k in q.meta["kinds"]} == {"add1", "mul"}
    assert found[0].id == "ledger-test-0-add1+mul-0" and task.verify(found[0], []).error == "no answer"
    with pytest.raises(ConfigError, match=r"task\.name: 'div' is no kind of ledger line; choose of add1, .*swap"):
        load_task("ledger:add1+div")


def test_files_by_path(tmp_path, monkeypatch):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": "a", "problem": "1 + 1?", "answer": "2"}\n')
    assert load_task(str(path)).queries("test")[0].answer == "2"
    assert load_task(path, split_by="train").queries("train")[0].split == "train"
    other = tmp_path / "mine.txt"
    path.rename(other)
    assert load_task(str(other)).name == "mine"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").write_text("")
    assert load_task("gsm8k").name == "gsm8k"  # a name wins over a file of that name


def test_gym_names_take_the_tasks_own_options():
    pytest.importorskip("reasoning_gym")
    task = load_task("gym:chain_sum", min_terms=4, max_terms=4)
    assert all(q.prompt.count("+") + q.prompt.count(" - ") == 3 for q in task.queries("test", 5))


@pytest.mark.parametrize("name", ["", "gsm", "gsm8k.json", "/tmp"])
def test_unknown_names_list_the_choices(name):
    with pytest.raises(
        ConfigError, match=r"task\.name: unknown task .*ledger, ledger:<kind>.*, gsm8k, .*gym:<.*path/to/file\.jsonl"
    ):
        load_task(name)


def test_missing_files_and_options_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"task\.name: there is no file .*nothing\.jsonl"):
        load_task(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ConfigError, match=r"task\.options\.size: not an option of ledger; known: it takes none"):
        load_task("ledger", size=3)
    with pytest.raises(
        ConfigError, match=r"task\.options\.split: not an option of gsm8k; known: split_by, strict, timeout"
    ):
        load_task("gsm8k", split="train")
