"""The report stage of a run: gather what every stage left and write `report.html`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from roro_fast.config_io import to_yaml
from roro_fast.engine import Trajectory
from roro_fast.errors import DataError
from roro_fast.eval.metrics import EvalSummary
from roro_fast.eval.plain import from_plain
from roro_fast.eval.records import load_points
from roro_fast.eval.report import write_report
from roro_fast.eval.report_data import Curve, JudgeRound, PairStats, ReportData
from roro_fast.eval.stages import FOLDER, LEARNED, SPLIT, SUMMARY, view_store
from roro_fast.eval.viewer import ViewTrajectory, view_trajectory
from roro_fast.files import read_json
from roro_fast.rubric.format import Rubric
from roro_fast.rubric.judge import Judge, JudgeInput
from roro_fast.rubric.render import view_of
from roro_fast.rubric.rubricor import Rubricor
from roro_fast.runs import RunDirectory
from roro_fast.train.context import Context
from roro_fast.train.router_stage import RORO, ROUTERS
from roro_fast.train.rubric_stage import JUDGE, RUBRICOR, load_judge

REPORT, DATA = "report.html", "report.json"
_CURVES = {
    "outcome": "outcome_reward",
    "process": "process_reward",
    "cost_share": "cost",
    "entropy": "entropy",
    "kl": "kl",
}


def report(ctx: Context) -> dict[str, Any]:
    """Write `report.json` and `report.html`; needs the evaluation."""
    run = ctx.run
    if not (run.path / SUMMARY).is_file():
        raise DataError(f"{run.path / SUMMARY}: not found; run `roro eval` first")
    data = ReportData(
        title=f"RoRo on {ctx.config.task.name}: {' and '.join(ctx.config.models.labels)}",
        created=read_json(run.path / "meta.json")["sessions"][-1]["time"],
        models=list(ctx.config.models.labels),
        evaluation=from_plain(EvalSummary, read_json(run.path / SUMMARY), SUMMARY),
        curves=curves(run),
        judge=judge_rounds(run),
        pairs=pair_stats(run),
        trajectories=viewed(ctx),
        provenance=provenance(run),
        notes=notes(run),
    )
    data.save(run.path / DATA)
    write_report(run.path / REPORT, data)
    ctx.progress(1, 1)
    return {"report": str(run.path / REPORT)}


def curves(run: RunDirectory) -> list[Curve]:
    """Learning curves of every router trained in this run."""
    out = []
    for arm in LEARNED:
        path = run.path / ROUTERS / arm / "history.json"
        rows = read_json(path) if path.is_file() else []
        for key, metric in _CURVES.items():
            if rows and key in rows[0] and not (arm != RORO and key == "process"):
                steps = [float(i) for i in range(1, len(rows) + 1)]
                out.append(Curve(arm, run.config.run.seed, metric, steps, [float(r[key]) for r in rows]))
    return out


def _summary(run: RunDirectory, stage: str) -> Mapping[str, Any]:
    mark = run.mark(stage)
    return mark.summary if mark is not None and mark.done else {}


def judge_rounds(run: RunDirectory) -> list[JudgeRound]:
    """The Judge after the last phase of every round."""
    last = {row["round"]: row for row in _summary(run, "rubric").get("history", []) if "accuracy" in row}
    return [
        JudgeRound(
            r,
            row["accuracy"],
            row["heldout_pairs"],
            seed=run.config.run.seed,
            valid_rubrics=1 - row["heldout_malformed"],
        )
        for r, row in sorted(last.items())
    ]


def pair_stats(run: RunDirectory) -> PairStats | None:
    """Counts of the pairs stage, None where it did not run."""
    s = _summary(run, "pairs")
    if not s:
        return None
    rolled = _summary(run, "collect").get("trajectories", 0)
    return PairStats(dict(s["rules"]), s["queries"], rolled, s["agreed_correct"] + s["agreed_wrong"])


def viewed(ctx: Context) -> list[ViewTrajectory]:
    """The kept test answers of one operating point per arm, with rubric and verdicts where there is a Judge."""
    run, n = ctx.run, ctx.config.eval.n_view
    queries = {q.id: q for q in ctx.bench.queries(SPLIT, n)} if n else {}
    knobs = {a: [p.knob for p in load_points(run.path / FOLDER / f"{a}.safetensors")] for a in ctx.config.eval.arms}
    found: dict[tuple[str, str], Trajectory] = {}
    for record in view_store(ctx):
        arm, setting = record["arm"], record["meta"]["setting"]
        if arm in knobs and setting == len(knobs[arm]) // 2 and record["query_id"] in queries and not record["sample"]:
            found[record["query_id"], arm] = Trajectory.from_dict(record)
    rubrics, verdicts = judged(ctx, {q: queries[q].prompt for q in queries}, found)
    out = []
    for query_id, query in queries.items():
        large = found.get((query_id, "all_large"))
        for arm in sorted(ctx.config.eval.arms, key=lambda a: a != RORO):
            t = found.get((query_id, arm))
            if t is None:
                continue
            score, p_true = verdicts.get((query_id, arm), (math.nan, ()))
            out.append(
                view_trajectory(
                    t,
                    query=query.prompt,
                    answer=query.answer,
                    flops_per_token=[2.0 * m.config.num_params for m in ctx.bench.models],
                    knob=knobs[arm][len(knobs[arm]) // 2],
                    large_flops=large.cost.generated_flops if large else math.nan,
                    rubric=rubrics.get(query_id),
                    p_true=p_true,
                    score=score,
                )
            )
    return out


Verdicts = dict[tuple[str, str], tuple[float, tuple[float, ...]]]


def judged(
    ctx: Context, prompts: Mapping[str, str], found: Mapping[tuple[str, str], Trajectory]
) -> tuple[dict[str, Rubric], Verdicts]:
    """Greedy rubrics of the trained Rubricor for `prompts` (by query id), and the Judge's verdicts under them."""
    run = ctx.run
    if not prompts or not (run.path / JUDGE).is_dir() or not (run.path / RUBRICOR).is_dir():
        return {}, {}
    judge: Judge = load_judge(run)
    rubricor = Rubricor.load(run.path / RUBRICOR, device=ctx.config.models.devices[0])
    drafts = rubricor.write(list(prompts.values()), max_new_tokens=ctx.config.rubric.max_tokens)
    rubrics = {q: d[0].rubric for q, d in zip(prompts, drafts, strict=True)}
    good = {q: r for q, r in rubrics.items() if isinstance(r, Rubric)}
    keys = [k for k in found if k[0] in good and found[k].steps]
    pool = ctx.pool()
    inputs = [JudgeInput(prompts[k[0]], view_of(found[k], pool), good[k[0]]) for k in keys]
    return good, {k: (j.score, j.p_true) for k, j in zip(keys, judge.score(inputs), strict=True)}


