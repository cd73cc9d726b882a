"""Mixtures: their parts in turn, each verified by its own rules, splits apart from each other."""

from __future__ import annotations

from collections import Counter

import pytest

from roro_fast.config_io import load_config
from roro_fast.errors import ConfigError
from roro_fast.tasks.mixture import MIXTURES
from roro_fast.tasks.registry import load_task
from roro_fast.tasks.worked import results
from roro_fast.train.setup import load_task as task_of

pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize("name", MIXTURES)
def test_parts_come_in_turn_and_verify_their_own(name):
    task = load_task(name, timeout=2.0)
    parts = [p.name for p in MIXTURES[name]]
    assert len(set(parts)) == len(parts)
    queries = task.queries("test", 50)
    assert [q.task for q in queries] == [parts[i % len(parts)] for i in range(50)]
    assert len({q.id for q in queries}) == 50 and queries == load_task(name).queries("test", 60)[:50]
    assert all(task.verify(q, [f"#### {q.answer}"]).correct for q in queries)
    assert not any(task.verify(q, [f"#### {q.answer}1"]).correct for q in queries)


def test_splits_share_no_question():
    task = load_task("arithmetic")
    seen = Counter(p for s in ("train", "calibrate", "test") for p in {q.prompt for q in task.queries(s, 120)})
    assert max(seen.values()) == 1


def test_results_of_sums_stay_in_range():
    asked = [q for q in load_task("arithmetic").queries("test", 200) if q.task == "gym:chain_sum"]
    found = [results("chain_sum", q.prompt) for q in asked]
    assert len(asked) == 100 and all(r[-1] == int(q.answer) for q, r in zip(asked, found, strict=True))
    assert 0 <= min(map(min, found)) < 5 and 150 < max(map(max, found)) < 200


def test_held_out_families_are_others():
    trained, held_out = ({p.task for p in MIXTURES[m]} for m in ("arithmetic", "arithmetic_held_out"))
    assert trained and held_out and not trained & held_out


def test_a_config_reaches_the_options_of_a_gym_task():
    config = load_config("nano", ["task.name=gym:chain_sum", "task.options.min_terms=5", "task.options.max_terms=5"])
    assert all(len(q.prompt.split(" + ")) + q.prompt.count(" - ") == 5 for q in task_of(config).queries("test", 5))
    with pytest.raises(ConfigError, match=r"task\.options: .*gym:chain_sum refuses .*terms"):
        task_of(load_config(config, ["task.options.terms=5"]))
    with pytest.raises(ConfigError, match=r"task\.options: ledger has none"):
        load_config("nano", ["task.options.min_terms=5"])
    assert task_of(load_config("nano", ["task.name=arithmetic"])).name == "arithmetic"
