"""Projected KV: where an exact map exists nothing changes but the work; where none does, it is refused or labelled."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from roro_fast.config import ProjectionConfig
from roro_fast.engine import Request, StepEngine, Trajectory
from roro_fast.engine import projection as projecting
from roro_fast.engine.projection import Gate, KVProjection
from roro_fast.engine.slots import Phase
from roro_fast.errors import CheckpointError, ConfigError, DataError, RoroError
from roro_fast.models.decoder import Decoder
from tests.engine import pairs
from tests.engine.pairs import Drawn, Planned, cold_kv, cold_logits, prompt, requests, run

TEXTS = [prompt(1000 + i, 40) for i in range(80)]
HELD_OUT = [prompt(5000 + i, 30) for i in range(12)]


def disguised(model: Decoder, seed: int = 0) -> Decoder:
    """A model with equal outputs and other keys and values: keys twice as long, values in another basis per head."""
    twin, c = copy.deepcopy(model), model.config
    g = torch.Generator().manual_seed(seed)
    n, d = c.num_kv_heads, c.head_dim
    with torch.no_grad():
        for layer in twin.layers:
            q, k, v = layer.qkv.weight.split(layer.sizes)
            q /= 2
            k *= 2
            basis = torch.linalg.qr(torch.randn(n, d, d, generator=g, dtype=torch.float64))[0] * 1.5
            v.copy_((basis @ v.view(n, d, -1)).flatten(0, 1))
            o = layer.o.weight.view(-1, n, c.num_heads // n, d)
            o.copy_(torch.einsum("hngd,nde->hnge", o, torch.linalg.inv(basis)))
    return twin


@cache
def pool() -> list[Decoder]:
    """Two models in fp64 with the same outputs, and KV that are linear maps of each other."""
    model = copy.deepcopy(pairs.model_pair(2, "llama")[1]).double()
    return [model, disguised(model)]


@cache
def maps() -> dict[tuple[int, int], KVProjection]:
    settings = ProjectionConfig(sources=1, ridge=[1e-12, 1e-2])
    found = {}
    for i, j in ((0, 1), (1, 0)):
        fitted = projecting.fit(pool()[i], pool()[j], TEXTS, settings)
        found[i, j] = projecting.gate(fitted, pool()[i], pool()[j], HELD_OUT, max_kl=1e-6)
    return found


def bad(i: int, j: int, max_kl: float = float("inf")) -> KVProjection:
    """Maps that give the receiver nothing but noise, with whatever bound they are to pass."""
    good, g = maps()[i, j], torch.Generator().manual_seed(1)
    weight = torch.randn(good.maps.weight.shape, generator=g) / 4
    return projecting.gate(replace(good, maps=good.maps._replace(weight=weight)), *pair(i, j), HELD_OUT, max_kl)


def pair(i: int, j: int) -> tuple[Decoder, Decoder]:
    return pool()[i], pool()[j]


def engine(projections: dict[tuple[int, int], KVProjection] | None = None, **settings: Any) -> StepEngine:
    return pairs.engine(pool(), projections=maps() if projections is None else projections, **settings)


def without_cost(t: Trajectory) -> tuple[Any, ...]:
    return t.token_ids, t.models, t.finish_reason, [d.action for d in t.decisions]


def test_the_twin_is_a_fair_test() -> None:
    ids = prompt(3, 30)
    ours, theirs = (cold_logits(m, ids) for m in pool())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    first, second = (cold_kv(m, ids) for m in pool())
    assert (first - second).abs().max() > 1


def test_recorded_keys_are_those_of_position_0() -> None:
    """In the first layer they depend on the token alone; everywhere they are a cold prefill's, turned back."""
    model, texts = pool()[0], [[7] * 9, prompt(1, 40), [7, 9, 7]]
    kv = projecting.record_kv(model, texts)
    assert kv.cu_seqlens.tolist() == [0, 9, 49, 52] and kv.keys.shape == (52, 2, 64)
    first = kv.keys[[*range(9), 49, 51], 0]
    torch.testing.assert_close(first, first[:1].expand_as(first), rtol=0, atol=1e-12)
    for i, ids in enumerate(texts):
        cold = cold_kv(model, ids)
        keys = torch.stack([k @ torch.linalg.inv(rotation(model, n)).T for n, k in enumerate(cold[:, :, 0])])
        begin = int(kv.cu_seqlens[i])
        torch.testing.assert_close(kv.keys[begin : begin + len(ids)], keys.flatten(2), rtol=0, atol=1e-12)
        values = cold[:, :, 1].flatten(2)
        torch.testing.assert_close(kv.values[begin : begin + len(ids)], values, rtol=0, atol=1e-12)


