"""GRPO of the Judge by TRL's GRPOTrainer: a sample is one verdict word per slot of both trajectories of a pair."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from trl import GRPOTrainer

from roro_fast.config import RubricConfig
from roro_fast.rubric.format import Rubric
from roro_fast.rubric.judge import Judge, JudgeInput
from roro_fast.rubric.pairs import Pair
from roro_fast.rubric.prompts import JudgePrompt
from roro_fast.rubric.seeds import group_by_query
from roro_fast.train.judge_training import PAIRS_PER_QUERY, JudgePhase, cycle, lay_out, sample_verdicts
from roro_fast.train.lm import pad
from roro_fast.train.trl import arguments
from roro_fast.train.trl.actor import lora_config, sync
from roro_fast.train.trl.fit import Job, Silent, fit, mean, quiet

Sides = tuple[JudgePrompt, JudgePrompt]  # of the chosen and of the rejected trajectory


class VerdictTrainer(Silent, GRPOTrainer):
    """GRPOTrainer whose sequences are slots of prompts: log-probabilities are of the verdict words only.

    A row's prompt is both prompts of a pair one after the other, its completion the verdicts of their slots. As the
    verdicts stand in no prompt, all samples of a pair take one forward over its two prompts.
    """

    def __init__(self, *, verdict_ids: torch.Tensor, **rest: Any) -> None:
        super().__init__(**rest)
        self.verdict_ids = verdict_ids
        self.sides: dict[tuple[int, ...], Sides] = {}

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *_: Any,
        compute_entropy: bool = False,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Log-probabilities [B, logits_to_keep] of the verdicts, entropies of their slots, 0 behind a row's last."""
        heads, verdicts = input_ids[:, :-logits_to_keep], input_ids[:, -logits_to_keep:]
        shown = attention_mask[:, :-logits_to_keep].bool()
        rows = [self.sides[tuple(ids[keep].tolist())] for ids, keep in zip(heads, shown, strict=True)]
        prompts = list(dict.fromkeys(id(p) for sides in rows for p in sides))
        by_id = {id(p): p for sides in rows for p in sides}
        table = dict(zip(prompts, self.slots(model, [by_id[i] for i in prompts]), strict=True))
        logp = heads.new_zeros(verdicts.shape, dtype=torch.float32)
        entropy = torch.zeros_like(logp)
        for b, sides in enumerate(rows):
            both = torch.cat([table[id(p)] for p in sides])  # [slots, verdict words]
            taken = (verdicts[b, : len(both), None] == self.verdict_ids.to(verdicts.device)).long().argmax(-1)
            logp[b, : len(both)] = both.gather(1, taken[:, None]).squeeze(1)
            entropy[b, : len(both)] = -(both.exp() * both).sum(-1)
        return logp, entropy.detach() if compute_entropy else None, None

    def slots(self, model: Any, prompts: Sequence[JudgePrompt]) -> list[torch.Tensor]:
        """Per prompt, the log-probabilities [slots, verdict words] float32 at the training temperature."""
        lm = self.accelerator.unwrap_model(model)
        lm = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
        ids = pad([p.ids for p in prompts], self._tokenizer.pad_token_id).to(lm.device)
        mask = pad([[1] * len(p.ids) for p in prompts], 0).to(lm.device)
        with self.accelerator.autocast():
            hidden = lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        head = lm.get_output_embeddings().weight[self.verdict_ids.to(lm.device)]
        at = torch.tensor([(b, r) for b, p in enumerate(prompts) for r in p.rows], device=lm.device)
        logits = F.linear(hidden[at[:, 0], at[:, 1]].float(), head.float()) / self.temperature
        return list(torch.log_softmax(logits, -1).split([len(p.rows) for p in prompts]))


