"""The benches run from end to end on tiny random models and write what they promise."""

from __future__ import annotations

import importlib
import importlib.util
import json
import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench.e2e import measure, plain, rollout, scaling, targets
from bench.e2e.cells import Cell, Prompts, routed_cell
from bench.e2e.gate import Gate
from bench.e2e.measure import Engine, Run
from bench.e2e.neighbours import neighbours
from bench.e2e.pairs import ensure
from bench.e2e.random_pair import SIZES, config_of
from bench.e2e.workload import Sequence, Workload
from bench.peers.base import Pool

CONFIGS = [config_of(s) for s in SIZES["tiny"][:2]]
CEILING = {"bytes_per_second": 1e9, "flops": 1e9}


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.slow
def test_rollout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    argv = "--pair tiny --dtype float32 --threads 1 --concurrency 3 --prompt 40 --new 30 --rounds 2 --plain-new 6"
    rollout.main([*argv.split(), "--engines", "roro_fast,hf_cached,llama_cpp", "--out", str(out)])
    found = last_line(capsys)
    assert found == json.loads(out.read_text())
    engines = found["workloads"][found["main"]]["engines"]
    assert set(engines) == {"roro_fast", "hf_cached"} and found["absent"]["llama_cpp"]
    assert found["gate"]["roro_fast"]["ok"] and found["gate"]["roro_fast"]["equal_to_fp32"] == 1
    for row in engines.values():
        assert len(row["seconds"]) == found["rounds"] == 2
        assert 0 < row["fraction_of_ceiling"] < 1
        assert row["step_ms_p50"] <= row["step_ms_p99"] and row["peak_rss_mb"] > 50
    assert engines["roro_fast"]["forward_flops_over_least"] == 1, "what both models share is run once"
    assert engines["hf_cached"]["forward_flops_over_least"] > 1.1
    assert engines["hf_cached"]["ours_over_this"] > 0 and 0 < engines["roro_fast"]["extra"]["outside_forward"] < 1
    plain = set(found["plain"]["engines"]["roro_fast"])  # a busy machine may leave no time to tell decoding by
    assert {"prefill", "warm"} <= plain <= {"decode_1", "decode_32", "prefill", "warm"}


def test_neighbours_compute_until_the_block_ends() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with neighbours(2):
        time.sleep(0.5)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before  # of children that have ended
    assert spent > 0.1


@pytest.mark.slow
def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.json"
    argv = "--pair tiny --short --threads 1 --rounds 1 --concurrency 16 --prompt 30 --long 80 --new 24"
    curves = ["concurrency", "switch", "group"]
    scaling.main([*argv.split(), "--curves", ",".join(curves), "--out", str(out)])
    found = last_line(capsys)
    assert set(found["curves"]) == set(curves) and set(found["bounds"]) == {*curves, "memory"}
    if importlib.util.find_spec("matplotlib"):
        assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    per_token = {c: [p["forward_flops_per_token"] for p in points] for c, points in found["curves"].items()}
    assert per_token["switch"] == sorted(per_token["switch"]) and per_token["group"][0] > per_token["group"][-1]
    same = [found["curves"][c][i] for c, i in (("concurrency", 2), ("switch", 1))]
    assert [p["x"] for p in same] == [16, 0.2], "one shape on two curves"
    assert same[0]["forward_flops_per_token"] == same[1]["forward_flops_per_token"], "no prompt was in the cache"
    kv = [p["kv_mb_peak"] for p in found["curves"]["concurrency"]]
    assert kv == sorted(kv) and kv[0] > 0
    assert scaling.sentence("models", found["curves"]["group"]).startswith("8 models instead of 1 give")


def test_time_that_switching_adds() -> None:
    """At a ceiling of 100 FLOP/s, half reached: 5 FLOPs more a token would take 0.05 s, and 0.2 - 0.1 s were added."""
    first = {"tokens_per_second": 10.0, "forward_flops_per_token": 5.0, "share": {"arithmetic": 0.5}}
    last = {"tokens_per_second": 5.0, "forward_flops_per_token": 10.0, "share": {"arithmetic": 0.5}}
    assert scaling.added_time(first, last) == pytest.approx(2.0)


def fake(work: Workload, seconds: float, **extra: object) -> Run:
    outcome = {"seconds": seconds, "step_seconds": [seconds] * 3, "forward_tokens": None, "extra": extra}
    return Run(work, outcome, 1 << 20)


