"""The engine on the Triton kernels: routed answers are those of the references. Interpreted on a CPU, so very short."""

from __future__ import annotations

import copy

import pytest
import torch

from roro_fast.engine import Request, StepEngine, padding
from roro_fast.routing import PolicyConfig, PolicyNetwork
from tests.engine import pairs
from tests.engine.pairs import prompt, run

HERE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = ("paged_attention", "norm_rope_store", "add_rms_norm", "silu_mul", "sample_step", "router_score")


def engine(**settings: bool) -> StepEngine:
    models = [copy.deepcopy(pairs.model_pair(i)[1]).to(HERE) for i in (0, 1)]
    return pairs.engine(models, max_num_seqs=4, **settings)


def router() -> PolicyNetwork:
    hidden = pairs.model_pair(0)[1].config.hidden_size
    policy = PolicyNetwork(PolicyConfig(hidden_size=hidden, action_space="regenerate", width=8))
    with torch.no_grad():
        policy.w2.copy_(torch.randn(policy.w2.shape, generator=torch.Generator().manual_seed(2)))
    return policy.to(HERE)


@pytest.mark.parametrize("settings", [{}, {"graphs": True, "overlap": True}], ids=["eager", "padded"])
def test_answers_are_those_of_the_references(settings: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three answers to a prompt longer than a shared prefix must be, one to another; both models write."""
    monkeypatch.setattr(padding, "MIXED_TOKENS", (8, 24, 80, 160))
    rows = [
        Request(prompt(i // 3, 70 - 50 * (i // 3)), sample=i, max_new_tokens=5, max_step_tokens=2, tag={"id": i})
        for i in range(4)
    ]
    monkeypatch.setenv("RORO_IMPL", "reference")
    want = run(engine(graphs=False, overlap=False), rows, router())
    monkeypatch.setenv("RORO_IMPL", ",".join(f"{op}=triton" for op in OPS))
    got = run(engine(**settings), rows, router())
    assert {m for t in want.values() for m in t.models} == {0, 1}
    for i, t in want.items():
        assert got[i].token_ids == t.token_ids and got[i].models == t.models
        assert [d.probs for d in got[i].decisions] == [pytest.approx(d.probs, abs=1e-3) for d in t.decisions]
