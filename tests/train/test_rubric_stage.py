"""The rubric stage inside a run: resumable, malformed rubrics counted, and usable by the router and the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from traceback import extract_stack

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from roro_fast.cli import app
from roro_fast.cli_stages import run_stages
from roro_fast.config_io import load_config
from roro_fast.engine import StepEngine
from roro_fast.engine.forward import Forward
from roro_fast.errors import CheckpointError, DataError
from roro_fast.models.decoder import Decoder
from roro_fast.models.loading import load_decoder
from roro_fast.rubric import judge as judge_module
from roro_fast.rubric.format import Rubric
from roro_fast.rubric.judge import Judge
from roro_fast.rubric.rubricor import Rubricor
from roro_fast.runs import RunDirectory
from roro_fast.train import rubric_stage
from roro_fast.train.context import Context
from roro_fast.train.rubric_stage import load_judge, load_rubrics
from roro_fast.train.setup import Workbench, load_tokenizer
from tests.tiny import save_adapter, save_tiny

SMALL = [
    "run.name=r",
    "task.n_train=32",
    "task.n_calibrate=3",
    "task.n_test=3",
    "collect.n_queries=32",
    "engine.max_num_seqs=64",
    "engine.kv_bytes=8MiB",
    "rubric.sft_steps=2",
    "rubric.steps=1",
    "rubric.rounds=1",
    "rubric.group_size=2",
    "rubric.batch_size=4",
    "rubric.max_tokens=24",
    "router.queries_per_step=4",
    "router.group_size=2",
    "router.steps=1",
    "eval.n_boot=5",
    "eval.n_view=1",
    "eval.arms=[all_small, all_large, roro]",
    "eval.budgets=[0.5]",
    "calibrate.budgets=[0.5]",
]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("reader"), hidden=16, seed=5)


def settings(root, reader, *more):
    return [f"run.dir={root}", *SMALL, f"rubric.judge={reader}", f"rubric.rubricor={reader}", *more]


@dataclass
class Watch:
    """What engines are asked for during a run."""

    completions: list[list[int]] = field(default_factory=list)  # that `generate` gave
    tokens: int = 0  # that forwards of engines ran during `generate`
    readings: list[tuple[set[str], int, int, int]] = field(default_factory=list)
    # of the Judge: files on the stack, verdicts given, verdict rows asked of the engine, dense forwards instead


@pytest.fixture(scope="module")
def watch():
    """Engine, Judge and decoder as they are, with notes taken."""
    seen, inside = Watch(), []
    generate, following, rewards = StepEngine.generate, Forward._next, Judge.rewards
    states, dense = judge_module.states, Decoder.dense

    def generating(self, prompts, **how):
        inside.append("generate")
        out = generate(self, prompts, **how)
        inside.pop()
        seen.completions += [ids for group in out for ids in group]
        return out

    def running(self, part):
        batch, keys = following(self, part)
        seen.tokens += batch.tokens if batch and "generate" in inside else 0
        return batch, keys

    def rewarding(self, inputs, *more, **how):
        inside.append([0, 0])
        out = rewards(self, inputs, *more, **how)
        asked = inside.pop()
        seen.readings.append(({Path(f.filename).name for f in extract_stack()}, len(out.probs), *asked))
        return out

    def asking(model, prompts, rows, max_tokens):
        inside[-1][0] += sum(map(len, rows))
        return states(model, prompts, rows, max_tokens)

    def around(self, *args):
        if inside and isinstance(inside[-1], list):
            inside[-1][1] += 1
        return dense(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepEngine, "generate", generating)
        patch.setattr(Forward, "_next", running)
        patch.setattr(Judge, "rewards", rewarding)
        patch.setattr(judge_module, "states", asking)
        patch.setattr(Decoder, "dense", around)
        yield seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory, reader, watch):
    root = tmp_path_factory.mktemp("whole")
    result = CliRunner().invoke(app, ["quickstart", *settings(root, reader, "router.process_reward=fixed_rubric")])
    assert result.exit_code == 0, result.output
    return root / "r", result


def test_it_leaves_models_rubrics_and_a_table(whole):
    run, result = whole
    for name in ("judge/model.safetensors", "rubricor/model.safetensors", "rubrics.jsonl", "pairs.jsonl"):
        assert (run / name).is_file()
    rows = [json.loads(line) for line in (run / "rubrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "stages" / "rubric.json").read_text())["summary"]
    assert len(rows) == 32 == summary["rubrics"] + summary["malformed"]
    assert summary["malformed"] == sum(bool(r["fault"]) for r in rows) > 0  # an untrained Rubricor writes no rubric
    assert [r["phase"] for r in summary["history"]] == ["warm-up", "judge", "rubricor"]
    assert "Judge on held-out pairs" in result.output


def test_every_rubric_was_generated_by_the_engine(whole, watch):
    rubricor = Rubricor.load(whole[0] / "rubricor")
    texts = {rubricor.encoder.decode(ids) for ids in watch.completions}
    rows = [json.loads(line) for line in (whole[0] / "rubrics.jsonl").read_text().splitlines()]
    assert {r["text"] for r in rows} <= texts and len({r["text"] for r in rows}) > 1
    assert watch.tokens >= sum(map(len, watch.completions)) > 24 * len(rows)


def test_every_verdict_of_the_judge_was_scored_by_the_engine(whole, watch):
    """Held-out pairs of the rubric stage and process rewards of the router's; only updates need gradients."""
    files = set().union(*(r[0] for r in watch.readings))
    assert {"alternate.py", "process.py"} <= files
    for _, given, asked, dense in watch.readings:
        assert given == asked and dense == 0
    assert sum(r[1] for r in watch.readings) > 0


