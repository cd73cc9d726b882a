"""(b) The careful Hugging Face loop: one KV cache per model, all sequences of a model in one running batch.

A sequence that joins a model brings the keys and values it left there; the tokens it missed are run in one padded
forward with those of everybody who joins in the same iteration. Caches are padded on the left, masks say what is real.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from bench.e2e.workload import Workload
from bench.peers import hf
from bench.peers.base import Pool, Stepwise

KV = list[tuple[torch.Tensor, torch.Tensor]]  # per layer keys and values, [heads, tokens, dim]


@dataclass
class Row:
    """`left` tokens are to be written; the last of `ids` has not been seen by the model yet."""

    seq: int
    ids: list[int]
    left: int
    new: list[int] = field(default_factory=list)

    def take(self, token: int) -> None:
        self.ids.append(token)
        self.new.append(token)
        self.left -= 1


class Batch:
    """The running batch of one model. `cache` holds [rows, heads, T, dim], `mask` [rows, T] marks what is real."""

    def __init__(self, model: Any, device: str) -> None:
        self.model, self.device = model, device
        self.rows: list[Row] = []
        self.joining: list[Row] = []
        self.layers: KV = []
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=device)
        self.kept: dict[int, KV] = {}

    def submit(self, row: Row) -> None:
        """A row that never left goes on; any other joins in the next iteration."""
        for mine in self.rows:
            if mine.seq == row.seq:
                mine.left, mine.new = row.left, []
                return
        self.joining.append(row)

    def leave(self) -> None:
        """Put away the keys and values of rows with nothing to write."""
        stay = [i for i, r in enumerate(self.rows) if r.left]
        if len(stay) == len(self.rows):
            return
        for i, r in enumerate(self.rows):
            if not r.left:
                real = int(self.mask[i].sum())
                self.kept[r.seq] = [(k[i, :, -real:].clone(), v[i, :, -real:].clone()) for k, v in self.layers]
        at = torch.tensor(stay, dtype=torch.long, device=self.device)
        self.rows = [self.rows[i] for i in stay]
        self.mask = self.mask[at]
        width = int(self.mask.sum(1).max()) if stay else 0
        cut = self.mask.shape[1] - width
        self.mask = self.mask[:, cut:]
        self.layers = [(k[at, :, cut:], v[at, :, cut:]) for k, v in self.layers] if stay else []

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, past: KV) -> tuple[list[int], KV]:
        """Greedy tokens [rows] after `ids` [rows, S], and all keys and values; `mask` [rows, past + S]."""
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        for i, (k, v) in enumerate(past):
            cache.update(k, v, i)
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].argmax(-1).tolist(), [(x.keys, x.values) for x in cache.layers]

    def decode(self) -> None:
        one = torch.ones(len(self.rows), 1, dtype=torch.long, device=self.device)
        ids = torch.tensor([[r.ids[-1]] for r in self.rows], device=self.device)
        self.mask = torch.cat((self.mask, one), 1)
        tokens, self.layers = self.forward(ids, self.mask, self.mask.sum(1, keepdim=True) - 1, self.layers)
        for r, t in zip(self.rows, tokens, strict=True):
            r.take(t)

    def join(self) -> list[tuple[int, int]]:
        """Run what the joining rows missed and merge them in; returns the spans run."""
        pasts = [self.kept.pop(r.seq, []) for r in self.joining]
        seen = [p[0][0].shape[1] if p else 0 for p in pasts]
        spans = [(n, len(r.ids)) for n, r in zip(seen, self.joining, strict=True)]
        before, width = max(seen), max(b - a for a, b in spans)
        ids = torch.tensor([[0] * (width - b + a) + r.ids[a:b] for (a, b), r in zip(spans, self.joining, strict=True)])
        mask = torch.tensor(
            [[0] * (before - a) + [1] * a + [0] * (width - b + a) + [1] * (b - a) for a, b in spans], dtype=torch.long
        )
        positions = torch.tensor([[*[0] * (width - b + a), *range(a, b)] for a, b in spans])
        past: KV = []
        if before:
            example = next(p for p in pasts if p)
            empty = [(k[:, :0], v[:, :0]) for k, v in example]
            padded = [[_left(kv, before) for kv in zip(*(p or empty), strict=True)] for p in pasts]
            past = [
                (torch.stack([k[i] for k, _ in padded]), torch.stack([v[i] for _, v in padded]))
                for i in range(len(example))
            ]
        tokens, layers = self.forward(ids.to(self.device), mask.to(self.device), positions.to(self.device), past)
        real = mask.bool()
        mine = [[(k[i][:, real[i]], v[i][:, real[i]]) for k, v in layers] for i in range(len(self.joining))]
        self._merge(mine, [b for _, b in spans])
        for r, t in zip(self.joining, tokens, strict=True):
            r.take(t)
        self.rows += self.joining
        self.joining = []
        return spans

    def _merge(self, new: list[KV], lengths: list[int]) -> None:
        width = max([self.mask.shape[1], *lengths])
        self.mask = torch.cat(
            [pad(self.mask, (width - self.mask.shape[1], 0))]
            + [torch.tensor([[0] * (width - n) + [1] * n], dtype=torch.long, device=self.device) for n in lengths]
        )
        merged: KV = []
        for i in range(len(new[0])):
            both = []
            for part in (0, 1):
                rows = [_left([kv[i][part]], width)[0][None] for kv in new]
                if self.layers:
                    rows.insert(0, _left([self.layers[i][part]], width)[0])
                both.append(torch.cat(rows))
            merged.append((both[0], both[1]))
        self.layers = merged


def _left(tensors: Any, width: int) -> list[torch.Tensor]:
    """Zeros in front along the token dimension, up to `width`."""
    return [pad(t, (0, 0, width - t.shape[-2], 0)) for t in tensors]


class HFCached(Stepwise):
    def load(self, pool: Pool) -> dict[str, Any]:
        self.models = hf.load_models(pool)
        self.batches = [Batch(m, pool.device) for m in self.models]
        return {**hf.about(), "note": "dynamic cache, sdpa, one running batch per model"}

    def begin(self, work: Workload) -> None:
        super().begin(work)
        self.batches = [Batch(m, b.device) for m, b in zip(self.models, self.batches, strict=True)]

    def submit(self, seq: int, model: int, ids: list[int], new_tokens: int) -> None:
        self.batches[model].submit(Row(seq, list(ids), new_tokens))

    @torch.inference_mode()
    def advance(self) -> Iterator[tuple[int, list[int]]]:
        done: list[tuple[int, list[int]]] = []
        for m, batch in enumerate(self.batches):
            batch.leave()
            if batch.rows:
                for row in batch.rows:
                    self.count(m, len(row.ids) - 1, len(row.ids))
                batch.decode()
            if batch.joining:
                for start, end in batch.join():
                    self.count(m, start, end)
            done += [(r.seq, r.new) for r in batch.rows if not r.left]
        return iter(done)

    def finish(self, seq: int) -> None:
        for batch in self.batches:
            batch.kept.pop(seq, None)


PEER = HFCached
