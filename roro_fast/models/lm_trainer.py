"""Updates of a decoder's weights: one AdamW for every language model that is trained here as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch

from roro_fast.models.decoder import Decoder
from roro_fast.profiling import mark

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
