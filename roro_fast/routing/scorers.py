"""Process reward models from outside: a Hugging Face classifier, or a causal model that answers with a label token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from roro_fast.engine.score import score_prompts
from roro_fast.errors import CapacityError, CheckpointError, ConfigError
from roro_fast.models.decoder import Decoder
from roro_fast.routing.scoring import Pieces, PrefixCache, StepScores, Trace, one_pass

POSITIVE = ("correct", "true", "good", "positive", "+", "label_1")
QUESTION = "\nIs the last step correct? Answer true or false:"
RATE = "\nRate the last step from 0 to 9. Score: "
LABELS, DIGITS = (" true", " false"), tuple("0123456789")


class ClassifierScorer:
    """A Hugging Face token or sequence classifier as a process reward model.

    Token classification reads an answer once; a step's score is that of its last token, of `separator` where one is
    written after every step. Sequence classification reads the beginning of the answer up to each step by itself.
    Score: softmax at label `positive` (by name; default: the label called correct, true, ...), sigmoid of a lone label.
    """

    def __init__(self, model: Any, tokenizer: Any, *, separator: str = "", positive: str = "") -> None:
        self.model, self.pieces = model.eval(), Pieces(tokenizer, separator)
        self.name = type(model).__name__
        self.per_token = self.name.endswith("ForTokenClassification")
        if not (self.per_token or self.name.endswith("ForSequenceClassification")):
            raise ConfigError(f"prm: {self.name} is no classifier; use a token or sequence classification model")
        self.labels = {str(v).lower(): int(k) for k, v in model.config.id2label.items()}
        self.positive = 0 if len(self.labels) == 1 else self._positive(positive)
        c = model.config.get_text_config()
        self.limit = int(getattr(c, "max_position_embeddings", 1 << 62))
        self.shape = sum(p.numel() for p in model.parameters()), c.num_hidden_layers, c.hidden_size
        self._cache = PrefixCache(self.shape)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, device: str | torch.device = "cpu", **options: str
    ) -> ClassifierScorer:
        """From a Hugging Face directory; raises CheckpointError when transformers cannot read it."""
        from transformers import (
            AutoConfig,
            AutoModelForSequenceClassification,
            AutoModelForTokenClassification,
            AutoTokenizer,
        )

        try:
            name = (AutoConfig.from_pretrained(directory).architectures or [""])[0]
            token = name.endswith("ForTokenClassification")
            if not (token or name.endswith("ForSequenceClassification")):  # transformers would make up a head
                raise ValueError(f"it holds {name or 'no named model'}")
            auto: Any = AutoModelForTokenClassification if token else AutoModelForSequenceClassification
            model = auto.from_pretrained(directory, use_safetensors=True).to(device)
            return cls(model, AutoTokenizer.from_pretrained(directory), **options)
        except (OSError, ValueError, KeyError) as e:
            reason = " ".join(str(e).split())[:200]
            raise CheckpointError(f"prm: {directory} is not a readable classifier directory ({reason})") from e

    def _positive(self, name: str) -> int:
        for known in [name.lower()] if name else POSITIVE:
            if known in self.labels:
                return self.labels[known]
        raise ConfigError(
            f"prm.positive: no label {name or 'that means correct'!r} among {', '.join(self.labels)}; name it"
        )

    def score(self, traces: Sequence[Trace]) -> list[StepScores]:
        if self.per_token:
            read = [self.pieces(t) for t in traces]
            found = self._probabilities([ids for ids, _ in read])
            ends = [[b - 1 for b in bounds[1:]] for _, bounds in read]
            rows = zip(read, ends, found, strict=True)
            return [one_pass(p[at].tolist(), bounds, self.shape) for (_, bounds), at, p in rows]
        heads = self._cache.missing(traces)
        prompts = [self.pieces(h)[0] for h in heads]
        answers = zip(heads, prompts, self._probabilities(prompts), strict=True)
        new = {h: (float(p), len(ids), 0) for h, ids, p in answers}
        return self._cache.collect(traces, new)

    @torch.no_grad()
    def _probabilities(self, rows: list[list[int]]) -> list[torch.Tensor]:
        """Per row [T] (token) or [] (sequence). Rows go one by one, so that none depends on another's padding."""
        out = []
        for ids in rows:
            if len(ids) > self.limit:
                raise CapacityError(
                    f"prm: {len(ids)} tokens exceed the model's context of {self.limit}; use a longer one"
                )
            z = self.model(input_ids=torch.tensor([ids], device=self.model.device)).logits[0].float().cpu()
            p = torch.sigmoid(z) if z.shape[-1] == 1 else torch.softmax(z, -1)
            out.append(p[..., self.positive])
        return out


class VerdictScorer:
    """A causal model asked about the last step: the expected value of its answer over a few label tokens.

    score = sum_k value_k p(label_k), p renormalised over the labels. With " true" / " false" of values 1 and 0 this is
    a generative reward model; with the digits 0-9 of values k / 9 it is SpecReason's rating (arXiv 2504.07891).
    `model` may be a model of the pool. Only the label rows of the head are multiplied.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any,
        *,
        labels: Sequence[str] = LABELS,
        values: Sequence[float] = (1.0, 0.0),
        question: str = QUESTION,
        max_tokens: int = 8192,
    ) -> None:
        if len(labels) != len(values) or not all(0 <= v <= 1 for v in values):
            raise ConfigError(f"prm.values: {list(values)} must be one value in [0, 1] for each of {list(labels)}")
        self.model, self.tokenizer, self.pieces = model, tokenizer, Pieces(tokenizer)
        self.max_tokens, self.name = max_tokens, "verdict"
        self.question = list(tokenizer(question, add_special_tokens=False)["input_ids"])
        self.label_ids = label_ids(tokenizer, labels)
        self.values = torch.tensor(values, dtype=torch.float32)
        c = model.config
        self._cache = PrefixCache((c.num_params, c.num_layers, c.num_heads * c.head_dim))

    @classmethod
    def digits(cls, model: Decoder, tokenizer: Any, question: str = RATE) -> VerdictScorer:
        """SpecReason's rating of 0-9, as a share of 9."""
        return cls(model, tokenizer, labels=DIGITS, values=[k / 9 for k in range(10)], question=question)

    def score(self, traces: Sequence[Trace]) -> list[StepScores]:
        heads = self._cache.missing(traces)
        prompts = [[*self.pieces(h)[0], *self.question] for h in heads]
        rows = [[len(p) - 1] for p in prompts]
        probs = score_prompts(self.model, prompts, rows, self.label_ids, self.max_tokens)
        q = len(self.question)
        answers = zip(heads, prompts, probs, strict=True)
        new = {h: (float(p[0] @ self.values), len(ids) - q, q) for h, ids, p in answers}
        return self._cache.collect(traces, new)


def label_ids(tokenizer: Any, labels: Sequence[str]) -> list[int]:
    """Token ids of the labels, each of which must be one known token."""
    out = []
    for label in labels:
        ids = tokenizer(label, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ConfigError(
                f"prm.labels: {label!r} is not a single known token of this tokenizer; choose other words"
            )
        out.append(int(ids[0]))
    return out
