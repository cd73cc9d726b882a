"""Training the Judge: warm-up on the truth of sentences, then GRPO on ordering pairs under frozen rubrics."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from roro_fast.config import RubricConfig
from roro_fast.models.lm_trainer import LMTrainer, Tick, idle
from roro_fast.rubric.format import Rubric
from roro_fast.rubric.grammar import read, truth, verbs_of
from roro_fast.rubric.judge import Judge, JudgeInput
from roro_fast.rubric.pairs import Pair
from roro_fast.rubric.prompts import JudgePrompt
from roro_fast.rubric.seeds import group_by_query
from roro_fast.train.grpo import group_advantages, grpo_loss
from roro_fast.train.lm import reference_of, rounded
from roro_fast.train.reader_data import sample_rubric

T = TypeVar("T")
PAIRS_PER_QUERY = 4  # pairs of one query in one update: they share trajectories, which are then read once
READS_WELL, WINDOW = 0.985, 8  # the warm-up ends when this share of verdicts is right over so many batches


def cycle(items: Sequence[T], size: int, seed: str) -> Iterator[list[T]]:
    """Batches of `size` for ever, reshuffled on every pass; `size` may exceed the number of items."""
    rng = random.Random(seed)
    queue: list[T] = []
    while True:
        batch: list[T] = []
        while len(batch) < size:
            if not queue:
                queue = rng.sample(list(items), len(items))
            batch.append(queue.pop())
        yield batch


def truths(x: JudgeInput, labels: Sequence[str]) -> list[bool | None]:
    """The programmatic verdict on each criterion; None where a sentence is not of the grammar."""
    verbs = verbs_of(x.prompt)
    found = [read(c.sentence) for c in x.rubric.criteria]
    return [None if c is None else truth(c, x.view, verbs, labels) for c in found]


def reading_inputs(pairs: Sequence[Pair], seeds: Mapping[str, Rubric], rng: random.Random) -> list[JudgeInput]:
    """What the warm-up reads: a trajectory of each pair, under the seed rubric or a random one, alternately."""
    inputs = []
    for i, p in enumerate(pairs):
        view = rng.choice((p.chosen, p.rejected)).view
        rubric = seeds[p.query_id] if i % 2 else sample_rubric(rng, p.prompt, steps=max(2, len(view.models)))
        inputs.append(JudgeInput(p.prompt, view, rubric))
    return inputs


def warm_up(
    judge: Judge,
    pairs: Sequence[Pair],
    seeds: Mapping[str, Rubric],
    config: RubricConfig,
    *,
    seed: int,
    tick: Tick = idle,
) -> float:
    """SFT: verdicts on the pairs' trajectories under seed and random rubrics, alternately. Returns the last loss.

    Takes at most `config.sft_steps` updates; a model that reads well already needs few.
    """
    pool = [p for p in pairs if p.query_id in seeds]
    if not pool or config.sft_steps == 0:
        return float("nan")
    labels, rng = judge.encoder.labels, random.Random(f"judge-sft/{seed}")
    batches = cycle(pool, config.batch_size, f"judge-sft/{seed}/order")
    loss = torch.tensor(float("nan"))
    right: deque[float] = deque(maxlen=WINDOW)
    with LMTrainer(judge.model, config.sft_lr, frozen=config.frozen, bf16=config.bf16, tick=tick) as trainer:
        for step in range(config.sft_steps):
            inputs = reading_inputs(next(batches), seeds, rng)
            answers = [t for x in inputs for t in truths(x, labels)]
            rows = [i for i, t in enumerate(answers) if t is not None]
            probs = judge.forward(judge.encode(inputs)).probs[rows]
            target = torch.tensor([0 if answers[i] else 1 for i in rows], device=probs.device)
            loss = F.nll_loss(probs.clamp_min(1e-9).log(), target)
            right.append(float((probs.argmax(-1) == target).float().mean()))
            if len(right) == WINDOW and sum(right) / WINDOW >= READS_WELL:
                break
            trainer.step(loss, config.sft_lr * (1 - step / config.sft_steps))
    return float(loss.detach())


@dataclass(slots=True)
class JudgePhase:
    """One phase's log: mean reward of the sampled verdicts, share of groups with unequal rewards, KL, skipped pairs."""

    reward: float
    informative: float
    kl: float
    malformed: int

    def to_dict(self) -> dict[str, Any]:
        return {k: rounded(getattr(self, k)) for k in ("reward", "informative", "kl", "malformed")}


