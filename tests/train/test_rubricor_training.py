"""The Rubricor's rewards to the letter, and GRPO that moves it towards what a frozen Judge rewards."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from roro_fast.config import RubricConfig
from roro_fast.rubric.format import InvalidRubric, Rubric, parse
from roro_fast.rubric.grammar import claims, criterion, read, truth, verbs_of
from roro_fast.rubric.judge import Judge, Judgement
from roro_fast.rubric.pairs import build_pairs
from roro_fast.rubric.rubricor import Draft, Rubricor
from roro_fast.rubric.seeds import group_by_query, seed_rubrics
from roro_fast.train.rubricor_training import rubric_rewards, train_rubricor, warm_up
from tests.rubric.samples import POOL, queries, routed
from tests.tiny import save_tiny


class TruthfulJudge(Judge):
    """A Judge that reads perfectly: it answers with the grammar's truth, so that rewards can be worked out by hand."""

    def score(self, inputs, max_tokens: int = 16384):
        out = []
        for x in inputs:
            held = [truth(read(c.sentence), x.view, verbs_of(x.prompt), POOL.labels) for c in x.rubric.criteria]
            weight = x.rubric.weights
            s = sum(w * (1 if h else -1) for w, h in zip(weight, held, strict=True)) / sum(weight)
            out.append(Judgement(s, tuple(map(float, held))))
        return out


@dataclass
class Setup:
    judge: Judge
    pairs: list


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    base = Judge.load(save_tiny(tmp_path_factory.mktemp("judge"), hidden=16))
    qs = [q for q in queries(60) if len(q.meta["kinds"]) == 4][:4]
    pairs = build_pairs({q.id: q for q in qs}, [t for q in qs for t in routed(q, 8, {1})], POOL)[0]
    return Setup(TruthfulJudge(base.model, base.tokenizer), pairs)


def draft(lines: str, tokens: int = 30) -> Draft:
    return Draft(tuple(range(tokens)), lines, parse(lines))


def line(sentence: str, tag: str = "Principle") -> str:
    return f"- [{tag}] (timely escalation) {sentence}"


PAD = [line("at most 9 switches"), line("at most 8 switches")]  # always true: no weight in any comparison
GOOD = "\n".join([line("the large model writes line #2"), *PAD])
BAD = "\n".join([line("the small model writes line #2"), *PAD])
MUTE = "\n".join([line("at most 7 switches"), *PAD])


def outcome_pairs(setup):
    return [p for p in setup.pairs if p.rule == "outcome"][:1]


def test_one_pair_gives_the_rewards_of_the_method(setup):
    invalid = Draft((1, 2), "x", InvalidRubric("not a criterion line"))
    rewards = rubric_rewards(setup.judge, [outcome_pairs(setup)], [[draft(GOOD), draft(BAD), draft(MUTE), invalid]])
    assert rewards.tolist() == [[1.0, -1.0, -1.0, -1.0]]


def test_the_shortest_of_long_correct_rubrics_earns_a_bonus(setup):
    extra = [line(f"at most {i} switches") for i in (10, 11, 12)]
    five, six = "\n".join([GOOD, *extra[:2]]), "\n".join([GOOD, *extra])
    rewards = rubric_rewards(
        setup.judge, [outcome_pairs(setup)], [[draft(six), draft(five), draft(five, 29), draft(BAD)]]
    )
    assert rewards[0].tolist() == pytest.approx([1.0, 1.0, 1.1, -1.0])
    short = rubric_rewards(setup.judge, [outcome_pairs(setup)], [[draft(GOOD), draft(five), draft(GOOD), draft(BAD)]])
    assert short[0].tolist() == [1.0, 1.0, 1.0, -1.0]  # they average fewer than 5


def test_several_pairs_average(setup):
    group = max(group_by_query(setup.pairs).values(), key=len)
    reward = rubric_rewards(setup.judge, [group], [[draft(GOOD)]])[0, 0].item()
    verbs = verbs_of(group[0].prompt)
    claim = read("the large model writes line #2")
    right = [
        truth(claim, p.chosen.view, verbs, POOL.labels) > truth(claim, p.rejected.view, verbs, POOL.labels)
        for p in group
    ]
    assert reward == pytest.approx(sum(2 * r - 1 for r in right) / len(group))


@pytest.fixture(scope="module")
def schooled(setup, tmp_path_factory):
    """A Rubricor that writes the format, with one helpful and one harmful first sentence equally likely."""
    r = Rubricor.load(save_tiny(tmp_path_factory.mktemp("rubricor"), hidden=48, layers=2))
    prompts = {p.query_id: p.prompt for p in setup.pairs}
    menu = []
    for sentence in ("the large model writes line #2", "the small model writes line #2"):
        tail = [c for c in claims((), POOL.labels, 5) if c.kind == "switches"][:2]
        menu.append(Rubric(tuple(criterion(c, "Principle", POOL.labels) for c in (read(sentence), *tail))))
    for i in range(40):
        seeds = {q: menu[(i + j) % 2] for j, q in enumerate(sorted(prompts))}
        loss = warm_up(r, prompts, seeds, RubricConfig(sft_steps=4, sft_lr=4e-3, batch_size=4), seed=i)
    assert loss < 0.6
    return r


def helpful_share(rubricor: Rubricor, setup: Setup) -> float:
    prompts = list({p.query_id: p.prompt for p in setup.pairs}.values())
    drafts = rubricor.write(prompts, n=16, temperature=1.0, seed=3, max_new_tokens=64)
    return sum("the large model writes line #2" in d.text for g in drafts for d in g) / (16 * len(prompts))


def test_grpo_raises_the_helpful_sentence(schooled, setup):
    before = helpful_share(schooled, setup)
    config = RubricConfig(steps=12, batch_size=16, rubricor_lr=2e-3, max_tokens=64)
    outcome = [p for p in setup.pairs if p.rule == "outcome"]
    phase = train_rubricor(schooled, setup.judge, outcome, config, seed=1)
    after = helpful_share(schooled, setup)
    assert 0.2 < before < 0.8 and after > before + 0.15
    assert phase.malformed < 0.5 and 3 <= phase.criteria <= 6 and phase.informative > 0


def test_training_repeats(setup, tmp_path):
    config = RubricConfig(steps=2, batch_size=8, max_tokens=16)
    logs, weights = [], []
    for _ in range(2):
        r = Rubricor.load(save_tiny(tmp_path, hidden=16))
        logs.append(train_rubricor(r, setup.judge, setup.pairs, config, seed=4))
        weights.append(torch.cat([p.flatten() for p in r.model.parameters()]))
    assert logs[0] == logs[1] and torch.equal(*weights)
    assert logs[0].malformed == 1.0 and logs[0].reward == -1.0


def test_seeds_are_what_the_warm_up_teaches(setup, tmp_path):
    r = Rubricor.load(save_tiny(tmp_path, hidden=48, layers=2))
    seeds = seed_rubrics(setup.pairs, POOL.labels)
    prompts = {p.query_id: p.prompt for p in setup.pairs}
    first = warm_up(r, prompts, seeds, RubricConfig(sft_steps=1), seed=0)
    assert warm_up(r, prompts, seeds, RubricConfig(sft_steps=60, batch_size=4, sft_lr=5e-3), seed=0) < 0.5 * first
