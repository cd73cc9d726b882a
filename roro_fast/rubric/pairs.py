"""Preference pairs between routed trajectories of one query: outcome, then cost, then process quality (METHOD.md 4)."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from roro_fast.config import PAIR_RULES, PairsConfig
from roro_fast.engine.trajectory import Trajectory
from roro_fast.errors import DataError
from roro_fast.rubric.quality import Formula, all_small_of, confidences, process_quality
from roro_fast.rubric.render import Pool, View, view_of
from roro_fast.tasks.base import Query


@dataclass(frozen=True, slots=True)
class Candidate:
    """One trajectory as pair building sees it. `cost`: generated FLOPs; `quality`: None without an all-small run."""

    view: View
    arm: str
    sample: int
    correct: bool
    cost: float
    quality: float | None


@dataclass(frozen=True, slots=True)
class Pair:
    """`chosen` is preferred to `rejected` because of `rule`, by `margin` (1 for outcome, else the relative cost saved
    or the quality gained). `split` is "train" or "heldout", the same for all pairs of a query."""

    query_id: str
    prompt: str
    chosen: Candidate
    rejected: Candidate
    rule: str
    margin: float
    split: str = "train"


@dataclass(slots=True)
class PairStatistics:
    """What became of the queries: `agreed_*` had one outcome in all arms and gave no pairs; `no_small` lack an
    all-small trajectory, so the process rule could not serve them; `rules` counts the pairs kept, `ties` the undecided
    ones."""

    queries: int = 0
    agreed_correct: int = 0
    agreed_wrong: int = 0
    no_small: int = 0
    ties: int = 0
    found: int = 0
    rules: dict[str, int] = field(default_factory=dict)
    heldout: int = 0


def relative_difference(a: float, b: float) -> float:
    """|a - b| as a share of the larger."""
    top = max(a, b)
    return abs(a - b) / top if top > 0 else 0.0


def compare(a: Candidate, b: Candidate, config: PairsConfig) -> tuple[int, str, float]:
    """(sign, rule, margin): sign +1 if `a` is preferred, -1 if `b`, 0 for a tie.

    Costs decide when they differ by more than `cost_margin`; quality may decide only up to `equal_cost`. Between wrong
    answers costs decide only with `cost_between_wrong`: what was saved there may be the escalation that was missed.
    """
    if a.correct != b.correct:
        return (1 if a.correct else -1), "outcome", 1.0
    apart = relative_difference(a.cost, b.cost)
    if apart > config.cost_margin and (a.correct or config.cost_between_wrong):
        return (1 if a.cost < b.cost else -1), "cost", apart
    if apart <= config.equal_cost and a.quality is not None and b.quality is not None:
        gain = a.quality - b.quality
        if abs(gain) > config.quality_margin:
            return (1 if gain > 0 else -1), "process", abs(gain)
    return 0, "", 0.0


def candidates(trajectories: Sequence[Trajectory], pool: Pool, formula: Formula) -> list[Candidate]:
    """One candidate per distinct (view, outcome) of a query's verified trajectories, in order of first appearance."""
    small = all_small_of(trajectories)
    confidence = confidences(small) if small else None
    out: dict[tuple[View, bool], Candidate] = {}
    for t in trajectories:
        if t.correct is None:
            raise DataError(
                f"trajectory {t.query_id}/{t.arm}/{t.sample}: `correct` is not set; verify it before pairing"
            )
        quality = process_quality(t.models, confidence, formula) if confidence else None
        view = view_of(t, pool)
        out.setdefault((view, t.correct), Candidate(view, t.arm, t.sample, t.correct, t.cost.generated_flops, quality))
    return list(out.values())


def split_of(query_id: str, holdout: float) -> str:
    """ "heldout" for a fixed share of query ids, by a stable hash."""
    return (
        "heldout"
        if int.from_bytes(hashlib.sha256(query_id.encode()).digest()[:4], "big") / 2**32 < holdout
        else "train"
    )


