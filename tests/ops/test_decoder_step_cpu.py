"""A step on an engine's stage: the bits of the separate ops, and no reading beyond what the stage holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from roro_fast.errors import RoroError
from roro_fast.models.decoder import Decoder
from roro_fast.models.inference import Cut
from roro_fast.models.loading import load_decoder
from roro_fast.ops import decoder_forward, native
from roro_fast.ops.decoder_step import Drawn, decoder_step, step_weights, usable
from roro_fast.ops.sample_step import sample_step
from tests.models.test_decoder import CASES, save_random
from tests.models.test_inference import batch, empty_pages, tokens

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "never")

LENGTHS = (11, 1, 8)
NO_GROUPS = (None, None, None)


def staged(lengths: tuple[int, ...], model: Decoder) -> tuple[list[torch.Tensor], torch.Tensor, tuple[int, ...]]:
    """(tokens, rows, page table), numbers and sizes of prompts on a stage that has room for more."""
    ids, n, t = tokens(lengths), len(lengths), sum(lengths)
    b = batch(model, ids, [0] * n, empty_pages(model, n))
    lines, rows, numbers = torch.zeros(4, t + 9, dtype=torch.int64), torch.zeros(5, n + 4, dtype=torch.int64), []
    for line, values in zip(lines, (b.ids, b.positions, b.slots, b.slots), strict=True):
        line[:t] = values
    rows[1, :n], rows[2, : n + 1], rows[3, :n] = b.kv_lens, b.cu_seqlens, b.cu_seqlens[1:] - 1
    rows[4, :n] = torch.tensor([0, 3, 7])
    table = torch.zeros(n + 3, b.page_table.shape[1] + 2, dtype=torch.int64)
    table[:n, : b.page_table.shape[1]] = b.page_table
    numbers = torch.tensor([[0.3, 0.9, 0.01, 9], [0.0, 0.7, 1.3, 9], [1.0, 0.9, 1.0, 9]])
    return [lines, rows, table], numbers, (n, t, n, b.page_table.shape[1])


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_the_separate_ops(tmp_path: Path, dtype: torch.dtype, truncated: bool) -> None:
    save_random(CASES["qwen3"], tmp_path)
    model = load_decoder(tmp_path, dtype=dtype)
    assert usable(model)
    stage, numbers, sizes = staged(LENGTHS, model)
    depth, drawn, vocab = 1, Drawn(5), model.config.vocab_size - 5
    pages, states = empty_pages(model, len(LENGTHS)), torch.zeros(12, 4, model.config.hidden_size, dtype=dtype)
    whole = step_weights(model, (0, model.config.num_layers), True)
    hidden, scores = decoder_step(whole, pages, stage, sizes, NO_GROUPS, None, False)
    b = batch(model, tokens(LENGTHS), [0] * 3, pages.clone())._replace(wanted=stage[1][3, :3])
    want = decoder_forward.cpu(model, b)
    assert torch.equal(hidden, want) and torch.equal(scores, decoder_forward.logits_cpu(model, want))
    drawn.draw(scores, len(scores), vocab, stage[1], numbers, truncated)
    limits = (stage[1][4, :3].clone(), numbers[2, :3].clone()) if truncated else ()
    alone = sample_step(scores[:, :vocab], numbers[0, :3].clone(), numbers[1, :3].clone(), *limits)
    for got, kept, expected in zip(drawn.wait(), drawn.sampled, alone, strict=True):
        np.testing.assert_array_equal(got, expected.numpy())
        assert torch.equal(kept[:3], expected)
    below, above = (step_weights(model, span, head) for span, head in (((0, depth), False), ((depth, 3), True)))
    nothing, _ = decoder_step(below, pages[:, :depth], stage, sizes, NO_GROUPS, states, True)
    again, _ = decoder_step(above, pages[:, depth:], stage, sizes, NO_GROUPS, states, False)
    assert len(nothing) == 0 and torch.equal(again, hidden) and b.cut is None and Cut(depth, states, b.slots, True)


def test_what_serves_a_step_can_be_ordered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random(CASES["qwen3"], tmp_path)
    model = load_decoder(tmp_path)
    assert usable(model) and not usable(model.double()) and usable(model.float())
    for op in ("sample_step", "linear", "decoder_forward", "decoder_logits", "paged_attention"):
        monkeypatch.setenv("RORO_IMPL", "reference" if "decoder" in op else f"{op}=reference")
        assert not usable(model), op


BAD = {
    "tokens: shape": (lambda s: s, {1: 99}),
    "batch: 99 rows": (lambda s: s, {0: 99}),
    "batch: 3 rows, 4 wanted": (lambda s: s, {2: 4}),
    "table: shape": (lambda s: s, {3: 99}),
    "rows: float32": (lambda s: [s[0], s[1].float(), s[2]], {}),
    "ids: -1 at 0": (lambda s: [0 * s[0] - 1, *s[1:]], {}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_stages(tmp_path: Path, message: str) -> None:
    change, wrong = BAD[message]
    save_random(CASES["qwen3"], tmp_path)
    model = load_decoder(tmp_path)
    stage, numbers, sizes = staged(LENGTHS, model)
    sizes = tuple(wrong.get(i, x) for i, x in enumerate(sizes))
    weights = step_weights(model, (0, model.config.num_layers), True)
    with pytest.raises(RoroError, match=message.replace("(", r"\(")):
        decoder_step(weights, empty_pages(model, 3), change(stage), sizes, NO_GROUPS, None, False)
    with pytest.raises(RoroError, match="token: shape"):
        Drawn(2).draw(torch.zeros(3, 8), 3, 8, stage[1], numbers, False)
    with pytest.raises(RoroError, match="vocab: 9, but logits has 8"):
        Drawn(3).draw(torch.zeros(3, 8), 3, 9, stage[1], numbers, False)
