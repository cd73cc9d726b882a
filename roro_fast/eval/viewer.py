"""One trajectory as the report's viewer shows it: every step with its writer, cost, decision and verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from roro_fast.engine.trajectory import Decision, Trajectory
from roro_fast.rubric.format import Rubric


@dataclass(slots=True)
class ViewStep:
    """One step. `flops` is 2N per token; `probability` is that of the action taken, `confidence` exp(mean log-prob).

    `draft` is the text of a rejected draft where it was kept; `rejected` says that there was one.
    """

    text: str
    model: int
    tokens: int
    flops: float
    confidence: float
    probability: float = math.nan
    correct: bool | None = None
    rejected: bool = False
    draft: str = ""


@dataclass(slots=True)
class ViewCriterion:
    """One criterion of the rubric with the Judge's probability that it holds."""

    sentence: str
    tag: str
    axis: str
    weight: float
    p_true: float = math.nan


@dataclass(slots=True)
class ViewTrajectory:
    """One answer. `flops_share` is its generated FLOPs over those of all-large on this query (NaN: unknown)."""

    query_id: str
    query: str
    arm: str
    knob: float
    sample: int
    correct: bool | None
    answer: str
    predicted: str
    finish_reason: str
    steps: list[ViewStep]
    generated_flops: float
    total_flops: float
    seconds: float
    discarded_tokens: int
    flops_share: float = math.nan
    rubric: list[ViewCriterion] = field(default_factory=list)
    score: float = math.nan
    note: str = ""


def view_trajectory(
    t: Trajectory,
    *,
    query: str,
    answer: str = "",
    flops_per_token: Sequence[float],
    knob: float = math.nan,
    large_flops: float = math.nan,
    rubric: Rubric | None = None,
    p_true: Sequence[float] = (),
    score: float = math.nan,
    note: str = "",
) -> ViewTrajectory:
    """Collect what the viewer shows.

    flops_per_token: 2N of each pool model. large_flops: all-large's generated FLOPs on this query. p_true: the Judge's
    probability per criterion, in the rubric's order. `t.meta["drafts"]` ({step index: text}) is shown where present.
    """
    by_step = {d.step: d for d in t.decisions}
    drafts = {int(k): str(v) for k, v in dict(t.meta.get("drafts", {})).items()}
    right = t.step_correct if t.step_correct is not None and len(t.step_correct) == len(t.steps) else None
    steps = []
    for i, s in enumerate(t.steps):
        d = by_step.get(i)
        steps.append(
            ViewStep(
                text=t.step_texts[i] if i < len(t.step_texts) else "",
                model=s.model,
                tokens=s.end - s.start,
                flops=flops_per_token[s.model] * (s.end - s.start),
                confidence=math.exp(min(s.mean_logprob, 0.0)),
                probability=_probability(d),
                correct=None if right is None else bool(right[i]),
                rejected=d is not None and d.kind == "regenerate" and d.action > 0,
                draft=drafts.get(i, ""),
            )
        )
    criteria = [
        ViewCriterion(c.sentence, c.tag, c.axis, c.weight, float(p_true[i]) if i < len(p_true) else math.nan)
        for i, c in enumerate(rubric.criteria if rubric is not None else ())
    ]
    return ViewTrajectory(
        query_id=t.query_id,
        query=query,
        arm=t.arm,
        knob=knob,
        sample=t.sample,
        correct=t.correct,
        answer=answer,
        predicted=t.predicted or "",
        finish_reason=t.finish_reason,
        steps=steps,
        generated_flops=t.cost.generated_flops,
        total_flops=t.cost.total_flops,
        seconds=t.cost.seconds,
        discarded_tokens=t.cost.discarded_tokens,
        flops_share=t.cost.generated_flops / large_flops if large_flops > 0 else math.nan,
        rubric=criteria,
        score=score,
        note=note,
    )


def _probability(d: Decision | None) -> float:
    if d is None:
        return math.nan
    return float(d.probs[d.action]) if d.action < len(d.probs) else math.exp(min(d.logprob, 0.0))
