"""Many prompts as few ragged forwards: no padding, and what prompts have in common is computed once.

Prompts are sorted, so that each has its longest common beginning with the one before it. The whole pages of that
beginning are shared; the rest is computed in the same forward, for a layer stores all its keys and values before any
row attends. Equal prompts, and prompts that another one begins with, cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from roro_fast.engine.transfer import upload
from roro_fast.models.decoder import Decoder
from roro_fast.models.inference import PagedBatch
from roro_fast.ops.paged_attention import PrefixGroups

PAGE_SIZE = 16
MIN_SHARED = 64  # tokens; attention over a shorter beginning is not worth a group


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One forward over `len(ids)` tokens. int64 arrays as `models.inference.PagedBatch` has them, without the memory.

    at: for each prompt served, by its index, the row of `ids` that computes each of its positions. num_pages: how much
    memory it takes. shared: members, offsets and lengths of sequences that share pages (`PrefixGroups`), or None.
    """

    ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    page_table: np.ndarray
    kv_lens: np.ndarray
    cu_seqlens: np.ndarray
    shared: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    num_pages: int
    at: dict[int, np.ndarray]

    def on(self, model: Decoder, page_size: int = PAGE_SIZE) -> PagedBatch:
        """On the model's device, over pages of its own. One layer's worth: nobody reads a layer's after it has run."""
        c, device = model.config, model.device
        shape = self.num_pages, 1, 2, page_size, c.num_kv_heads, c.head_dim
        pages = torch.empty(shape, dtype=model.dtype, device=device).expand(-1, c.num_layers, -1, -1, -1, -1)
        parts = (self.ids, self.positions, self.slots, self.page_table, self.kv_lens, self.cu_seqlens)
        ids, positions, slots, table, lens, cu, *shared = upload((*parts, *(self.shared or ())), device)
        return PagedBatch(ids, positions, slots, pages, table, lens, cu, PrefixGroups(*shared) if shared else None)


@dataclass(frozen=True, slots=True)
class _Sequence:
    """A prompt to compute from `start` on, and the indices of all prompts it serves: each is a beginning of it."""

    tokens: np.ndarray
    start: int
    serves: list[int]


def pack(
    prompts: Sequence[Sequence[int]], max_tokens: int, page_size: int = PAGE_SIZE, share: bool = True
) -> Iterator[PackedBatch]:
    """Batches of at most `max_tokens` computed tokens (a longer prompt gets one of its own) that serve all `prompts`.

    Every prompt has a token at least. A batch begins with an empty memory: what neighbouring batches share is computed
    in both. share=False computes every prompt whole, for comparison.
    """
    batch: list[_Sequence] = []
    used = 0
    for s in _sequences(prompts, page_size, share):
        if batch and used + len(s.tokens) - s.start > max_tokens:
            yield _build(batch, page_size)
            batch, used = [], 0
        if not batch:
            s = _Sequence(s.tokens, 0, s.serves)
        batch.append(s)
        used += len(s.tokens) - s.start
    if batch:
        yield _build(batch, page_size)


def _sequences(prompts: Sequence[Sequence[int]], page_size: int, share: bool) -> Iterator[_Sequence]:
    """In sorted order; `start` counts what the one before has computed already, in whole pages."""
    tokens = [np.asarray(p, np.int64) for p in prompts]
    if not share:
        yield from (_Sequence(t, 0, [i]) for i, t in enumerate(tokens))
        return
    kept: list[tuple[int, list[int]]] = []  # (tokens in common with the one before, prompts served)
    for i in sorted(range(len(prompts)), key=lambda i: list(prompts[i])):
        common = _common(tokens[i], tokens[kept[-1][1][-1]]) if kept else 0
        if kept and common == len(tokens[kept[-1][1][-1]]):
            kept[-1][1].append(i)
        else:
            kept.append((common, [i]))
    for common, serves in kept:
        yield _Sequence(tokens[serves[-1]], common // page_size * page_size, serves)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n


def _build(batch: list[_Sequence], page_size: int) -> PackedBatch:
    starts = [s.start for s in batch]
    counts = np.array([len(s.tokens) - s.start for s in batch])
    cu = np.concatenate(([0], counts.cumsum()))
    tables: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    at: dict[int, np.ndarray] = {}
    pages = 0
    rows = table = np.empty(0, np.int64)
    for i, s in enumerate(batch):
        before = s.start // page_size
        own = -(-len(s.tokens) // page_size) - before
        table = np.concatenate((table[:before], np.arange(pages, pages + own)))
        rows = np.concatenate((rows[: s.start], np.arange(cu[i], cu[i + 1])))
        slots.append(np.arange(pages * page_size, pages * page_size + counts[i]))
        tables.append(table)
        at |= {p: rows for p in s.serves}
        pages += own
    page_table = np.zeros((len(batch), max(map(len, tables))), np.int64)
    for line, table in zip(page_table, tables, strict=True):
        line[: len(table)] = table
    return PackedBatch(
        ids=np.concatenate([s.tokens[s.start :] for s in batch]),
        positions=np.concatenate([np.arange(s.start, len(s.tokens)) for s in batch]),
        slots=np.concatenate(slots),
        page_table=page_table,
        kv_lens=np.array([len(s.tokens) for s in batch]),
        cu_seqlens=cu,
        shared=_siblings(starts),
        num_pages=pages,
        at=at,
    )


def _siblings(starts: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Sequences that branch off at one point of one beginning: they have all that comes before their own tokens in
    common. The first to pass that point computes it and is not among them."""
    groups: list[tuple[int, list[int]]] = []
    open_: list[tuple[int, list[int]]] = []  # deeper and deeper branching points of the current sequence
    for i, start in enumerate(starts):
        while open_ and open_[-1][0] > start:
            groups.append(open_.pop())
        if open_ and open_[-1][0] == start:
            open_[-1][1].append(i)
        else:
            open_.append((start, [i]))
    groups = [g for g in (*groups, *open_) if g[0] >= MIN_SHARED and len(g[1]) > 1]
    if not groups:
        return None
    members = np.array([i for _, g in groups for i in g])
    return members, np.cumsum([0, *(len(g) for _, g in groups)]), np.array([n for n, _ in groups])
