"""The paged forward equals the dense one for every family, whatever serves its ops."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from roro_fast.errors import ConfigError
from roro_fast.models.decoder import Decoder
from roro_fast.models.inference import Cut, PagedBatch, infer
from roro_fast.models.loading import load_decoder
from roro_fast.ops import native
from roro_fast.ops.paged_attention import find_prefix_groups
from tests.models.test_decoder import CASES, SHAPE, gemma3, qwen3, save_random

PAGE = 4
LENGTHS = (11, 1, 8)


@pytest.fixture(params=["reference", "cpu"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "cpu" and not native.available():
        pytest.skip(native.why_not())
    monkeypatch.setenv("RORO_IMPL", request.param)


def batch(model: Decoder, ids: list[torch.Tensor], start: list[int], pages: torch.Tensor) -> PagedBatch:
    """The tokens of each sequence from `start` on; sequence i owns pages i, i + N, i + 2N, ..."""
    n = len(ids)
    table = torch.arange(len(pages)).view(-1, n).T.contiguous()
    positions = [torch.arange(s, len(x)) for x, s in zip(ids, start, strict=True)]
    slots = [table[i, p // PAGE] * PAGE + p % PAGE for i, p in enumerate(positions)]
    return PagedBatch(
        ids=torch.cat([x[s:] for x, s in zip(ids, start, strict=True)]),
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        pages=pages,
        page_table=table,
        kv_lens=torch.tensor([len(x) for x in ids]),
        cu_seqlens=torch.tensor([0, *(len(p) for p in positions)]).cumsum(0),
    )


def empty_pages(model: Decoder, sequences: int) -> torch.Tensor:
    c = model.config
    return torch.full((sequences * 4, c.num_layers, 2, PAGE, c.num_kv_heads, c.head_dim), torch.nan, dtype=model.dtype)


def tokens(lengths: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(0, SHAPE["vocab_size"], (n,), generator=g) for n in lengths]


def order_what_serves(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ ops that Gemma uses, where the whole forward in C++ declines it."""
    if case.startswith("gemma3") and os.environ["RORO_IMPL"] == "cpu":
        monkeypatch.setenv("RORO_IMPL", "norm_rope_store=cpu,paged_attention=cpu")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("impl")
def test_catch_up_then_decode_equals_dense(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order_what_serves(case, monkeypatch)
    save_random(CASES[case], tmp_path)
    model = load_decoder(tmp_path)
    ids, pages = tokens(LENGTHS), empty_pages(model, len(LENGTHS))
    first = infer(model, batch(model, [x[: max(1, len(x) - 3)] for x in ids], [0, 0, 0], pages))
    last = infer(model, batch(model, ids, [8, 0, 5], pages))
    with torch.no_grad():
        dense = [model.dense(x[None])[0] for x in ids]
    torch.testing.assert_close(first, torch.cat([dense[0][:8], dense[1][:1], dense[2][:5]]), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(last, torch.cat([dense[0][8:], dense[1], dense[2][5:]]), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("impl")
def test_a_forward_cut_in_two_equals_the_whole(case: str, tmp_path: Path) -> None:
    if case.startswith("gemma3") and os.environ["RORO_IMPL"] == "cpu":
        pytest.skip("decoder_forward:cpu does not compute it")
    save_random(CASES[case], tmp_path)
    model = load_decoder(tmp_path).double() if os.environ["RORO_IMPL"] == "reference" else load_decoder(tmp_path)
    ids, layers = tokens(LENGTHS), model.config.num_layers
    cold, pages = empty_pages(model, 3), empty_pages(model, 3)
    whole = batch(model, ids, [0, 0, 0], cold)
    want, last = infer(model, whole), whole.cu_seqlens[1:] - 1
    torch.testing.assert_close(infer(model, whole._replace(wanted=last)), want[last], atol=1e-6, rtol=1e-6)
    for depth in range(1, layers + 1):
        states = torch.full((len(pages), 4, model.config.hidden_size), torch.nan, dtype=model.dtype)
        cut = Cut(depth, states, whole.slots.flip(0), True)
        assert not len(infer(model, whole._replace(pages=pages[:, :depth], cut=cut)))
        above = whole._replace(pages=pages[:, depth:], cut=cut._replace(below=False))
        torch.testing.assert_close(infer(model, above), want, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(infer(model, above._replace(wanted=last)), want[last], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(pages, cold, atol=1e-6, rtol=1e-6, equal_nan=True)


@pytest.mark.usefixtures("impl")
def test_bfloat16_is_as_near_to_the_truth_as_the_dense_forward(tmp_path: Path) -> None:
    save_random(qwen3(), tmp_path)
    exact, model = load_decoder(tmp_path), load_decoder(tmp_path, dtype=torch.bfloat16)
    ids = tokens((13,))
    with torch.no_grad():
        truth, naive = exact.dense(ids[0][None])[0], model.dense(ids[0][None])[0]
    got = infer(model, batch(model, ids, [0], empty_pages(model, 1)))
    assert got.dtype == torch.bfloat16
    assert (got.float() - truth).abs().mean() <= 1.2 * (naive.float() - truth).abs().mean() + 1e-3


@pytest.mark.usefixtures("impl")
def test_a_shared_prefix_is_read_from_the_pages_of_one(tmp_path: Path) -> None:
    save_random(qwen3(), tmp_path)
    model = load_decoder(tmp_path)
    ids, pages = tokens((8, 3, 2)), empty_pages(model, 1)
    infer(model, batch(model, ids[:1], [0], pages))
    forks = [torch.cat((ids[0], x)) for x in ids[1:]]
    table = torch.tensor([[0, 1, 2], [0, 1, 3]])
    at = [(8, 9, 10), (8, 9)]
    shared = PagedBatch(
        ids=torch.cat(ids[1:]),
        positions=torch.tensor([*at[0], *at[1]]),
        slots=torch.tensor([8, 9, 10, 12, 13]),
        pages=pages,
        page_table=table,
        kv_lens=torch.tensor([11, 10]),
        cu_seqlens=torch.tensor([0, 3, 5]),
    )
    prefix = find_prefix_groups(table, shared.kv_lens, shared.cu_seqlens, PAGE, min_tokens=4)
    assert prefix.lengths.tolist() == [8]
    with torch.no_grad():
        want = torch.cat([model.dense(x[None])[0, 8:] for x in forks])
    for groups in (prefix, None):
        torch.testing.assert_close(infer(model, shared._replace(prefix=groups)), want, atol=2e-5, rtol=2e-5)


def test_the_whole_forward_in_one_call_declines_gemma_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random(gemma3(), tmp_path)
    model = load_decoder(tmp_path)
    one = batch(model, tokens((5,)), [0], empty_pages(model, 1))
    monkeypatch.setenv("RORO_IMPL", "decoder_forward=cpu")
    if not native.available():
        pytest.skip(native.why_not())
    with pytest.raises(ConfigError, match="decoder_forward:cpu .*gemma3_text.*'reference'"):
        infer(model, one)
    monkeypatch.delenv("RORO_IMPL")
    with torch.no_grad():
        torch.testing.assert_close(infer(model, one), model.dense(one.ids[None])[0], atol=2e-5, rtol=2e-5)


def test_rotary_tables_stay_in_float32(tmp_path: Path) -> None:
    save_random(qwen3(), tmp_path)
    model = load_decoder(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.cos.dtype == model.sin.dtype == torch.float32
    assert torch.equal(model.cos, load_decoder(tmp_path).cos)
