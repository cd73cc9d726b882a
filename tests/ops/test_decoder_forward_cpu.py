"""decoder_forward in C++ on every instruction set; the paged forward's own tests are in tests/models."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from pathlib import Path

import pytest
import torch

from roro_fast.errors import ConfigError, RoroError
from roro_fast.models.decoder import Decoder
from roro_fast.models.inference import Cut, PagedBatch, infer, logits
from roro_fast.models.loading import load_decoder
from roro_fast.ops import decoder_forward, native
from roro_fast.ops.registry import select
from tests.models.test_decoder import CASES, save_random
from tests.models.test_inference import batch, empty_pages, tokens
from tests.ops import concurrency

LENGTHS = (11, 1, 8)
SERVED = [case for case in CASES if not case.startswith("gemma3")]


@pytest.fixture
def model(tmp_path: Path) -> Decoder:
    return load(tmp_path, "qwen3")


def load(directory: Path, case: str, dtype: torch.dtype = torch.float32) -> Decoder:
    save_random(CASES[case], directory)
    return load_decoder(directory, dtype=dtype)


def prefill(model: Decoder, lengths: tuple[int, ...] = LENGTHS, impl: str = "cpu") -> torch.Tensor:
    ids = tokens(lengths)
    paged = batch(model, ids, [0] * len(ids), empty_pages(model, len(ids)))
    serve = decoder_forward.cpu if impl == "cpu" else infer
    return serve(model, paged)


def near(got: torch.Tensor, naive: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """By the mean: the largest error of many rounded layers is chance."""
    assert not got.isnan().any()
    error, allowed = ((x.double() - truth).abs().mean() for x in (got, naive))
    assert error <= 1.1 * allowed + (1e-5 if dtype == torch.float32 else 1e-3), (error, allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SERVED)
def test_no_worse_than_op_by_op(
    isa: str, case: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tmp_path, case, dtype)
    exact = copy.deepcopy(model).double()
    monkeypatch.setenv("RORO_IMPL", "reference")
    truth, naive = prefill(exact, impl="reference"), prefill(model, impl="reference")
    got = prefill(model)
    assert got.dtype == dtype
    near(got, naive, truth, dtype)
    near(decoder_forward.logits_cpu(model, got), model.logits(naive), exact.logits(truth), dtype)


@pytest.mark.usefixtures("kernels")
def test_serves_by_default_unless_a_part_is_ordered(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    for order, serves in [("", True), ("cpu", True), ("paged_attention=cpu", True), ("reference", False),
                          ("paged_attention=reference", False), ("decoder_forward=reference", False)]:  # fmt: skip
        monkeypatch.setenv("RORO_IMPL", order)
        served = select("decoder_forward", device, torch.float32) is decoder_forward.cpu
        assert served == serves, order
    monkeypatch.setenv("RORO_IMPL", "decoder_forward=cpu,silu_mul=reference")
    with pytest.raises(ConfigError, match="silu_mul is ordered from 'reference'"):
        prefill(model, impl="auto")
    monkeypatch.setenv("RORO_IMPL", "")
    assert select("decoder_forward", device, torch.float64) is not decoder_forward.cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_has_the_same_bits_in_any_batch(isa: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = load(tmp_path, "qwen3", dtype)
    ids = tokens((13, 5, 13, 1, 9))
    together, alone = empty_pages(model, 5), [empty_pages(model, 1) for _ in ids]
    for start, stop in ((0, -1), (-1, None)):
        now = [x[:stop] for x in ids if len(x[:stop])]
        begin = [0 if start == 0 else len(x) - 1 for x in now]
        whole = decoder_forward.cpu(model, batch(model, now, begin, together[: 4 * len(now)]))
        parts = [
            decoder_forward.cpu(model, batch(model, [x], [b], pages))
            for x, b, pages in zip(now, begin, alone, strict=False)
        ]
        assert torch.equal(whole, torch.cat(parts))
        torch.set_num_threads(2)
        try:
            assert torch.equal(decoder_forward.cpu(model, batch(model, now, begin, together[: 4 * len(now)])), whole)
        finally:
            torch.set_num_threads(1)
        together = empty_pages(model, 5)
        if start == 0:
            for x, pages in zip(ids, alone, strict=True):
                decoder_forward.cpu(model, batch(model, [x], [0], pages))
            decoder_forward.cpu(model, batch(model, ids, [0] * 5, together))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_have_the_same_bits_as_one_prefill(isa: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Handoff is exact to the bit: catch-up in any portions leaves the keys, values and states of a cold prefill."""
    model = load(tmp_path, "qwen3", dtype)
    ids = tokens((15,))
    cold, warm = empty_pages(model, 1), empty_pages(model, 1)
    want = decoder_forward.cpu(model, batch(model, ids, [0], cold))
    ends = (1, 2, 5, 14, 15)
    got = [
        decoder_forward.cpu(model, batch(model, [ids[0][:end]], [begin], warm))
        for begin, end in zip((0, *ends), ends, strict=False)
    ]
    assert torch.equal(torch.cat(got), want)
    assert torch.equal(warm.nan_to_num(), cold.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SERVED)
