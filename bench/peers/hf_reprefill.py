"""(a) What research code does: Hugging Face `generate`, one question at a time, the text prefilled at every switch.

While the writer stays the same its cache is kept, which is more than most such loops do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from bench.peers import hf
from bench.peers.base import Pool, Stepwise


class HFReprefill(Stepwise):
    max_concurrency = 1

    def load(self, pool: Pool) -> dict[str, Any]:
        self.models = hf.load_models(pool)
        self.device = pool.device
        self.queue: deque[tuple[int, int, list[int], int]] = deque()
        self.cache: tuple[int, int, Any] | None = None  # whose: sequence, model
        return {**hf.about(), "note": "generate(), batch 1, cache kept while the writer stays the same"}

    def submit(self, seq: int, model: int, ids: list[int], new_tokens: int) -> None:
        self.queue.append((seq, model, ids, new_tokens))

    def advance(self) -> Iterator[tuple[int, list[int]]]:
        import torch

        seq, model, ids, n = self.queue.popleft()
        past = self.cache[2] if self.cache and self.cache[:2] == (seq, model) else None
        self.count(model, past.get_seq_length() if past is not None else 0, len(ids) + n - 1)
        with torch.inference_mode():
            out = self.models[model].generate(
                torch.tensor([ids], device=self.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.device),
                max_new_tokens=n,
                do_sample=False,
                past_key_values=past,
                return_dict_in_generate=True,
            )
        self.cache = seq, model, out.past_key_values
        yield seq, out.sequences[0, len(ids) :].tolist()

    def finish(self, seq: int) -> None:
        self.cache = None


PEER = HFReprefill