class Scripted:
    """Answers like a worker's, from a list."""

    def __init__(self, tokens: list[list[list[int]]]) -> None:
        self.tokens, self.closed = tokens, False

    def run(self, work: Workload) -> dict:
        outcome = {"seconds": 1.0, "tokens": self.tokens.pop(0), "step_seconds": [1.0]}
        return {"outcome": outcome, "peak_rss": 1, "peak_device": 0}

    def close(self) -> None:
        self.closed = True


def test_an_engine_that_writes_something_else_is_left_out() -> None:
    pair = ensure("tiny")
    work = routed_cell(Prompts(pair), concurrency=2, switch=0.5, prompt=12, new=20, queries=2).make(0)
    peer = importlib.import_module("bench.peers.hf_reprefill").PEER()
    peer.load(Pool(random=pair.random, dtype="float32", threads=1))
    right = peer.run(work).tokens
    wrong = [[*right[0][:5], (right[0][5] + 1) % 512, *right[0][6:]], right[1]]
    engines = [Engine("hf_cached", Scripted([right])), Engine("roro_fast", Scripted([wrong]))]  # type: ignore[arg-type]
    bench = measure.Bench(engines, 1, 0.5, lambda line: None)
    warm = bench.round([Cell(work.name, "routed", lambda n: work)], 0, keep=False)
    assert set(bench.runs[work.name]) == {"hf_cached", "roro_fast"}  # both took longer than cell_seconds
    checks = rollout.gated(bench, Gate(pair, "float32", "cpu", 1), warm[work.name], 2)
    assert checks["hf_cached"]["ok"] and not checks["roro_fast"]["ok"]
    assert [e.name for e in bench.alive()] == ["hf_cached"] and engines[1].remote.closed  # type: ignore[attr-defined]
    assert set(bench.runs[work.name]) == {"hf_cached"}


def test_ratios_pair_the_rounds() -> None:
    work = Workload("w", [Sequence([1] * 4, [(0, 10)], 0)], 1)
    runs = {
        "roro_fast": [fake(work, s) for s in (1.0, 2.0, 4.0)],
        "hf_cached": [fake(work, s) for s in (3.0, 2.0, 8.0)],
    }
    row = measure.summary(runs, CONFIGS, 4, CEILING)["hf_cached"]
    assert row["ours_over_this"] == 2.0 and row["ours_over_this_spread"] == [1.0, 3.0]
    assert row["tokens_per_second"] == pytest.approx(10 / 3, abs=0.01)
    assert row["forward_flops"] is None


def test_the_floor_is_the_larger_need() -> None:
    work = Workload("w", [Sequence([1] * 4, [(1, 10)], 0)], 1)
    c = CONFIGS[1]
    least = measure.floor(work, CONFIGS, 4, CEILING)
    assert least["flops"] == pytest.approx(c.forward_flops(13, 13))
    context = sum(range(5, 15))
    assert least["bytes"] == 10 * c.num_params * 4 + context * c.kv_bytes_per_token(4)
    assert least["seconds"] == max(least["flops"], least["bytes"]) / 1e9
    twice = Workload("w", work.sequences * 2, 2)  # a batch reads the weights once
    assert measure.floor(twice, CONFIGS, 4, CEILING)["bytes"] < 1.1 * least["bytes"]


def test_the_floor_counts_shared_layers_once() -> None:
    large = CONFIGS[1]
    small = replace(large, num_layers=large.num_layers - 1)
    p, layer = small.num_layers, measure.layer_params(large)
    work = Workload("w", [Sequence([1] * 4, [(1, 3), (0, 5), (1, 2)], 0)], 1)
    least = measure.floor(work, [small, large], 4, CEILING, p)
    both = measure.layers_flops(large, large.num_layers, 13, 13 * 14 / 2)
    rest = large.num_params - large.num_layers * layer
    assert least["flops"] == pytest.approx(both + 2 * rest * (13 + 5))
    context = sum(range(5, 8)) + sum(range(13, 15)), sum(range(8, 13))
    kv = context[0] * large.kv_bytes_per_token(4) + context[1] * small.kv_bytes_per_token(4)
    weights = 10 * p * layer + 5 * (large.num_params - p * layer) + 5 * (small.num_params - p * layer)
    assert least["bytes"] == pytest.approx(4 * weights + kv)


