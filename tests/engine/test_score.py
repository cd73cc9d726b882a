"""Scoring on ragged paged forwards: equal to a dense prefill of each prompt alone, common tokens computed once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from roro_fast.engine import packing, score
from roro_fast.engine.packing import PackedBatch, pack
from roro_fast.engine.score import score_prompts, states
from roro_fast.models.decoder import Decoder
from roro_fast.models.inference import PagedBatch, infer
from tests.engine.pairs import CONTEXT, cold_logits, engine, exact, model_pair, prompt

LABELS = [9, 40, 77]
Prompts = list[list[int]]

# Tails over two ids, so that prompts begin alike, repeat, and begin one another; heads end around page boundaries.
TREES = st.lists(
    st.builds(
        lambda seed, n, tail: prompt(seed, 70)[:n] + tail,
        st.integers(0, 1),
        st.integers(0, 70),
        st.lists(st.integers(4, 5), min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=12,
)
BOUNDARIES = [prompt(0, n) for n in (15, 16, 17, 32, 33, 48)]
BRANCHES = [prompt(0, 64) + prompt(i // 3, 16) + prompt(i, 20) for i in range(9)] + [prompt(0, 64), prompt(0, 1)]


def least_tokens(prompts: Prompts, size: int) -> int:
    """Each distinct run of whole pages once, and each tail of a prompt that is not the beginning of another one."""
    last = {tuple(p) for p in prompts}
    last = {p for p in last if not any(q != p and q[: len(p)] == p for q in last)}
    pages = {p[: (i + 1) * size] for p in last for i in range(len(p) // size)}
    return size * len(pages) + sum(len(p) % size for p in last)


def check_layout(batch: PackedBatch, prompts: Prompts, size: int) -> None:
    """Every prompt finds its own tokens at their positions, in the pages that its sequence reads."""
    assert len(set(batch.slots.tolist())) == len(batch.ids) and batch.slots.max() < batch.num_pages * size
    for i, at in batch.at.items():
        assert batch.ids[at[: len(prompts[i])]].tolist() == prompts[i]
        position = np.arange(len(at))
        assert (batch.positions[at] == position).all()
        owner = int(np.searchsorted(batch.cu_seqlens, at[-1], "right")) - 1
        assert (batch.page_table[owner, position // size] * size + position % size == batch.slots[at]).all()
        assert batch.kv_lens[owner] == len(at)
    if batch.shared is not None:
        members, offsets, lengths = batch.shared
        own = batch.kv_lens - np.diff(batch.cu_seqlens)
        assert len(set(members.tolist())) == len(members) == offsets[-1]
        for a, b, n in zip(offsets[:-1], offsets[1:], lengths, strict=True):
            pages = batch.page_table[members[a:b], : n // size]
            assert b - a > 1 and n % size == 0 and (own[members[a:b]] == n).all() and (pages == pages[0]).all()


@given(TREES, st.sampled_from([1, 4, 16]), st.sampled_from([1, 100, 10**6]))
@example([[4], [4]], 16, 10**6)
@example(BOUNDARIES, 16, 10**6)
@example(BRANCHES, 16, 10**6)
def test_packs_every_prompt_and_computes_what_is_common_once(prompts: Prompts, size: int, budget: int) -> None:
    batches = list(pack(prompts, budget, size))
    assert sorted(i for b in batches for i in b.at) == list(range(len(prompts)))
    for b in batches:
        check_layout(b, prompts, size)
        assert len(b.ids) <= budget or len(b.kv_lens) == 1
    if budget > 1000:
        assert len(batches) == 1 and len(batches[0].ids) == least_tokens(prompts, size)
    plain = list(pack(prompts, budget, size, share=False))
    assert sum(len(b.ids) for b in plain) == sum(map(len, prompts)) and all(b.shared is None for b in plain)


def test_nested_branches_are_grouped_where_they_part() -> None:
    (batch,) = pack(BRANCHES, 10**6)
    assert batch.shared is not None
    assert batch.shared[2].tolist() == [80, 80, 64, 80] and [len(x) for x in batch.shared[:2]] == [8, 5]


@settings(max_examples=25)
@given(prompts=TREES, budget=st.sampled_from([1, 100, 10**6]), data=st.data())
@example(prompts=BRANCHES, budget=10**6, data=None)
@example(prompts=BOUNDARIES, budget=40, data=None)
def test_equals_a_dense_prefill_of_each_prompt_alone(prompts: Prompts, budget: int, data: st.DataObject | None) -> None:
    rows = [
        [0, len(p) - 1] if data is None else data.draw(st.lists(st.integers(0, len(p) - 1), max_size=3))
        for p in prompts
    ]
    for model in (model_pair(0)[1], exact(1)):
        got = score_prompts(model, prompts, rows, LABELS, budget)
        for p, r, g in zip(prompts, rows, got, strict=True):
            want = cold_logits(model, p)[r][:, LABELS].softmax(-1)
            torch.testing.assert_close(g, want.float(), atol=1e-5 if model.dtype == torch.float32 else 1e-7, rtol=0)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_shared_groups_change_nothing_but_rounding(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of the forward, with groups as small as they get, in each family, in float32 through the C++ kernel."""
    model = model_pair(index)[1]
    monkeypatch.setattr(packing, "MIN_SHARED", 16)
    prompts = [*BRANCHES, *(prompt(0, 32) + prompt(i, 7) for i in range(4)), prompt(5, CONTEXT)]
    (batch,) = pack(prompts, 10**6)
    assert batch.shared is not None and 32 in batch.shared[2] and 64 in batch.shared[2]
    logits = model.logits(infer(model, batch.on(model)))
    for i, at in batch.at.items():
        torch.testing.assert_close(logits[at[: len(prompts[i])]], cold_logits(model, prompts[i]), atol=1e-4, rtol=0)