def provenance(run: RunDirectory) -> dict[str, str]:
    """Where the numbers come from, as text under headings."""
    session = read_json(run.path / "meta.json")["sessions"][-1]
    git = session["git"]
    host = session["host"]
    return {
        "command": " ".join(session["command"]),
        "versions": "\n".join(f"{k} {v}" for k, v in session["versions"].items()),
        "git": "not a checkout" if git is None else git["commit"] + (" with local changes" if git["dirty"] else ""),
        "machine": f"{host['cpu']}, {host['cores']} cores, {host['platform']}",
        "seed": str(run.config.run.seed),
        "config": to_yaml(run.config),
    }


def notes(run: RunDirectory) -> list[str]:
    """Counted skips and ties that a reader should know of."""
    out = []
    last: Mapping[str, Any] = next(iter(_summary(run, "rubric").get("history", [])[-1:]), {})
    if last.get("ties"):
        share = f"{100 * last['ties']:.0f} %"
        out.append(f"The Judge scores {share} of the held-out pairs equal in the end; a tie counts as a wrong order.")
    for stage in ("collect", "rubric"):
        s = _summary(run, stage)
        refused = s.get("finish", {}).get("refused", 0)
        if refused:
            out.append(
                f"{refused} of {s['trajectories']} collected answers were refused (prompt longer than the context)."
            )
        if s.get("skipped_rows"):
            rows = s["skipped_rows"]
            out.append(f"{len(rows)} malformed rows of the data were skipped; the first: {rows[0]}.")
        if s.get("malformed"):
            out.append(
                f"{s['malformed']} of {s['malformed'] + s['rubrics']} rubrics were malformed; they scored nothing."
            )
    return out