def test_the_judge_scores_the_router_and_the_report_counts_malformed_rubrics(whole):
    run, _ = whole
    history = json.loads((run / "routers" / "roro" / "history.json").read_text())
    assert history[0]["process"] != 0.0 and history[0]["unscored"] == 0.0
    report = json.loads((run / "report.json").read_text())
    assert [r["round"] for r in report["judge"]] == [0, 1] and report["pairs"]["n_trajectories"] > 0
    assert any("malformed" in note for note in report["notes"])


def test_a_router_without_any_rubric_learns_from_outcome_and_cost(whole, reader, tmp_path):
    result = CliRunner().invoke(
        app, ["train", "--run", str(whole[0]), "router.process_reward=judge", "--redo", "router"]
    )
    assert result.exit_code == 0, result.output
    row = json.loads((whole[0] / "routers" / "roro" / "history.json").read_text())[0]
    assert row["unscored"] > 0


class Stop(Exception):
    """Stands for a crash between two phases."""


def test_a_crash_between_phases_changes_nothing(whole, reader, tmp_path):
    config = load_config("nano", settings(tmp_path, reader, "router.process_reward=fixed_rubric"))
    run = RunDirectory.for_config(config)
    run_stages(run, "pairs", Console(quiet=True))

    def crash(done, total, **info):
        if "pair_accuracy" in info:
            raise Stop

    with pytest.raises(Stop), run:
        rubric_stage.rubric(Context(run, Workbench(config), crash))
    state = json.loads((run.path / "rubric" / "alternation.json").read_text())
    assert len(state["history"]) == 1 and not (run.path / "judge").exists()
    run_stages(RunDirectory(run.path), "rubric", Console(quiet=True))
    for name in ("judge", "rubricor"):
        got, want = (load_file(d / name / "model.safetensors") for d in (run.path, whole[0]))
        assert all((got[k] == want[k]).all() for k in want)
    assert (run.path / "rubrics.jsonl").read_text() == (whole[0] / "rubrics.jsonl").read_text()


def test_rubrics_are_read_back_and_faults_left_out(tmp_path):
    text = "\n".join(f"- [Principle] (efficient allocation) at most {i} switches" for i in (1, 2, 3))
    rows = [
        {"query_id": "a", "text": text, "fault": ""},
        {"query_id": "b", "text": "gibberish", "fault": "not a criterion line"},
    ]
    (tmp_path / "rubrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = RunDirectory(tmp_path, load_config("nano"))
    found = load_rubrics(run)
    assert list(found) == ["a"] and isinstance(found["a"], Rubric) and str(found["a"]) == text
    (tmp_path / "rubrics.jsonl").write_text('{"query_id": "a"}\n')
    with pytest.raises(DataError, match=r"rubrics\.jsonl:1: not a rubric row"):
        load_rubrics(run)


def test_missing_results_say_what_to_run(tmp_path):
    run = RunDirectory(tmp_path, load_config("nano"))
    with pytest.raises(CheckpointError, match=r"no trained Judge.*roro train"):
        load_judge(run)
    with pytest.raises(DataError, match="run the rubric stage first"):
        load_rubrics(run)


def test_an_adapter_can_be_judge_and_rubricor(tmp_path, reader):
    adapter = save_adapter(tmp_path / "adapter", reader)
    config = load_config("nano", settings(tmp_path, adapter))
    bench = Workbench(config)
    rubric_stage.check(bench)
    judge, rubricor = rubric_stage.load_models(Context(RunDirectory.for_config(config), bench))
    want = load_decoder(reader).layers[0].down.weight + 1
    for model in (judge.model, rubricor.model):
        assert torch.equal(model.layers[0].down.weight, want)
    assert judge.tokenizer.get_vocab() == load_tokenizer(reader).get_vocab()
