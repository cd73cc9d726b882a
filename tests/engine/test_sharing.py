"""Layers that all models of a pool share run once for all of them, and nothing else changes."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roro_fast.engine import Request, StepEngine, Trajectory
from roro_fast.errors import CapacityError, ConfigError
from tests.engine import pairs
from tests.engine.pairs import FAMILIES, Drawn, Planned, check_kv, engine, family, prompt, requests, run

pytestmark = pytest.mark.usefixtures("implementation")

POLICIES = {
    "next": lambda: Drawn("next"),
    "next-scout": lambda: Drawn("next", True),
    "regenerate": lambda: Drawn("regenerate"),
    "regenerate-scout": lambda: Drawn("regenerate", True),
    "switch": lambda: Planned("next", True),
}


def workload(n: int = 12, plan: tuple[int, ...] = (1, 0)) -> list[Request]:
    """Equal prompts, extended ones, greedy and sampled answers; at most 71 tokens each."""
    hot = {"temperature": 1.0, "top_k": 40}
    rows = requests(n)
    rows[5], rows[6] = (replace(rows[0], sample=i, tag={"id": i}) for i in (5, 6))
    return [replace(r, **(hot if i % 2 else {}), tag=r.tag | {"plan": plan}) for i, r in enumerate(rows)]


LONGEST = max(len(r.prompt_ids) + r.max_new_tokens for r in workload())


def apart(name: str, policy: str) -> dict[int, Trajectory]:
    """What the models answer when each runs all its layers."""
    return _apart(name, policy, pairs.DTYPE)


@cache
def _apart(name: str, policy: str, dtype: torch.dtype) -> dict[int, Trajectory]:
    return run(engine(family(name), share_layers=False), switching(name), POLICIES[policy]())


def switching(name: str) -> list[Request]:
    """The workload with the plan that has every model write."""
    return workload(plan=tuple(reversed(range(len(FAMILIES[name][0])))))


def assert_equal(a: Trajectory, b: Trajectory) -> None:
    """The C++ kernels give a row the same bits in any batch; the references round otherwise in another shape."""
    pairs.assert_same(a, b)
    if torch.float32 == pairs.DTYPE:
        assert a.steps == b.steps


def tight(models: list, tokens: int, page_size: int = 4, **limits: int) -> StepEngine:
    """The smallest arena that holds one sequence of `tokens` tokens for every model."""
    probe = engine(models, page_size=page_size, kv_bytes=64 << 20)
    pages = -(-tokens // page_size)
    per_slab = probe.kv.pool.pages_per_slab
    own = max(-(-pages // per_slab[m]) for m in range(len(models)) if probe.kv.page_bytes[m])
    slabs = own + -(-pages // per_slab[probe.kv.trunk])
    return engine(models, page_size=page_size, kv_bytes=slabs * probe.kv.slab_bytes[0], **limits)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_the_same(name: str, policy: str) -> None:
    e = engine(family(name))
    assert e.shared_layers == FAMILIES[name][1]
    got, want = run(e, switching(name), POLICIES[policy]()), apart(name, policy)
    for i, t in want.items():
        assert_equal(got[i], t)
        assert got[i].cost.forward_tokens == t.cost.forward_tokens and t.cost.shared_tokens == 0
        one = sum(n > 0 for n in t.cost.forward_tokens) == 1
        assert got[i].cost.total_flops <= t.cost.total_flops if one else got[i].cost.total_flops < t.cost.total_flops
    assert len({m for t in want.values() for m in t.models}) == len(e.models)


@pytest.mark.parametrize(
    "limits",
    [{"max_batch_tokens": 8, "page_size": 3}, {"page_size": 1}, {"max_num_seqs": 1}, {"overlap": True}],
    ids=str,
)
@pytest.mark.parametrize("policy", ["next", "regenerate-scout"])
@pytest.mark.parametrize("name", ["prefix", "three"])
def test_no_setting_changes_an_answer(name: str, policy: str, limits: dict[str, int]) -> None:
    got = run(engine(family(name), **limits), switching(name), POLICIES[policy]())
    for i, t in apart(name, policy).items():
        assert_equal(got[i], t)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["prefix", "three"])
@pytest.mark.parametrize("batch", [8, 64])
def test_the_smallest_arena_gives_the_same_answers(name: str, policy: str, batch: int) -> None:
    e = tight(family(name), LONGEST, max_num_seqs=8, max_batch_tokens=batch)
    got = run(e, switching(name), POLICIES[policy]())
    for i, t in apart(name, policy).items():
        assert_equal(got[i], t)
    assert e.kv.stats.preemptions > 0 and e.kv.stats.evicted_pages > 0


@settings(max_examples=15, suppress_health_check=list(HealthCheck), deadline=None)
@given(
    name=st.sampled_from(sorted(FAMILIES)),
    policy=st.sampled_from(sorted(POLICIES)),
    page_size=st.sampled_from([1, 2, 3, 5, 16, 64]),
    seqs=st.integers(1, 9),
    room=st.integers(0, 200),
    batch=st.integers(0, 60),
    order=st.permutations(range(12)),
)
def test_little_memory_changes_no_answer(
    name: str, policy: str, page_size: int, seqs: int, room: int, batch: int, order: list[int]
) -> None:
    e = tight(family(name), LONGEST + room, page_size, max_num_seqs=seqs, max_batch_tokens=seqs + batch)
    rows = switching(name)
    got = run(e, [rows[i] for i in order], POLICIES[policy]())
    for i, t in apart(name, policy).items():
        assert_equal(got[i], t)


@pytest.mark.parametrize("space", ["next", "regenerate"])
@pytest.mark.parametrize("memory", ["ample", "tight"])
def test_pages_hold_what_a_cold_prefill_computes(space: str, memory: str) -> None:
    limits = {"max_batch_tokens": 12, "max_num_seqs": 6}
    e = tight(family("three"), LONGEST, **limits) if memory == "tight" else engine(family("three"), **limits)
    for r in workload():
        e.add(r, Drawn(space, True))
    compared = 0
    while e.has_work:
        e.step()
        if e.iterations % 4 == 0:
            compared += check_kv(e)
    assert compared > 500 and (e.kv.stats.preemptions > 0) == (memory == "tight")
    pairs.assert_clean(e)


def test_a_token_runs_through_the_shared_layers_once() -> None:
    """Switches at every token: the small model is the shared layers, so nothing is left of it but the head."""
    small, large = models = family("prefix")
    rows = [replace(r, max_step_tokens=1, tag=r.tag | {"plan": [1, 0]}) for r in requests(6)]
    for t in run(engine(models, page_size=64), rows, Planned()).values():
        n, new = len(t.prompt_ids), len(t.token_ids)
        assert t.cost.shared_tokens == n + new - 1
        head, layer = small.head.weight.numel() * 2 + small.norm.weight.numel(), small.config.num_params
        assert head + sum(p.numel() for p in small.layers.parameters()) == layer
        c, seen = large.config, t.cost.forward_tokens[1]
        shared = sum(p.numel() for p in small.layers.parameters())
        mean = 2 * c.num_heads * c.head_dim * (c.num_layers - 2)
        want = 2 * shared * (n + new - 1) + 2 * head * t.cost.generated_tokens[0]
        want += 2 * (c.num_params - shared) * seen + mean * seen * (seen + 1)
        want += 2 * c.num_heads * c.head_dim * 2 * (n + new - 1) * (n + new)
        assert t.cost.total_flops == want


def test_a_group_computes_its_common_prompt_once() -> None:
    common = prompt(1, 33)
    rows = [Request(common, sample=i, max_new_tokens=1, temperature=1.0, model=1, tag={"id": i}) for i in range(16)]
    e = engine(family("prefix"), max_num_seqs=16, page_size=8)
    ran = [0, 0]
    following = e.forward._next

    def counted(part: int):  # type: ignore[no-untyped-def]
        batch, keys = following(part)
        ran[part == e.kv.trunk] += batch.tokens if batch else 0
        return batch, keys

    e.forward._next = counted  # type: ignore[method-assign]
    run(e, rows)
    assert ran == [33 + 15, 33 + 15]
    assert e.kv.stats.hit_tokens == 2 * 15 * 32


@pytest.mark.parametrize("when", [1, 4, 9])
def test_forks_and_aborts(when: int) -> None:
    e, policy = engine(family("three"), page_size=4, max_num_seqs=12), Drawn("regenerate", True)
    rows = workload(8)
    want = run(e, rows, policy)
    ids = [e.add(r, policy) for r in rows]
    done = []
    for _ in range(when):
        done += e.step()
    living = [i for i in ids if i in e.slots.request_id]
    fresh = Request([0], seed=5, max_new_tokens=12, max_step_tokens=5, temperature=1.0)
    for j in range(2):
        e.fork(living[0], replace(fresh, sample=j, tag={"id": 50 + j}), policy)
    for rid in living[::2]:
        assert e.abort(rid)
    while e.has_work:
        done += e.step()
        check_kv(e)
    pairs.assert_clean(e)
    got = {t.meta["id"]: t for t in done}
    assert len(got) == 8 + 2 - len(living[::2])
    for i, t in got.items():
        if i < 50:
            assert_equal(t, want[i])
        else:
            again = replace(fresh, prompt_ids=t.prompt_ids, sample=i - 50, tag={"id": 0})
            assert_equal(t, run(engine(family("three"), share_layers=False), [again], policy)[0])


def test_a_fork_goes_on_without_running_the_shared_layers_again() -> None:
    e = engine(family("prefix"), page_size=4)
    rid = e.add(Request(prompt(7, 10), max_new_tokens=12, tag={"id": 0}))
    e.step(), e.step()
    e.fork(rid, Request([0], max_new_tokens=6, model=1, tag={"id": 1}))
    done = []
    while e.has_work:
        done += e.step()
    fork = next(t for t in done if t.meta["id"] == 1)
    assert fork.cost.shared_tokens == len(fork.token_ids)
    for t in done:
        pairs.audit(e, t, greedy=True)


def change(model: torch.nn.Module, layer: int) -> None:
    with torch.no_grad():
        model.layers[layer].qkv.weight.mul_(-1.1)


@pytest.mark.parametrize(("layer", "left"), [(2, 2), (1, 1), (0, 0)])
def test_new_weights_reach_running_sequences(layer: int, left: int) -> None:
    """Sharing goes on up to the changed layer, and comes back when the other model has got the same weights."""
    models = family("prefix")
    e = engine(models, page_size=4)
    for r in requests(6):
        e.add(replace(r, max_new_tokens=20, tag=r.tag | {"plan": [1, 0]}), Planned())
    for _ in range(5):
        e.step()
    stats, compared = e.kv.stats, 0
    for m in (1, 0):
        if layer < models[m].config.num_layers:
            change(models[m], layer)
            e.update_weights(m)
        assert e.shared_layers == (left if m else 2) and e.kv.stats is stats
        for _ in range(4):
            e.step()
            compared += check_kv(e)
    while e.has_work:
        e.step()
        compared += check_kv(e)
    assert compared > 200
    pairs.assert_clean(e)


def test_scattered_pages_are_moved_together() -> None:
    e = engine(family("twins"), page_size=4)
    assert e.kv.pool.pages_per_slab[e.kv.trunk] > 1
    done, ids = [], [e.add(Request(prompt(i, 8), max_new_tokens=40, ignore_eos=True, tag={"id": i})) for i in range(3)]
    for _ in range(30):
        done += e.step()
    for rid in ids[1:]:
        e.abort(rid)
    trunk, slot = e.kv.trunk, int(np.flatnonzero(e.slots.request_id == ids[0])[0])
    n = int(e.kv.num_pages[trunk, slot])
    assert e.kv.scattered(trunk, slot) > 0
    free = e.kv.pool.free_slabs
    assert e.kv.compact(trunk, slot) and e.kv.pool.free_slabs > free
    assert e.kv.scattered(trunk, slot) == 0 and e.kv.num_pages[trunk, slot] == n
    assert check_kv(e) and not e.kv.compact(trunk, slot)
    while e.has_work:
        done += e.step()
    pairs.assert_clean(e)
    alone = Request(prompt(0, 8), max_new_tokens=40, ignore_eos=True, tag={"id": 0})
    pairs.assert_same(done[-1], run(engine(family("twins"), share_layers=False), [alone])[0])


def test_wrong_residuals_would_be_noticed() -> None:
    e = engine(family("prefix"))
    infer_rows = e.forward.launch

    def forgetful(m: int):  # type: ignore[no-untyped-def]
        e.kv.states[:, 1:] = e.kv.states[:, :-1].clone()
        return infer_rows(m)

    e.forward.launch = forgetful  # type: ignore[method-assign]
    got, want = run(e, workload(), Drawn()), apart("prefix", "next")
    assert sum(got[i].token_ids != t.token_ids for i, t in want.items()) > 6


def test_half_precision_is_the_same_to_the_bit(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("its rows depend on the batch they are in")
    models = [m.bfloat16() for m in family("three")]
    both = [
        run(engine([copy.deepcopy(m) for m in models], share_layers=s), workload(), Drawn("next", True))
        for s in (None, False)
    ]
    for i, t in both[0].items():
        assert t.token_ids == both[1][i].token_ids and t.steps == both[1][i].steps


def test_what_sharing_does_not_go_with() -> None:
    models = family("prefix")
    assert engine(models, share_layers=False).shared_layers == engine(models, graphs=True).shared_layers == 0
    assert engine(models, share_layers=True).shared_layers == 2
    for wrong, message in [({"graphs": True}, "CUDA graphs"), ({"projections": {(0, 1): None}}, "projections")]:
        with pytest.raises(ConfigError, match=f"share_layers: does not go with {message}"):
            engine(models, share_layers=True, **wrong)
    with pytest.raises(ConfigError, match="share_layers: the models have several tokenizers"):
        StepEngine(models, [pairs.tokenizer(), copy.deepcopy(pairs.tokenizer())], share_layers=True)
    with pytest.raises(ConfigError, match="share_layers: the models have no first layers in common"):
        engine(pairs.pool(2), share_layers=True)
    e = tight(models, 48)
    e.add(Request(prompt(1, 30), max_new_tokens=18))
    with pytest.raises(CapacityError, match=r"request.max_new_tokens.*engine.kv_bytes"):
        e.add(Request(prompt(1, 30), max_new_tokens=19 + 4 * max(e.kv.pool.pages_per_slab)))
