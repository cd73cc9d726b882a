"""`roro eval --suite` on a tiny pool: tables, resumption, what went missing, and the real benchmark files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from roro_fast.cli import app
from roro_fast.config import ModelsConfig
from roro_fast.engine.trajectory import Cost
from roro_fast.errors import ConfigError, DataError
from roro_fast.eval import suite as eval_suite
from roro_fast.eval.prices import price_table
from roro_fast.eval.suite_table import Measured, document, markdown
from roro_fast.routing import PolicyConfig, PolicyNetwork
from roro_fast.tasks.gym import names
from roro_fast.tasks.suites import SUITES, load_entry, suite
from tests.chat import save_pair
from tests.eval.samples import point

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
MATH5 = [e.name for e in SUITES["math5"]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


def write_data(folder: Path, names=MATH5) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        rows = [{"id": f"{name}-{i}", "problem": f"What is {i} + 1?", "answer": i + 1} for i in range(3)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def roro(root: Path, pair, *args):
    settings = [
        f"run.dir={root}", "run.name=s", f"models.paths=[{pair[0]}, {pair[1]}]", "engine.max_new_tokens=8",
        "engine.max_steps=4", "engine.kv_bytes=8MiB", "eval.n_boot=50", "suite.shares=[0.5]", "suite.thresholds=[0.9]",
        "models.prices=[1, 10]", "models.read_prices=[0.5, 5]",
    ]  # fmt: skip
    return CliRunner().invoke(app, ["eval", *settings, *map(str, args)])


def test_a_suite_ends_in_one_table_and_is_not_measured_twice(tmp_path, pair):
    router = tmp_path / "mine"
    PolicyNetwork(PolicyConfig(num_models=2, calibration=[(0.2, 0.0), (0.8, 4.0)])).save_pretrained(router)
    args = ("--suite", "math5", "--data", write_data(tmp_path / "data"), "--limit", 2, "--router", router)
    done = roro(tmp_path, pair, *args, "eval.budgets=[0.5]")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "s" / "suite_math5.json").read_text())
    assert result["queries"] == dict.fromkeys(MATH5, 2) and result["missing"] == {}
    by_arm = {p["arm"]: p for p in result["points"]}
    assert list(by_arm) == ["all_small", "all_large", "random", "confidence", "oracle_query", "mine"]
    for p in by_arm.values():
        assert list(p["benchmarks"]) == MATH5
        for key in ("accuracy", "total_flops", "seconds", "price", "generated"):
            mine = [v[key]["mean"] for v in p["benchmarks"].values()]
            assert p["macro"][key]["mean"] == pytest.approx(np.mean(mine))
        assert p["macro"]["price"]["mean"] > 0 and (p["macro"]["wall_seconds"]["mean"] or 1) > 0
    assert by_arm["all_large"]["macro"]["generated"]["mean"] == 1.0
    assert by_arm["all_small"]["macro"]["price"]["mean"] < by_arm["all_large"]["macro"]["price"]["mean"]
    table = (tmp_path / "s" / "suite_math5.md").read_text()
    assert table.count("| macro average |") == 6 and table.count("| aime24 (2) |") == 6 and "price" in table

    points = tmp_path / "s" / "suites" / "math5"
    kept = {f: f.stat().st_mtime_ns for f in points.rglob("*.safetensors")}
    gone = points / "amc23" / "random-0.5.safetensors"
    gone.unlink()
    assert roro(tmp_path, pair, *args, "eval.budgets=[0.5]").exit_code == 0
    now = {f: f.stat().st_mtime_ns for f in points.rglob("*.safetensors")}
    assert {f for f in now if now[f] != kept[f]} == {gone}
    again = json.loads((tmp_path / "s" / "suite_math5.json").read_text())
    for a, b in zip(result["points"], again["points"], strict=True):
        assert a["macro"]["accuracy"] == b["macro"]["accuracy"] and a["macro"]["price"] == b["macro"]["price"]

    changed = roro(tmp_path, pair, *args[:4], "--limit", 1)
    assert changed.exit_code == 2 and "suite.limit" in changed.output and "--redo" in changed.output


def test_what_cannot_be_loaded_is_named_and_the_rest_goes_on(tmp_path, pair):
    data = write_data(tmp_path / "data", [n for n in MATH5 if n != "aime24"])
    (data / "amc23.jsonl").write_text(
        '{"id": 1, "problem": "p", "answer": 1}\n{"id": 1, "problem": "q", "answer": 2}\n'
    )
    (data / "math500.jsonl").write_text('{"id": 1, "problem": "p"}\n')
    args = ("--suite", "math5", "--data", data, "suite.arms=[all_small, all_large]")
    done = roro(tmp_path, pair, *args)
    assert done.exit_code == 1
    result = json.loads((tmp_path / "s" / "suite_math5.json").read_text())
    assert list(result["queries"]) == ["gsm8k", "olympiadbench"]
    assert "has no aime24.jsonl" in result["missing"]["aime24"]
    assert "'1' is already used at line 1" in result["missing"]["amc23"]
    assert "field 'answer' is missing" in result["missing"]["math500"]
    for name in result["missing"]:
        assert f"missing: {name}: " in done.output and f"**{name}**" in (tmp_path / "s" / "suite_math5.md").read_text()

    write_data(data)
    assert roro(tmp_path, pair, *args).exit_code == 0
    write_data(data, ["gsm8k"])
    (data / "gsm8k.jsonl").write_text('{"id": 1, "problem": "p", "answer": 1}\n')
    done = roro(tmp_path, pair, *args)
    assert done.exit_code == 1 and "queries changed" in done.output and "--redo gsm8k" in done.output
    assert roro(tmp_path, pair, *args, "--redo", "gsm8k").exit_code == 0


def test_without_network_every_benchmark_is_missing_and_says_so(tmp_path, pair, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    done = roro(tmp_path, pair, "--suite", "math5")
    assert done.exit_code == 1 and done.output.count("no route to host") == 5 and "JSONL" in done.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--suite", "chess"], "unknown suite 'chess'"),
        (["--limit", 3], "name math5 or gym"),
        (["--suite", "math5", "suite.arms=[all_small]"], "all_large"),
        (["--suite", "math5", "suite.arms=[all_large, oracle_query]"], "lacks 'all_small'"),
        (["--suite", "math5", "--redo", "svamp"], "'svamp' is not a benchmark of this suite"),
        (["--suite", "math5", "--router", "nowhere"], "nowhere: not a readable router directory"),
        (["--suite", "math5", "models.prices=[1]"], "models.prices: 1 prices for 2 models"),
        (["--suite", "math5", "models.prices=[1, -2]"], "models.prices"),
    ],
)
def test_bad_suites_are_one_clear_error(tmp_path, pair, args, words):
    done = roro(tmp_path, pair, *args)
    assert done.exit_code == 2 and words in done.output, done.output


def test_a_baseline_is_fitted_once_and_measured_everywhere(tmp_path, pair, monkeypatch):
    calls = []
    real = eval_suite.fitted
    monkeypatch.setattr(eval_suite, "fitted", lambda ctx, arm: calls.append(arm) or real(ctx, arm))
    args = ("--suite", "gym", "--limit", 1, "suite.arms=[all_small, all_large, glimp_router]", "eval.n_fit=2")
    args += ("task.n_calibrate=3", "task.n_train=40", "collect.n_queries=40", "eval.budgets=[0.4, 0.8]")
    for _ in range(2):
        done = roro(tmp_path, pair, *args)
        assert done.exit_code == 0, done.output
    assert calls == ["glimp_router"]
    result = json.loads((tmp_path / "s" / "suite_gym.json").read_text())
    assert [(p["arm"], p["knob"]) for p in result["points"][2:]] == [("glimp_router", 0.4), ("glimp_router", 0.8)]


def test_a_baseline_that_cannot_be_fitted_is_not_blamed_on_a_benchmark(tmp_path, pair):
    done = roro(tmp_path, pair, "--suite", "gym", "--limit", 1, "suite.arms=[all_large, rsd]", "eval.prm=nowhere")
    assert done.exit_code == 2 and "eval.prm: no directory 'nowhere'" in done.output
    assert not (tmp_path / "s" / "suite_gym.json").exists()


def test_a_router_of_another_pool_is_refused(tmp_path, pair):
    PolicyNetwork(PolicyConfig(num_models=3)).save_pretrained(tmp_path / "three")
    done = roro(tmp_path, pair, "--suite", "gym", "--router", tmp_path / "three")
    assert done.exit_code == 2 and "was trained for 3 models" in done.output


def test_gym_runs_with_its_settings(tmp_path, pair):
    done = roro(tmp_path, pair, "--suite", "gym", "--limit", 1, "suite.arms=[all_small, all_large]")
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "s" / "suite_gym.json").read_text())
    assert result["queries"] == {e.name: 1 for e in suite("gym")}


def test_suites_name_benchmarks_that_exist():
    assert {e.task.removeprefix("gym:") for e in suite("gym")} <= set(names())
    assert len({e.name for e in suite("gym")}) == len(suite("gym"))
    with pytest.raises(ConfigError, match="unknown suite"):
        suite("math")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not beside this checkout")
def test_the_real_files_are_whole():
    sizes = {e.name: len(load_entry(e, str(SHARED)).queries("test")) for e in suite("math5")}
    assert sizes == {"gsm8k": 1319, "math500": 500, "aime24": 30, "amc23": 40, "olympiadbench": 675}


def test_intervals_are_those_of_independent_benchmarks():
    def measured(n: int) -> list[Measured]:
        right = np.arange(n) % 2
        return [Measured(point("all_large", right, 1.0), 2.0), Measured(point("random", 1 - right, 0.5, knob=0.5), 1.0)]

    result = document("x", {"a": measured(400), "b": measured(100)}, {}, resamples=2000)
    large, other = result["points"]
    for name, n in (("a", 400), ("b", 100)):
        v = large["benchmarks"][name]["accuracy"]
        assert v["mean"] == pytest.approx(0.5) and v["hi"] - v["lo"] == pytest.approx(
            2 * 1.96 * 0.5 / math.sqrt(n), rel=0.15
        )
    macro = large["macro"]["accuracy"]
    want = 2 * 1.96 * 0.5 * math.hypot(1 / math.sqrt(400), 1 / math.sqrt(100)) / 2
    assert macro["hi"] - macro["lo"] == pytest.approx(want, rel=0.15)
    same = document("x", {"a": measured(100), "b": measured(100)}, {}, resamples=2000)["points"][0]
    v, macro = same["benchmarks"]["a"]["accuracy"], same["macro"]["accuracy"]
    assert macro["hi"] - macro["lo"] == pytest.approx((v["hi"] - v["lo"]) / math.sqrt(2), rel=0.15)
    assert other["macro"]["generated"]["mean"] == 0.5 and other["macro"]["wall_seconds"]["mean"] == 2.0
    assert large["macro"]["price"]["mean"] is None and "price" not in markdown(result)
    with pytest.raises(DataError, match="all_large was not measured"):
        document("x", {"a": [Measured(point("random", [1.0], 0.5), 1.0)]}, {}, resamples=2)


def test_prices_count_drafts_and_what_is_read():
    cost = Cost(generated_tokens=[10, 20], forward_tokens=[45, 130], discarded_tokens=5)
    prices = price_table(ModelsConfig(prices=[1, 10], read_prices=[0.5, 2]))
    assert prices is not None
    assert prices.of(cost) == pytest.approx((1 * 15 + 0.5 * 30 + 10 * 20 + 2 * 110) / 1e6)
    assert price_table(ModelsConfig()) is None
