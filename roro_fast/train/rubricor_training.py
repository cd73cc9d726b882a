"""Training the Rubricor: warm-up on seed rubrics, then GRPO on how a frozen Judge orders pairs under its rubrics."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from roro_fast.config import RubricConfig
from roro_fast.models.lm_trainer import LMTrainer, Tick, idle
from roro_fast.rubric.format import Rubric
from roro_fast.rubric.judge import Judge, JudgeInput
from roro_fast.rubric.pairs import Pair
from roro_fast.rubric.rubricor import Draft, Rubricor
from roro_fast.rubric.seeds import group_by_query
from roro_fast.train.grpo import group_advantages, grpo_loss
from roro_fast.train.judge_training import PAIRS_PER_QUERY, cycle
from roro_fast.train.lm import (
    completion_batch,
    reference_of,
    rounded,
    sft_loss,
    token_logprobs,
)

LENGTH_BONUS, LONG = 0.1, 5.0


def warm_up(
    rubricor: Rubricor,
    prompts: Mapping[str, str],
    seeds: Mapping[str, Rubric],
    config: RubricConfig,
    *,
    seed: int,
    tick: Tick = idle,
) -> float:
    """SFT on each query's seed rubric. `prompts` maps query ids to texts. Returns the last loss."""
    ids = sorted(q for q in seeds if q in prompts)
    if not ids or config.sft_steps == 0:
        return float("nan")
    e = rubricor.encoder
    batches = cycle(ids, config.batch_size, f"rubricor-sft/{seed}")
    loss = torch.tensor(float("nan"))
    with LMTrainer(rubricor.model, config.sft_lr, frozen=config.frozen, bf16=config.bf16, tick=tick) as trainer:
        for step in range(config.sft_steps):
            batch = next(batches)
            heads, tails = [e.rubricor(prompts[q]) for q in batch], [e.completion(seeds[q]) for q in batch]
            loss = sft_loss(rubricor.model, *completion_batch(heads, tails, e.eos))
            trainer.step(loss, config.sft_lr * (1 - step / config.sft_steps))
    return float(loss.detach())


@dataclass(slots=True)
class RubricorPhase:
    """One phase's log, means over its updates."""

    reward: float
    informative: float
    kl: float
    malformed: float
    criteria: float

    def to_dict(self) -> dict[str, Any]:
        return {k: rounded(getattr(self, k)) for k in ("reward", "informative", "kl", "malformed", "criteria")}


def train_rubricor(
    rubricor: Rubricor, judge: Judge, pairs: Sequence[Pair], config: RubricConfig, *, seed: int, tick: Tick = idle
) -> RubricorPhase:
    """`config.steps` GRPO updates with the Judge frozen; an update takes about `config.batch_size` pairs.

    The G rubrics sampled for a query are rewarded by `rubric_rewards` on up to PAIRS_PER_QUERY of its pairs.
    """
    groups = group_by_query(pairs)
    if not groups or config.steps == 0:
        return RubricorPhase(float("nan"), 0.0, 0.0, 0.0, 0.0)
    e, g = rubricor.encoder, config.group_size
    frozen = reference_of(rubricor.model) if config.kl > 0 else None
    batches = cycle(sorted(groups), max(1, config.batch_size // PAIRS_PER_QUERY), f"rubricor/{seed}")
    rng = random.Random(f"rubricor/{seed}/pairs")
    log: list[tuple[float, float, float, float, float]] = []
    judge = judge.scorer(config.bf16)
    with LMTrainer(rubricor.model, config.rubricor_lr, frozen=config.frozen, bf16=config.bf16, tick=tick) as trainer:
        for step in range(config.steps):
            batch = [rng.sample(groups[q], min(PAIRS_PER_QUERY, len(groups[q]))) for q in next(batches)]
            texts = [b[0].prompt for b in batch]
            drafts = rubricor.write(
                texts, n=g, temperature=config.temperature, seed=seed + 7919 * step, max_new_tokens=config.max_tokens
            )
            rewards = rubric_rewards(judge, batch, drafts)  # [Q, G]
            heads = [e.rubricor(t) for t in texts for _ in range(g)]
            tails = [list(d.ids) for group in drafts for d in group]
            ids, targets = completion_batch(heads, tails, e.eos)
            logp = token_logprobs(rubricor.model, ids, targets, config.temperature)
            lengths = torch.tensor([len(t) for t in tails])
            advantage = group_advantages(rewards).flatten().repeat_interleave(lengths)
            weight = (1 / (len(tails) * lengths)).repeat_interleave(lengths)
            ref = None
            if frozen is not None:
                with torch.no_grad():
                    ref = token_logprobs(frozen, ids, targets, config.temperature)
            result = grpo_loss(
                logp,
                logp.detach(),
                advantage.to(logp.device),
                weight.to(logp.device),
                reference=ref,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                kl=config.kl,
            )
            trainer.step(result.loss)
            good = [d.rubric for group in drafts for d in group if isinstance(d.rubric, Rubric)]
            log.append(
                (
                    float(rewards.mean()),
                    float((rewards.amax(1) > rewards.amin(1)).float().mean()),
                    result.kl,
                    1 - len(good) / len(tails),
                    sum(map(len, good)) / max(1, len(good)),
                )
            )
    return RubricorPhase(*(sum(column) / len(log) for column in zip(*log, strict=True)))


def rubric_rewards(judge: Judge, batch: Sequence[Sequence[Pair]], drafts: Sequence[Sequence[Draft]]) -> torch.Tensor:
    """Rewards [Q, G] float32 of the drafts for each query, given some of its pairs.

    A malformed draft gets -1. Any other gets the mean over the pairs of +1 where the Judge scores the chosen trajectory
    above the rejected one under it, else -1 (with one pair: METHOD.md section 5 to the letter). A positive mean makes a
    draft correct; when the correct ones of a group average at least 5 criteria, the shortest of them gets 0.1 more.
    """
    inputs: list[JudgeInput] = []
    for pairs, group in zip(batch, drafts, strict=True):
        for d in group:
            if isinstance(d.rubric, Rubric):
                inputs += [JudgeInput(p.prompt, c.view, d.rubric) for p in pairs for c in (p.chosen, p.rejected)]
    scores = iter([j.score for j in judge.score(inputs)])
    rewards = torch.full((len(batch), len(drafts[0]) if drafts else 0), -1.0)
    for q, (pairs, group) in enumerate(zip(batch, drafts, strict=True)):
        correct: list[tuple[int, int, int]] = []  # (criteria, tokens, index)
        for i, d in enumerate(group):
            if isinstance(d.rubric, Rubric):
                rewards[q, i] = sum(1.0 if next(scores) > next(scores) else -1.0 for _ in pairs) / len(pairs)
                if rewards[q, i] > 0:
                    correct.append((len(d.rubric), len(d.ids), i))
        if correct and sum(c[0] for c in correct) / len(correct) >= LONG:
            rewards[q, min(correct)[2]] += LENGTH_BONUS
    return rewards
