"""Seed rubrics for the warm-up: the grammar's sentences that best explain a query's own preference pairs.

A sentence earns evidence from each pair for which it holds for the chosen and not for the rejected trajectory (and
loses it the other way round). A query has few pairs, so its evidence is shrunk towards that of the same kind of
sentence over all pairs. Sentences are then added greedily as long as the rubric's score orders more of the query's pairs right.
Neither gold answers nor oracles are consulted, only the pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from roro_fast.rubric.format import AXES, HARD_RULE, MAX_CRITERIA, MIN_CRITERIA, PRINCIPLE, WEIGHTS, Rubric
from roro_fast.rubric.grammar import Claim, axis_of, claims, criterion, truth, verbs_of
from roro_fast.rubric.pairs import Pair

RULE_WEIGHTS = {"outcome": 2.0, "cost": 1.0, "process": 1.0}
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SeedConfig:
    """`shrinkage`: how many pairs the corpus-wide evidence counts for. `hard`: evidence that makes a Hard Rule.
    `repeat_axis`: evidence a sentence gives up when its axis is already covered."""

    shrinkage: float = 4.0
    hard: float = 0.35
    repeat_axis: float = 0.05


def group_by_query(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    groups: dict[str, list[Pair]] = defaultdict(list)
    for p in pairs:
        groups[p.query_id].append(p)
    return dict(groups)


def seed_rubrics(
    pairs: Iterable[Pair], labels: Sequence[str], config: SeedConfig | None = None, most: int = MAX_CRITERIA
) -> dict[str, Rubric]:
    """A rubric for every query of `pairs` about which the grammar has enough to say, by query id. Deterministic."""
    config = config or SeedConfig()
    groups = group_by_query(pairs)
    tables = {q: _Table.of(group, labels) for q, group in groups.items()}
    corpus = _corpus_evidence(tables.values())
    out = {}
    for query_id, table in tables.items():
        if len(table.claims) >= MIN_CRITERIA:
            out[query_id] = _select(table, corpus, labels, config, most)
    return out


@dataclass(frozen=True, slots=True)
class _Table:
    """One query's claims against its pairs: `votes` [C, P] is truth(chosen) - truth(rejected), `weight` [P] by rule."""

    claims: list[Claim]
    keys: list[Key]
    votes: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, pairs: Sequence[Pair], labels: Sequence[str]) -> _Table:
        verbs = verbs_of(pairs[0].prompt)
        views = {v: i for i, v in enumerate(dict.fromkeys(x.view for p in pairs for x in (p.chosen, p.rejected)))}
        options = claims(verbs, labels, None if verbs else max(len(v.models) for v in views))
        holds = np.array([[truth(c, v, verbs, labels) for v in views] for c in options], dtype=np.float64)
        holds = holds.reshape(len(options), len(views))
        chosen, rejected = [views[p.chosen.view] for p in pairs], [views[p.rejected.view] for p in pairs]
        weight = np.array([RULE_WEIGHTS[p.rule] for p in pairs])
        return cls(options, [_key(c, verbs) for c in options], holds[:, chosen] - holds[:, rejected], weight)


def _key(claim: Claim, verbs: Sequence[str]) -> Key:
    """What a claim is about in words that mean the same for every query: line numbers become their lines' verbs."""
    verb = [*verbs, "total"] if verbs else [f"#{i}" for i in range(1, claim.number + 2)]
    if claim.kind == "writes line":
        return ("writes", claim.label, verb[claim.number - 1])
    if claim.kind == "writes every":
        return ("writes", claim.label, claim.verb)
    if claim.kind == "takes over after":
        return (claim.kind, claim.label, verb[claim.number - 1], verb[claim.number])
    return (claim.kind, claim.label, str(claim.number))


def _corpus_evidence(tables: Iterable[_Table]) -> dict[Key, float]:
    """Weighted mean vote of each key over all pairs."""
    total: dict[Key, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for t in tables:
        sums = t.votes @ t.weight
        for key, s in zip(t.keys, sums, strict=True):
            total[key] += (s, t.weight.sum())
    return {k: float(v[0] / v[1]) for k, v in total.items()}


def _select(table: _Table, corpus: Mapping[Key, float], labels: Sequence[str], config: SeedConfig, most: int) -> Rubric:
    prior = np.array([corpus[k] for k in table.keys])
    mass = table.weight.sum()
    strength = (table.votes @ table.weight + config.shrinkage * prior) / (mass + config.shrinkage)
    tags = [HARD_RULE if s >= config.hard else PRINCIPLE for s in strength]
    value = table.votes * np.array([WEIGHTS[t] for t in tags])[:, None]
    axes = [axis_of(c, labels) for c in table.claims]
    chosen: list[int] = []
    total, best = np.zeros(len(table.weight)), -1.0
    while len(chosen) < most:
        ordered = (
            ((total + value) > 1e-9) @ table.weight / mass
        )  # share of pair weight ordered right with each claim added
        crowded = np.array([sum(axes[j] == a for j in chosen) for a in axes])
        merit = ordered + strength - config.repeat_axis * crowded
        merit[chosen] = -np.inf
        merit[_same_votes(table.votes, chosen)] -= 1.0
        i = int(merit.argmax())
        if len(chosen) >= MIN_CRITERIA and (ordered[i] <= best or strength[i] <= 0):
            break
        chosen.append(i)
        total += value[i]
        best = float(ordered[i])
    order = sorted(chosen, key=lambda i: (tags[i] != HARD_RULE, AXES.index(axes[i]), -strength[i]))
    return Rubric(tuple(criterion(table.claims[i], tags[i], labels) for i in order))


def _same_votes(votes: np.ndarray, chosen: list[int]) -> np.ndarray:
    """Claims that say about these pairs what a chosen one already says."""
    if not chosen:
        return np.zeros(len(votes), dtype=bool)
    return (votes[:, None, :] == votes[None, chosen, :]).all(-1).any(-1)
