"""TRIM-POMDP (arXiv 2601.10245): plan rewrites over a belief about the correctness that scores only hint at.

Hidden state at a draft: 0 all steps right, 1 the draft is the first wrong step, 2 an earlier wrong step was kept.
Keeping a draft leaves "right so far" only in state 0, rewriting it in 0 and 1 with the large model's accuracy q. With u
the probability of "right so far" after an action, the value of going on depends on u and the step alone:

    W_t(u) = sum_k max_a [ G_t(u_a) - lambda c P(k) [a = rewrite] ],   G_t(u) = h_t R(u) + (1 - h_t) W_{t+1}(u)

over score bins k, where h_t is the chance that step t is the last, R(u) the expected correctness, c a rewrite's cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from roro_fast.engine.policy import BoundaryBatch, Decisions
from roro_fast.routing.baselines import decisions
from roro_fast.routing.scoring import StepScorer, rate

GRID = 201


@dataclass(frozen=True, slots=True)
class StepModel:
    """What is fitted. `edges` [B - 1] cut scores into B bins; `small` and `large` [3, B] are P(bin | state) of a step
    by either model; `p` and `q` the chance that small and large write a right step after right ones; `last` [T] h_t;
    `right` and `wrong` the accuracy of answers without and with a wrong step; `cost` a rewrite's share of all-large."""

    edges: np.ndarray
    small: np.ndarray
    large: np.ndarray
    p: float
    q: float
    last: np.ndarray
    right: float
    wrong: float
    cost: float


def states_of(flags: Sequence[bool]) -> list[int]:
    """Hidden state at each step of an answer whose steps are right or wrong as `flags` say."""
    first = list(flags).index(False) if False in flags else len(flags)
    return [0 if i < first else 1 if i == first else 2 for i in range(len(flags))]


def fit_model(
    small: Sequence[tuple[Sequence[float], Sequence[bool], bool]],
    large: Sequence[tuple[Sequence[float], Sequence[bool], bool]],
    *,
    bins: int = 8,
) -> StepModel:
    """From (step scores, step verdicts, answer correct) of all-small and of all-large answers.

    Bins are quantiles of small scores; frequencies are smoothed by one count. Ours: the paper learns its model from
    data of annotated step errors, here the task's verifier (or the scores themselves) annotates own answers.
    """
    scores = np.concatenate([np.asarray(s, float) for s, _, _ in small])
    edges = np.unique(np.quantile(scores, np.arange(1, bins) / bins))
    counts = np.ones((2, 3, len(edges) + 1))
    outcome = np.array([[1.0, 2.0], [1.0, 2.0]])  # [has a wrong step]: correct answers, answers, with one count each
    steps = np.zeros((2, 2))  # [model]: right after right, steps after right
    for who, answers in enumerate((small, large)):
        for values, flags, correct in answers:
            state = states_of(flags)
            np.add.at(counts[who], (np.array(state, int), np.searchsorted(edges, values, "right")), 1)
            steps[who] += state.count(0), len(state) - state.count(2)
            outcome[int(False in flags)] += bool(correct), 1
    lengths = np.array([len(flags) for _, flags, _ in large if len(flags)])
    horizon = int(lengths.max())
    alive = np.array([(lengths > t).sum() for t in range(horizon)])
    ended = np.array([(lengths == t + 1).sum() for t in range(horizon)])
    small_o, large_o = counts / counts.sum(-1, keepdims=True)
    (p, q), (right, wrong) = (steps[:, 0] + 1) / (steps[:, 1] + 2), outcome[:, 0] / outcome[:, 1]
    return StepModel(edges, small_o, large_o, p, q, ended / alive, right, wrong, 1 / float(lengths.mean()))


class TrimPOMDP:
    """Rewrite iff it is worth lambda. The table `go_on` [T + 1, GRID] of W over u is made once, decisions look it up.

    The belief is filtered anew over the scores of the answer as it stands, so rewritten steps are observed too, and
    nothing is remembered between decisions. Ours: exact backward induction on a grid of the scalar u, for which the
    paper calls a point-based solver on its larger state.
    """

    name = "trim_pomdp"
    action_space = "regenerate"
    needs_scout = False

    def __init__(self, scorer: StepScorer, model: StepModel, lambda_cost: float = 0.3) -> None:
        self.scorer, self.model, self.lambda_cost = scorer, model, lambda_cost
        self.grid = np.linspace(0, 1, GRID)
        self.go_on = self._solve()

    def _solve(self) -> np.ndarray:
        m, horizon = self.model, len(self.model.last)
        w = np.zeros((horizon + 1, GRID))
        w[horizon] = self._reward(self.grid)  # past the longest answer seen: it ends here
        prior = np.stack((self.grid * m.p, self.grid * (1 - m.p), 1 - self.grid), -1)  # [G, 3]
        for t in range(horizon - 1, -1, -1):
            for k in range(m.small.shape[1]):
                mass = prior * m.small[:, k]
                total = mass.sum(-1)
                keep, rewrite = self._values(mass / total[:, None], t, w)
                w[t] += total * np.maximum(keep, rewrite)
        return w

    def _reward(self, u: np.ndarray) -> np.ndarray:
        return u * self.model.right + (1 - u) * self.model.wrong

    def _values(self, belief: np.ndarray, t: int, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values [N] of keeping and of rewriting at beliefs [N, 3] about the draft of step t."""
        m = self.model
        h = m.last[t] if t < len(m.last) else 1.0
        after = w[min(t + 1, len(w) - 1)]

        def going_on(u: np.ndarray) -> np.ndarray:
            value: np.ndarray = h * self._reward(u) + (1 - h) * np.interp(u, self.grid, after)
            return value

        return going_on(belief[:, 0]), going_on((belief[:, 0] + belief[:, 1]) * m.q) - self.lambda_cost * m.cost

    def belief(self, scores: Sequence[float], actions: Sequence[int]) -> np.ndarray:
        """[3] posterior at the last of `scores`, the draft's; `actions` say who wrote the steps before it."""
        m, u = self.model, 1.0
        b = np.zeros(3)
        for i, k in enumerate(np.searchsorted(m.edges, scores, "right")):
            by_large = i < len(scores) - 1 and actions[i] > 0
            p, o = (m.q, m.large) if by_large else (m.p, m.small)
            b = np.array([u * p, u * (1 - p), 1 - u]) * o[:, k]
            b /= b.sum()
            u = float(b[0])
        return b

    def decide(self, batch: BoundaryBatch) -> Decisions:
        beliefs = [self.belief(s, tag["actions"]) for s, tag in zip(rate(self.scorer, batch), batch.tags, strict=True)]
        large = []
        for b, t in zip(beliefs, batch.step_index.tolist(), strict=True):
            keep, rewrite = self._values(b[None], t, self.go_on)
            large.append(bool(rewrite[0] > keep[0]))
        out = decisions(torch.tensor(large), batch)
        out.features = torch.tensor(np.array(beliefs), dtype=torch.float32)
        return out
