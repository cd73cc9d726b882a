"""Losses of small language models: batches of completions, masked cross-entropy."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from roro_fast.models.decoder import Decoder

IGNORE = -100


def rounded(value: float) -> float | None:
    """For logs: 5 decimals, None where there was nothing to measure (NaN is no JSON)."""
    return None if value != value else round(value, 5)


def reference_of(model: Decoder) -> Decoder:
    """A frozen copy."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def pad(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """[B, longest] int64, right-padded."""
    width = max(map(len, rows))
    return torch.tensor([[*r, *([fill] * (width - len(r)))] for r in rows])


def completion_batch(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], fill: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, targets), both [B, S] int64: `targets` is the next token where it belongs to a completion, else IGNORE."""
    ids = [[*p, *c[:-1]] for p, c in zip(prompts, completions, strict=True)]
    targets = [[*([IGNORE] * (len(p) - 1)), *c] for p, c in zip(prompts, completions, strict=True)]
    return pad(ids, fill), pad(targets, IGNORE)


def token_logprobs(model: Decoder, ids: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities [A] float32 of the targets that are not IGNORE, row by row; only those rows get logits."""
    flat = targets.flatten()
    rows = (flat != IGNORE).nonzero().squeeze(1)
    logits = model.logits(model.dense(ids).flatten(0, 1)[rows]).float() / temperature
    return torch.log_softmax(logits, -1).gather(-1, flat[rows, None]).squeeze(-1)


def sft_loss(model: Decoder, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the targets that are not IGNORE."""
    return -token_logprobs(model, ids, targets).mean()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets)
