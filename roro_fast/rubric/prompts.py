"""Token-level prompts of Rubricor and Judge. Both start with the query, so one pretrained reader serves both.

Rubricor:  Query / Rubric                 -> writes the rubric, then EOS
Judge:     Query / Trajectory / Rubric    with "Verdict:" after every criterion; the verdict is the token to follow it

Pieces are tokenised one by one and concatenated, which fixes the verdict rows exactly, and with special-token parsing
off, so that a step text holding "<eos>" is just text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from roro_fast.errors import ConfigError
from roro_fast.rubric.format import RESERVED, Rubric
from roro_fast.rubric.render import View, render

VERDICTS = (" true", " false")


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """`ids`: tokens. `rows`: the last token of each verdict slot, whose logits decide. `weights`: one per slot."""

    ids: list[int]
    rows: list[int]
    weights: list[float]


class PromptEncoder:
    """Encodes prompts for one tokenizer and set of model labels; `preamble` is an instruction put before the query."""

    def __init__(self, tokenizer: Any, labels: Sequence[str], preamble: str = "") -> None:
        self.tokenizer, self.labels, self.preamble = tokenizer, tuple(labels), preamble
        if tokenizer.eos_token_id is None:
            raise ConfigError("tokenizer.eos_token: none set; Rubricor needs one to end a rubric")
        self.eos = int(tokenizer.eos_token_id)
        self.start = list(tokenizer("")["input_ids"])  # what the tokenizer itself puts first, e.g. Llama's BOS
        self.piece = lru_cache(maxsize=65536)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return tuple(ids)

    def query(self, prompt: str) -> list[int]:
        return [*self.start, *self.piece(f"{self.preamble}Query:\n{prompt.strip()}\n")]

    def rubricor(self, prompt: str) -> list[int]:
        """What the Rubricor continues."""
        return [*self.query(prompt), *self.piece("Rubric:\n")]

    def rubricor_text(self, prompt: str) -> str:
        """The same as one text, for generators that tokenise it themselves."""
        return f"{self.preamble}Query:\n{prompt.strip()}\nRubric:\n"

    def completion(self, rubric: Rubric | str) -> list[int]:
        """What the Rubricor should answer."""
        return [*self._encode(str(rubric)), self.eos]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a Rubricor's completion up to EOS."""
        ids = list(ids)
        body = ids[: ids.index(self.eos)] if self.eos in ids else ids
        return str(self.tokenizer.decode(body))

    def judge_head(self, prompt: str, view: View) -> list[int]:
        """The part of a Judge's prompt that does not depend on the rubric."""
        steps = self._encode("Trajectory:\n" + render(view, self.labels))
        return [*self.query(prompt), *steps, *self.piece("Rubric:\n")]

    def judge(self, prompt: str, view: View, rubric: Rubric) -> JudgePrompt:
        """The Judge's single-pass prompt for one trajectory under one rubric."""
        ids = self.judge_head(prompt, view)
        newline, rows = self.piece("\n"), []
        for c in rubric.criteria:
            ids += self.piece(f"{c} {RESERVED}")
            rows.append(len(ids) - 1)
            ids += newline
        return JudgePrompt(ids[: rows[-1] + 1], rows, rubric.weights)


def verdict_ids(tokenizer: Any, words: Sequence[str] = VERDICTS) -> list[int]:
    """Token ids of the verdict words; each must be one known token, and all must differ."""
    out = []
    for word in words:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ConfigError(
                f"judge.verdicts: {word!r} is {len(ids)} tokens {ids} of this tokenizer, not one known token; "
                "choose words that are single tokens, e.g. ' yes' and ' no'"
            )
        out.append(int(ids[0]))
    if len(set(out)) != len(out):
        raise ConfigError(f"judge.verdicts: {list(words)} map to the same token {out[0]}; choose different words")
    return out
