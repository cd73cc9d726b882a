"""The Rubricor: a decoder that writes a query-specific rubric. Training only; serving never calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roro_fast.engine import StepEngine
from roro_fast.models.decoder import Decoder
from roro_fast.rubric import checkpoint
from roro_fast.rubric.format import MAX_CRITERIA, InvalidRubric, Rubric, parse
from roro_fast.rubric.grammar import checker
from roro_fast.rubric.prompts import PromptEncoder


@dataclass(frozen=True, slots=True)
class Draft:
    """One sampled rubric: its token ids (EOS included when produced), its text, and what parsing made of it."""

    ids: tuple[int, ...]
    text: str
    rubric: Rubric | InvalidRubric


class Rubricor:
    """`closed_grammar`: only sentences of `rubric.grammar` about the query count as well-formed (the nano tier).

    `preamble` is an instruction placed before the query, for models that were not trained on the bare format.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any,
        labels: Sequence[str] = ("small", "large"),
        *,
        closed_grammar: bool = True,
        preamble: str = "",
        max_criteria: int = MAX_CRITERIA,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.encoder = PromptEncoder(tokenizer, labels, preamble)
        self.closed_grammar, self.max_criteria = closed_grammar, max_criteria
        self._engine: StepEngine | None = None

    @classmethod
    def load(
        cls,
        directory: str | Path,
        labels: Sequence[str] | None = None,
        device: str = "cpu",
        base: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Rubricor:
        """From a directory written by `save`, any Hugging Face language model of a supported family, or a LoRA adapter
        of the one in `base`."""
        model, tokenizer, settings = checkpoint.load(directory, "rubricor", device, base, dtype)
        fields = ("labels", "closed_grammar", "preamble", "max_criteria")
        return cls(model, tokenizer, **checkpoint.arguments(settings, fields, labels))

    def save(self, directory: str | Path) -> None:
        e = self.encoder
        settings = {
            "role": "rubricor",
            "labels": e.labels,
            "closed_grammar": self.closed_grammar,
            "preamble": e.preamble,
            "max_criteria": self.max_criteria,
        }
        checkpoint.save(directory, self.model, self.tokenizer, settings)

    def read(self, prompt: str, ids: Sequence[int]) -> Draft:
        """Parse a completion; one that was cut off before EOS is no rubric."""
        text = self.encoder.decode(ids)
        if self.encoder.eos not in ids:
            return Draft(tuple(ids), text, InvalidRubric("unfinished", f"no end within {len(ids)} tokens"))
        check = checker(prompt, self.encoder.labels) if self.closed_grammar else None
        return Draft(tuple(ids), text, parse(text, check, self.max_criteria))

    def engine(self) -> StepEngine:
        """The engine over this model as it is now: what is kept of earlier calls is memory and the vocabulary's table,
        not KV, because training changes the weights in place."""
        if self._engine is None or self._engine.models[0] is not self.model:
            self._engine = StepEngine([self.model], self.tokenizer)
        self._engine.update_weights(0)
        return self._engine

    def write(
        self, prompts: Sequence[str], *, n: int = 1, temperature: float = 0.0, seed: int = 0, max_new_tokens: int = 128
    ) -> list[list[Draft]]:
        """`n` drafts per query text. Temperature 0 is greedy; otherwise seeded. The drafts of a query share its KV."""
        completions = self.engine().generate(
            [self.encoder.rubricor(p) for p in prompts],
            n=n,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        return [[self.read(p, ids) for ids in group] for p, group in zip(prompts, completions, strict=True)]

    def compose(
        self, prompts: Sequence[str], *, tries: int = 4, seed: int = 0, max_new_tokens: int = 128
    ) -> list[Draft]:
        """One draft per query: the greedy one, or where that is malformed the first well-formed of `tries` samples.

        A query for which all of them are malformed keeps its greedy draft, whose `rubric` says what was wrong.
        """
        out = [group[0] for group in self.write(prompts, max_new_tokens=max_new_tokens)]
        failed = [i for i, d in enumerate(out) if isinstance(d.rubric, InvalidRubric)]
        if failed and tries > 0:
            again = self.write(
                [prompts[i] for i in failed], n=tries, temperature=1.0, seed=seed, max_new_tokens=max_new_tokens
            )
            for i, group in zip(failed, again, strict=True):
                out[i] = next((d for d in group if isinstance(d.rubric, Rubric)), out[i])
        return out