def test_a_forward_cut_in_two_has_the_bits_of_the_whole(
    isa: str, case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = load(tmp_path, case, dtype)
    ids, layers = tokens(LENGTHS), model.config.num_layers
    cold = empty_pages(model, 3)
    whole = batch(model, ids, [0, 0, 0], cold)
    want = decoder_forward.cpu(model, whole)
    last = whole.cu_seqlens[1:] - 1
    assert torch.equal(decoder_forward.cpu(model, whole._replace(wanted=last)), want[last])
    assert decoder_forward.cpu(model, whole._replace(wanted=last[:0])).shape == (0, model.config.hidden_size)
    for depth in range(1, layers + 1):
        pages = empty_pages(model, 3)
        states = torch.full((len(pages), 9, model.config.hidden_size), torch.nan, dtype=dtype)[:, 1:5]
        slots = torch.arange(len(whole.ids)).flip(0)
        cut = Cut(depth, states, slots, True)
        assert not len(decoder_forward.cpu(model, whole._replace(pages=pages[:, :depth], cut=cut)))
        assert torch.equal(pages[:, :depth].nan_to_num(), cold[:, :depth].nan_to_num())
        upper = whole._replace(pages=pages[:, depth:], cut=cut._replace(below=False))
        assert torch.equal(decoder_forward.cpu(model, upper), want)
        assert torch.equal(pages.nan_to_num(), cold.nan_to_num())
        assert torch.equal(decoder_forward.cpu(model, upper._replace(wanted=last)), want[last])
        assert torch.equal(pages.nan_to_num(), cold.nan_to_num())


@pytest.mark.usefixtures("kernels")
def test_changed_weights_are_packed_again(model: Decoder) -> None:
    def fresh() -> torch.Tensor:
        return prefill(copy.deepcopy(model))

    before = prefill(model)
    with torch.no_grad():
        model.layers[0].qkv.weight.mul_(1.5)
    changed = prefill(model)
    assert torch.equal(changed, fresh()) and not torch.equal(changed, before)
    model.layers[1].down.weight = torch.nn.Parameter(2 * model.layers[1].down.weight)
    assert torch.equal(prefill(model), fresh())
    model.norm.weight.data = 3 * model.norm.weight.data
    assert torch.equal(prefill(model), fresh())
    model.norm.weight.data.mul_(2)
    decoder_forward.forget(model)
    assert torch.equal(prefill(model), fresh())
    with torch.inference_mode():
        model.layers[2].qkv = copy.deepcopy(model.layers[2].qkv)
        model.layers[2].qkv.weight = torch.nn.Parameter(-model.layers[2].qkv.weight, requires_grad=False)
    decoder_forward.forget(model)
    assert torch.equal(prefill(model), fresh())
    hidden = torch.randn(3, model.config.hidden_size)
    before = logits(model, hidden)
    with torch.no_grad():
        model.head.weight.neg_()
    assert torch.equal(logits(model, hidden), -before)


@pytest.mark.usefixtures("kernels")
def test_packed_weights_go_with_the_model(tmp_path: Path) -> None:
    model = load(tmp_path, "qwen3")
    prefill(model)
    (packed,) = map(weakref.ref, decoder_forward._layers[model].values())
    del model
    gc.collect()
    assert packed() is None


def whole_cut(b: PagedBatch) -> Cut:
    """Everything below, nothing above."""
    return Cut(b.pages.shape[1], torch.zeros(len(b.pages), 4, 32), b.slots, True)


BAD = {
    "ids: 97 at 0, but the vocabulary has 97": lambda b: b._replace(ids=b.ids * 0 + 97),
    "ids: -1 at 0": lambda b: b._replace(ids=b.ids * 0 - 1),
    "positions: 999 at 0, but cos and sin have": lambda b: b._replace(positions=b.positions * 0 + 999),
    "slots: -1 at 0, but the pages hold": lambda b: b._replace(slots=b.slots * 0 - 1),
    "slots: shape [19] but [20]": lambda b: b._replace(slots=b.slots[1:]),
    "pages: shape": lambda b: b._replace(pages=b.pages[:, :1]),
    "pages: float16": lambda b: b._replace(pages=b.pages.half()),
    "page_table: page 99 at [0, 0]": lambda b: b._replace(page_table=b.page_table + 99),
    "kv_lens: 99 at 0, but page_table maps": lambda b: b._replace(kv_lens=b.kv_lens * 0 + 99),
    "cu_seqlens: must run from 0 to 20": lambda b: b._replace(cu_seqlens=b.cu_seqlens + 1),
    "wanted: 20 at 1, but tokens: 20": lambda b: b._replace(wanted=torch.tensor([1, 20])),
    "wanted: 3 at 1 does not ascend": lambda b: b._replace(wanted=torch.tensor([3, 3])),
    "state_slots: shape [19] but [20]": lambda b: b._replace(cut=whole_cut(b)._replace(slots=b.slots[1:])),
    "state_slots: -50 at 0, but the states hold": lambda b: b._replace(cut=whole_cut(b)._replace(slots=b.slots - 50)),
    "states: shape": lambda b: b._replace(cut=whole_cut(b)._replace(states=torch.zeros(12, 4, 7))),
    "states: bfloat16": lambda b: b._replace(cut=whole_cut(b)._replace(states=torch.zeros(12, 4, 32).bfloat16())),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str, model: Decoder) -> None:
    pages = empty_pages(model, 3).zero_()
    good = batch(model, tokens(LENGTHS), [0, 0, 0], pages)
    with pytest.raises(RoroError, match=re.escape(message)):
        decoder_forward.cpu(model, BAD[message](good))
    assert not pages.any()


def arguments(model: Decoder, b: PagedBatch) -> tuple[torch.Tensor | None, ...]:
    packed = decoder_forward.packed_layers(model)
    return packed, model.embed.weight.detach(), model.cos, model.sin, b.ids, b.positions, b.slots, *b[3:7], *[None] * 3


@pytest.mark.usefixtures("kernels")
def test_bad_weights_are_named(model: Decoder) -> None:
    args = arguments(model, batch(model, tokens(LENGTHS), [0, 0, 0], empty_pages(model, 3)))
    with pytest.raises(RoroError, match="packed: this is no packed decoder"):
        native.call("decoder_forward", args[0][:-1], *args[1:])
    c, layer = model.config, model.layers[0]
    sizes = (c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size, False, False, False, True)
    empty = native.call("decoder_new", model.norm.weight.detach(), *sizes, 1e-6)
    with pytest.raises(RoroError, match="packed: layer 0 has no weights yet"):
        native.call("decoder_forward", empty, *args[1:])
    norm, weight = layer.input_norm.weight.detach(), layer.qkv.weight.detach()
    rest = [None, None, None, weight, None, norm, weight, None, weight, None]
    with pytest.raises(RoroError, match="layer: 9, but there are"):
        native.call("decoder_set_layer", empty, 9, norm, weight, *rest)
    with pytest.raises(RoroError, match="q_norm, k_norm: weights are needed"):
        native.call("decoder_set_layer", empty, 0, norm, weight, *rest)
    with pytest.raises(RoroError, match="heads: 3 over 2 key heads"):
        native.call("decoder_new", norm, 2, 3, 2, 8, 32, False, False, False, True, 1e-6)


@pytest.mark.usefixtures("kernels")
def test_registered_op_passes_opcheck(model: Decoder) -> None:
    b = batch(model, tokens(LENGTHS), [0, 0, 0], empty_pages(model, 3).zero_())
    torch.library.opcheck(native.op("decoder_forward"), arguments(model, b))


@pytest.mark.usefixtures("kernels")
def test_threads_fork_and_repeats(model: Decoder) -> None:
    concurrency.check(lambda: [prefill(model, (11, 9, 16, 5))], repeats=5)
