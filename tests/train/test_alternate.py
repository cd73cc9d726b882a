"""The alternation: order, disjoint shares, log rows, and resuming after any phase to the identical result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from roro_fast.config import PAIR_RULES, RubricConfig
from roro_fast.errors import DataError
from roro_fast.rubric.judge import Judge, JudgeInput
from roro_fast.rubric.pairs import build_pairs
from roro_fast.rubric.rubricor import Rubricor
from roro_fast.train import alternate as module
from roro_fast.train.alternate import STATE, alternate, evaluate, phases, thirds
from tests.rubric.samples import POOL, queries, routed
from tests.tiny import save_tiny

CONFIG = RubricConfig(sft_steps=2, steps=1, batch_size=4, max_tokens=24, group_size=2)


@pytest.fixture(scope="module")
def pairs():
    qs = [q for q in queries(80) if len(q.meta["kinds"]) == 4][:12]
    return build_pairs({q.id: q for q in qs}, [t for q in qs for t in routed(q, 6, {1})], POOL)[0]


def models(root: Path) -> tuple[Judge, Rubricor]:
    return Judge.load(save_tiny(root / "j", hidden=16, seed=1)), Rubricor.load(save_tiny(root / "r", hidden=16, seed=2))


def weights(*owners) -> list[torch.Tensor]:
    return [p.clone() for o in owners for p in o.model.parameters()]


def test_phases_follow_the_order():
    assert phases(RubricConfig(rounds=2)) == [
        (0, "warm-up"),
        (1, "judge"),
        (1, "rubricor"),
        (2, "judge"),
        (2, "rubricor"),
    ]
    first = phases(RubricConfig(rounds=1, order="rubricor_first"))
    assert first == [(0, "warm-up"), (1, "rubricor"), (1, "judge")]


def test_shares_are_disjoint_and_keep_queries_together(pairs):
    shares = thirds(pairs, 3, 0)
    ids = [{p.query_id for p in s} for s in shares]
    assert sum(map(len, shares)) == len(pairs) and set.union(*ids) == {p.query_id for p in pairs}
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
    assert thirds(pairs, 3, 1) != shares


def test_history_has_a_row_per_phase(pairs, tmp_path):
    rows: list[dict] = []
    result = alternate(*models(tmp_path), pairs, CONFIG, log=rows.append)
    assert result.history == rows and [(r["round"], r["phase"]) for r in rows] == phases(CONFIG)
    held = [p for p in pairs if p.split == "heldout"]
    for row in rows:
        assert row["heldout_pairs"] == len(held) > 0 and 0 <= row["accuracy"] <= 1
        assert {f"accuracy_{r}" for r in PAIR_RULES} <= set(row) and 0 <= row["heldout_malformed"] <= 1
        json.dumps(row)
    assert rows[0]["seed_rubrics"] == len({p.query_id for p in pairs if p.split == "train"})


def test_each_phase_changes_its_own_model_only(pairs, tmp_path, monkeypatch):
    judge, rubricor = models(tmp_path)
    changed: dict[tuple[int, str], tuple[bool, bool]] = {}
    state = {"judge": weights(judge), "rubricor": weights(rubricor)}

    def watch(row):
        now = {"judge": weights(judge), "rubricor": weights(rubricor)}
        changed[(row["round"], row["phase"])] = tuple(
            not all(torch.equal(a, b) for a, b in zip(state[k], now[k], strict=True)) for k in ("judge", "rubricor")
        )
        state.update(now)

    seeds = module.seed_rubrics(pairs, POOL.labels)
    # The tiny Rubricor writes no well-formed rubric, so the Judge trains on the seeds.
    monkeypatch.setattr(module, "written", lambda r, p, c, s: {x.query_id: seeds[x.query_id] for x in p})
    alternate(judge, rubricor, pairs, replace(CONFIG, rounds=1, kl=0.5), log=watch)
    assert changed[(0, "warm-up")] == (True, True) and changed[(1, "judge")] == (True, False)
    assert not changed[(1, "rubricor")][0]


@pytest.mark.parametrize("stop_after", [1, 3])
def test_resuming_gives_the_identical_result(pairs, tmp_path, stop_after):
    config = replace(CONFIG, rounds=2)
    whole = alternate(*models(tmp_path), pairs, config, out=tmp_path / "whole")

    class Stop(Exception):
        pass

    def interrupt(row):
        if len(json.loads((tmp_path / "cut" / STATE).read_text())["history"]) == stop_after:
            raise Stop

    with pytest.raises(Stop):
        alternate(*models(tmp_path), pairs, config, out=tmp_path / "cut", log=interrupt)
    rest: list[dict] = []
    again = alternate(*models(tmp_path), pairs, config, out=tmp_path / "cut", log=rest.append)
    assert len(rest) == 5 - stop_after and again.history == whole.history
    a, b = weights(whole.judge, whole.rubricor), weights(again.judge, again.rubricor)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert [p.name for p in (tmp_path / "cut").glob("phase-*")] == ["phase-5"]


def test_evaluate_counts_malformed_as_wrong_and_reads_margins(pairs, tmp_path, monkeypatch):
    judge, rubricor = models(tmp_path)
    row = evaluate(judge, rubricor, pairs, CONFIG)
    assert row["heldout_malformed"] == 1.0 and row["accuracy"] == 0.0 and row["reading"] is None
    seeds = module.seed_rubrics(pairs, POOL.labels)

    class Writer:
        def write(self, prompts, **_):
            by_prompt = {p.prompt: seeds[p.query_id] for p in pairs}
            return [[rubricor.read(q, rubricor.encoder.completion(by_prompt[q]))] for q in prompts]

    row = evaluate(judge, Writer(), pairs, CONFIG)
    assert row["heldout_malformed"] == 0.0
    inputs = [JudgeInput(p.prompt, c.view, seeds[p.query_id]) for p in pairs for c in (p.chosen, p.rejected)]
    s = [j.score for j in judge.score(inputs)]
    right = [a > b for a, b in zip(s[0::2], s[1::2], strict=True)]
    assert row["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-4)
    cost = [r for r, p in zip(right, pairs, strict=True) if p.rule == "cost"]
    assert row["accuracy_cost"] == pytest.approx(sum(cost) / len(cost), abs=1e-4)


def test_too_few_queries_is_an_error(pairs, tmp_path):
    one = [p for p in pairs if p.query_id == pairs[0].query_id]
    with pytest.raises(DataError, match=r"rubric\.rounds"):
        alternate(*models(tmp_path), one, CONFIG)