def test_an_exact_map_is_found() -> None:
    for p in maps().values():
        assert p.maps.layers.flatten().tolist() == [0, 1] and np.max(p.fit["error"]) < 1e-9
        assert set(np.ravel(p.fit["ridge"])) == {1e-12}
        assert p.gate is not None and p.gate.kl_mean < 1e-9 and p.gate.top1 == 1.0 and p.gate.tokens > 100


CHUNKED = {"page_size": 3, "max_batch_tokens": 9}


@pytest.mark.parametrize(
    ("space", "scout", "settings"),
    [
        ("next", False, {}),
        ("next", True, CHUNKED),
        ("regenerate", False, CHUNKED),
        ("regenerate", True, {}),
        ("next", True, {"overlap": True, "graphs": True}),
    ],
)
def test_the_engine_writes_what_exact_catch_up_writes(space: str, scout: bool, settings: dict[str, int]) -> None:
    rows = [replace(r, temperature=float(i % 2), top_k=30) for i, r in enumerate(requests(12))]
    exact = run(pairs.engine(pool(), **settings), rows, Drawn(space, scout))
    got = run(engine(**settings), rows, Drawn(space, scout))
    assert {m for t in exact.values() for m in t.models} == {0, 1}
    for i, want in exact.items():
        assert without_cost(got[i]) == without_cost(want)
    projected = sum(sum(t.meta["projected_tokens"]) for t in got.values())
    assert projected > 200
    assert "approximate" not in exact[0].meta and any(t.meta["approximate"] for t in got.values())


def test_only_the_last_missing_token_runs() -> None:
    """One step each by 0, 1, 0: every hand-over costs the receiver one token and the map the rest."""
    row = Request(prompt(9, 25), max_new_tokens=12, max_step_tokens=4, tag={"id": 0, "plan": [0, 1, 0]})
    exact = run(pairs.engine(pool()), [row], Planned())[0]
    e = engine()
    t = run(e, [row], Planned())[0]
    assert without_cost(t) == without_cost(exact) and t.models == [0, 1, 0]
    assert exact.cost.forward_tokens == [25 + 3 + 1 + 4 + 3, 25 + 4 + 3] and exact.cost.cached_tokens == 0
    assert t.cost.forward_tokens == [25 + 3 + 1 + 3, 1 + 3] and t.meta["projected_tokens"] == [4, 25 + 3]
    flops = [maps()[j, m].maps.flops_per_token for j, m in ((1, 0), (0, 1))]
    assert t.meta["projection_flops"] == 4 * flops[0] + 28 * flops[1]
    spent = [m.config.forward_flops for m in pool()]
    assert exact.cost.total_flops == spent[0](36, 36) + spent[1](32, 32)
    ran = spent[0](28, 28) + spent[0](4, 36) + spent[1](4, 32)
    assert t.cost.total_flops == ran + t.meta["projection_flops"]
    assert t.cost.generated_flops == exact.cost.generated_flops
    again = run(e, [row], Planned())[0]
    assert again.meta["projected_tokens"] == t.meta["projected_tokens"] and again.cost.total_flops == t.cost.total_flops


def test_a_map_one_way_leaves_the_other_exact() -> None:
    rows = requests(10)
    exact = run(pairs.engine(pool()), rows, Drawn())
    got = run(engine({(0, 1): maps()[0, 1]}), rows, Drawn())
    for i, t in got.items():
        assert without_cost(t) == without_cost(exact[i]) and t.meta["projected_tokens"][0] == 0
    assert sum(t.meta["projected_tokens"][1] for t in got.values()) > 100


