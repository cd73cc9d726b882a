"""Step boundaries on token ids: which tokens end a step, given the delimiter as text.

GPT-2-style pre-tokenizers split a blank line before text into two newline tokens, so a model trained with one (SmolLM2)
writes them one by one and hardly ever uses the blank-line token that its vocabulary holds. `StepBoundary` therefore
follows the text across tokens. `delimiter_ids` gives the tokens that close a step by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from roro_fast.errors import ConfigError


class StepBoundary:
    """An automaton over token ids: a step ends with the first token that completes `delimiter` in the step's text.

    A sequence carries one small integer, its state: how many characters of the delimiter its text ends with. It is 0 at
    the start of a step. `table[state, token]` is the next state, `closed` when that token ends the step.

    Attributes:
        table: [len(delimiter), V] int64; V is `vocab_size`, or the tokenizer's own size.
        closed: the value in `table` that marks the end of a step, len(delimiter).

    Raises:
        ConfigError: the delimiter is empty, or no sequence of tokens can produce it.
    """

    def __init__(self, tokenizer: Any, delimiter: str, vocab_size: int | None = None) -> None:
        _check(delimiter)
        self.delimiter = delimiter
        self.closed = len(delimiter)
        texts = token_texts(tokenizer)
        self.table = torch.zeros(self.closed, max(vocab_size or 0, len(texts)), dtype=torch.int64)
        letters, control = set(delimiter), special_ids(tokenizer)
        for token, text in enumerate(texts):
            if letters.isdisjoint(text) or token in control:
                continue
            for state in range(self.closed):
                self.table[state, token] = _follow(delimiter, state, text)
        reached, frontier = {0}, [0]
        while frontier and self.closed not in reached:
            new = set(self.table[frontier.pop()].unique().tolist()) - reached
            reached |= new
            frontier += sorted(new - {self.closed})
        if self.closed not in reached:
            raise _impossible(delimiter)

    def advance(self, states: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(next states, closed) for N sequences: states, tokens [N] int64; closed [N] bool, back at state 0."""
        following = self.table[states, tokens]
        closed = following == self.closed
        return following.masked_fill(closed, 0), closed

    def ends(self, tokens: Iterable[int]) -> list[int]:
        """End offsets of the closed steps of a token sequence that begins at a step's start."""
        out, state = [], 0
        for i, token in enumerate(tokens):
            state = int(self.table[state, token])
            if state == self.closed:
                out.append(i + 1)
                state = 0
        return out

    def to(self, device: str | torch.device) -> StepBoundary:
        """Move the table; returns self."""
        self.table = self.table.to(device)
        return self


def delimiter_ids(tokenizer: Any, delimiter: str) -> frozenset[int]:
    """Ids of all tokens whose own text contains `delimiter`: producing one of them closes a step whatever came before.

    A byte-level vocabulary holds many for a blank line: after a full stop, with indentation, tripled. Special tokens
    never count. The set alone misses delimiters spelled over several tokens; see `StepBoundary`.

    Args:
        tokenizer: a `transformers` tokenizer or a `tokenizers.Tokenizer`.
        delimiter: non-empty text, usually a blank line.

    Raises:
        ConfigError: the delimiter is empty, or no single token contains it.
    """
    _check(delimiter)
    found = frozenset(i for i, text in enumerate(token_texts(tokenizer)) if delimiter in text) - special_ids(tokenizer)
    if not found:
        raise _impossible(delimiter)
    return found


def token_texts(tokenizer: Any) -> list[str]:
    """The decoded text of every id on its own, in id order; bytes of a split character decode to U+FFFD."""
    fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
    ids = [[i] for i in range(1 + max(tokenizer.get_vocab().values(), default=-1))]
    if hasattr(fast, "decode_batch"):
        return fast.decode_batch(ids, skip_special_tokens=False)
    return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of control tokens such as EOS and padding."""
    if hasattr(tokenizer, "all_special_ids"):
        return frozenset(tokenizer.all_special_ids)
    return frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def _follow(delimiter: str, state: int, text: str) -> int:
    """Characters of `delimiter` matched after reading `text` from `state`; len(delimiter) as soon as it is complete."""
    matched = delimiter[:state] + text
    if delimiter in matched:
        return len(delimiter)
    return next(n for n in range(len(delimiter) - 1, -1, -1) if matched.endswith(delimiter[:n]))


def _check(delimiter: str) -> None:
    if not delimiter:
        raise ConfigError('engine.delimiter: is empty; give the text that ends a step, for example "\\n\\n"')


def _impossible(delimiter: str) -> ConfigError:
    return ConfigError(
        f"engine.delimiter: the tokenizer cannot produce {delimiter!r}; choose a delimiter that is in its vocabulary"
    )
