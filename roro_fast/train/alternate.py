"""Alternating optimisation of Rubricor and Judge (METHOD.md section 5), resumable after every phase."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roro_fast.config import PAIR_RULES, RubricConfig
from roro_fast.errors import DataError
from roro_fast.models.lm_trainer import Tick, idle
from roro_fast.models.loading import assign, read_tensors
from roro_fast.rubric.format import Rubric
from roro_fast.rubric.judge import Judge, JudgeInput
from roro_fast.rubric.pairs import Pair
from roro_fast.rubric.rubricor import Rubricor
from roro_fast.rubric.seeds import group_by_query, seed_rubrics
from roro_fast.train.judge_training import truths
from roro_fast.train.lm import rounded
from roro_fast.train.trainers import NATIVE, Trainers

STATE = "alternation.json"
Log = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class Alternation:
    """What came out: the trained models, and one row of `history` per phase, the first after SFT ("warm-up")."""

    judge: Judge
    rubricor: Rubricor
    history: list[dict[str, Any]] = field(default_factory=list)


def phases(config: RubricConfig) -> list[tuple[int, str]]:
    """(round, who) in order: the warm-up, then both sides of every round in the configured order."""
    sides = ["judge", "rubricor"] if config.order == "judge_first" else ["rubricor", "judge"]
    return [(0, "warm-up"), *((r, who) for r in range(1, config.rounds + 1) for who in sides)]


def thirds(pairs: Sequence[Pair], rounds: int, seed: int) -> list[list[Pair]]:
    """Disjoint shares of the pairs, one per round; a query's pairs stay together."""
    groups = group_by_query(pairs)
    order = sorted(groups)
    random.Random(f"rounds/{seed}").shuffle(order)
    return [[p for q in order[r::rounds] for p in groups[q]] for r in range(rounds)]


def alternate(
    judge: Judge,
    rubricor: Rubricor,
    pairs: Sequence[Pair],
    config: RubricConfig,
    *,
    seed: int = 0,
    out: Path | None = None,
    log: Log | None = None,
    judge_loss: str = "grpo",
    others: Mapping[str, str] | None = None,
    tick: Tick = idle,
    trainers: Trainers = NATIVE,
) -> Alternation:
    """Train both models in place on the pairs of split "train"; measure on split "heldout" after every phase.

    With `out`, every phase leaves its weights there and an interrupted call continues after the last finished phase to
    the identical result. `log` receives each history row as it is made, `tick` is called after every update. `others`
    maps ids of training queries without pairs to their texts: the Rubricor's warm-up learns from seed rubrics about
    them too. `trainers` does the updates.
    """
    train = [p for p in pairs if p.split == "train"]
    heldout = [p for p in pairs if p.split != "train"]
    if len(group_by_query(train)) < config.rounds:
        raise DataError(
            f"pairs: {len(group_by_query(train))} training queries for {config.rounds} rounds; "
            "collect more queries or lower rubric.rounds"
        )
    shares = thirds(train, config.rounds, seed)
    result = Alternation(judge, rubricor, _resume(judge, rubricor, out))
    for index, (round_, who) in enumerate(phases(config)):
        if index < len(result.history):
            continue
        row: dict[str, Any] = {"round": round_, "phase": who}
        phase_seed = seed * 1000 + index
        if who == "warm-up":
            kept = {q: t for q, t in (others or {}).items() if q not in {p.query_id for p in heldout}}
            row |= _warm_up(judge, rubricor, train, kept, config, phase_seed, tick, trainers)
        elif who == "judge":
            share = shares[round_ - 1]
            rubrics = written(rubricor, share, config, phase_seed)
            trained = trainers.train_judge(judge, share, rubrics, config, seed=phase_seed, loss=judge_loss, tick=tick)
            row |= trained.to_dict()
        else:
            share = shares[round_ - 1]
            row |= trainers.train_rubricor(rubricor, judge, share, config, seed=phase_seed, tick=tick).to_dict()
        row |= evaluate(judge, rubricor, heldout, config)
        result.history.append(row)
        if out is not None:
            _checkpoint(result, out)
        if log is not None:
            log(row)
    return result


def _warm_up(
    judge: Judge,
    rubricor: Rubricor,
    train: Sequence[Pair],
    others: Mapping[str, str],
    config: RubricConfig,
    seed: int,
    tick: Tick,
    trainers: Trainers,
) -> dict[str, Any]:
    seeds = seed_rubrics(train, judge.encoder.labels, most=config.max_criteria, others=others)
    prompts = {**others, **{p.query_id: p.prompt for p in train}}
    return {
        "seed_rubrics": len(seeds),
        "rubricor_sft_loss": rounded(trainers.warm_up_rubricor(rubricor, prompts, seeds, config, seed=seed, tick=tick)),
        "judge_sft_loss": rounded(trainers.warm_up_judge(judge, train, seeds, config, seed=seed, tick=tick)),
    }


