"""The published baselines by name: fitted on train queries, brought to each budget on calibrate queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from roro_fast.engine import RoutingPolicy, StepEngine, Trajectory
from roro_fast.engine.score import states
from roro_fast.eval.prm import prm, rating
from roro_fast.eval.sweep import Runner, Setting
from roro_fast.routing import Constant
from roro_fast.routing.calibrate import fit_biases
from roro_fast.routing.glimp import GlimpRouter
from roro_fast.routing.neural import NeuralRouter
from roro_fast.routing.oracle_next import OracleNext
from roro_fast.routing.policy_guided import PolicyGuided
from roro_fast.routing.r2r import R2R, fit, token_features
from roro_fast.routing.rsd import RSD
from roro_fast.routing.scoring import Trace
from roro_fast.routing.spec_reason import SpecReason
from roro_fast.routing.speculative_thinking import CUES, SpeculativeThinking, fit_cues, opening
from roro_fast.routing.steer import Steer, fit_mixture
from roro_fast.routing.threshold import Explore, Scored
from roro_fast.routing.trim import TrimAgg, TrimThr
from roro_fast.routing.trim_pomdp import TrimPOMDP, fit_model
from roro_fast.train.ppo import PPOConfig, PPOTrainer
from roro_fast.train.setup import Workbench

LAMBDAS = tuple(float(x) for x in np.geomspace(0.02, 20, 16))  # cost weights that TRIM-POMDP is planned for
LAMBDA, BUDGET = 0.3, 0.3  # of TRIM-Agg's reward; constraint of policy-guided routing, a share of all-large


@dataclass
class Fitting:
    """What a baseline may learn from. `train` and `calibrate` roll out those splits; `budgets` are cost shares."""

    bench: Workbench
    train: Runner
    calibrate: Runner
    budgets: Sequence[float]
    seed: int = 0
    steps: int = 40

    @cached_property
    def small(self) -> list[Trajectory]:
        """All-small answers to the train queries."""
        return self.train.trajectories(Constant(0, "all_small"), "all_small", self.seed)

    @cached_property
    def large(self) -> list[Trajectory]:
        return self.train.trajectories(self._all_large, "all_large", self.seed)

    @cached_property
    def calibrate_flops(self) -> dict[str, float]:
        found = self.calibrate.trajectories(self._all_large, "all_large", self.seed)
        return {t.query_id: t.cost.generated_flops for t in found}

    @property
    def _all_large(self) -> Constant:
        return Constant(len(self.bench.models) - 1, "all_large")

    def ppo(self, policy: NeuralRouter, config: PPOConfig) -> None:
        costs = {t.query_id: t.cost.generated_flops for t in self.large}
        r = self.train
        PPOTrainer(policy, r.engine, r.task, r.prompts, costs, config, r.limits, self.seed).train()

    def costs_at(self, settings: Sequence[Setting]) -> list[float]:
        """Mean cost share of each setting on the calibrate split."""
        large = np.array([self.calibrate_flops[q.id] for q, _ in self.calibrate.prompts])
        points = self.calibrate.run("calibrate", settings, self.seed)
        return [float((p.generated_flops / large).mean()) for p in points]

    def at_budgets(self, policy: Scored) -> list[Setting]:
        """The policy at the threshold that meets each budget on the calibrate split."""
        explored = self.calibrate.trajectories(Explore(policy), "explore", self.seed)
        scores = np.array([d.features[0] for t in explored for d in t.decisions if d.features], np.float64)

        def costs_at(biases: list[float]) -> list[float]:
            return self.costs_at([(b, policy.at(-b)) for b in biases])

        table, _ = fit_biases(-scores, costs_at, self.budgets)
        return [(budget, policy.at(-bias)) for budget, bias in table]

    def among(self, policies: Sequence[RoutingPolicy]) -> list[Setting]:
        """Per budget that of `policies` which costs most within it on the calibrate split, else the cheapest."""
        costs = self.costs_at([(float(i), p) for i, p in enumerate(policies)])
        return [(b, policies[i]) for b, i in zip(self.budgets, nearest(self.budgets, costs), strict=True)]


def distinct(scores: Sequence[float], most: int = 24) -> list[float]:
    """Thresholds that tell the scores apart, at most `most` of them: just above each, evenly thinned."""
    cuts = sorted({float(np.nextafter(s, np.inf)) for s in scores})
    return [cuts[i] for i in np.unique(np.linspace(0, len(cuts) - 1, min(most, len(cuts))).astype(int))]


def nearest(budgets: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Per budget the setting of the greatest cost within it, else the cheapest one."""
    c = np.asarray(costs)
    return [int(np.where(c <= b, c, -1).argmax()) if (c <= b).any() else int(c.argmin()) for b in budgets]