def build_pairs(
    queries: Mapping[str, Query],
    trajectories: Iterable[Trajectory],
    pool: Pool,
    config: PairsConfig | None = None,
    *,
    formula: Formula | None = None,
    seed: int = 0,
) -> tuple[list[Pair], PairStatistics]:
    """All pairs the rules decide, at most `max_per_query` a query, taken from the rules in turn. Deterministic.

    `queries` maps ids to queries; the order of `trajectories` within a query does not change which pairs exist, only
    ties of the draw. A query in which every arm had the same outcome says nothing about routing and is only counted.
    """
    config = config or PairsConfig()
    formula = formula or Formula((config.weights[0], config.weights[1], config.weights[2]))
    groups: dict[str, list[Trajectory]] = defaultdict(list)
    for t in trajectories:
        if t.query_id not in queries:
            raise DataError(
                f"trajectory {t.query_id!r}: no such query; pass the queries the trajectories were rolled out for"
            )
        groups[t.query_id].append(t)
    stats = PairStatistics(queries=len(groups))
    pairs: list[Pair] = []
    for query_id in sorted(groups):
        group = sorted(groups[query_id], key=lambda t: (t.arm, t.sample))
        found = candidates(group, pool, formula)
        outcomes = {c.correct for c in found}
        if len(outcomes) == 1:
            stats.agreed_correct += outcomes == {True}
            stats.agreed_wrong += outcomes == {False}
            continue
        stats.no_small += found[0].quality is None
        decided = _decide(queries[query_id], found, config, stats)
        stats.found += len(decided)
        pairs += _cap(decided, config.max_per_query, random.Random(f"pairs/{seed}/{query_id}"))
    stats.rules = dict(Counter(p.rule for p in pairs))
    stats.heldout = sum(p.split == "heldout" for p in pairs)
    return pairs, stats


def _decide(query: Query, found: list[Candidate], config: PairsConfig, stats: PairStatistics) -> list[Pair]:
    split, out = split_of(query.id, config.holdout), []
    for a, b in combinations(found, 2):
        sign, rule, margin = compare(a, b, config)
        if sign == 0 or rule not in config.rules:
            stats.ties += sign == 0
            continue
        chosen, rejected = (a, b) if sign > 0 else (b, a)
        out.append(Pair(query.id, query.prompt, chosen, rejected, rule, margin, split))
    return out


def _cap(pairs: list[Pair], limit: int, rng: random.Random) -> list[Pair]:
    """At most `limit` pairs, drawn from the rules in turn so that the commonest rule does not crowd out the others."""
    pools = [[p for p in pairs if p.rule == rule] for rule in PAIR_RULES]
    for pool in pools:
        rng.shuffle(pool)
    out: list[Pair] = []
    while len(out) < limit and any(pools):
        for pool in pools:
            if pool and len(out) < limit:
                out.append(pool.pop())
    return out


def to_row(pair: Pair) -> dict[str, Any]:
    """A flat JSON/Parquet row; `from_row` inverts it."""
    row: dict[str, Any] = {k: getattr(pair, k) for k in ("query_id", "prompt", "rule", "margin", "split")}
    for side in ("chosen", "rejected"):
        c: Candidate = getattr(pair, side)
        row |= {f"{side}_{k}": list(getattr(c.view, k)) for k in ("texts", "models", "costs")}
        row |= {f"{side}_{k}": getattr(c, k) for k in ("arm", "sample", "correct", "cost", "quality")}
    return row


def from_row(row: Mapping[str, Any]) -> Pair:
    try:
        sides = []
        for side in ("chosen", "rejected"):
            texts, models, costs = (tuple(row[f"{side}_{k}"]) for k in ("texts", "models", "costs"))
            if not len(texts) == len(models) == len(costs):
                raise DataError(f"pair {row['query_id']!r}: {side}_texts, _models and _costs differ in length")
            rest = {k: row[f"{side}_{k}"] for k in ("arm", "sample", "correct", "cost", "quality")}
            sides.append(Candidate(View(texts, models, costs), **rest))
        if row["rule"] not in PAIR_RULES:
            raise DataError(f"pair {row['query_id']!r}: rule {row['rule']!r} is not one of {', '.join(PAIR_RULES)}")
        return Pair(row["query_id"], row["prompt"], sides[0], sides[1], row["rule"], float(row["margin"]), row["split"])
    except (KeyError, TypeError) as e:
        raise DataError(
            f"pair row: field {e} is missing or of the wrong type; was this file written by save_pairs?"
        ) from None
