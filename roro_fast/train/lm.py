"""Training of small language models: updates, masked cross-entropy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from roro_fast.models.decoder import Decoder
from roro_fast.profiling import mark

IGNORE = -100
Tick = Callable[[], None]  # called after every update, for progress bars


def idle() -> None:
    """A Tick that does nothing."""


class LMTrainer:
    """AdamW over the weights of a decoder, with gradient clipping. The model is trainable inside `with trainer:`.

    `frozen`: of its first layers, so many stay as they are, and with them the embedding. `bf16`: dense forwards (and
    what comes back through them) inside the block compute in bfloat16 under the float32 weights.
    """

    def __init__(
        self,
        model: Decoder,
        lr: float,
        *,
        weight_decay: float = 0.0,
        clip_norm: float = 1.0,
        frozen: int = 0,
        bf16: bool = False,
        tick: Tick = idle,
    ) -> None:
        self.model, self.lr, self.clip_norm, self.tick = model, lr, clip_norm, tick
        self.frozen, self.bf16 = frozen, bf16
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)

    def __enter__(self) -> LMTrainer:
        self.model.requires_grad_(True)
        if self.frozen:
            for part in (self.model.embed, self.model.head, *list(self.model.layers)[: self.frozen]):
                part.requires_grad_(False)
        self.model.autocast = torch.bfloat16 if self.bf16 else None
        return self

    def __exit__(self, *_: object) -> None:
        self.model.requires_grad_(False)
        self.model.autocast = None

    def step(self, loss: torch.Tensor, lr: float | None = None) -> float:
        """One update; returns the gradient norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr if lr is None else lr
        self.optimizer.zero_grad(set_to_none=True)
        with mark("train/lm"):
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            self.optimizer.step()
        # A fused optimiser leaves the counters alone by which packed copies of the weights know that they are stale.
        torch.autograd.graph.increment_version(list(self.model.parameters()))
        self.tick()
        return float(norm)


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
