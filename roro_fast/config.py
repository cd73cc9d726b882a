"""The configuration of a run: typed sections whose invariants name the key and the fix.

A config is a YAML file or a packaged preset plus `key=value` overrides; `roro_fast.config_io` loads and saves it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roro_fast.config_checks import at_least, check_budgets, choose, choose_all, clip_range, positive, require, share
from roro_fast.config_rubric import RubricConfig
from roro_fast.config_trl import TrlConfig
from roro_fast.tasks.base import SPLITS
from roro_fast.tasks.prompting import INSTRUCTION

DTYPES = ("float32", "bfloat16", "float16")
ACTION_SPACES = ("next", "regenerate")
PAIR_RULES = ("outcome", "cost", "process")
PROCESS_REWARDS = ("judge", "none", "formula", "fixed_rubric", "random_rubric", "shuffled")
COLLECT_ARMS = ("all_small", "all_large", "confidence", "random_budget", "critical", "anti_critical", "policy")
BASELINE_ARMS = (
    "trim_thr", "trim_agg", "trim_pomdp", "policy_guided", "policy_guided_regenerate", "steer", "steer_regenerate",
    "glimp_router", "glimp_router_regenerate", "spec_reason", "rsd", "speculative_thinking", "r2r", "oracle_next",
)  # fmt: skip
_BUDGETED = tuple(a for a in BASELINE_ARMS if not a.startswith("oracle"))  # an oracle knows its own task only
ORACLE_QUERY = "oracle_query"  # needs the answers of all-small and all-large only, so any task has it
SUITE_ARMS = ("all_small", "all_large", "random", "confidence", ORACLE_QUERY, *_BUDGETED)
EVAL_ARMS = (
    "all_small", "all_large", "random", "confidence", "oracle", ORACLE_QUERY, "outcome_only", "roro", *BASELINE_ARMS,
)  # fmt: skip


@dataclass
class RunConfig:
    """Where results go (`dir`/`name`) and the one seed everything else is derived from.

    `threads` is the number of CPU threads, 0 for torch's choice: models as small as the nano pair run fastest on one.
    """

    name: str = "nano"
    dir: str = "runs"
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        require(bool(self.name) and self.name not in (".", ".."), "run.name", "is empty; give the run a name")
        require("/" not in self.name, "run.name", f"{self.name!r} holds a '/'; put folders in run.dir")
        at_least(self.seed, 0, "run.seed")
        at_least(self.threads, 0, "run.threads")

    @property
    def path(self) -> Path:
        return Path(self.dir) / self.name


@dataclass
class TaskConfig:
    """The source of queries: a task by name, or the path of a JSONL file of {id, problem, answer}.

    `seed` selects the drawn queries. `split_by` "hash" divides a source into splits by a hash of ids; empty does so
    with a file and leaves anything else to the task. `strict` refuses a malformed row instead of counting it. `system`
    (empty: the template's own) and `instruction` are put into the prompt of benchmark problems; `timeout` is seconds
    per answer checked. `chat` goes to the tokenizer's chat template: `{enable_thinking: true}` for Qwen3. `options` are
    a gym task's own: `{min_terms: 3}`.
    """

    name: str = "ledger"
    n_train: int = 1000
    n_calibrate: int = 100
    n_test: int = 200
    seed: int = 0
    split_by: str = ""
    strict: bool = False
    timeout: float = 2.0
    system: str = ""
    instruction: str = INSTRUCTION
    chat: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(bool(self.name), "task.name", "is empty; try 'ledger'")
        for key in ("n_train", "n_calibrate", "n_test"):
            at_least(getattr(self, key), 1, f"task.{key}")
        at_least(self.seed, 0, "task.seed")
        positive(self.timeout, "task.timeout")
        require(
            not self.options or self.name.startswith("gym:"),
            "task.options",
            f"{self.name} has none, only tasks named gym:<task>; drop them",
        )


@dataclass
class ModelsConfig:
    """The pool, smallest first. A path is a model directory or a packaged name such as 'nano/small'.

    `layers` keeps only the first layers of a model (0: all), or those in a list, `[[0, 1, 28, 29], 0]`; one entry per
    model, an empty list keeps all layers.
    `device` is one for all models, or one each: 'cuda:0,cuda:1'. Router, Rubricor and Judge live on the first.
    `prices` is each model's price per million tokens it generates, `read_prices` per million it only reads (prompt and
    catch-up; free when empty), in any one currency; evaluations then report what answers cost.
    """

    paths: list[str] = field(default_factory=lambda: ["nano/small", "nano/large"])
    labels: list[str] = field(default_factory=lambda: ["small", "large"])
    layers: list[Any] = field(default_factory=list)
    dtype: str = "float32"
    device: str = "cpu"
    prices: list[float] = field(default_factory=list)
    read_prices: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        k = len(self.paths)
        require(k >= 2, "models.paths", f"routing needs at least two models, got {k}; list them smallest first")
        require(all(self.paths), "models.paths", "holds an empty path; name a model directory or a packaged model")
        require(
            len(self.labels) == k,
            "models.labels",
            f"{len(self.labels)} labels for {k} models; give one each",
        )
        require(len(set(self.labels)) == k, "models.labels", f"{self.labels} repeats a label; labels must differ")
        require(
            len(self.layers) in (0, k),
            "models.layers",
            f"{len(self.layers)} entries for {k} models; give one each",
        )
        for n in self.layers:
            listed = n if isinstance(n, list) else [n]
            require(
                bool(listed) and all(type(i) is int and i >= 0 for i in listed),
                "models.layers",
                f"{n!r} is neither a number of layers nor a list of their numbers; write e.g. 12 or [0, 1, 28, 29]",
            )
        for key in ("prices", "read_prices"):
            table = getattr(self, key)
            require(
                len(table) in (0, k), f"models.{key}", f"{len(table)} prices for {k} models; give one each, or none"
            )
            require(all(p >= 0 for p in table), f"models.{key}", f"{table} holds a negative price; use 0 or more")
        require(bool(self.prices) or not self.read_prices, "models.read_prices", "needs models.prices too; set both")
        choose(self.dtype, "models.dtype", DTYPES)
        require(all(self.devices), "models.device", "is empty; use 'cpu' or 'cuda'")
        require(
            len(self.devices) == k,
            "models.device",
            f"{len(self.devices)} devices for {k} models; give one for all, or one each",
        )

    @property
    def devices(self) -> list[str]:
        """The device of each model."""
        named = [d.strip() for d in self.device.split(",")]
        return named * len(self.paths) if len(named) == 1 else named


@dataclass
class EngineConfig:
    """StepEngine's limits and sampling. `kv_bytes` is the byte budget of the page pool; '256MiB' is accepted too.

    `max_new_tokens` and `max_steps` cap one answer; `temperature` is the sampling temperature of evaluation
    (collection and training have their own). `share_layers`: first layers that all models have in common run once for
    all of them; answers are the same either way.
    """

    delimiter: str = "\n\n"
    max_num_seqs: int = 256
    kv_bytes: int = 256 << 20
    page_size: int = 16
    share_layers: bool = True
    max_new_tokens: int = 128
    max_steps: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require(bool(self.delimiter), "engine.delimiter", r'is empty; the usual one is "\n\n"')
        require(
            "\\n" not in self.delimiter,
            "engine.delimiter",
            "holds a backslash and an n, not a line break; quote it twice in a shell: 'engine.delimiter=\"\\n\\n\"'",
        )
        for key in ("max_num_seqs", "kv_bytes", "page_size", "max_new_tokens", "max_steps"):
            at_least(getattr(self, key), 1, f"engine.{key}")
        at_least(self.temperature, 0.0, "engine.temperature")
        at_least(self.top_k, 0, "engine.top_k")
        require(0 < self.top_p <= 1, "engine.top_p", f"{self.top_p} is not in (0, 1]; 1 turns it off")


@dataclass
class ProjectionConfig:
    """The approximate KV handoff of `engine.projection`: off unless `maps` names fitted projections (`roro project`).

    A map is refused above `max_kl` nats per token of mean next-token KL on held-out answers. By Pinsker's inequality a
    sampled token then changes with probability at most sqrt(max_kl / 2) on average, 0.03 at the default, around which
    answers to the built-in task begin to suffer (bench/studies/projection_study.py). `sources` is the number of source
    layers a receiver layer is made from, `ridge` the strengths that `validation`, a share of the texts, chooses from.
    `texts` answers are fitted on, `held_out` others gated on.
    """

    maps: list[str] = field(default_factory=list)
    max_kl: float = 0.002
    sources: int = 2
    ridge: list[float] = field(default_factory=lambda: [1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1.0])
    validation: float = 0.1
    texts: int = 800
    held_out: int = 200

    def __post_init__(self) -> None:
        require(all(self.maps), "projection.maps", "holds an empty path; name directories that `roro project` wrote")
        at_least(self.max_kl, 0.0, "projection.max_kl")
        for key, low in (("sources", 1), ("texts", 2), ("held_out", 1)):
            at_least(getattr(self, key), low, f"projection.{key}")
        require(len(self.ridge) > 0, "projection.ridge", "is empty; list strengths such as 1e-4")
        for r in self.ridge:
            positive(r, "projection.ridge")
        require(0 < self.validation < 1, "projection.validation", f"{self.validation} is not in (0, 1); use e.g. 0.1")


@dataclass
class CollectConfig:
    """Which arms roll out how many samples of the first `n_queries` queries of `split`.

    `policy` is the router directory that the "policy" arm samples from, e.g. runs/nano/routers/roro.
    """

    arms: list[str] = field(
        default_factory=lambda: ["all_small", "all_large", "confidence", "random_budget", "critical", "anti_critical"]
    )
    split: str = "train"
    samples: int = 1
    n_queries: int = 200
    thresholds: list[float] = field(default_factory=lambda: [0.7, 0.9, 0.97])
    policy: str = ""
    temperature: float = 0.0

    def __post_init__(self) -> None:
        choose_all(self.arms, "collect.arms", COLLECT_ARMS)
        choose(self.split, "collect.split", SPLITS)
        at_least(self.samples, 1, "collect.samples")
        at_least(self.n_queries, 1, "collect.n_queries")
        at_least(self.temperature, 0.0, "collect.temperature")
        require(
            "confidence" not in self.arms or len(self.thresholds) > 0,
            "collect.thresholds",
            "is empty but the 'confidence' arm sweeps it; list values in [0, 1] or drop the arm",
        )
        require(
            "policy" not in self.arms or bool(self.policy),
            "collect.policy",
            "is empty but the 'policy' arm samples from it; name a router directory or drop the arm",
        )
        for t in self.thresholds:
            share(t, "collect.thresholds")


@dataclass
class PairsConfig:
    """Margins and weights of the lexicographic preference (METHOD.md section 4).

    `rules` are the rules whose pairs are used, for ablations; the order among them stays. `cost_between_wrong` lets the
    cheaper of two wrong answers win; off, they differ by process quality alone.
    """

    rules: list[str] = field(default_factory=lambda: list(PAIR_RULES))
    cost_margin: float = 0.10
    cost_between_wrong: bool = False
    equal_cost: float = 0.20
    quality_margin: float = 0.02
    weights: list[float] = field(default_factory=lambda: [0.4, 0.3, 0.3])
    max_per_query: int = 8
    holdout: float = 0.2

    def __post_init__(self) -> None:
        for key in ("cost_margin", "equal_cost", "quality_margin", "holdout"):
            share(getattr(self, key), f"pairs.{key}")
        choose_all(self.rules, "pairs.rules", PAIR_RULES)
        require(self.holdout < 1, "pairs.holdout", "1.0 leaves no pair to train on; use e.g. 0.2")
        require(len(self.weights) == 3, "pairs.weights", f"needs 3 (critical, switches, waste), got {self.weights}")
        require(
            min(self.weights) >= 0 and abs(sum(self.weights) - 1.0) < 1e-6,
            "pairs.weights",
            f"{self.weights} must be non-negative and sum to 1",
        )
        at_least(self.max_per_query, 1, "pairs.max_per_query")


@dataclass
class RouterConfig:
    """The routing policy and its GRPO. R = 1[correct] - lambda_cost * cost share + beta * process score in [-1, 1].

    `process_reward` selects the score or one of the controls of METHOD.md section 7. With `scale_hidden` a
    hidden state wider than the signals is scaled down to the weight of them all; else a dimension counts as a signal.
    """

    action_space: str = "next"
    signals: bool = True
    hidden: bool = False
    scale_hidden: bool = False
    width: int = 64
    lambda_cost: float = 0.3
    beta: float = 0.3
    process_reward: str = "judge"
    group_size: int = 8
    scale_rewards: str = "batch"
    queries_per_step: int = 32
    steps: int = 60
    epochs: int = 2
    lr: float = 3e-3
    clip_low: float = 0.2
    clip_high: float = 0.28
    entropy: float = 0.01
    kl: float = 0.0
    temperature: float = 0.0
    checkpoint_every: int = 1

    def __post_init__(self) -> None:
        choose(self.action_space, "router.action_space", ACTION_SPACES)
        require(
            self.signals or self.hidden,
            "router.signals",
            "is off and so is router.hidden; switch one on",
        )
        require(
            not self.scale_hidden or (self.hidden and self.signals),
            "router.scale_hidden",
            "weighs the hidden state against the signals; switch both on, or this off",
        )
        choose(self.process_reward, "router.process_reward", PROCESS_REWARDS)
        choose(self.scale_rewards, "router.scale_rewards", ("group", "batch", "none"))
        at_least(self.lambda_cost, 0.0, "router.lambda_cost")
        require(
            0 <= self.beta < 0.5,
            "router.beta",
            f"{self.beta} is not in [0, 0.5): scores span [-1, 1], so 2 * beta must stay below 1 "
            "or a process score could outweigh the outcome",
        )
        require(
            self.group_size >= 2,
            "router.group_size",
            f"{self.group_size} is no group to normalise by; use 2 or more",
        )
        for key in ("width", "queries_per_step", "steps", "epochs", "checkpoint_every"):
            at_least(getattr(self, key), 1, f"router.{key}")
        positive(self.lr, "router.lr")
        for key in ("entropy", "kl", "temperature"):
            at_least(getattr(self, key), 0.0, f"router.{key}")
        clip_range(self.clip_low, self.clip_high, "router")


@dataclass
class CalibrateConfig:
    """Budgets (share of all-large cost) for which decision thresholds are fitted on the calibrate split."""

    budgets: list[float] = field(default_factory=lambda: [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])

    def __post_init__(self) -> None:
        check_budgets(self.budgets, "calibrate.budgets")


@dataclass
class EvalConfig:
    """Arms and budgets of the frontier, and the bootstrap resamples behind its intervals.

    `n_view` test queries are kept answer by answer for the report's viewer. Published baselines are fitted on `n_fit`
    train queries, those that learn by `fit_steps` rounds of PPO. `prm` names their process reward model and `rating`
    what SpecReason asks: directories or packaged heads (empty: the packaged head, or the large model's own digit).
    """

    arms: list[str] = field(
        default_factory=lambda: ["all_small", "all_large", "random", "confidence", "oracle", "outcome_only", "roro"]
    )
    budgets: list[float] = field(default_factory=lambda: [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    n_boot: int = 1000
    n_view: int = 12
    n_fit: int = 200
    fit_steps: int = 40
    prm: str = ""
    rating: str = ""

    def __post_init__(self) -> None:
        choose_all(self.arms, "eval.arms", EVAL_ARMS)
        for anchor in ("all_small", "all_large"):
            require(
                anchor in self.arms, "eval.arms", f"lacks {anchor!r}, which every frontier is measured against; add it"
            )
        at_least(self.n_view, 0, "eval.n_view")
        for key in ("n_fit", "fit_steps"):
            at_least(getattr(self, key), 1, f"eval.{key}")
        check_budgets(self.budgets, "eval.budgets")
        at_least(self.n_boot, 1, "eval.n_boot")


@dataclass
class SuiteConfig:
    """What `roro eval --suite` measures: arms that need no training, and `routers`, directories of trained ones.

    "random" is measured at each of `shares`, "confidence" at each of `thresholds`, trained routers and published
    baselines (fitted on the task's train queries) at each of `eval.budgets`. Benchmarks come as <name>.jsonl from
    `data_dir`, or from the Hugging Face hub when it is empty. `limit` caps the queries per benchmark (0: all).
    """

    arms: list[str] = field(default_factory=lambda: ["all_small", "all_large", "random", "confidence", ORACLE_QUERY])
    routers: list[str] = field(default_factory=list)
    shares: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75])
    thresholds: list[float] = field(default_factory=lambda: [0.4, 0.6, 0.75])
    data_dir: str = ""
    limit: int = 0

    def __post_init__(self) -> None:
        choose_all(self.arms, "suite.arms", SUITE_ARMS)
        require("all_large" in self.arms, "suite.arms", "lacks 'all_large', whose FLOPs are the measure; add it")
        require(
            ORACLE_QUERY not in self.arms or "all_small" in self.arms,
            "suite.arms",
            f"lacks 'all_small', which {ORACLE_QUERY!r} chooses from; add it or drop that",
        )
        require(all(self.routers), "suite.routers", "holds an empty path; name directories of trained routers")
        for key, arm in (("shares", "random"), ("thresholds", "confidence")):
            values = getattr(self, key)
            require(bool(values) or arm not in self.arms, f"suite.{key}", f"is empty; list values or drop {arm!r}")
            for v in values:
                share(v, f"suite.{key}")
        at_least(self.limit, 0, "suite.limit")


@dataclass
class Config:
    """All sections; see each for its keys."""

    run: RunConfig = field(default_factory=RunConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    models: ModelsConfig = field(default_factory=ModelsConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    rubric: RubricConfig = field(default_factory=RubricConfig)
    trl: TrlConfig = field(default_factory=TrlConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    suite: SuiteConfig = field(default_factory=SuiteConfig)

    def __post_init__(self) -> None:
        require(
            self.collect.n_queries <= self.task.n_train,
            "collect.n_queries",
            f"{self.collect.n_queries} is more than task.n_train {self.task.n_train}; change one",
        )
        require(
            self.router.queries_per_step <= self.task.n_train,
            "router.queries_per_step",
            f"{self.router.queries_per_step} is more than task.n_train {self.task.n_train}; change one",
        )
        require(
            len(self.models.paths) == 2 or self.router.action_space == "next",
            "router.action_space",
            "'regenerate' drafts with model 0 and is for two models; use 'next' for a larger pool",
        )