def test_plain_figures() -> None:
    one = Workload("w", [Sequence([1] * 4, [(1, 1)], 0)], 1)
    eleven = Workload("w", [Sequence([1] * 4, [(1, 11)], 0)], 1)
    runs = {
        name: {"roro_fast": [fake(w, ours)], "hf_cached": [fake(w, theirs)], "llama_cpp": [fake(w, 9 * theirs)]}
        for name, w, ours, theirs in (
            ("start_1", one, 1.0, 1.0), ("decode_1", eleven, 2.0, 3.0), ("prefill", one, 0.5, 0.25),
        )
    }  # fmt: skip
    found = plain.summary(runs, CONFIGS[1], 4, CEILING)
    assert found["engines"]["roro_fast"] == {"decode_1": 10.0, "prefill": 500.0}
    assert found["best_peer"]["decode_1"] == {
        "peer": "hf_cached", "its": 5.0, "ours": 10.0, "ours_is_faster_by": 2.0,
    }  # fmt: skip
    assert found["best_peer"]["prefill"]["ours_is_faster_by"] == 0.5
    limit = 1e9 / (CONFIGS[1].num_params * 4)
    assert found["bandwidth_fraction"]["hf_cached"] == pytest.approx(5 / limit, abs=1e-4)
    runs["start_1"]["llama_cpp"] = [fake(one, 28.0)]
    assert "decode_1" not in plain.summary(runs, CONFIGS[1], 4, CEILING)["engines"]["llama_cpp"], "27 s are less"


def test_decode_is_judged_by_the_bandwidth_around_each_run() -> None:
    """Runs in a slow and a fast moment of the machine, at the same share of what it could read then."""
    one = Workload("w", [Sequence([1] * 4, [(1, 1)], 0)], 1)
    eleven = Workload("w", [Sequence([1] * 4, [(1, 11)], 0)], 1)
    weights = CONFIGS[1].num_params * 4
    decodes = [fake(eleven, 3.0), fake(eleven, 11.0), fake(eleven, 6.0)]
    for run, share in zip(decodes, (0.8, 0.7, 0.6), strict=True):
        run.bandwidth = 10 / (run.seconds - 1.0) * weights / share
    runs = {"start_1": {"roro_fast": [fake(one, 1.0)] * 3}, "decode_1": {"roro_fast": decodes}}
    found = plain.summary(runs, CONFIGS[1], 4, CEILING)
    assert found["bandwidth_fraction"]["roro_fast"] == pytest.approx(0.7, abs=1e-4)
    cells = [Cell("decode_1", "plain", lambda n: eleven, reads=True), Cell("start_1", "plain", lambda n: one)]
    engine = Engine("roro_fast", Scripted([[[1]], [[1]]]))  # type: ignore[arg-type]
    moments = iter((1e9, 3e9))
    bench = measure.Bench([engine], 1, 9, lambda line: None, lambda: next(moments))
    got = bench.round(cells, 1, keep=True)
    assert got["decode_1"]["roro_fast"].bandwidth == 2e9 and got["start_1"]["roro_fast"].bandwidth == 0


def test_targets_judge_only_what_was_measured() -> None:
    engines = {
        "roro_fast": {"tokens_per_second": 5.0, "forward_flops_over_least": 1.2, "extra": {"outside_forward": 0.04}},
        "hf_cached": {"ours_over_this": 3.0},
        "vllm_cpu": {"ours_over_this": 1.9},
    }
    best = {"prefill": {"peer": "vllm_cpu", "ours_is_faster_by": 1.43}}
    found = {
        "pair": "smol", "device": "cpu", "main": "m", "workloads": {"m": {"engines": engines}},
        "plain": {"best_peer": best, "bandwidth_fraction": {"roro_fast": 0.79}},
    }  # fmt: skip
    judged = {t["what"]: t["reached"] for t in targets.judged(found)}
    assert judged == {
        "answers/s over hf_cached": True, "answers/s over vllm_cpu": False, "FLOPs beyond exact catch-up": False,
        "share of time outside model forwards": True, "prefill faster than vllm_cpu by": True,
        "decode_1 of the read bandwidth": False,
    }  # fmt: skip
    assert targets.judged(found | {"device": "cuda"}) == []
    engines["roro_fast"]["fraction_of_ceiling"] = 0.71
    gpu = targets.judged(found | {"device": "cuda", "pair": "qwen3"})
    assert [t["reached"] for t in gpu] == [True, True, False]
    assert [t["reached"] for t in targets.judged(found | {"pair": "nano"})] == [False]
