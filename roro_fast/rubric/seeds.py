"""Seed rubrics for the warm-up: the grammar's sentences that best explain a query's own preference pairs.

A sentence votes for a pair's order when it holds for the chosen and not for the rejected trajectory (and against it the
other way round). A query has few pairs, so its votes are shrunk towards what the same kind of sentence is worth over
all pairs, which is also all that a Rubricor can learn about queries it has not seen: its coefficient in a Bradley-Terry
model of the preferences. Sentences are then added greedily by that evidence and by how many more of the query's pairs
the rubric orders right. Neither gold answers nor oracles are consulted, only the pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from roro_fast.rubric.format import AXES, HARD_RULE, MAX_CRITERIA, MIN_CRITERIA, PRINCIPLE, WEIGHTS, Rubric
from roro_fast.rubric.grammar import KINDS, NUMBERED, Claim, axis_of, claims, criterion, truth, verbs_of
from roro_fast.rubric.pairs import Pair

NEWTON_STEPS = 8
LIMITS = ("writes at most", "switches")  # a rubric holds one of each at most
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SeedConfig:
    """`shrinkage`: number of pairs that the corpus-wide evidence counts for; `ridge`: penalty of its fit. `hard`:
    evidence that makes a Hard Rule; `least`: evidence below which nothing is added past the third criterion.
    `repeat_axis`: evidence a sentence gives up per criterion already on its axis. `kinds`: kinds of sentence to choose
    from, by default those that the packaged reader reads without error."""

    shrinkage: float = 60.0
    ridge: float = 20.0
    hard: float = 0.5
    least: float = 0.05
    repeat_axis: float = 0.05
    kinds: tuple[str, ...] = NUMBERED


def group_by_query(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    groups: dict[str, list[Pair]] = defaultdict(list)
    for p in pairs:
        groups[p.query_id].append(p)
    return dict(groups)


def seed_rubrics(
    pairs: Iterable[Pair],
    labels: Sequence[str],
    config: SeedConfig | None = None,
    most: int = MAX_CRITERIA,
    others: Mapping[str, str] | None = None,
) -> dict[str, Rubric]:
    """A rubric for every query of `pairs` about which the grammar has enough to say, by query id. Deterministic.

    `others` maps ids of further queries to their texts; having no pairs, they get what the corpus says about them.
    """
    config = config or SeedConfig()
    tables = {q: _Table.of(group[0].prompt, group, labels, config.kinds) for q, group in group_by_query(pairs).items()}
    corpus = _corpus_evidence(tables.values(), config.ridge)
    for q, prompt in (others or {}).items():
        if q not in tables and verbs_of(prompt):
            tables[q] = _Table.of(prompt, [], labels, config.kinds)
    return {q: _select(t, corpus, labels, config, most) for q, t in tables.items() if len(t.claims) >= MIN_CRITERIA}


@dataclass(frozen=True, slots=True)
class _Table:
    """One query's claims against its pairs: `votes` [C, P] is truth(chosen) - truth(rejected)."""

    claims: list[Claim]
    keys: list[Key]
    votes: np.ndarray

    @classmethod
    def of(cls, prompt: str, pairs: Sequence[Pair], labels: Sequence[str], kinds: Sequence[str]) -> _Table:
        verbs = verbs_of(prompt)
        views = {v: i for i, v in enumerate(dict.fromkeys(x.view for p in pairs for x in (p.chosen, p.rejected)))}
        steps = None if verbs else max(len(v.models) for v in views)
        options = [c for c in claims(verbs, labels, steps) if c.kind in kinds]
        holds = np.array([[truth(c, v, verbs, labels) for v in views] for c in options], dtype=np.float64)
        holds = holds.reshape(len(options), len(views))
        chosen, rejected = [views[p.chosen.view] for p in pairs], [views[p.rejected.view] for p in pairs]
        return cls(options, [_key(c, verbs) for c in options], holds[:, chosen] - holds[:, rejected])


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


def _corpus_evidence(tables: Iterable[_Table], ridge: float) -> dict[Key, float]:
    """What each key adds to a preference, others being equal, as a share of what the strongest adds.

    The coefficients of a Bradley-Terry model over all pairs, P(chosen > rejected) = sigmoid(sum_k b_k v_k) with v_k the
    votes of key k, fitted by Newton's method under the penalty ridge / 2 * |b|^2. A plain mean of votes would credit
    every escalation with what the few that mattered brought.
    """
    tables = list(tables)
    index = {k: i for i, k in enumerate(dict.fromkeys(k for t in tables for k in t.keys))}
    rows = []
    for t in tables:
        x = np.zeros((len(index), t.votes.shape[1]))
        np.add.at(x, [index[k] for k in t.keys], t.votes)
        rows.append(x.T)
    x = np.concatenate(rows)
    b = np.zeros(len(index))
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-x @ b))
        gradient = x.T @ (1 - p) - ridge * b
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(b))
        b += np.linalg.solve(hessian, gradient)
    top = max(float(np.abs(b).max(initial=0.0)), 1e-12)
    return {k: float(b[i] / top) for k, i in index.items()}


def _select(table: _Table, corpus: Mapping[Key, float], labels: Sequence[str], config: SeedConfig, most: int) -> Rubric:
    prior = np.array([corpus.get(k, 0.0) for k in table.keys])
    pairs = table.votes.shape[1]
    strength = (table.votes.sum(1) + config.shrinkage * prior) / (pairs + config.shrinkage)
    tags = [HARD_RULE if s >= config.hard else PRINCIPLE for s in strength]
    value = table.votes * np.array([WEIGHTS[t] for t in tags])[:, None]
    axes = [axis_of(c, labels) for c in table.claims]
    chosen: list[int] = []
    total = np.zeros(pairs)
    while len(chosen) < most:
        ordered = ((total + value) > 1e-9).sum(1) / max(pairs, 1)  # share of pairs ordered right with each added
        crowded = np.array([sum(axes[j] == a for j in chosen) for a in axes])
        merit = ordered + strength - config.repeat_axis * crowded
        merit[_said(table, chosen)] -= 2.0
        merit[chosen] = -np.inf
        i = int(merit.argmax())
        if len(chosen) >= MIN_CRITERIA and strength[i] < config.least:
            break
        chosen.append(i)
        total += value[i]
    # One canonical order, lines ascending: what comes next is easier to learn, and so is not to repeat oneself.
    order = sorted(
        chosen, key=lambda i: (tags[i] != HARD_RULE, AXES.index(axes[i]), KINDS.index(table.claims[i].kind), i)
    )
    return Rubric(tuple(criterion(table.claims[i], tags[i], labels) for i in order))


def _said(table: _Table, chosen: list[int]) -> np.ndarray:
    """Claims that repeat a chosen one: about the same thing, another limit, or the same votes on all of these pairs."""
    if not chosen:
        return np.zeros(len(table.claims), dtype=bool)
    same_votes = (table.votes[:, None, :] == table.votes[None, chosen, :]).all(-1).any(-1) & (table.votes.shape[1] > 0)
    keys = {table.keys[j]: table.claims[j].kind for j in chosen}
    limits = {table.claims[j].kind for j in chosen} & set(LIMITS)

    def repeats(key: Key, claim: Claim) -> bool:
        each_line = claim.kind == keys.get(key) == "writes line"  # two lines of one verb are two things
        return (key in keys and not each_line) or claim.kind in limits

    return np.array(same_votes | np.array([repeats(k, c) for k, c in zip(table.keys, table.claims, strict=True)]))
