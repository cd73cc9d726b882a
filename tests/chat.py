"""Tiny pools that chat: a byte-level tokenizer with a template that has a thinking switch, as Qwen3's has."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import save_random

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<eos>"])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    out = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<eos>")
    out.chat_template = TEMPLATE
    return out


def save(directory: Path, *, hidden: int, seed: int, context: int = 2048) -> Path:
    tok = tokenizer()
    tok.save_pretrained(directory)
    return save_random(directory, len(tok), tok.eos_token_id, hidden=hidden, layers=1, seed=seed, context=context)


def save_pair(root: Path, **changes: int) -> tuple[Path, Path]:
    """(small, large) directories."""
    return save(root / "small", hidden=16, seed=1, **changes), save(root / "large", hidden=32, seed=2, **changes)