class Verdicts:
    """The engine as TRL's rollout function: it reads every trajectory of the batch once and draws the verdicts."""

    def __init__(
        self, judge: Judge, pairs: Sequence[Pair], rubrics: Mapping[str, Rubric], config: RubricConfig, seed: int
    ) -> None:
        self.judge, self.pairs, self.rubrics, self.config, self.seed = judge, pairs, rubrics, config, seed

    def __call__(self, prompts: list[str], trainer: VerdictTrainer) -> dict[str, Any]:
        """`prompts`: each pair's index `group_size` times in a row."""
        g = self.config.group_size
        sync(trainer.model, self.judge.model)
        batch = [self.pairs[int(i)] for i in prompts[::g]]
        inputs = [JudgeInput(p.prompt, c.view, self.rubrics[p.query_id]) for p in batch for c in (p.chosen, p.rejected)]
        index = {x: i for i, x in enumerate(dict.fromkeys(inputs))}
        encoded = self.judge.encode(list(index))
        probs = self.judge.read(encoded).probs
        slots, owner, weights = lay_out(encoded, [index[x] for x in inputs], probs.device)
        generator = torch.Generator().manual_seed(self.seed + 7919 * trainer.state.global_step)
        actions, rewards = sample_verdicts(probs[slots], owner, weights, self.config, generator)
        words = self.judge.verdict_ids[actions]  # [M, G]
        per_pair = words.split(torch.bincount(owner // 2).tolist())
        trainer.sides = {}
        heads = []
        for chosen, rejected in zip(inputs[0::2], inputs[1::2], strict=True):
            sides = encoded[index[chosen]], encoded[index[rejected]]
            heads.append([*sides[0].ids, *sides[1].ids])
            trainer.sides[tuple(heads[-1])] = sides
        return {
            "prompt_ids": [h for h in heads for _ in range(g)],
            "completion_ids": [column.tolist() for block in per_pair for column in block.T],
            "logprobs": None,
            "ordering": rewards.flatten().tolist(),
        }


def ordering_reward(ordering: list[float], **_: Any) -> list[float]:
    """+1 where a sample's verdicts put the chosen trajectory first, else -1: drawn with them by `sample_verdicts`."""
    return ordering


def train(
    judge: Judge, pairs: Sequence[Pair], rubrics: Mapping[str, Rubric], config: RubricConfig, job: Job
) -> JudgePhase:
    """See `judge_training.train_judge`; an update takes exactly `config.batch_size` pairs."""
    usable = [p for p in pairs if p.query_id in rubrics]
    malformed = len(pairs) - len(usable)
    if not usable or config.steps == 0:
        return JudgePhase(float("nan"), 0.0, 0.0, malformed)
    rows = config.batch_size * config.group_size
    # Rows of one pair share its forward: with all rows in one forward, only its pairs' prompts count.
    most = rows if 2 * config.batch_size <= job.config.micro_batch else max(1, job.config.micro_batch // 2)
    with quiet():
        args = arguments.grpo(
            job.out, job.config, config, judge.model.device, rows=rows, most=most, lr=config.judge_lr, seed=job.seed
        )
        trainer = VerdictTrainer(
            verdict_ids=judge.verdict_ids,
            model=job.actor(judge.model),
            reward_funcs=ordering_reward,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": str(i)} for i in plan(usable, config, job.seed)]),
            processing_class=copy.deepcopy(judge.tokenizer),  # TRL gives it a padding token
            peft_config=lora_config(job.config),
            rollout_func=Verdicts(judge, usable, rubrics, config, job.seed),
        )
    log = fit(trainer, judge.model, job)
    kl = 0.0 if config.kl == 0 else mean(log, "kl")
    return JudgePhase(mean(log, "reward"), 1 - mean(log, "frac_reward_zero_std"), kl, malformed)


def plan(pairs: Sequence[Pair], config: RubricConfig, seed: int) -> list[int]:
    """Indices of the pairs of all updates, `config.batch_size` each; those of a query stand together."""
    index = {id(p): i for i, p in enumerate(pairs)}
    groups = group_by_query(pairs)
    queries, rng = cycle(sorted(groups), 1, f"judge/{seed}"), random.Random(f"judge/{seed}/pairs")
    out: list[int] = []
    while len(out) < config.steps * config.batch_size:
        group = groups[next(queries)[0]]
        out += [index[id(p)] for p in rng.sample(group, min(PAIRS_PER_QUERY, len(group)))]
    return out[: config.steps * config.batch_size]
