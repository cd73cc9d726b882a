"""Queueing all models' forwards before waiting for any changes when things happen, never what comes out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from roro_fast.engine import boundary, transfer
from roro_fast.engine.forward import Launched
from roro_fast.routing import PolicyConfig, PolicyNetwork
from tests.engine import pairs
from tests.engine.pairs import Drawn, assert_same, check_kv, requests, run

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.mark.parametrize("action_space", ["next", "regenerate"])
@pytest.mark.parametrize("needs_scout", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_overlapped_rollouts_are_the_same(action_space: str, needs_scout: bool, temperature: float) -> None:
    rows = requests(14, temperature=temperature)
    both = [
        run(pairs.engine(pairs.pool(3), max_num_seqs=5, overlap=overlap), rows, Drawn(action_space, needs_scout))
        for overlap in (False, True)
    ]
    assert sorted(both[0]) == sorted(both[1]) == list(range(14))
    assert len({tuple(t.models) for t in both[0].values()}) > 5
    for i in both[0]:
        assert_same(both[0][i], both[1][i])


def test_a_preempted_row_of_a_flying_forward_keeps_its_token() -> None:
    """The arena holds one long sequence, so models launched later take pages from rows that are already running."""
    rows = requests(9, temperature=0.8)
    calm = run(pairs.engine(pairs.pool(2), max_num_seqs=4), rows, Drawn("regenerate", True))
    e = pairs.tight(2, 80, 4, max_num_seqs=4, overlap=True)
    scarce = run(e, rows, Drawn("regenerate", True))
    assert e.kv.stats.preemptions > 3
    for i in calm:
        assert_same(calm[i], scarce[i])


def test_caches_stay_exact_between_overlapped_iterations() -> None:
    e = pairs.engine(overlap=True)
    for r in requests(8):
        e.add(r, Drawn("regenerate", True))
    compared = 0
    while e.has_work:
        e.step()
        compared += check_kv(e)
    assert compared > 2000


def test_one_buffer_carries_every_array() -> None:
    arrays = [
        np.arange(5),
        np.linspace(0, 1, 7, dtype=np.float32),
        np.zeros((0, 3), np.int64),
        np.arange(12).reshape(3, 4)[:, :3],
        np.array([True, False, True]),
    ]
    buffer = torch.from_numpy(transfer.pack(arrays))
    assert buffer.dtype == torch.uint8 and len(buffer) % transfer.ALIGN == 0
    for want, got in zip(arrays, transfer.unpack(buffer, arrays), strict=True):
        assert got.data_ptr() % transfer.ALIGN == 0 or not got.numel()
        np.testing.assert_array_equal(got.numpy(), want)
    tensors = [torch.arange(3), torch.tensor([True, False]), torch.rand(2, 2), torch.empty(0)]
    flat = torch.cat([t.contiguous().view(torch.uint8).flatten() for t in tensors]).numpy()
    for want, got in zip(tensors, transfer.split(flat, tensors), strict=True):
        np.testing.assert_array_equal(got, want.numpy())
    shared = transfer.upload(arrays[:1], torch.device("cpu"))[0]
    assert shared.data_ptr() == arrays[0].ctypes.data


def test_the_router_is_asked_while_its_scout_flies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both orders give the learned router the same inputs: the decisions, features included, agree."""
    config = PolicyConfig(hidden_size=pairs.pool()[0].config.hidden_size, action_space="regenerate", width=8)
    policy = PolicyNetwork(config)
    with torch.no_grad():
        policy.w2.copy_(torch.randn(policy.w2.shape, generator=torch.Generator().manual_seed(2)))
    rows = requests(10, temperature=0.7)
    late, e = run(pairs.engine(max_num_seqs=4, overlap=False), rows, policy), pairs.engine(max_num_seqs=4, overlap=True)
    ask, answers = e._ask_early, []

    def counted(launched: Launched) -> list[boundary.Asked]:
        answers.append(ask(launched))
        return answers[-1]

    monkeypatch.setattr(e, "_ask_early", counted)
    early = run(e, rows, policy)
    assert sum(len(a.rows) for asked in answers for a in asked) == sum(len(t.decisions) for t in early.values()) > 20
    assert {d.action for t in late.values() for d in t.decisions} == {0, 1}
    for i, a in late.items():
        assert_same(a, early[i])
        for d, e in zip(a.decisions, early[i].decisions, strict=True):
            np.testing.assert_allclose(d.features, e.features, atol=1e-4)
