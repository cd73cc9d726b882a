"""The engine on a GPU: streams, CUDA graphs, routing on the device. Everything here needs one."""

from __future__ import annotations

import copy

import pytest
import torch

from roro_fast.engine import StepEngine
from roro_fast.models.decoder import Decoder
from roro_fast.routing import PolicyConfig, PolicyNetwork
from tests.engine import pairs
from tests.engine.pairs import Drawn, audit, check_kv, requests, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pool(dtype: torch.dtype = torch.float32) -> list[Decoder]:
    return [copy.deepcopy(pairs.model_pair(i)[1]).to("cuda", dtype) for i in (0, 1)]


def engine(dtype: torch.dtype = torch.float32, **settings: bool) -> StepEngine:
    return pairs.engine(pool(dtype), max_num_seqs=6, **settings)


@pytest.mark.parametrize(
    "settings", [{}, {"graphs": False}, {"overlap": False}, {"graphs": False, "overlap": False}], ids=str
)
@pytest.mark.parametrize("action_space", ["next", "regenerate"])
def test_greedy_rollouts_audit_against_cold_prefills(action_space: str, settings: dict[str, bool]) -> None:
    e = engine(**settings)
    for t in run(e, requests(12, temperature=0.0), Drawn(action_space, True)).values():
        cpu = pairs.engine([pairs.model_pair(i)[1] for i in (0, 1)])
        audit(cpu, t, greedy=True)


def test_caches_equal_cold_prefills() -> None:
    e = engine()
    for r in requests(8):
        e.add(r, Drawn("regenerate", True))
    compared = 0
    while e.has_work:
        e.step()
        torch.cuda.synchronize()
        compared += check_kv(e, 1e-4)
    assert compared > 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_are_repeatable(dtype: torch.dtype) -> None:
    """Race check: streams, graphs and page reuse under pressure give the same tokens every time."""
    config = PolicyConfig(hidden_size=pairs.pool()[0].config.hidden_size, action_space="regenerate", width=8)
    policy = PolicyNetwork(config).cuda()
    rows = requests(20, temperature=0.8)
    e = pairs.engine(pool(dtype), max_num_seqs=8, kv_bytes=1 << 20, page_size=4)
    first = run(e, rows, policy)
    for _ in range(5):
        again = run(e, rows, policy)
        for m in range(2):
            e.kv.clear_prefixes(m)
        assert [again[i].token_ids for i in range(20)] == [first[i].token_ids for i in range(20)]


def test_a_warm_iteration_waits_for_the_device_once_per_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """With synchronising calls turned into errors, decode iterations of a group go through."""
    e = engine(torch.bfloat16)
    config = PolicyConfig(hidden_size=e.models[0].config.hidden_size, width=8)
    policy = PolicyNetwork(config).cuda()
    run(e, requests(6), policy)
    e.warm_up(pairs.CONTEXT)
    for r in requests(6):
        e.add(r, policy)
    e.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            e.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_catch_up_rows_ride_in_replayed_batches() -> None:
    """Mixed batches are captured and replayed, answers are greedy ones of a cold prefill, and after a warm-up nothing
    is captured any more."""
    e = engine()
    known = e.warm_up(pairs.CONTEXT)
    seen = run(e, requests(12, temperature=0.0), Drawn("regenerate", True))
    graphs = [g for g in e.forward._graphs if g is not None]
    assert len(graphs) == 2 and known == sum(len(g._ready) for g in graphs)
    assert all(any(b.tokens for b in g._ready) for g in graphs)
    for t in seen.values():
        audit(pairs.engine([pairs.model_pair(i)[1] for i in (0, 1)]), t, greedy=True)


def test_a_replay_equals_an_eager_run_of_the_same_padded_batch() -> None:
    """Token by token in bf16, where a wrong input would show: what a graph holds is the forward, not its inputs."""
    answers = []
    for capture in (True, False):
        e = engine(torch.bfloat16)
        for g in e.forward._graphs:
            assert g is not None
            g.capture = capture
        answers.append(run(e, requests(12, temperature=0.8), Drawn()))
    assert [t.token_ids for _, t in sorted(answers[0].items())] == [t.token_ids for _, t in sorted(answers[1].items())]