@pytest.mark.parametrize("page_size", [1, 4])
def test_the_smallest_arena_gives_the_same_answers(page_size: int) -> None:
    rows = requests(14)
    longest = max(len(r.prompt_ids) + r.max_new_tokens for r in rows)
    need = -(-longest // page_size)
    probe = pairs.engine(pool(), page_size=page_size)
    e = engine(page_size=page_size, kv_bytes=need * probe.kv.page_bytes[0])
    exact = run(pairs.engine(pool()), rows, Drawn("next", True))
    got = run(e, rows, Drawn("next", True))
    for i, want in exact.items():
        assert without_cost(got[i]) == without_cost(want)
    assert e.kv.stats.preemptions > 0 and sum(sum(t.meta["projected_tokens"]) for t in got.values()) > 0


@pytest.mark.parametrize("when", [9, 12, 18, 23])
def test_forks_share_projected_pages(when: int) -> None:
    """Source and forks write on from the middle of a page that they share, and hand it over to each other's models."""
    policy = Planned()
    source = Request(prompt(2, 19), max_new_tokens=60, max_step_tokens=7, seed=4, tag={"id": 0, "plan": [0, 1]})
    child = Request([0], max_new_tokens=30, max_step_tokens=7, seed=5, temperature=1.0)
    done = {}
    for e in (pairs.engine(pool(), page_size=8), engine(page_size=8)):
        rid = e.add(source, policy)
        found = [t for _ in range(when) for t in e.step()]
        for j in (1, 2):
            e.fork(rid, replace(child, sample=j, tag={"id": j, "plan": [j - 1, 2 - j]}), policy)
        while e.has_work:
            found += e.step()
        pairs.assert_clean(e)
        done[e.forward.projecting is not None] = {t.meta["id"]: t for t in found}
    assert len({tuple(t.token_ids[-9:]) for t in done[False].values()}) == 3
    for i in (0, 1, 2):
        assert without_cost(done[True][i]) == without_cost(done[False][i])
        assert done[True][i].meta["approximate"]


def test_what_is_forked_from_approximate_kv_is_approximate() -> None:
    e = engine()
    rid = e.add(
        Request(prompt(9, 12), max_new_tokens=20, max_step_tokens=4, tag={"id": 0, "plan": [0, 1, 1, 1, 1]}), Planned()
    )
    for _ in range(8):
        e.step()
    e.fork(rid, Request([0], max_new_tokens=3, model=1, tag={"id": 1}))
    done = {}
    while e.has_work:
        done |= {t.meta["id"]: t for t in e.step()}
    assert done[1].meta["projected_tokens"] == [0, 0] and done[1].meta["approximate"]
    fresh = run(e, [Request(prompt(1, 5), model=1, tag={"id": 2})])[2]
    assert not fresh.meta["approximate"] and fresh.meta["projection_flops"] == 0


def test_the_prefix_cache_holds_exact_pages_only() -> None:
    """Bad maps, shared prompts and small pages: whatever the cache keeps must still be what a cold prefill gives."""
    e = engine({(0, 1): bad(0, 1), (1, 0): bad(1, 0)}, page_size=2)
    shared = prompt(77, 21)
    rows = [
        Request(shared[: 9 + 4 * (i % 4)], sample=i, seed=i, max_new_tokens=20, max_step_tokens=4, tag={"id": i})
        for i in range(16)
    ]
    done = list(e.rollout(rows, Drawn("next", True)))
    assert sum(sum(t.meta["projected_tokens"]) for t in done) > 300 and e.kv.stats.hit_tokens > 0
    exact = run(pairs.engine(pool()), rows, Drawn("next", True))
    assert any(without_cost(t) != without_cost(exact[t.meta["id"]]) for t in done), "these maps should do harm"
    checked = 0
    for m in (0, 1):
        by_key = {key: entry.page for key, entry in e.kv._cached[m].items()}
        for t in done:
            ids = t.prompt_ids + t.token_ids
            want = cold_kv(e.models[m], ids)
            for i, key in enumerate(e.kv.chain(m, np.array(ids))):
                if key in by_key:
                    page = e.kv.pages[m][by_key[key]].permute(2, 0, 1, 3, 4)
                    torch.testing.assert_close(page, want[2 * i : 2 * i + 2], rtol=0, atol=1e-9)
                    checked += 1
    assert checked > 20
    e.forward.projecting = None
    for i, t in run(e, rows, Drawn("next", True)).items():
        assert without_cost(t) == without_cost(exact[i])


def test_answers_and_costs_do_not_depend_on_the_batch() -> None:
    """With maps that do harm: what others left in the prefix cache must not decide how much of it an answer gets."""
    found = {(0, 1): bad(0, 1), (1, 0): bad(1, 0)}
    rows = [
        Request(prompt(77, 21), sample=i, max_new_tokens=20, max_step_tokens=4, temperature=1.0, tag={"id": i})
        for i in range(8)
    ]
    together = engine(found, page_size=4)
    for _ in range(2):
        done = {t.meta["id"]: t for t in together.rollout(rows, Drawn("next", True))}
        for i, t in done.items():
            alone = run(engine(found, page_size=4), [rows[i]], Drawn("next", True))[i]
            assert without_cost(t) == without_cost(alone) and t.meta == alone.meta
            assert t.cost.total_flops == alone.cost.total_flops
            assert t.cost.forward_tokens == alone.cost.forward_tokens
    assert together.kv.stats.hit_tokens > 0


def test_new_weights_end_a_map() -> None:
    e = engine()
    e.update_weights(1)
    rows = requests(6)
    assert all(not t.meta["approximate"] for t in run(e, rows, Drawn()).values())


def test_the_gate_measures_what_the_engine_would_do() -> None:
    """KL of one text from logits that are computed by hand: every earlier token replaced by its projection."""
    p, ids, seed = bad(0, 1), HELD_OUT[0][:-1], 3  # what comes after the last token is unknown
    cut = int(np.random.default_rng(seed).integers(11, len(ids)))
    source, target = pool()
    kv, projected = cold_kv(source, ids), torch.zeros(cut, 2, 2, 4, 16, dtype=torch.float64)
    for n in range(cut):
        turn = [rotation(m, n) for m in (source, target)]
        for layer in (0, 1):
            weight, bias = p.maps.weight[layer].double(), p.maps.bias[layer].double()
            key = kv[n, layer, 0] @ torch.linalg.inv(turn[0]).T
            projected[n, layer, 0] = (weight[0] @ key.flatten() + bias[0]).view(4, 16) @ turn[1].T
            projected[n, layer, 1] = (weight[1] @ kv[n, layer, 1].flatten() + bias[1]).view(4, 16)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = torch.cat((projected[:, layer, 0], k)), torch.cat((projected[:, layer, 1], v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / 4
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(cut)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)

    with torch.no_grad():
        hidden = target(torch.tensor(ids[cut:]), torch.arange(cut, len(ids)), attend)
        q, exact = target.logits(hidden).log_softmax(-1), cold_logits(target, ids)[cut:].log_softmax(-1)
    kl = (exact.exp() * (exact - q)).sum(-1)
    g = projecting.measure(p, source, target, [HELD_OUT[0]], [12], seed)
    assert g.tokens == len(kl) and g.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4) and g.kl_mean > 0.1
    assert g.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-4)
    assert g.top1 == pytest.approx(float((exact.argmax(-1) == q.argmax(-1)).double().mean()))


