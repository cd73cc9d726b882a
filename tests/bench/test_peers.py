"""Engines under test do the same work and write the same tokens; what differs is only their speed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench.e2e import workload
from bench.e2e.cells import Prompts, routed_cell
from bench.e2e.gate import Gate
from bench.e2e.pairs import ensure
from bench.e2e.workload import Workload
from bench.peers import setup
from bench.peers.base import Outcome, Peer, Pool
from bench.peers.catalogue import CATALOGUE, Remote, why_absent

HERE = ("ours", "hf_reprefill", "hf_cached", "hf_continuous")


def pool(**settings: Any) -> Pool:
    defaults = {"dtype": "float32", "threads": 1, "concurrency": 6, "max_len": 160, "kv_tokens": 960}
    return Pool(random=ensure("tiny").random, **(defaults | settings))


@cache
def work(group: int = 1, round_: int = 1) -> Workload:
    settings = {"concurrency": 6, "switch": 0.6, "prompt": 37, "new": 45, "queries": 6, "group": group}
    return routed_cell(Prompts(ensure("tiny")), **settings).make(round_)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Peer]]:
    out = {}
    for name in HERE:
        out[name] = importlib.import_module(f"bench.peers.{name}").PEER()
        out[name].load(pool())
    yield out
    for peer in out.values():
        peer.close()


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate(ensure("tiny"), "float32", "cpu", 1)


@pytest.fixture(scope="module")
def truth(engines: dict[str, Peer]) -> Outcome:
    found = engines["hf_reprefill"].run(work())
    assert len({t for row in found.tokens for t in row}) > 60  # a model that repeats itself would hide mistakes
    return found


@pytest.mark.parametrize("name", HERE)
def test_the_same_tokens_and_forced_lengths(name: str, engines: dict[str, Peer], truth: Outcome, gate: Gate) -> None:
    found = engines[name].run(work())
    assert [len(t) for t in found.tokens] == [s.new_tokens for s in work().sequences]
    assert len(found.step_seconds) == sum(len(s.steps) for s in work().sequences)
    assert all(0 < s <= found.seconds for s in found.step_seconds)
    assert found.tokens == truth.tokens
    checked = gate.check(work(), found.tokens)
    assert checked["ok"] and checked["tokens"] == work().new_tokens


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("name", ["ours", "hf_cached", "hf_continuous"])
def test_how_many_are_in_flight_changes_nothing(
    name: str, concurrency: int, engines: dict[str, Peer], truth: Outcome
) -> None:
    assert engines[name].run(replace(work(), concurrency=concurrency)).tokens == truth.tokens


def test_what_was_run_is_counted(engines: dict[str, Peer]) -> None:
    fresh = work(round_=5)
    tokens, pairs = workload.needed(fresh)
    for name in ("ours", "hf_cached"):
        found = engines[name].run(fresh)
        assert (found.forward_tokens, found.forward_pairs) == (tokens, pairs), name
    again = engines["hf_reprefill"].run(fresh)
    assert again.forward_tokens is not None and sum(again.forward_tokens) > sum(tokens)
    assert engines["hf_continuous"].run(fresh).forward_tokens is None


def test_a_group_pays_for_its_prompt_once(engines: dict[str, Peer]) -> None:
    grouped = work(group=3, round_=9)
    least, _ = workload.needed(grouped)
    found = engines["ours"].run(grouped)
    assert found.forward_tokens is not None
    page_rest = 16 * len(grouped.sequences) * 2  # sharing ends at a page's edge
    assert sum(least) <= sum(found.forward_tokens) <= sum(least) + page_rest
    assert sum(found.extra["cached_tokens"]) > 0


def test_the_gate_sees_faults(gate: Gate, truth: Outcome) -> None:
    one_wrong = [list(t) for t in truth.tokens]
    one_wrong[2][20] = (one_wrong[2][20] + 1) % 512
    assert not gate.check(work(), one_wrong)["ok"]
    shifted = Workload("w", [*work().sequences[1:], work().sequences[0]], 6)
    assert not gate.check(shifted, truth.tokens)["ok"]
    assert not gate.check(work(), [t[:-1] for t in truth.tokens])["ok"]
    swapped = Workload.from_dict(work().to_dict())
    for s in swapped.sequences:
        s.steps[:] = [(1 - m, n) for m, n in s.steps]
    assert not gate.check(swapped, truth.tokens)["ok"]


def test_rounding_in_bf16_is_allowed_for(truth: Outcome) -> None:
    gate = Gate(ensure("tiny"), "bfloat16", "cpu", 1)
    allowed = gate.calibrate(work(), truth.tokens)
    assert 1e-3 < allowed["tolerance"] < 0.1
    peer = importlib.import_module("bench.peers.ours").PEER()
    peer.load(pool(dtype="bfloat16"))
    found = peer.run(work())
    assert gate.check(work(), found.tokens)["ok"]
    wrong = [t[:10] + [(t[10] + 7) % 512] + t[11:] for t in found.tokens]
    assert not gate.check(work(), wrong)["ok"]


def test_a_process_of_its_own() -> None:
    remote = Remote("hf_cached", pool())
    try:
        with pytest.raises(RuntimeError, match="hf_cached: "):
            remote.run(work())  # nothing is loaded yet
        assert remote.load()["about"]["transformers"]
        answer = remote.run(work())
        assert answer["peak_rss"] > 50 << 20 and len(answer["outcome"]["tokens"]) == 6
        remote.kill()
        with pytest.raises(RuntimeError, match="the process ended"):
            remote.run(work())
    finally:
        remote.close()


def test_absent_peers_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RORO_PEERS", str(tmp_path))
    reasons = {name: why_absent(name, pool()) for name in CATALOGUE}
    assert {n for n, why in reasons.items() if not why} == {"roro_fast", "hf_reprefill", "hf_cached", "hf_continuous"}
    assert "python -m bench.peers.setup vllm_cpu" in reasons["vllm_cpu"]
    assert "cuda" in why_absent("openvino_genai", pool(device="cuda")) or reasons["openvino_genai"]


SMOL = [setup.root() / "models" / f"smol-8{suffix}" for suffix in ("", ".f16.gguf")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vllm_cpu", "llama_cpp", "openvino_genai"])
def test_peers_with_environments_of_their_own(name: str) -> None:
    """Two copies of the smol pair's small model stand in for a pool: switches must not change a token."""
    if setup.absent(name):
        pytest.skip(setup.absent(name))
    if not all(p.exists() for p in SMOL):
        pytest.skip("the smol pair is not exported; bench.e2e.rollout does it")
    directory, gguf = map(str, SMOL)
    settings: dict[str, Any] = {"concurrency": 3, "max_len": 128, "kv_tokens": 384, "threads": 1}
    two = Pool([directory] * 2, [gguf] * 2, dtype="float32" if name == "vllm_cpu" else "bfloat16", **settings)
    rows = [[100 + 7 * i + j for j in range(20)] for i in range(3)]
    routed, alone = (workload.routed("w", rows, new_tokens=30, switch=s, concurrency=3) for s in (1.0, 0.0))
    remote = Remote(name, two)
    try:
        remote.load(300)
        a, b = (remote.run(w)["outcome"] for w in (routed, alone))
    finally:
        remote.close()
    assert [len(t) for t in a["tokens"]] == [30] * 3
    same = sum(x == y for s, t in zip(a["tokens"], b["tokens"], strict=True) for x, y in zip(s, t, strict=True))
    assert same >= 60 if name != "vllm_cpu" else same == 90  # bf16 may tie and part ways
