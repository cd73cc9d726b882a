"""The router stage of a run: reference answers, the process reward, GRPO with checkpoints, the trained policies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from roro_fast.config import Config, RouterConfig
from roro_fast.engine import Request, Trajectory
from roro_fast.errors import DataError
from roro_fast.files import write_json
from roro_fast.routing import Constant, PolicyConfig, PolicyNetwork
from roro_fast.rubric.format import Rubric
from roro_fast.rubric.judge import Judge
from roro_fast.runs.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from roro_fast.tasks.base import Query
from roro_fast.train.context import Context
from roro_fast.train.process import FormulaReward, JudgeReward, ShuffledReward, fixed_rubric, random_rubrics
from roro_fast.train.rewards import ProcessReward
from roro_fast.train.rollout import roll_out, stored
from roro_fast.train.router import RouterTrainer
from roro_fast.train.rubric_stage import load_judge, load_rubrics

REFERENCE = "reference"
ROUTERS = "routers"  # one directory per trained arm
OUTCOME_ONLY, RORO = "outcome_only", "roro"


@dataclass(frozen=True, slots=True)
class Reference:
    """All-small and all-large answers of the training queries, by query id."""

    small: dict[str, Trajectory]
    large: dict[str, Trajectory]

    @property
    def large_flops(self) -> dict[str, float]:
        return {q: t.cost.generated_flops for q, t in self.large.items()}


def reference(ctx: Context, queries: list[tuple[Query, list[int]]]) -> Reference:
    """Roll out (or read back) the two constant routes of every query: the measure of costs and of the formula."""
    store = ctx.run.store(REFERENCE)
    limits = ctx.limits(ctx.config.router.temperature)
    arms = (("all_small", 0), ("all_large", len(ctx.bench.models) - 1))
    requests = [
        Request(ids, query=q, arm=arm, policy=Constant(m, arm), **limits) for arm, m in arms for q, ids in queries
    ]
    roll_out(ctx.bench.engine, ctx.bench.task, requests, store, progress=ctx.progress)
    by_arm: dict[str, dict[str, Trajectory]] = {arm: {} for arm, _ in arms}
    for t in stored(store):
        if t.finish_reason != "refused":
            by_arm[t.arm][t.query_id] = t
    return Reference(by_arm["all_small"], by_arm["all_large"])


def process_reward(
    kind: str,
    *,
    seed: int,
    queries: Mapping[str, str],
    ref: Reference,
    judge: Judge | None = None,
    rubrics: Mapping[str, Rubric] | None = None,
    ctx: Context,
) -> ProcessReward | None:
    """The process reward that `router.process_reward` names; None for outcome only."""
    pool = ctx.pool()
    if kind == "none":
        return None
    if kind == "formula":
        return FormulaReward(ref.small)
    if judge is None or rubrics is None:
        raise DataError(f"router.process_reward: {kind!r} needs a trained Judge; run the rubric stage first")
    if kind == "fixed_rubric":
        rubrics = dict.fromkeys(queries, fixed_rubric(pool.labels))
    elif kind == "random_rubric":
        rubrics = random_rubrics(queries, seed, {q: len(t.steps) for q, t in ref.small.items()})
    reward = JudgeReward(judge, rubrics, queries, pool)
    return ShuffledReward(reward, seed) if kind == "shuffled" else reward


def new_policy(ctx: Context, config: RouterConfig, seed: int) -> PolicyNetwork:
    models = ctx.bench.models
    return PolicyNetwork(
        PolicyConfig(
            num_models=len(models),
            hidden_size=models[0].config.hidden_size if config.hidden else 0,
            width=config.width,
            use_signals=config.signals,
            action_space=config.action_space,
        ),
        seed=seed,
    ).to(models[0].device)


def train_arm(
    ctx: Context, arm: str, config: RouterConfig, reward: ProcessReward | None, ref: Reference
) -> dict[str, Any]:
    """Train one router to the end, resuming from its last checkpoint; writes it to routers/<arm>, its curve beside."""
    seed = ctx.config.run.seed
    queries = [(q, ids) for q, ids in ctx.prompts("train") if q.id in ref.large and q.id in ref.small]
    limits = {k: v for k, v in ctx.limits(config.temperature).items() if k not in ("seed", "temperature")}
    trainer = RouterTrainer(
        new_policy(ctx, config, seed),
        ctx.bench.engine,
        ctx.bench.task,
        queries,
        ref.large_flops,
        config if reward is not None else dataclasses.replace(config, beta=0.0),
        reward,
        limits,
        seed,
    )
    folder = ctx.run.checkpoints("router") / arm
    history: list[dict[str, float]] = []
    if found := checkpoints(folder):
        step, tensors, state = load_checkpoint(found[-1])
        trainer.load_tensors(tensors, step)
        history = state["history"]
    while trainer.step < config.steps:
        history.append(trainer.train_step())
        if trainer.step % config.checkpoint_every == 0 or trainer.step == config.steps:
            save_checkpoint(folder, trainer.step, trainer.tensors(), {"history": history})
        ctx.progress(trainer.step, config.steps, **{k: history[-1][k] for k in ("outcome", "cost_share", "process")})
    trainer.policy.save_pretrained(ctx.run.path / ROUTERS / arm)
    write_json(ctx.run.path / ROUTERS / arm / "history.json", history)
    write_scalars(ctx, arm, history)
    return {f"{arm}.{k}": v for k, v in history[-1].items()}


def write_scalars(ctx: Context, arm: str, history: list[dict[str, float]]) -> None:
    """The learning curve as TensorBoard scalars, written anew so that a resumed run leaves one clean curve."""
    from torch.utils.tensorboard import SummaryWriter

    folder = ctx.run.logs / "router" / arm
    for old in folder.glob("events.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for step, row in enumerate(history, 1):
            for k, v in row.items():
                writer.add_scalar(k, v, step)


def needs_judge(config: Config) -> bool:
    """Does the configured process reward come from a trained Judge?"""
    return config.router.process_reward not in ("none", "formula")


def reference_answers(ctx: Context) -> dict[str, Any]:
    """Stage: all-small and all-large answers of every training query."""
    ref = reference(ctx, ctx.prompts("train"))
    arms = {"all_small": ref.small, "all_large": ref.large}
    return {f"{arm}_accuracy": sum(bool(t.correct) for t in found.values()) / len(found) for arm, found in arms.items()}


def configured_reward(ctx: Context, ref: Reference) -> ProcessReward | None:
    """The process reward of the run's config, by the run's Judge and rubrics where it needs them."""
    judged = needs_judge(ctx.config)
    return process_reward(
        ctx.config.router.process_reward,
        seed=ctx.config.run.seed,
        queries={q.id: q.prompt for q in ctx.bench.queries("train")},
        ref=ref,
        judge=load_judge(ctx.run) if judged else None,
        rubrics=load_rubrics(ctx.run) if judged else None,
        ctx=ctx,
    )


def router(ctx: Context) -> dict[str, Any]:
    """Stage: the router under the configured process reward."""
    ref = reference(ctx, ctx.prompts("train"))
    return train_arm(ctx, RORO, ctx.config.router, configured_reward(ctx, ref), ref)


def outcome_only(ctx: Context) -> dict[str, Any]:
    """Stage: the control that sees outcome and cost alone."""
    ref = reference(ctx, ctx.prompts("train"))
    return train_arm(ctx, OUTCOME_ONLY, ctx.config.router, None, ref)
