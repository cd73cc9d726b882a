"""Plugged-in process reward models against the same models run by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
)

from roro_fast.errors import CapacityError, CheckpointError, ConfigError
from roro_fast.models import nano_tokenizer
from roro_fast.models.loading import load_decoder
from roro_fast.routing.scorers import ClassifierScorer, VerdictScorer
from roro_fast.routing.scoring import Pieces, PrefixCache, Trace, forward_flops, one_pass
from tests.tiny import save_tiny

TRACE = Trace("Ada's ledger of coins starts at 37 #0 Total?\n\n", (" pays 5: 37 gives 32 #1\n\n", " Total 32"))
OTHER = Trace(TRACE.prompt, (" pays 5: 37 gives 31 #1\n\n",))


def tokenizer_at(path: Path) -> Any:
    nano_tokenizer.save(path)
    return AutoTokenizer.from_pretrained(path)


def config(**changes: Any) -> Qwen3Config:
    size = {"vocab_size": len(nano_tokenizer.vocabulary()), "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return Qwen3Config(**size, **shape, pad_token_id=0, **changes)


def test_a_token_classifier_scores_each_step_at_its_end(tmp_path: Path) -> None:
    tokenizer = tokenizer_at(tmp_path)
    torch.manual_seed(0)
    model = Qwen3ForTokenClassification(config(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})).eval()
    model.save_pretrained(tmp_path)
    ids = tokenizer(TRACE.prompt + "".join(TRACE.steps))["input_ids"]
    first = len(tokenizer(TRACE.prompt + TRACE.steps[0])["input_ids"])
    with torch.no_grad():
        p = torch.softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)[:, 1]
    scorer = ClassifierScorer.from_pretrained(tmp_path)
    both = scorer.score([TRACE, OTHER])
    assert scorer.name == "Qwen3ForTokenClassification" and len(both[1].values) == 1
    torch.testing.assert_close(torch.tensor(both[0].values), p[[first - 1, -1]])
    shape = sum(x.numel() for x in model.parameters()), 2, 16
    first_cost = forward_flops(*shape, first)
    assert both[0].tokens == (first, len(ids) - first)
    assert both[0].flops == (first_cost, forward_flops(*shape, len(ids)) - first_cost)
    other = ClassifierScorer(model, tokenizer, positive="bad").score([TRACE])[0].values
    torch.testing.assert_close(torch.tensor(other), 1 - p[[first - 1, -1]])


def test_a_separator_carries_the_score(tmp_path: Path) -> None:
    tokenizer = tokenizer_at(tmp_path)
    torch.manual_seed(0)
    model = Qwen3ForTokenClassification(config(num_labels=1)).eval()
    ids = tokenizer(TRACE.prompt + TRACE.steps[0] + "\n" + TRACE.steps[1] + "\n")["input_ids"]
    ends = [i for i, t in enumerate(ids) if t == tokenizer("\n")["input_ids"][0]]
    with torch.no_grad():
        p = torch.sigmoid(model(input_ids=torch.tensor([ids])).logits[0, ends, 0])
    found = ClassifierScorer(model, tokenizer, separator="\n").score([TRACE])[0].values
    torch.testing.assert_close(torch.tensor(found), p)


def test_a_sequence_classifier_reads_every_beginning(tmp_path: Path) -> None:
    tokenizer = tokenizer_at(tmp_path)
    torch.manual_seed(0)
    model = Qwen3ForSequenceClassification(config(num_labels=2)).eval()
    texts = [TRACE.prompt + TRACE.steps[0], TRACE.prompt + "".join(TRACE.steps)]
    rows = [tokenizer(t)["input_ids"] for t in texts]
    with torch.no_grad():
        p = [torch.softmax(model(input_ids=torch.tensor([r])).logits[0], -1)[1].item() for r in rows]
    scorer = ClassifierScorer(model, tokenizer)
    found = scorer.score([TRACE])[0]
    assert found.values == pytest.approx(p) and found.tokens == (len(rows[0]), len(rows[1]) - len(rows[0]))
    assert scorer.score([TRACE, OTHER])[0] == found, "what is known is charged all the same"


def test_verdicts_renormalise_over_the_labels(tmp_path: Path) -> None:
    save_tiny(tmp_path, hidden=32)
    model, tokenizer = load_decoder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    scorer = VerdictScorer(model, tokenizer, question="\n")
    ids = [*Pieces(tokenizer)(TRACE)[0], *tokenizer("\n")["input_ids"]]
    labels = [tokenizer(w)["input_ids"][0] for w in (" true", " false")]
    p = torch.softmax(model.logits(model.dense(torch.tensor([ids])))[0, -1, labels].detach(), -1)[0]
    found = scorer.score([OTHER, TRACE])[1]
    assert found.values[-1] == pytest.approx(p.item(), abs=1e-5) and sum(found.tokens) == len(ids) + 1, (
        "the question is read twice"
    )
    with pytest.raises(ConfigError, match=r"prm\.labels: 'perhaps'"):
        VerdictScorer(model, tokenizer, labels=("perhaps", " false"))
    with pytest.raises(ConfigError, match=r"prm\.values"):
        VerdictScorer(model, tokenizer, values=(1.0, 0.5, 0.0))
    with pytest.raises(ConfigError, match=r"prm\.labels: '0'"):
        VerdictScorer.digits(model, tokenizer)


def test_bad_models_are_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_at(tmp_path)
    with pytest.raises(ConfigError, match="no classifier"):
        ClassifierScorer(Qwen3ForCausalLM(config()), tokenizer)
    labels = {"id2label": {0: "x", 1: "y"}, "label2id": {"x": 0, "y": 1}}
    with pytest.raises(ConfigError, match=r"prm\.positive: .*x, y"):
        ClassifierScorer(Qwen3ForTokenClassification(config(**labels)), tokenizer)
    scorer = ClassifierScorer(Qwen3ForTokenClassification(config(num_labels=1)), tokenizer)
    with pytest.raises(CapacityError, match="64"):
        scorer.score([Trace(TRACE.prompt, TRACE.steps * 8)])
    save_tiny(tmp_path / "lm", hidden=16)
    with pytest.raises(CheckpointError, match="no named model"):
        ClassifierScorer.from_pretrained(tmp_path / "lm")
    with pytest.raises(CheckpointError, match="classifier directory"):
        ClassifierScorer.from_pretrained(tmp_path / "absent")


def test_the_cache_forgets_the_oldest_beyond_its_size() -> None:
    cache = PrefixCache((100, 2, 16), size=2)
    heads = cache.missing([TRACE])
    assert [len(h.steps) for h in heads] == [1, 2]
    found = cache.collect([TRACE], {heads[0]: (0.5, 7, 3), heads[1]: (0.6, 12, 3)})[0]
    assert found.values == (0.5, 0.6) and found.tokens == (10, 8), "7 and 3 asked; 5 more and 3 asked again"
    assert found.flops[1] == forward_flops(100, 2, 16, 15) - forward_flops(100, 2, 16, 7)
    assert cache.missing([TRACE]) == []
    cache.collect([OTHER], {OTHER: (0.1, 3, 0)})
    assert cache.missing([TRACE]) == heads[:1]


def test_one_pass_charges_every_token_once() -> None:
    s = one_pass([0.1, 0.2, 0.3], [4, 7, 9, 12], (100, 2, 16))
    assert s.tokens == (7, 2, 3) and sum(s.flops) == 2 * 100 * 12 + 4 * 2 * 16 * 78
    assert one_pass([], [4], (1, 1, 1)).tokens == ()
