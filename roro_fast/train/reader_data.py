"""Pretraining data of a reader: format and reading only, nothing about what makes a route good.

Queries are of a task's train split, with their solutions (`Source`; the nano reader's are of the ledger); the model of
every step is drawn at random; rubrics are random sentences of the grammar; verdicts are the sentences' programmatic
truth. A batch is a pure function of (seed, step).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from roro_fast.rubric.format import HARD_RULE, MAX_CRITERIA, MIN_CRITERIA, PRINCIPLE, Rubric
from roro_fast.rubric.grammar import KINDS, NUMBERED, Claim, claims, criterion, truth, verbs_of
from roro_fast.rubric.prompts import PromptEncoder
from roro_fast.rubric.render import View
from roro_fast.tasks.ledger import MODULUS, render_query, render_steps, sample_problem, split_of
from roro_fast.train.lm import IGNORE

LABELS = ("small", "large")
CLAIMS_PER_TRAJECTORY = (6, 12)  # more than a rubric holds: dense supervision


class Source(Protocol):
    """Where a reader's queries come from. `price`: range of the ratio of neighbouring models' prices per token."""

    price: tuple[float, float]

    def size(self, rng: random.Random) -> int:
        """Length of the queries of one batch, in the source's own measure."""
        ...

    def draw(self, rng: random.Random, size: int) -> tuple[str, list[str]]:
        """A query's text and the steps of an answer to it."""
        ...

    def verbs(self, prompt: str) -> tuple[str, ...]:
        """What its lines do, where claims are to be made about that."""
        ...


@dataclass(frozen=True, slots=True)
class ReaderBatch:
    """`read` [B, S] right-padded Judge prompts; `rows` [M] flat indices of their verdict slots, `verdicts` [M] bool,
    `kinds` [M] index into grammar.KINDS; `recited` [R, 2] (flat index, next token): look-ups asked after the rubric.
    `write` [B2, S2] Rubricor prompt + rubric; `targets` [B2, S2], IGNORE where not trained. `judged` [M]: what each
    verdict is about."""

    read: torch.Tensor
    rows: torch.Tensor
    verdicts: torch.Tensor
    kinds: torch.Tensor
    recited: torch.Tensor
    write: torch.Tensor
    targets: torch.Tensor
    judged: tuple[tuple[Claim, View], ...] = ()


def sample_query(rng: random.Random, lines: int, split: str = "train") -> tuple[str, list[str]]:
    """A ledger prompt of `lines` lines with its solution, whose results are now and then wrong, as models write."""
    while True:
        name, item, start, drawn = sample_problem(rng)
        if len(drawn) == lines and split_of([x.kind.name for x in drawn]) == split:
            break
    steps = [s.strip() for s in render_steps(start, drawn)]
    if rng.random() < 0.5:
        steps = [blur(rng, s) for s in steps]
    return render_query(name, item, start, drawn), steps


def blur(rng: random.Random, step: str) -> str:
    """A step with some of its numbers wrong, as models write them."""
    words = step.split()
    for i, w in enumerate(words):
        if w.isdigit() and rng.random() < 0.2:
            words[i] = str(rng.randrange(MODULUS))
    return " ".join(words)


class LedgerSource:
    """Problems of the built-in task; a batch is of one line count."""

    price = (2.0, 20.0)

    def size(self, rng: random.Random) -> int:
        return rng.randint(4, 8)

    def draw(self, rng: random.Random, size: int) -> tuple[str, list[str]]:
        return sample_query(rng, size)

    def verbs(self, prompt: str) -> tuple[str, ...]:
        return verbs_of(prompt)


LEDGER = LedgerSource()


def sample_view(
    rng: random.Random,
    steps: list[str],
    verbs: tuple[str, ...],
    num_models: int,
    price: tuple[float, float] = LedgerSource.price,
) -> View:
    """Any routing of these steps: independent, in runs, or by verb (where there are any), at any price in the range."""
    n, style = len(steps), rng.random()
    share = rng.choice((0.1, 0.3, 0.5, 0.5, 0.7, 0.9))

    def draw() -> int:
        return rng.randrange(1, num_models) if rng.random() < share else 0

    if style < 0.4:
        models = [draw() for _ in range(n)]
    elif style < 0.7 or not verbs:
        models = [draw()]
        while len(models) < n:
            models.append(draw() if rng.random() < 0.3 else models[-1])
    else:
        by_verb = {v: draw() for v in verbs}
        models = [by_verb[v] if rng.random() < 0.9 else draw() for v in verbs] + [draw()]
    prices = [1.0]
    for _ in range(num_models - 1):
        prices.append(prices[-1] * rng.uniform(*price))
    tokens = [len(s.split()) + 2 for s in steps]  # words, colon, delimiter
    whole = sum(tokens) * prices[-1]
    costs = [min(100, round(100 * t * prices[m] / whole)) for t, m in zip(tokens, models, strict=True)]
    return View(tuple(steps), tuple(models), tuple(costs))


def sample_claims(rng: random.Random, options: list[Claim], count: int, kinds: Sequence[str] = NUMBERED) -> list[Claim]:
    """`count` distinct claims, `kinds` equally likely."""
    pools = {k: [c for c in options if c.kind == k] for k in kinds}
    out: list[Claim] = []
    while len(out) < count:
        pool = pools[rng.choice(kinds)]
        if pool:
            out.append(pool.pop(rng.randrange(len(pool))))
    return out


