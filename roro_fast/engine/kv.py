"""Paged KV of K models in one byte-budgeted arena a device, with a prefix cache and copy-on-write.

The arena is cut in equal slabs. A slab belongs to one model at a time and holds a whole number of that model's pages,
so memory moves between models as the routing shifts. A page holds all layers of `page_size` tokens:
[layer, k/v, offset, kv_head, head_dim].

Where the models share their first layers, these are one more part with page tables of its own, and a model's part holds
only its other layers. What is said of a model's pages here goes for every part.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from roro_fast.engine.arena import Arena
from roro_fast.engine.pages import chain_hashes, root_hash
from roro_fast.engine.transfer import upload
from roro_fast.errors import CapacityError
from roro_fast.models.decoder import Decoder
from roro_fast.ops.kv_handoff import copy_pages


@dataclass(slots=True)
class CacheStats:
    """Counters since the engine was made: prefix pages reused and evicted, copies on write, idle drops, preemptions."""

    hit_tokens: int = 0
    evicted_pages: int = 0
    cow_pages: int = 0
    idle_drops: int = 0
    preemptions: int = 0


class CachedPage(NamedTuple):
    """A page of the prefix cache with the tokens it holds, compared before sharing because keys may collide."""

    page: int
    tokens: bytes


class KVCache:
    """Page tables of `num_slots` sequences for every part: `table[c]` [slots, pages] and `kv_len` [C, slots] int64.

    depth: first layers that all models share. Their part is `trunk`, None where there is none, and `states` [pages,
    page_size, H] holds the residual stream after them. A model without further layers has no pages; its `kv_len` still
    says what it has seen.
    """

    def __init__(
        self,
        models: list[Decoder],
        *,
        kv_bytes: int,
        page_size: int,
        num_slots: int,
        max_len: int,
        depth: int = 0,
        stats: CacheStats | None = None,
    ) -> None:
        arena = Arena(models, kv_bytes, page_size, depth)
        self.page_size, self.num_models, self.device_group = page_size, len(models), np.array(arena.group)
        self.page_bytes, self.capacity, self.scratch = arena.page_bytes, arena.capacity, arena.scratch
        self.pool, self.pages, self.whole, self.slab_bytes = arena.pool, arena.pages, arena.whole, arena.slab_bytes
        self.pools, self.num_parts = arena.pools, len(self.pages)
        self.trunk = len(models) if depth else None
        self.states = arena.states if depth else torch.empty(0)
        width = -(-max_len // page_size)
        self.table = np.zeros((self.num_parts, num_slots, width), np.int64)
        self.num_pages = np.zeros((self.num_parts, num_slots), np.int64)
        self.kv_len = np.zeros((self.num_parts, num_slots), np.int64)
        self.shared = np.zeros((self.num_parts, num_slots), bool)  # may hold others' pages too: check before writing
        self.versions = [0] * self.num_parts
        self._cached: list[OrderedDict[int, CachedPage]] = [OrderedDict() for _ in self.pages]
        self.stats = stats or CacheStats()

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def check_fits(self, tokens: int, field: str) -> None:
        """CapacityError unless one sequence of `tokens` tokens fits the arena for every model."""
        for m in range(self.num_models):
            parts = [c for c in (m, self.trunk) if c is not None and self.page_bytes[c]]
            slabs = [-(-self.pages_for(tokens) // self.pool.pages_per_slab[c]) for c in parts]
            size, have = self.slab_bytes[m], self.capacity[m] // self.pool.pages_per_slab[m]
            if sum(slabs) > have:
                raise CapacityError(
                    f"{field}: a sequence of {tokens} tokens needs {sum(slabs) * size} bytes of KV for model {m}, "
                    f"engine.kv_bytes holds {have * size}; raise engine.kv_bytes or lower the length"
                )

    def home(self, m: int) -> int:
        """The part whose pages a forward of model m goes by: its own, or the shared one where it has none."""
        return m if self.page_bytes[m] or self.trunk is None else self.trunk

    # -- pages of one sequence -------------------------------------------------------------------------------------

    def missing(self, m: int, slots: np.ndarray, upto: np.ndarray) -> np.ndarray:
        """Pages each slot still needs to hold tokens [0, upto) of model m; [N] int64."""
        return np.maximum(-(-upto // self.page_size) - self.num_pages[m, slots], 0)

    def grow(self, m: int, slot: int, pages: list[int]) -> None:
        n = self.num_pages[m, slot]
        self.table[m, slot, n : n + len(pages)] = pages
        self.num_pages[m, slot] = n + len(pages)

    def alloc(self, m: int, n: int) -> list[int]:
        """n pages or []; evicts unused prefix-cache pages of any model first if that is what it takes."""
        pages = self.pool.alloc(m, n)
        while not pages and self._evict_one(m):
            pages = self.pool.alloc(m, n)
        return pages

    def drop(self, m: int, slot: int) -> int:
        """Give back everything slot holds for model m; returns the number of pages."""
        n = int(self.num_pages[m, slot])
        if n:
            self.pool.decref(m, self.table[m, slot, :n].tolist())
        self.num_pages[m, slot] = self.kv_len[m, slot] = 0
        self.shared[m, slot] = False
        return n

    def free(self, slot: int) -> None:
        for m in range(self.num_parts):
            self.drop(m, slot)

    def truncate(self, slot: int, length: int, models: Iterable[int] | None = None) -> None:
        """Forget tokens from `length` on, of all models or some; the pages stay with the slot."""
        held = range(self.num_parts) if models is None else models
        for m in [m for m in held if self.kv_len[m, slot] > length]:
            self.kv_len[m, slot] = length
            again = self.table[m, slot, length // self.page_size : self.num_pages[m, slot]].tolist()
            self.shared[m, slot] |= any(self.pool.refcount(m, page) > 1 for page in again)

    def fork(self, source: int, target: int) -> None:
        """Let `target` share every page of `source`; whoever writes a shared page first gets a private copy."""
        for m in range(self.num_parts):
            n = int(self.num_pages[m, source])
            self.table[m, target, :n] = self.table[m, source, :n]
            self.pool.incref(m, self.table[m, source, :n].tolist())
            self.num_pages[m, target] = n
            self.kv_len[m, target] = self.kv_len[m, source]
            self.shared[m, source] = self.shared[m, target] = n > 0

    def make_writable(self, m: int, slot: int, start: int, stop: int) -> bool:
        """Copy pages that tokens [start, stop) will be written to and that others hold too. False if memory ran out."""
        lo, hi = start // self.page_size, min(self.pages_for(stop), int(self.num_pages[m, slot]))
        for i in range(lo, hi):
            page = int(self.table[m, slot, i])
            if self.pool.refcount(m, page) == 1:
                continue
            fresh = self.alloc(m, 1)
            if not fresh:
                self.forget(m, [page])
                if self.pool.refcount(m, page) > 1:
                    return False
                continue
            whole, device = self.whole[m], self.whole[m].device
            copy_pages(whole, *upload((np.array([page]), np.array(fresh)), device))
            self.pool.decref(m, [page])
            self.table[m, slot, i] = fresh[0]
            self.stats.cow_pages += 1
        if hi == self.num_pages[m, slot]:
            self.shared[m, slot] = False
        return True

    def compact(self, m: int, slot: int) -> bool:
        """Move the pages of the only sequence left together, so that slabs come free; False when that gains nothing.

        It may hold pages of two parts, which together fit the arena, though not from any state: pages of one that lie
        scattered keep slabs from the other.
        """
        if (slabs := self.scattered(m, slot)) == 0:
            return False
        n = int(self.num_pages[m, slot])
        pages = self.table[m, slot, :n].tolist()
        self.forget(m, pages)
        if any(self.pool.refcount(m, page) > 1 for page in pages):
            return False
        held = self.whole[m][pages]
        self.pool.decref(m, pages)
        self.table[m, slot, :n] = fresh = self.pool.alloc(m, n)
        self.whole[m][fresh] = held
        return self.scattered(m, slot) < slabs

    def scattered(self, m: int, slot: int) -> int:
        """Slabs that the slot's pages lie in beyond the fewest that could hold them."""
        pages, size = self.table[m, slot, : self.num_pages[m, slot]], self.pool.pages_per_slab[m]
        return len(np.unique(pages // size)) - -(-len(pages) // size)

    # -- prefix cache ----------------------------------------------------------------------------------------------

    def chain(self, m: int, tokens: np.ndarray) -> list[int]:
        """Cache keys of all full pages of `tokens` for model m at its current weights."""
        return chain_hashes(root_hash(m, self.versions[m]), tokens, self.page_size)

    def find_prefix(self, m: int, keys: list[int], tokens: np.ndarray) -> list[int]:
        """Cached pages of the longest known prefix of `tokens`; the last token is always left to compute."""
        cached, size = self._cached[m], self.page_size
        hits: list[int] = []
        for i, key in enumerate(keys[: (len(tokens) - 1) // size]):
            entry = cached.get(key)
            if entry is None or entry.tokens != tokens[i * size : (i + 1) * size].tobytes():
                break
            hits.append(entry.page)
        return hits

    def attach_prefix(self, m: int, slot: int, keys: list[int], hits: list[int]) -> None:
        """Let an empty slot share the pages `hits` that `find_prefix` found for `keys`."""
        for key in keys[: len(hits)]:
            self._cached[m].move_to_end(key)
        self.pool.incref(m, hits)
        self.grow(m, slot, hits)
        self.kv_len[m, slot] = len(hits) * self.page_size
        self.stats.hit_tokens += len(hits) * self.page_size

    def publish_prefix(self, m: int, slot: int, keys: list[int], tokens: np.ndarray) -> None:
        """Enter the slot's computed full pages of `tokens` into the cache, which holds a reference of its own."""
        cached, size = self._cached[m], self.page_size
        full = min(len(keys), int(self.kv_len[m, slot]) // size)
        for i, (key, page) in enumerate(zip(keys[:full], self.table[m, slot, :full].tolist(), strict=True)):
            if key not in cached:
                self.pool.incref(m, [page])
                cached[key] = CachedPage(page, tokens[i * size : (i + 1) * size].tobytes())

    def forget(self, m: int, pages: list[int]) -> None:
        """Take `pages` out of the prefix cache if they are in it."""
        gone = set(pages)
        for key in [k for k, entry in self._cached[m].items() if entry.page in gone]:
            self.pool.decref(m, [self._cached[m].pop(key).page])

    def clear_prefixes(self, m: int) -> None:
        self.pool.decref(m, [entry.page for entry in self._cached[m].values()])
        self._cached[m].clear()

    def bump_version(self, m: int) -> None:
        """The weights of part m changed: nothing computed by it may be reused, not even by running sequences."""
        self.versions[m] += 1
        self.clear_prefixes(m)
        for slot in np.nonzero(self.kv_len[m] + self.num_pages[m])[0]:
            self.drop(m, int(slot))

    def room(self, m: int) -> int:
        """Pages that model m can get without taking anything from a sequence."""
        return self.pool.available(m) + sum(self.pool.refcount(m, e.page) == 1 for e in self._cached[m].values())

    def _evict_one(self, wanting: int) -> bool:
        """Drop the least recently used cached page that no sequence holds, from the model that caches most bytes on
        the device of model `wanting`."""
        mine = np.flatnonzero(self.device_group == self.device_group[wanting]).tolist()
        for m in sorted(mine, key=lambda m: -len(self._cached[m]) * self.page_bytes[m]):
            for key, entry in self._cached[m].items():
                if self.pool.refcount(m, entry.page) == 1:
                    del self._cached[m][key]
                    self.pool.decref(m, [entry.page])
                    self.stats.evicted_pages += 1
                    return True
        return False

    def leaked_pages(self) -> int:
        """Pages in use that neither a slot nor the cache accounts for; 0 unless there is a bug."""
        held: list[set[int]] = [{entry.page for entry in c.values()} for c in self._cached]
        for m in range(self.num_parts):
            for slot in np.nonzero(self.num_pages[m])[0]:
                held[m].update(self.table[m, slot, : self.num_pages[m, slot]].tolist())
        return sum(self.pool.used(m) - len(held[m]) for m in range(self.num_parts))