def trim_thr(f: Fitting) -> list[Setting]:
    return f.at_budgets(TrimThr(prm(f.bench, "trim_thr")))


def rsd(f: Fitting) -> list[Setting]:
    return f.at_budgets(RSD(prm(f.bench, "rsd")))


def trim_agg(f: Fitting) -> list[Setting]:
    policy = TrimAgg(prm(f.bench, "trim_agg"), seed=f.seed)
    f.ppo(policy, PPOConfig(steps=f.steps, multiplier=LAMBDA))
    return f.at_budgets(policy)


def trim_pomdp(f: Fitting) -> list[Setting]:
    scorer = prm(f.bench, "trim_pomdp")
    queries = {q.id: q.prompt for q, _ in f.train.prompts}

    def annotated(answers: Sequence[Trajectory]) -> list[tuple[Sequence[float], Sequence[bool], bool]]:
        scores = scorer.score([Trace(queries[t.query_id], tuple(t.step_texts)) for t in answers])
        verdicts = [t.step_correct or [v >= 0.5 for v in s.values] for t, s in zip(answers, scores, strict=True)]
        return [(s.values, v, bool(t.correct)) for t, s, v in zip(answers, scores, verdicts, strict=True)]

    model = fit_model(annotated(f.small), annotated(f.large))
    return f.among([TrimPOMDP(scorer, model, x) for x in LAMBDAS])


def policy_guided(f: Fitting, action_space: str = "next") -> list[Setting]:
    policy = PolicyGuided(action_space, seed=f.seed)
    f.ppo(policy, PPOConfig(steps=f.steps, budget=BUDGET))
    return f.at_budgets(policy)


def steer(f: Fitting, action_space: str = "next") -> list[Setting]:
    confidences = np.array([s.mean_logprob for t in f.small for s in t.steps])
    return f.at_budgets(Steer(fit_mixture(confidences), action_space=action_space))


def glimp_router(f: Fitting, action_space: str = "next") -> list[Setting]:
    return f.at_budgets(GlimpRouter(action_space=action_space))


def spec_reason(f: Fitting) -> list[Setting]:
    return f.at_budgets(SpecReason(rating(f.bench)))


def speculative_thinking(f: Fitting) -> list[Setting]:
    """With the published cues where the task's answers hold any, else with risks of the words they do hold."""
    drafts = [(text, ok) for t in f.small for text, ok in zip(t.step_texts, t.step_correct or (), strict=False)]
    said = any(f" {cue} " in opening(text, 20) for cue in CUES for t in f.small for text in t.step_texts)
    policy = SpeculativeThinking(CUES if said or not drafts else fit_cues(drafts))
    return f.among([policy.at(x) for x in distinct([1 - risk for risk in policy.cues.values()])])


def r2r(f: Fitting) -> list[Setting]:
    """Labels along all-large answers: a token is divergent where the small model's likeliest one differs from it."""
    model = f.bench.models[0]
    prompts = [t.prompt_ids + t.token_ids for t in f.large]
    rows = [list(range(len(t.prompt_ids) - 1, len(p) - 1)) for t, p in zip(f.large, prompts, strict=True)]
    hidden, index = states(model, prompts, rows, 8192)
    h = hidden[index].clone()
    with torch.no_grad():
        logp = torch.log_softmax(model.logits(h)[:, : f.train.engine.vocab_size].float(), -1)
    x = token_features(h, -(logp.exp() * logp).sum(-1), logp.max(-1).values.exp())
    written = torch.tensor([token for t in f.large for token in t.token_ids])
    router = R2R(model.config.hidden_size, seed=f.seed)
    fit(router, x, logp.argmax(-1).cpu() != written)
    return f.at_budgets(router)


def oracle_next(f: Fitting) -> list[Setting]:
    """Nothing to fit and no budget to meet: one point."""
    engine = StepEngine(f.bench.models[:1], f.bench.tokenizer, delimiter=f.bench.config.engine.delimiter)
    return [(0.0, OracleNext(f.calibrate.task, engine, f.bench.encode, f.calibrate.limits["max_new_tokens"]))]


BUILDERS: dict[str, Callable[[Fitting], list[Setting]]] = {
    "trim_thr": trim_thr,
    "trim_agg": trim_agg,
    "trim_pomdp": trim_pomdp,
    "policy_guided": policy_guided,
    "policy_guided_regenerate": lambda f: policy_guided(f, "regenerate"),
    "steer": steer,
    "steer_regenerate": lambda f: steer(f, "regenerate"),
    "glimp_router": glimp_router,
    "glimp_router_regenerate": lambda f: glimp_router(f, "regenerate"),
    "spec_reason": spec_reason,
    "rsd": rsd,
    "speculative_thinking": speculative_thinking,
    "r2r": r2r,
    "oracle_next": oracle_next,
}
