"""Process rewards of the router: the Judge's, and the controls of METHOD.md section 7."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np

from roro_fast.engine import Trajectory
from roro_fast.rubric.format import HARD_RULE, PRINCIPLE, Rubric
from roro_fast.rubric.grammar import Claim, criterion
from roro_fast.rubric.judge import Judge, JudgeInput
from roro_fast.rubric.quality import Formula, confidences, process_quality
from roro_fast.rubric.render import Pool, view_of


class JudgeReward:
    """S of each trajectory under its query's rubric; NaN for a query whose rubric was malformed or is missing.

    Scores only: the advantage of METHOD.md section 6 is that of the whole reward, of which S is one term.
    """

    name = "judge"

    def __init__(self, judge: Judge, rubrics: Mapping[str, Rubric], prompts: Mapping[str, str], pool: Pool) -> None:
        self.judge, self.rubrics, self.prompts, self.pool = judge, rubrics, prompts, pool

    def score(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        out = np.full(len(trajectories), np.nan, np.float32)
        rows = [i for i, t in enumerate(trajectories) if t.query_id in self.rubrics and t.steps]
        inputs = [
            JudgeInput(
                self.prompts[trajectories[i].query_id],
                view_of(trajectories[i], self.pool),
                self.rubrics[trajectories[i].query_id],
            )
            for i in rows
        ]
        if inputs:
            out[rows] = self.judge.rewards(inputs).scores.cpu().numpy()
        return out


class ShuffledReward:
    """Control: another process reward's scores, dealt to the wrong trajectories of the batch."""

    name = "shuffled"

    def __init__(self, inner: JudgeReward, seed: int) -> None:
        self.inner, self.seed = inner, seed

    def score(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        # Keyed by the batch, not by a running state, so that a resumed training deals the same hands.
        rng = np.random.default_rng([self.seed, *(t.seed for t in trajectories[:1])])
        return rng.permutation(self.inner.score(trajectories))


class FormulaReward:
    """Control: the process-quality formula of METHOD.md section 4 without any language model, mapped to [-1, 1]."""

    name = "formula"

    def __init__(self, all_small: Mapping[str, Trajectory], formula: Formula | None = None) -> None:
        self.confidence = {q: confidences(t) for q, t in all_small.items()}
        self.formula = formula

    def score(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        q = [process_quality(t.models, self.confidence[t.query_id], self.formula) for t in trajectories]
        return 2 * np.array(q, np.float32) - 1


def fixed_rubric(labels: Sequence[str]) -> Rubric:
    """Control: one hand-written rubric for every query, saying what one could without seeing it."""
    small, large = labels[0], labels[-1]
    sentences = (
        (HARD_RULE, Claim("writes at most", large, 3)),
        (PRINCIPLE, Claim("switches", number=2)),
        (PRINCIPLE, Claim("takes over after", small, 2)),
    )
    return Rubric(tuple(criterion(claim, tag, labels) for tag, claim in sentences))


def random_rubrics(prompts: Mapping[str, str], seed: int, steps: Mapping[str, int] | None = None) -> dict[str, Rubric]:
    """Control: grammatical rubrics about each query, drawn at random.

    `steps` of the small model's answer to each, for queries whose text does not tell.
    """
    from roro_fast.train.reader_data import sample_rubric

    return {
        q: sample_rubric(random.Random(f"{seed}/{q}"), prompt, steps=max(2, (steps or {}).get(q, 2)))
        for q, prompt in prompts.items()
    }