def written(rubricor: Rubricor, pairs: Sequence[Pair], config: RubricConfig, seed: int) -> dict[str, Rubric]:
    """One rubric per query, sampled once at the training temperature; malformed ones are left out."""
    prompts = {p.query_id: p.prompt for p in pairs}
    drafts = rubricor.write(
        list(prompts.values()), temperature=config.temperature, seed=seed, max_new_tokens=config.max_tokens
    )
    found = {q: d[0].rubric for q, d in zip(prompts, drafts, strict=True)}
    return {q: r for q, r in found.items() if isinstance(r, Rubric)}


def evaluate(judge: Judge, rubricor: Rubricor, pairs: Sequence[Pair], config: RubricConfig) -> dict[str, Any]:
    """Held-out figures with greedy rubrics.

    `accuracy` and `accuracy_<rule>`: share of pairs with S(chosen) > S(rejected), a malformed rubric or a tie being
    wrong. `ties`, `malformed`: shares. `criteria`: mean number per rubric. `reading`: share of verdicts that agree with
    the grammar's truth, i.e. whether the Judge still reads what the rubric says.
    """
    if not pairs:
        return {"heldout_pairs": 0}
    prompts = {p.query_id: p.prompt for p in pairs}
    drafts = rubricor.write(list(prompts.values()), max_new_tokens=config.max_tokens)
    rubrics = {q: d[0].rubric for q, d in zip(prompts, drafts, strict=True)}
    good = {q: r for q, r in rubrics.items() if isinstance(r, Rubric)}
    judged = [p for p in pairs if p.query_id in good]
    inputs = [JudgeInput(p.prompt, c.view, good[p.query_id]) for p in judged for c in (p.chosen, p.rejected)]
    verdicts = judge.scorer(config.bf16).score(inputs)
    gains = [a.score - b.score for a, b in zip(verdicts[0::2], verdicts[1::2], strict=True)]
    row: dict[str, Any] = {"heldout_pairs": len(pairs), "accuracy": round(sum(g > 0 for g in gains) / len(pairs), 4)}
    for rule in PAIR_RULES:
        total = sum(p.rule == rule for p in pairs)
        right = sum(g > 0 and p.rule == rule for p, g in zip(judged, gains, strict=True))
        row[f"accuracy_{rule}"] = round(right / total, 4) if total else None
    row["ties"] = round(sum(g == 0 for g in gains) / len(pairs), 4)
    row["heldout_malformed"] = round(1 - len(good) / len(rubrics), 4)
    row["heldout_criteria"] = round(sum(map(len, good.values())) / max(1, len(good)), 3)
    row["reading"] = _reading(judge, inputs, [v.p_true for v in verdicts])
    return row


def _reading(judge: Judge, inputs: Sequence[JudgeInput], p_true: Sequence[Sequence[float]]) -> float | None:
    agree = total = 0
    for x, ps in zip(inputs, p_true, strict=True):
        for t, p in zip(truths(x, judge.encoder.labels), ps, strict=True):
            if t is not None:
                total += 1
                agree += (p > 0.5) == t
    return round(agree / total, 4) if total else None


def _checkpoint(result: Alternation, out: Path) -> None:
    """Weights first, then the state file that names them, then the older weights go."""
    out.mkdir(parents=True, exist_ok=True)
    done = len(result.history)
    result.judge.save(out / f"phase-{done}" / "judge")
    result.rubricor.save(out / f"phase-{done}" / "rubricor")
    part = out / f"{STATE}.part"
    part.write_text(json.dumps({"history": result.history}, indent=2) + "\n")
    part.replace(out / STATE)
    for old in out.glob("phase-*"):
        if old.name != f"phase-{done}":
            shutil.rmtree(old)


def _resume(judge: Judge, rubricor: Rubricor, out: Path | None) -> list[dict[str, Any]]:
    if out is None or not (out / STATE).is_file():
        return []
    history: list[dict[str, Any]] = json.loads((out / STATE).read_text())["history"]
    for model, name in ((judge.model, "judge"), (rubricor.model, "rubricor")):
        directory = out / f"phase-{len(history)}" / name
        assign(model, read_tensors(directory), str(directory))
    return history
