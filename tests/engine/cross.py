"""Tiny pools of models that do not share a tokenizer, and the independent recomputation of their answers."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config

from roro_fast.engine import Request, StepEngine, Trajectory
from roro_fast.models.config import DecoderConfig
from roro_fast.models.decoder import Decoder
from roro_fast.models.token_bytes import TokenBytes
from roro_fast.tasks.prompting import Prompt
from tests.engine import pairs
from tests.two_tokenizers import TEXT, byte_fallback, byte_level

CONTEXT = 640
TOKENIZERS = [byte_level, byte_fallback, byte_level]  # of models 0, 1, 2
LETTERS = "".join(TEXT[:3])


@cache
def _model(index: int, dtype: torch.dtype) -> Decoder:
    """A random decoder that often writes blank lines, half characters and sometimes EOS."""
    tok, hidden = TOKENIZERS[index](), (32, 48, 64)[index]
    config = Qwen3Config(
        vocab_size=len(tok) + (0, 3, 9)[index],
        hidden_size=hidden,
        num_hidden_layers=1 + index,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=2 * hidden,
        max_position_embeddings=CONTEXT,
        eos_token_id=tok.eos_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(40 + index)
    model = Decoder(DecoderConfig.from_hf(config)).requires_grad_(False)
    for p in model.parameters():
        p.normal_(float(p.dim() == 1), 0.3 if p.dim() > 1 else 0.1)
    for token in tok("\n\n", add_special_tokens=False)["input_ids"]:
        model.head.weight[token] *= 2.0
    model.head.weight[tok.eos_token_id] *= 1.5
    return copy.deepcopy(model).to(dtype)


def pool(k: int = 2) -> list[Decoder]:
    return [_model(i, pairs.DTYPE) for i in range(k)]


def tokenizers(k: int = 2) -> list[PreTrainedTokenizerFast]:
    return [make() for make in TOKENIZERS[:k]]


def engine(k: int = 2, **settings: Any) -> StepEngine:
    return StepEngine(pool(k), tokenizers(k), **({"max_num_seqs": 8, "kv_bytes": 8 << 20} | settings))


def prompt(i: int) -> Prompt:
    """The same words in both tokenizers, the second after a BOS of its own."""
    draw = np.random.default_rng(i)
    at = int(draw.integers(0, 60))
    text = LETTERS[at : at + 1 + int(draw.integers(0, 50))]
    first, second = (make()(text)["input_ids"] for make in TOKENIZERS[:2])
    return Prompt(first, [second])


def requests(n: int, **settings: Any) -> list[Request]:
    fields: dict[str, Any] = {"seed": 7, "max_new_tokens": 40, "max_step_tokens": 7}
    return [Request(prompt(i), sample=i, tag={"id": i}, **(fields | settings)) for i in range(n)]


def tracks(t: Trajectory, k: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt ids, token ids, end of each step) in the tokens of each model."""
    own = (t.prompt_ids, t.token_ids, [s.end for s in t.steps])
    other = t.meta["tracks"][0]
    return [own if m % 2 == 0 else (other["prompt_ids"], other["token_ids"], other["ends"]) for m in range(k)]


def audit(e: StepEngine, t: Trajectory, *, greedy: bool) -> None:
    """Every step is what its writer says after a cold prefill of its own track, and all tracks are one text."""
    k = e.num_models
    found = tracks(t, k)
    codecs = [TokenBytes(tok) for tok in tokenizers(k)]
    texts = [[codec.decode(ids[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
             for codec, (_, ids, ends) in zip(codecs, found, strict=True)]  # fmt: skip
    assert all(x == texts[0] for x in texts)
    assert t.step_texts == [x.decode(errors="replace") for x in texts[0]]
    written = [0] * k
    logps = [
        pairs.cold_logits(m, ids[0] + ids[1])[:, :size].log_softmax(-1)
        for m, ids, size in zip(e.models, found, e.vocab_sizes, strict=True)
    ]
    for i, step in enumerate(t.steps):
        m = step.model
        start_ids, ids, ends = found[m]
        start, end = ([0, *ends])[i], ends[i]
        tokens = ids[start:end]
        written[m] += len(tokens)
        logp = logps[m][len(start_ids) + start - 1 : len(start_ids) + end - 1]
        chosen = logp.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        if greedy:
            assert (logp.amax(1) - chosen).max() < pairs.TOLERANCE, "a token is not its writer's greedy choice"
        entropy = -(logp.exp() * logp).sum(1)
        measured = [step.mean_logprob, step.min_logprob, step.first_entropy, step.mean_entropy]
        truth = [chosen.mean(), chosen.min(), entropy[0], entropy.mean()]
        np.testing.assert_allclose(measured, [float(x) for x in truth], atol=pairs.TOLERANCE)
    assert t.cost.generated_tokens == written
    for m, (_, ids, _) in enumerate(found):
        eos = int(tokenizers(k)[m].eos_token_id)
        assert t.finish_reason != "eos" or ids[-1] == eos
