"""SpecReason's acceptance of 7 and more out of 9, and the expected digit behind a rating."""

from __future__ import annotations

import torch

from roro_fast.models.decoder import Decoder
from roro_fast.models.loading import load_decoder
from roro_fast.routing.scorers import VerdictScorer
from roro_fast.routing.scoring import Trace
from roro_fast.routing.spec_reason import SpecReason
from tests.routing.batches import Written, traced
from tests.tiny import save_tiny


def test_seven_is_enough() -> None:
    out = SpecReason(Written()).decide(traced("0.777", "0.778", "0.0|1.0"))  # 6.99, 7.002, 9
    assert out.actions.tolist() == [1, 0, 0]
    assert SpecReason(Written()).at(9.5).decide(traced("1.0")).actions.tolist() == [1]


def test_a_rating_is_the_expected_digit(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    model: Decoder = load_decoder(save_tiny(tmp_path / "m", hidden=32))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    scorer = VerdictScorer(
        model, tokenizer, labels=[f" {k}" for k in range(10)], values=[k / 9 for k in range(10)], question=" at most"
    )
    text = "Ada's ledger of coins starts at 37 #0 pays 5 #1 Total?\n\n pays 5: 37 gives 32 #1\n\n at most"
    ids = tokenizer(text)["input_ids"]
    logits = model.logits(model.dense(torch.tensor([ids])))[0, -1]
    digits = [tokenizer(f" {k}")["input_ids"][0] for k in range(10)]
    expected = (torch.softmax(logits[digits], -1) * torch.arange(10)).sum() / 9
    trace = Trace("Ada's ledger of coins starts at 37 #0 pays 5 #1 Total?\n\n", (" pays 5: 37 gives 32 #1\n\n",))
    torch.testing.assert_close(torch.tensor(scorer.score([trace])[0].values), expected[None], atol=1e-5, rtol=1e-5)