def rotation(model: Decoder, n: int) -> torch.Tensor:
    """The half-split rotary of position n as a matrix [D, D]."""
    cos, sin = model.cos[n].double(), model.sin[n].double()
    half = len(cos) // 2
    swap = torch.zeros(2 * half, 2 * half, dtype=torch.float64)
    swap[range(half), range(half, 2 * half)] = -1
    swap[range(half, 2 * half), range(half)] = 1
    return torch.diag(cos) + sin[:, None] * swap


def test_source_layers_are_chosen_by_validation_error() -> None:
    """The receiver is the source without its last layer, so layer l must come from layer l."""
    large = copy.deepcopy(pairs.model_pair(1)[1]).double()
    small = copy.deepcopy(large)
    del small.layers[2:]
    small.config = replace(small.config, num_layers=2)
    p = projecting.fit(large, small, TEXTS, ProjectionConfig(sources=1))
    assert p.maps.layers.tolist() == [[0], [1]] and np.max(p.fit["error"]) < 1e-9
    both = projecting.fit(small, large, TEXTS, ProjectionConfig(sources=9))
    assert both.maps.layers.tolist() == [[0, 1]] * 3 and both.maps.weight.shape[3] == 2 * small.config.head_dim
    assert np.max(both.fit["error"][:2]) < 1e-9 < np.min(both.fit["error"][2])