def sample_rubric(rng: random.Random, prompt: str, kinds: Sequence[str] = NUMBERED, steps: int | None = None) -> Rubric:
    """A random rubric about a query; of one without verbs the number of `steps` of its answers must be given."""
    verbs = verbs_of(prompt)
    options = [c for c in claims(verbs, LABELS, None if verbs else steps) if c.kind in kinds]
    count = min(rng.randint(MIN_CRITERIA, MAX_CRITERIA), len(options))
    chosen = sample_claims(rng, options, count, kinds)
    return Rubric(tuple(criterion(c, rng.choice((HARD_RULE, PRINCIPLE)), LABELS) for c in chosen))


def _balanced(rng: random.Random, view: View, verbs: tuple[str, ...], count: int) -> list[tuple[Claim, bool]]:
    """Claims of which about half hold, per kind as far as the trajectory allows."""
    options = claims(verbs, LABELS, None if verbs else len(view.models))
    rng.shuffle(options)
    pools: dict[tuple[str, bool], list[Claim]] = {}
    for c in options:
        pools.setdefault((c.kind, truth(c, view, verbs, LABELS)), []).append(c)
    out: list[tuple[Claim, bool]] = []
    while len(out) < min(count, len(options)):
        key = (rng.choice(KINDS), rng.random() < 0.5)
        if pools.get(key):
            out.append((pools[key].pop(), key[1]))
    return out


def _pad(rows: list[list[int]], fill: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([r + [fill] * (width - len(r)) for r in rows])


def make_batch(
    encoder: PromptEncoder,
    pad: int,
    seed: int,
    step: int,
    read: int,
    write: int,
    count: tuple[int, int] = CLAIMS_PER_TRAJECTORY,
    source: Source = LEDGER,
) -> ReaderBatch:
    """`read` Judge prompts and `write` rubrics over queries of one size (little padding)."""
    rng = random.Random(f"reader/{seed}/{step}")
    size = source.size(rng)
    ids: list[list[int]] = []
    rows: list[tuple[int, int]] = []
    recited: list[tuple[int, int, int]] = []
    verdicts: list[bool] = []
    kinds: list[int] = []
    about: list[tuple[Claim, View]] = []
    for b in range(read):
        prompt, steps = source.draw(rng, size)
        verbs = source.verbs(prompt)
        view = sample_view(rng, steps, verbs, len(LABELS), source.price)
        judged = _balanced(rng, view, verbs, rng.randint(*count))
        rubric = Rubric(tuple(criterion(c, rng.choice((HARD_RULE, PRINCIPLE)), LABELS) for c, _ in judged))
        encoded = encoder.judge(prompt, view, rubric)
        ids.append(encoded.ids)
        rows += [(b, r) for r in encoded.rows]
        recited += [(b, at, label) for at, label in _recite(rng, encoder, view, verbs, ids[-1])]
        verdicts += [t for _, t in judged]
        kinds += [KINDS.index(c.kind) for c, _ in judged]
        about += [(c, view) for c, _ in judged]
    padded = _pad(ids, pad)
    width = padded.shape[1]
    flat = torch.tensor([b * width + r for b, r in rows])
    asked = torch.tensor([(b * width + at, label) for b, at, label in recited])
    written, targets = _rubrics(rng, encoder, pad, source, size, write)
    return ReaderBatch(padded, flat, torch.tensor(verdicts), torch.tensor(kinds), asked, written, targets, tuple(about))


def _recite(
    rng: random.Random, encoder: PromptEncoder, view: View, verbs: tuple[str, ...], ids: list[int]
) -> list[tuple[int, int]]:
    """Append look-ups to `ids`; returns (index, next token) of every answer.

    For all lines in random order "line #k <its writer> <the next line's writer, or last>", for all verbs "<verb>
    <writer, or 'or' when several wrote such lines>", and the number of switches. Every kind of sentence is built from
    these skills; asking for them directly makes them form early.
    """
    out: list[tuple[int, int]] = []

    def say(question: str, *answers: str) -> None:
        ids.extend(encoder.piece(question))
        for answer in answers:
            *before, token = encoder.piece(f" {answer}")
            ids.extend(before)  # a blank that is a token of its own
            out.append((len(ids) - 1, token))
            ids.append(token)

    labels = [LABELS[m] for m in view.models]
    ids.extend(encoder.piece("\n"))
    for k in rng.sample(range(len(labels)), len(labels)):
        say(f" line #{k + 1}", labels[k], labels[k + 1] if k + 1 < len(labels) else "last")
    for verb in rng.sample(sorted(set(verbs)), len(set(verbs))):
        writers = {labels[i] for i, v in enumerate(verbs) if v == verb}
        say(f" {verb}", "or" if len(writers) > 1 else writers.pop())
    say(" switches", str(view.switches))
    return out


def _rubrics(
    rng: random.Random, encoder: PromptEncoder, pad: int, source: Source, size: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = [], []
    for _ in range(count):
        prompt, steps = source.draw(rng, size)
        kinds = KINDS if source.verbs(prompt) else NUMBERED
        head, tail = encoder.rubricor(prompt), encoder.completion(sample_rubric(rng, prompt, kinds, len(steps)))
        inputs.append(head + tail[:-1])
        targets.append([IGNORE] * (len(head) - 1) + tail)
    return _pad(inputs, pad), _pad(targets, IGNORE)


def reading_sets(
    encoder: PromptEncoder, pad: int, seed: int, batches: int, size: int, source: Source = LEDGER
) -> list[Any]:
    """Held-out batches with rubrics of ordinary size, for measuring verdict accuracy."""
    return [make_batch(encoder, pad, seed, i, size, 1, (MIN_CRITERIA, MAX_CRITERIA), source) for i in range(batches)]