def train_judge(
    judge: Judge,
    pairs: Sequence[Pair],
    rubrics: Mapping[str, Rubric],
    config: RubricConfig,
    *,
    seed: int,
    loss: str = "grpo",
    tick: Tick = idle,
) -> JudgePhase:
    """`config.steps` updates of about `config.batch_size` pairs with the Rubricor frozen.

    `rubrics` maps query ids to its cached, well-formed rubrics.

    GRPO: an action is one verdict word per slot of both trajectories of a pair, sampled from the verdict words only;
    the reward is +1 if the sampled verdicts give the chosen trajectory the higher score, else -1, shared by all slots.
    A pair whose rubric was malformed earns -1 whatever the Judge does, so it moves nothing and is only counted.
    `loss="pairwise"` descends -log sigmoid(S(chosen) - S(rejected)) instead.
    """
    usable = [p for p in pairs if p.query_id in rubrics]
    malformed = len(pairs) - len(usable)
    if not usable or config.steps == 0:
        return JudgePhase(float("nan"), 0.0, 0.0, malformed)
    frozen = reference_of(judge.model) if config.kl > 0 else None
    reference = Judge(frozen, judge.tokenizer, judge.encoder.labels, verdicts=judge.verdicts) if frozen else None
    groups = group_by_query(usable)
    batches = cycle(sorted(groups), max(1, config.batch_size // PAIRS_PER_QUERY), f"judge/{seed}")
    rng, generator = random.Random(f"judge/{seed}/pairs"), torch.Generator().manual_seed(seed)
    rewards, informative, drift = [], [], []
    with LMTrainer(judge.model, config.judge_lr, frozen=config.frozen, bf16=config.bf16, tick=tick) as trainer:
        for _ in range(config.steps):
            batch = [p for q in next(batches) for p in rng.sample(groups[q], min(PAIRS_PER_QUERY, len(groups[q])))]
            inputs = [JudgeInput(p.prompt, c.view, rubrics[p.query_id]) for p in batch for c in (p.chosen, p.rejected)]
            index = {x: i for i, x in enumerate(dict.fromkeys(inputs))}  # a trajectory of several pairs is read once
            prompts = judge.encode(list(index))
            out = judge.forward(prompts)
            side = [index[x] for x in inputs]
            if loss == "pairwise":
                scores = out.scores[side]
                gain = scores[0::2] - scores[1::2]
                trainer.step(-F.logsigmoid(gain).mean())
                rewards.append(float((gain > 0).float().mean() * 2 - 1))
                continue
            slots, owner, weights = lay_out(prompts, side, out.probs.device)
            probs = out.probs[slots]
            actions, reward = sample_verdicts(probs.detach(), owner, weights, config, generator)
            advantage = group_advantages(reward)[owner // 2]  # [M, G]
            taken = tempered(probs, config.temperature).gather(1, actions)  # [M, G]
            length = torch.bincount(owner // 2)[owner // 2].float()
            share = (1 / (len(batch) * config.group_size * length))[:, None].expand_as(advantage)
            ref = None
            if reference is not None:
                ref = tempered(reference.read(prompts).probs[slots], config.temperature).gather(1, actions).flatten()
            result = grpo_loss(
                taken.flatten(),
                taken.detach().flatten(),
                advantage.flatten(),
                share.flatten(),
                reference=ref,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                kl=config.kl,
            )
            trainer.step(result.loss)
            rewards.append(float(reward.mean()))
            informative.append(float((reward.amax(1) > reward.amin(1)).float().mean()))
            drift.append(result.kl)
    return JudgePhase(_mean(rewards), _mean(informative), _mean(drift), malformed)


def lay_out(
    prompts: Sequence[JudgePrompt], side: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(slots, owner, weights), all [M]: slot m of the pairs is slot `slots[m]` of a forward over `prompts`, has weight
    `weights[m]` and belongs to `owner[m]`, 2i and 2i + 1 being pair i; `side` names their prompts in that order."""
    starts = [0, *accumulate(len(p.rows) for p in prompts)]
    slots = [s for i in side for s in range(starts[i], starts[i + 1])]
    owner = [o for o, i in enumerate(side) for _ in prompts[i].rows]
    weights = [w for i in side for w in prompts[i].weights]
    return torch.tensor(slots, device=device), torch.tensor(owner, device=device), torch.tensor(weights, device=device)


def sample_verdicts(
    probs: torch.Tensor, owner: torch.Tensor, weights: torch.Tensor, config: RubricConfig, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(actions [M, G] int64: 0 true, 1 false; rewards [B, G]: +1 where chosen outscores rejected, else -1).

    probs [M, 2]; owner [M] int64: prompt of each slot, chosen and rejected of pair i being prompts 2i and 2i + 1.
    """
    uniforms = torch.rand(len(probs), config.group_size, generator=generator).to(probs.device)
    actions = (uniforms >= tempered(probs, config.temperature)[:, :1].exp()).long()
    value = weights[:, None] * (1 - 2 * actions)
    sizes = torch.bincount(owner)
    # A pair has one rubric, so both its prompts have the same weight sum and unnormalised scores compare alike.
    scores = torch.segment_reduce(value, "sum", lengths=sizes)
    return actions, torch.where(scores[0::2] > scores[1::2], 1.0, -1.0)


def tempered(probs: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities at a sampling temperature, from probabilities at 1."""
    return torch.log_softmax(probs.clamp_min(1e-9).log() / temperature, -1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
