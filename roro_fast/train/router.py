"""Router training: GRPO over groups of really routed answers, clipped per routing decision (METHOD.md section 6)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from roro_fast.config import RouterConfig
from roro_fast.engine import Request, StepEngine, Trajectory
from roro_fast.engine.rng import stream_key
from roro_fast.profiling import mark
from roro_fast.routing.policy import PolicyNetwork
from roro_fast.tasks.base import Query, Task
from roro_fast.train.grpo import group_advantages, grpo_loss
from roro_fast.train.rewards import ProcessReward, combine
from roro_fast.train.rollout import verify


@dataclass(slots=True)
class DecisionBatch:
    """Decisions of many trajectories: features [D, F]; actions, behaviour log-probs and advantages [D]."""

    features: torch.Tensor
    actions: torch.Tensor
    logprobs: torch.Tensor
    advantages: torch.Tensor

    @classmethod
    def of(
        cls, trajectories: Sequence[Trajectory], advantages: torch.Tensor, device: torch.device | None = None
    ) -> DecisionBatch:
        flat = [(d, a) for t, a in zip(trajectories, advantages.tolist(), strict=True) for d in t.decisions]
        return cls(
            torch.tensor([d.features for d, _ in flat], dtype=torch.float32, device=device),
            torch.tensor([d.action for d, _ in flat], device=device),
            torch.tensor([d.logprob for d, _ in flat], device=device),
            torch.tensor([a for _, a in flat], dtype=torch.float32, device=device),
        )


def decision_loss(
    logits: torch.Tensor, batch: DecisionBatch, clip_low: float, clip_high: float, entropy: float, kl: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """GRPO's loss averaged over all decisions, the behaviour policy as its reference, minus an entropy bonus.

    logits [D, K].
    """
    logp = torch.log_softmax(logits, -1)
    new = logp.gather(-1, batch.actions[:, None]).squeeze(-1)
    old = batch.logprobs
    result = grpo_loss(new, old, batch.advantages, reference=old, clip_low=clip_low, clip_high=clip_high, kl=kl)
    h = -(logp.exp() * logp).sum(-1).mean()
    stats = {"entropy": h.item(), "kl": result.kl, "clip_fraction": result.clipped}
    return result.loss - entropy * h, stats


@dataclass
class RouterTrainer:
    """Trains `policy` in place. `queries` pairs each query with its prompt ids; `all_large` has FLOPs by query id.

    Everything a step draws follows from (seed, step), so policy, optimiser and step number are the whole state.
    """

    policy: PolicyNetwork
    engine: StepEngine
    task: Task
    queries: Sequence[tuple[Query, list[int]]]
    all_large: dict[str, float]
    config: RouterConfig
    process: ProcessReward | None = None
    limits: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=self.config.lr)
        self._by_id = {q.id: q for q, _ in self.queries}

    def train_step(self) -> dict[str, float]:
        """One round of rollouts and updates; returns the metrics of the round."""
        trajectories = self.rollouts(self._requests())
        if self.step == 0:
            seen = [d.features for t in trajectories for d in t.decisions]
            self.policy.standardize(torch.tensor(seen, device=self.policy.w1.device), self.config.scale_hidden)
        process = np.zeros(len(trajectories)) if self.process is None else self.process.score(trajectories)
        c = self.config
        rewards = combine(trajectories, self.all_large, c.lambda_cost, c.beta, process)
        grouped = torch.from_numpy(rewards.total).view(-1, c.group_size)
        advantages = group_advantages(grouped, c.scale_rewards, eps=1e-4).flatten()
        with mark("train/router"):
            stats = self._update(DecisionBatch.of(trajectories, advantages, self.policy.w1.device))
        self.step += 1
        large = [np.mean([m > 0 for m in t.models]) for t in trajectories]
        return {
            "reward": float(rewards.total.mean()),
            "outcome": float(rewards.outcome.mean()),
            "cost_share": float(rewards.cost_share.mean()),
            "process": float(rewards.process.mean()),
            "unscored": float(rewards.unscored),
            "large_share": float(np.mean(large)),
            "flat_groups": float((advantages.abs() < 1e-9).double().mean()),
            **stats,
        }

    def rollouts(self, requests: list[Request]) -> list[Trajectory]:
        """Verified trajectories in request order, whatever order they finished in."""
        # A cached prefix differs in its last bits from one computed anew, and a resumed run would start without it.
        for model in range(self.engine.num_models):
            self.engine.kv.clear_prefixes(model)
        found = {(t.query_id, t.sample): t for t in self.engine.rollout(requests, self.policy)}
        keys = [(r.query.id, r.sample) for r in requests if r.query is not None]
        return [verify(found[k], self._by_id[k[0]], self.task) for k in keys]

    def _requests(self) -> list[Request]:
        """This step's queries (shuffled epochs, disjoint within one) times the group."""
        n, per = len(self.queries), min(self.config.queries_per_step, len(self.queries))
        epoch, at = divmod(self.step * per, n - n % per)
        order = list(range(n))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        seed = stream_key(self.seed, self.step) & 0x7FFFFFFF
        return [
            Request(
                ids, query=q, sample=j, seed=seed + i, temperature=self.config.temperature, arm="grpo", **self.limits
            )
            for i, (q, ids) in enumerate(self.queries[k] for k in order[at : at + per])
            for j in range(self.config.group_size)
        ]

    def _update(self, batch: DecisionBatch) -> dict[str, float]:
        c = self.config
        stats: dict[str, float] = {}
        for _ in range(c.epochs):
            logits = self.policy.logits(batch.features)
            loss, stats = decision_loss(logits, batch, c.clip_low, c.clip_high, c.entropy, c.kl)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step()
        return stats

    def tensors(self) -> dict[str, torch.Tensor]:
        """Policy and optimiser as a flat dict of tensors, for a safetensors checkpoint."""
        out = {f"policy.{k}": v.detach().clone() for k, v in self.policy.state_dict().items()}
        for i, p in enumerate(self.policy.parameters()):
            for k, v in self.optimizer.state.get(p, {}).items():
                out[f"adam.{i}.{k}"] = torch.as_tensor(v).detach().clone()
        return out

    def load_tensors(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Inverse of `tensors`; training goes on exactly as if it had never stopped."""
        self.policy.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("policy.")})
        for i, p in enumerate(self.policy.parameters()):
            state = {k.split(".", 2)[2]: v.clone() for k, v in tensors.items() if k.startswith(f"adam.{i}.")}
            if state:
                self.optimizer.state[p] = state
        self.step = step