def test_a_bad_map_is_refused_with_figure_bound_and_fix() -> None:
    with pytest.raises(ConfigError, match=r"KL \d[\d.e+]* nats per token .* above projection.max_kl 0.02; fit it on"):
        bad(0, 1, 0.02)
    allowed = bad(0, 1)
    assert allowed.gate is not None
    with pytest.raises(ConfigError, match="above projection.max_kl 0.02"):
        allowed.accept(0.02)
    strict = replace(allowed, gate=replace(allowed.gate, bound=0.02))
    with pytest.raises(ConfigError, match="above projection.max_kl 0.02"):
        engine({(0, 1): strict})


def test_maps_that_make_nan_are_refused() -> None:
    p = maps()[0, 1]
    broken = replace(p, maps=p.maps._replace(bias=p.maps.bias * float("nan")))
    with pytest.raises(ConfigError, match="KL inf"):
        projecting.gate(broken, *pair(0, 1), HELD_OUT, 1.0)


def test_bad_input_is_named() -> None:
    p = maps()[0, 1]
    with pytest.raises(ConfigError, match="never gated"):
        engine({(0, 1): replace(p, gate=None)})
    with pytest.raises(ConfigError, match=r"\(1, 1\) is no pair of different models"):
        engine({(1, 1): p})
    with pytest.raises(ConfigError, match=r"\(0, 2\) is no pair"):
        engine({(0, 2): p})
    with pytest.raises(ConfigError, match="projection.source: made for weights"):
        engine({(1, 0): p})
    with pytest.raises(DataError, match="1 given; fitting and validation need one each"):
        projecting.fit(*pair(0, 1), TEXTS[:1], ProjectionConfig())
    with pytest.raises(DataError, match=r"texts\[1\]: empty, or an id outside"):
        projecting.fit(*pair(0, 1), [[5], [10**6]], ProjectionConfig())
    with pytest.raises(RoroError, match=r"texts\[0\]: 200 tokens, the model takes 160"):
        projecting.record_kv(pool()[0], [[5] * 200])
    with pytest.raises(DataError, match="none with two tokens after its start"):
        projecting.gate(p, *pair(0, 1), [[5, 6, 7]], 1.0, [3])


def test_a_saved_map_is_the_same_map(tmp_path: Any) -> None:
    p = bad(0, 1)
    p.save(tmp_path / "map")
    q = KVProjection.load(tmp_path / "map")
    assert all(torch.equal(a, b) for a, b in zip(p.maps, q.maps, strict=True))
    assert (q.source, q.target, q.fit, q.gate) == (p.source, p.target, p.fit, p.gate) and isinstance(q.gate, Gate)
    assert replace(p, gate=None).gate is None
    q.check_models(*pair(0, 1))
    q.check_models(*(copy.deepcopy(m).bfloat16() for m in pair(0, 1)))
    (tmp_path / "map" / "maps.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not a readable projection"):
        KVProjection.load(tmp_path / "map")
    with pytest.raises(CheckpointError, match="no config.json"):
        KVProjection.load(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_too() -> None:
    models = [copy.deepcopy(m).to("cuda", torch.float32) for m in pool()]
    found = {}
    for i, j in ((0, 1), (1, 0)):
        fitted = projecting.fit(models[i], models[j], TEXTS, ProjectionConfig(sources=1))
        found[i, j] = projecting.gate(fitted, models[i], models[j], HELD_OUT, max_kl=1e-5)
    done = run(pairs.engine(models, projections=found), requests(12, temperature=0.0), Drawn("regenerate", True))
    assert sum(sum(t.meta["projected_tokens"]) for t in done.values()) > 200
    for t in done.values():
        pairs.audit(pairs.engine(pool()), t, greedy=True)


def test_nothing_is_left_of_a_cancelled_rollout() -> None:
    e = engine(page_size=4)
    for _ in e.rollout(requests(12), Drawn()):
        break
    assert (e.slots.phase == Phase.FREE).all() and not e.kv.num_pages.any()
    pairs.assert_clean(e)
