"""The rubric stage of a run: Rubricor and Judge by alternation, then one rubric for every training query."""

from __future__ import annotations

import json
import shutil
from itertools import accumulate
from typing import Any

import torch

from roro_fast.config import Config
from roro_fast.errors import CheckpointError, DataError
from roro_fast.files import write_text
from roro_fast.models.loading import load_config
from roro_fast.rubric.checkpoint import read_settings
from roro_fast.rubric.format import InvalidRubric, Rubric, parse
from roro_fast.rubric.judge import Judge
from roro_fast.rubric.pair_files import load_pairs
from roro_fast.rubric.prompts import VERDICTS, verdict_ids
from roro_fast.rubric.rubricor import Draft, Rubricor
from roro_fast.runs import RunDirectory
from roro_fast.train.alternate import alternate, phases
from roro_fast.train.context import Context
from roro_fast.train.pipeline import PAIRS
from roro_fast.train.setup import Workbench, load_tokenizer, model_files
from roro_fast.train.trainers import NATIVE, Trainers
from roro_fast.train.trl.trainers import TrlTrainers, check_installed

JUDGE, RUBRICOR, RUBRICS, ALTERNATION = "judge", "rubricor", "rubrics.jsonl", "rubric"
TRL_STATE = "trl"
_CHUNK = 256  # queries per call of the Rubricor, for a moving progress bar


def load_models(ctx: Context) -> tuple[Judge, Rubricor]:
    """The untrained Judge and Rubricor that the config names, with this run's model labels."""
    c, labels = ctx.config.rubric, ctx.config.models.labels
    device = ctx.config.models.devices[0]
    read, write = model_files(c.judge, "rubric.judge"), model_files(c.rubricor, "rubric.rubricor")
    judge = Judge.load(read.path, labels, device, read.weights, dtype_of(ctx.config))
    rubricor = Rubricor.load(write.path, labels, device, write.weights, dtype_of(ctx.config))
    rubricor.closed_grammar = ctx.config.task.name.partition(":")[0] == "ledger"
    rubricor.max_criteria = c.max_criteria
    return judge, rubricor


def dtype_of(config: Config) -> torch.dtype:
    """Of Rubricor's and Judge's weights: what trains them needs them in."""
    return getattr(torch, config.trl.dtype) if config.rubric.trainer == "trl" else torch.float32


def check(bench: Workbench) -> None:
    """Refuse models that cannot be Rubricor or Judge, and trainers that are not installed; loads no weights."""
    c = bench.config.rubric
    for key, name in (("rubric.judge", c.judge), ("rubric.rubricor", c.rubricor)):
        found = model_files(name, key, weights=False)
        load_config(found.weights)
        tokenizer = load_tokenizer(found.tokenizer, key)
        if key == "rubric.judge":
            verdict_ids(tokenizer, read_settings(found.path, "judge").get("verdicts", VERDICTS))
    if c.trainer == "trl":
        check_installed(bench.config.trl)


def trainers_of(ctx: Context) -> Trainers:
    """What updates the weights: this package's loops, or TRL with its state and its curves in the run directory."""
    if ctx.config.rubric.trainer == "native":
        return NATIVE
    return TrlTrainers(ctx.config.trl, ctx.run.path / ALTERNATION / TRL_STATE, ctx.run.logs / "rubric")


class _Bar:
    """Counts updates; a phase that needs fewer than planned moves on to where it would have ended."""

    def __init__(self, ctx: Context, total: int) -> None:
        self.ctx, self.total, self.done = ctx, total, 0
        self.info: dict[str, float] = {}
        self.at(0)

    def tick(self) -> None:
        self.at(min(self.done + 1, self.total))

    def at(self, done: int, accuracy: float | None = None) -> None:
        if accuracy is not None:
            self.info = {"pair_accuracy": accuracy}
        self.done = done
        self.ctx.progress(done, self.total, **self.info)


def rubric(ctx: Context) -> dict[str, Any]:
    """Alternate on the run's pairs; leaves `judge/`, `rubricor/` and `rubrics.jsonl` in the run directory."""
    run, c = ctx.run, ctx.config.rubric
    judge, rubricor = load_models(ctx)
    trainers = trainers_of(ctx)
    queries = ctx.bench.queries("train")
    steps = [2 * c.sft_steps if who == "warm-up" else c.steps for _, who in phases(c)]
    ends = list(accumulate(steps))
    written = -(-len(queries) // _CHUNK)
    total = ends[-1] + written
    bar = _Bar(ctx, total)

    def phase_done(row: dict[str, Any]) -> None:
        bar.at(ends[phases(c).index((row["round"], row["phase"]))], row.get("accuracy"))

    result = alternate(
        judge,
        rubricor,
        load_pairs(run.path / PAIRS),
        c,
        seed=ctx.config.run.seed,
        out=run.path / ALTERNATION,
        log=phase_done,
        others={q.id: q.prompt for q in queries},
        tick=bar.tick,
        trainers=trainers,
    )
    shutil.rmtree(run.path / ALTERNATION / TRL_STATE, ignore_errors=True)
    judge.save(run.path / JUDGE)
    rubricor.save(run.path / RUBRICOR)
    drafts: list[Draft] = []
    for at in range(0, len(queries), _CHUNK):
        prompts = [q.prompt for q in queries[at : at + _CHUNK]]
        drafts += rubricor.compose(prompts, seed=ctx.config.run.seed + at, max_new_tokens=c.max_tokens)
        bar.tick()
    rows = [
        {"query_id": q.id, "text": d.text, "fault": d.rubric.reason if isinstance(d.rubric, InvalidRubric) else ""}
        for q, d in zip(queries, drafts, strict=True)
    ]
    write_text(run.path / RUBRICS, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    bar.at(total)
    faults = sum(bool(r["fault"]) for r in rows)
    return {"history": result.history, "rubrics": len(rows) - faults, "malformed": faults}


def load_judge(run: RunDirectory) -> Judge:
    """The trained Judge of a run."""
    if not (run.path / JUDGE).is_dir():
        raise CheckpointError(f"{run.path / JUDGE}: no trained Judge; run the rubric stage first (`roro train`)")
    return Judge.load(run.path / JUDGE, device=run.config.models.devices[0], dtype=dtype_of(run.config))


def load_rubrics(run: RunDirectory) -> dict[str, Rubric]:
    """The well-formed rubrics of a run by query id."""
    path = run.path / RUBRICS
    if not path.is_file():
        raise DataError(f"{path}: not found; run the rubric stage first (`roro train`)")
    found: dict[str, Rubric] = {}
    for number, line in enumerate(path.read_text().split("\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            parsed = parse(row["text"]) if not row["fault"] else None
            query_id = row["query_id"]
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise DataError(f"{path}:{number}: not a rubric row ({e}); run `--redo rubric`") from e
        if isinstance(parsed, Rubric):
            found[query_id] = parsed
    return found
