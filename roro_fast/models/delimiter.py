"""Resolve a step delimiter given as text to the token ids that end a step."""

from __future__ import annotations

from typing import Any

from roro_fast.errors import ConfigError


def delimiter_ids(tokenizer: Any, delimiter: str) -> frozenset[int]:
    """Ids of all tokens whose own text contains `delimiter`: producing one of them closes a step.

    A byte-level vocabulary holds many such tokens for a blank line (".\\n\\n", "\\n\\n\\n", "\\n\\n  "), and a model picks
    any of them, so a step must end at each. Special tokens never count. A delimiter that the model spells out over
    several tokens is not seen.

    Args:
        tokenizer: a `transformers` tokenizer or a `tokenizers.Tokenizer`.
        delimiter: non-empty text, usually a blank line.

    Raises:
        ConfigError: the delimiter is empty, or no single token contains it.
    """
    if not delimiter:
        raise ConfigError('engine.delimiter: is empty; give the text that ends a step, for example "\\n\\n"')
    found = frozenset(i for i, text in enumerate(token_texts(tokenizer)) if delimiter in text) - special_ids(tokenizer)
    if not found:
        raise ConfigError(
            f"engine.delimiter: the tokenizer has no token that contains {delimiter!r}; "
            "choose a delimiter that is one token in its vocabulary"
        )
    return found


def token_texts(tokenizer: Any) -> list[str]:
    """The decoded text of every id on its own, in id order; bytes of a split character decode to U+FFFD."""
    fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
    ids = [[i] for i in range(vocabulary_size(tokenizer))]
    if hasattr(fast, "decode_batch"):
        return fast.decode_batch(ids, skip_special_tokens=False)
    return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest token id, added tokens included."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of control tokens such as EOS and padding."""
    if hasattr(tokenizer, "all_special_ids"):
        return frozenset(tokenizer.all_special_ids)
    return frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
