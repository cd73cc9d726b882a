"""The rubric stage of a run: Rubricor and Judge by alternation, then one rubric for every training query."""

from __future__ import annotations

import json
from typing import Any

from roro_fast.errors import CheckpointError, DataError
from roro_fast.files import write_text
from roro_fast.rubric.format import InvalidRubric, Rubric, parse
from roro_fast.rubric.judge import Judge
from roro_fast.rubric.pair_files import load_pairs
from roro_fast.rubric.rubricor import Draft, Rubricor
from roro_fast.runs import RunDirectory
from roro_fast.train.alternate import alternate, phases
from roro_fast.train.context import Context
from roro_fast.train.pipeline import PAIRS
from roro_fast.train.setup import resolve_model

JUDGE, RUBRICOR, RUBRICS, ALTERNATION = "judge", "rubricor", "rubrics.jsonl", "rubric"
_CHUNK = 256  # queries per call of the Rubricor, for a moving progress bar


def load_models(ctx: Context) -> tuple[Judge, Rubricor]:
    """The untrained Judge and Rubricor that the config names, with this run's model labels."""
    c, labels = ctx.config.rubric, ctx.config.models.labels
    device = ctx.config.models.device
    judge = Judge.load(resolve_model(c.judge, "rubric.judge"), labels, device)
    rubricor = Rubricor.load(resolve_model(c.rubricor, "rubric.rubricor"), labels, device)
    rubricor.closed_grammar = ctx.config.task.name == "ledger"
    rubricor.max_criteria = c.max_criteria
    return judge, rubricor


def rubric(ctx: Context) -> dict[str, Any]:
    """Alternate on the run's pairs; leaves `judge/`, `rubricor/` and `rubrics.jsonl` in the run directory."""
    run, c = ctx.run, ctx.config.rubric
    judge, rubricor = load_models(ctx)
    queries = ctx.bench.queries("train")
    total = len(phases(c)) + 1

    def told(row: dict[str, Any]) -> None:
        ctx.progress(phases(c).index((row["round"], row["phase"])) + 1, total, pair_accuracy=row.get("accuracy", 0.0))

    ctx.progress(0, total)
    result = alternate(
        judge, rubricor, load_pairs(run.path / PAIRS), c, seed=ctx.config.run.seed, out=run.path / ALTERNATION, log=told
    )
    judge.save(run.path / JUDGE)
    rubricor.save(run.path / RUBRICOR)
    drafts: list[Draft] = []
    for at in range(0, len(queries), _CHUNK):
        prompts = [q.prompt for q in queries[at : at + _CHUNK]]
        drafts += [d[0] for d in rubricor.write(prompts, max_new_tokens=c.max_tokens)]
    rows = [
        {"query_id": q.id, "text": d.text, "fault": d.rubric.reason if isinstance(d.rubric, InvalidRubric) else ""}
        for q, d in zip(queries, drafts, strict=True)
    ]
    write_text(run.path / RUBRICS, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    ctx.progress(total, total)
    faults = sum(bool(r["fault"]) for r in rows)
    return {"history": result.history, "rubrics": len(rows) - faults, "malformed": faults}


def load_judge(run: RunDirectory) -> Judge:
    """The trained Judge of a run."""
    if not (run.path / JUDGE).is_dir():
        raise CheckpointError(f"{run.path / JUDGE}: no trained Judge; run the rubric stage first (`roro train`)")
    return Judge.load(run.path / JUDGE, device=run.config.models.device)


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
