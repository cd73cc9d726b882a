"""The Judge: one forward pass over query, rendered trajectory and rubric, and a probability per verdict slot."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from roro_fast.engine.score import states
from roro_fast.engine.transfer import upload
from roro_fast.errors import CapacityError
from roro_fast.models.decoder import Decoder
from roro_fast.ops.judge_score import JudgeScores, judge_score
from roro_fast.profiling import mark
from roro_fast.rubric import checkpoint
from roro_fast.rubric.format import Rubric
from roro_fast.rubric.prompts import VERDICTS, JudgePrompt, PromptEncoder, verdict_ids
from roro_fast.rubric.render import View

VALENCE = (1.0, -1.0)  # of VERDICTS: S = sum w (p_true - p_false) / sum w


@dataclass(frozen=True, slots=True)
class Judgement:
    """`score` in [-1, 1]; `p_true` in [0, 1] per criterion, in the rubric's order."""

    score: float
    p_true: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class JudgeInput:
    """All the Judge is told: the query's text, what may be seen of one trajectory, and a rubric."""

    prompt: str
    view: View
    rubric: Rubric


class Judge:
    """A decoder used as a pointwise trajectory judge. `verdicts` are the words for true and false, one token each."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any,
        labels: Sequence[str] = ("small", "large"),
        *,
        verdicts: Sequence[str] = VERDICTS,
        preamble: str = "",
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.encoder = PromptEncoder(tokenizer, labels, preamble)
        self.verdicts = tuple(verdicts)
        self.verdict_ids = torch.tensor(verdict_ids(tokenizer, verdicts), device=model.device)
        self.valence = torch.tensor(VALENCE, device=model.device)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        labels: Sequence[str] | None = None,
        device: str = "cpu",
        base: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Judge:
        """From a directory written by `save`, any Hugging Face language model of a supported family, or a LoRA adapter
        of the one in `base`."""
        model, tokenizer, settings = checkpoint.load(directory, "judge", device, base, dtype)
        fields = ("labels", "verdicts", "preamble")
        return cls(model, tokenizer, **checkpoint.arguments(settings, fields, labels))

    def save(self, directory: str | Path) -> None:
        e = self.encoder
        settings = {"role": "judge", "labels": e.labels, "verdicts": self.verdicts, "preamble": e.preamble}
        checkpoint.save(directory, self.model, self.tokenizer, settings)

    def scorer(self, bf16: bool = True) -> Judge:
        """A Judge of the same weights rounded to bfloat16, for scoring only; itself where nothing would change."""
        if not bf16 or self.model.dtype == torch.bfloat16:
            return self
        model = copy.deepcopy(self.model).to(torch.bfloat16).eval().requires_grad_(False)
        e = self.encoder
        return Judge(model, self.tokenizer, e.labels, verdicts=self.verdicts, preamble=e.preamble)

    def encode(self, inputs: Sequence[JudgeInput]) -> list[JudgePrompt]:
        out = [self.encoder.judge(x.prompt, x.view, x.rubric) for x in inputs]
        longest = max((len(p.ids) for p in out), default=0)
        if longest > self.model.config.max_position:
            raise CapacityError(
                f"judge: a prompt of {longest} tokens exceeds the model's context of {self.model.config.max_position}; "
                "shorten the trajectory or use a Judge with a longer context"
            )
        return out

    def forward(self, prompts: Sequence[JudgePrompt], group_offsets: torch.Tensor | None = None) -> JudgeScores:
        """One forward over all prompts (a right-padded rectangle), differentiable. Slots in prompt order.

        group_offsets [G + 1]: groups of neighbouring prompts whose scores are normalised against each other.
        """
        device = self.model.device
        width = max(len(p.ids) for p in prompts)
        flat = [i for p in prompts for i in (*p.ids, *([self.encoder.eos] * (width - len(p.ids))))]
        hidden = self.model.dense(torch.tensor(flat, device=device).view(len(prompts), width)).flatten(0, 1)
        rows = torch.tensor([b * width + r for b, p in enumerate(prompts) for r in p.rows], device=device)
        return self._verdicts(hidden, rows, prompts, group_offsets)

    @torch.no_grad()
    def read(
        self, prompts: Sequence[JudgePrompt], group_offsets: torch.Tensor | None = None, max_tokens: int = 4096
    ) -> JudgeScores:
        """What `forward` gives, without gradients and for any number of prompts.

        Ragged forwards of at most `max_tokens` computed tokens each, in which what prompts begin with in common is
        computed once; then one `judge_score` over all verdict slots. Nothing waits for the host.
        """
        with mark("judge"):
            hidden, rows = states(self.model, [p.ids for p in prompts], [p.rows for p in prompts], max_tokens)
            return self._verdicts(hidden, rows, prompts, group_offsets)

    def rewards(
        self, inputs: Sequence[JudgeInput], group_offsets: torch.Tensor | None = None, max_tokens: int = 4096
    ) -> JudgeScores:
        """Scores of all inputs, and advantages within groups of neighbouring ones, left on the model's device."""
        index = {x: i for i, x in enumerate(dict.fromkeys(inputs))}
        encoded = self.encode(list(index))
        return self.read([encoded[index[x]] for x in inputs], group_offsets, max_tokens)

    def score(self, inputs: Sequence[JudgeInput], max_tokens: int = 4096) -> list[Judgement]:
        """Judgements in input order; forwards compute at most `max_tokens` tokens. Equal inputs are read once."""
        result = self.rewards(inputs, max_tokens=max_tokens)
        p_true = iter(result.probs[:, 0].tolist())
        return [
            Judgement(s, tuple(islice(p_true, len(x.rubric))))
            for s, x in zip(result.scores.tolist(), inputs, strict=True)
        ]

    def _verdicts(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        prompts: Sequence[JudgePrompt],
        group_offsets: torch.Tensor | None,
    ) -> JudgeScores:
        weight = np.array([w for p in prompts for w in p.weights], np.float32)
        weights, offsets = upload((weight, np.cumsum([0, *(len(p.rows) for p in prompts)])), self.model.device)
        head = self.model.head.weight[self.verdict_ids]
        return judge_score(hidden, rows, head, weights, offsets, self.valence, group_offsets)