def test_states_are_rows_of_the_model_in_the_order_asked_for() -> None:
    model = exact(0)
    prompts, rows = BRANCHES[::-1], [[len(p) - 1, 0] if len(p) > 1 else [] for p in BRANCHES[::-1]]
    for budget in (1, 120, 10**6):
        hidden, index = states(model, prompts, rows, budget)
        want = torch.cat([model.dense(torch.tensor([p]))[0, r] for p, r in zip(prompts, rows, strict=True)])
        torch.testing.assert_close(hidden[index], want, atol=1e-10, rtol=0)
    hidden, index = states(model, [], [], 100)
    assert tuple(hidden.shape) == (0, model.config.hidden_size) and len(index) == 0


def test_memory_is_one_layer_of_the_pages_in_use() -> None:
    model = model_pair(1)[1]
    (batch,) = pack(BRANCHES, 10**6)
    pages = batch.on(model).pages
    c = model.config
    assert pages.shape[:2] == (batch.num_pages, c.num_layers)
    assert pages.untyped_storage().nbytes() == batch.num_pages * 2 * 16 * c.num_kv_heads * c.head_dim * 4


def ran(monkeypatch: pytest.MonkeyPatch) -> list[PagedBatch]:
    """The forwards that scoring makes from now on."""
    seen: list[PagedBatch] = []

    def noted(model: Decoder, batch: PagedBatch) -> torch.Tensor:
        seen.append(batch)
        return infer(model, batch)

    monkeypatch.setattr(score, "infer", noted)
    return seen


def test_criteria_asked_apart_compute_their_common_prefix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six criteria over one query, trajectory and rubric of 96 tokens: one forward, one group of those that come after
    the first, which computes the prefix for all."""
    common, criteria = prompt(8, 96), [prompt(20 + i, 5 + i) for i in range(6)]
    prompts, forwards, e = [common + c for c in criteria], ran(monkeypatch), engine([model_pair(0)[1]])
    got = e.score(prompts, [[len(p) - 1] for p in prompts], LABELS)
    (batch,) = forwards
    assert len(batch.ids) == 96 + sum(map(len, criteria))
    assert batch.pages.shape[0] == 96 // 16 + 6, "pages of the prefix once, and one of each criterion"
    assert batch.prefix is not None
    assert batch.prefix.lengths.tolist() == [96] and batch.prefix.offsets.tolist() == [0, 5]
    assert (batch.page_table[:, :6] == batch.page_table[0, :6]).all()
    for p, g in zip(prompts, got, strict=True):
        want = cold_logits(e.models[0], p)[-1:, LABELS].softmax(-1)
        torch.testing.assert_close(g, want, atol=1e-5, rtol=0)


def test_criteria_of_one_prompt_are_rows_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the Judge asks them: the tokens of a prompt once, whatever the number of its verdict rows."""
    p, forwards, e = prompt(8, 96), ran(monkeypatch), engine([model_pair(0)[1]])
    got = e.score([p, p], [[95, 40, 60, 80], [95]], LABELS)
    assert [len(b.ids) for b in forwards] == [96] and [len(g) for g in got] == [4, 1]
    assert torch.equal(got[0][0], got[1][0])
