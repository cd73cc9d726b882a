"""Which rows a forward can take, and where their pages come from when memory is short.

The ladder: free pages, unused prefix-cache pages, KV that a sequence holds for models it is not using, then preemption
of the youngest sequence (its KV is dropped and recomputed later; its tokens stay). A preempted sequence holds nothing
until it resumes, the oldest running one can take from all others and fits by admission: there is always progress.
Layers that all models share are always in use: only preemption takes their KV; that of the last sequence left is moved
together where it lies scattered.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from roro_fast.engine.kv import KVCache
from roro_fast.engine.slots import Phase, Slots


class Memory:
    """Scheduling decisions that depend on pages. `taken()` is called when a sequence is preempted, before its pages
    are used: a forward in flight may still be writing them."""

    def __init__(self, kv: KVCache, slots: Slots) -> None:
        self.kv, self.slots = kv, slots
        self.taken: Callable[[], None] = lambda: None

    def schedule(
        self, m: int, rows: np.ndarray, max_tokens: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, list[int]]]:
        """(rows, start, count, prefix keys by slot) of this iteration's forward of part m, pages reserved.

        Decode rows come first, longer ones by age; a row that does not fit the token budget is chunked or waits. Where
        first layers are shared, a model can go as far as these have come, and they have nothing to do for a row that
        they have seen to its end.
        """
        kv, slots, trunk = self.kv, self.slots, self.kv.trunk
        if slots.paused[rows].any():
            rows = self._resume(m, rows) if trunk in (None, m) else rows[~slots.paused[rows]]
        if trunk not in (None, m):
            rows = rows[kv.kv_len[trunk, rows] > 0]
            if kv.home(m) == trunk:
                rows = rows[kv.kv_len[trunk, rows] == slots.length[rows]]
                return rows, slots.length[rows] - 1, np.ones(len(rows), np.int64), {}
        rows, keys = self._touch(m, rows)
        if m == trunk:
            rows = rows[kv.kv_len[m, rows] < slots.length[rows]]
        # Logits come from running the last token. A fork may hold its KV already: an equal write, on a page of its own.
        known = rows[kv.kv_len[m, rows] == slots.length[rows]]
        kv.kv_len[m, known] -= 1
        kv.shared[m, known] = True
        start = kv.kv_len[m, rows]
        need = (slots.length[rows] if trunk in (None, m) else kv.kv_len[trunk, rows]) - start
        if not keys and len(rows) <= max_tokens and (need == 1).all():
            ok = self._reserve(m, rows, start, start + 1)
            return (rows, start, need, {}) if ok.all() else (rows[ok], start[ok], need[ok], {})
        order = np.lexsort((slots.arrival[rows], need > 1))
        rows, start, need = rows[order], start[order], need[order]
        if trunk not in (None, m) and (need <= 0).any():  # waits for the shared layers
            rows, start, need = rows[need > 0], start[need > 0], need[need > 0]
        before = np.cumsum(need) - need
        count = np.minimum(need, max_tokens - before)
        fits = count > 0
        rows, start, count = rows[fits], start[fits], count[fits]
        ok = self._reserve(m, rows, start, start + count)
        served = set(rows[ok].tolist()) if keys else ()
        return rows[ok], start[ok], count[ok], {s: k for s, k in keys.items() if s in served}

    def _touch(self, m: int, rows: np.ndarray) -> tuple[np.ndarray, dict[int, list[int]]]:
        """First contact of sequences with model m: share cached prefixes, and let one of several equals go first."""
        kv, slots = self.kv, self.slots
        fresh = kv.num_pages[m, rows] == 0
        if not fresh.any():
            return rows, {}
        keys: dict[int, list[int]] = {}
        leading: set[int] = set()
        wait: set[int] = set()
        for s in rows[fresh][np.argsort(slots.arrival[rows[fresh]])].tolist():
            tokens = slots.tokens[s, : slots.length[s]]
            chain = kv.chain(m, tokens)
            hits = kv.find_prefix(m, chain, tokens)
            if len(hits) < (len(tokens) - 1) // kv.page_size:
                if chain[len(hits)] in leading:  # being computed in this very forward: take it from the cache next time
                    wait.add(s)
                    continue
                leading.add(chain[len(hits)])
            kv.attach_prefix(m, s, chain, hits)
            if hits and not slots.forward_tokens[m, s]:
                slots.charge_cached(m, s, len(hits) * kv.page_size)
            keys[s] = chain
        return (rows[~np.isin(rows, list(wait))] if wait else rows), keys

    def _reserve(self, m: int, rows: np.ndarray, start: np.ndarray, upto: np.ndarray) -> np.ndarray:
        """Pages for tokens [0, upto) of each row, private where [start, upto) is written; bool mask of rows served."""
        kv, slots = self.kv, self.slots
        need = kv.missing(m, rows, upto)
        total = int(need.sum())
        calm = not kv.shared[m, rows].any()
        if calm and total == 0:
            return np.ones(len(rows), bool)
        pages = kv.alloc(m, total) if calm else []
        if pages:
            at = 0
            for i in np.nonzero(need)[0]:
                kv.grow(m, int(rows[i]), pages[at : at + need[i]])
                at += int(need[i])
            return np.ones(len(rows), bool)
        ok = np.zeros(len(rows), bool)
        for i in np.argsort(slots.arrival[rows], kind="stable"):
            s = int(rows[i])
            # A younger row may have lost its KV to an older one a moment ago; its plan is void.
            if kv.kv_len[m, s] == start[i] and not slots.paused[s]:
                ok[i] = self._serve(m, s, int(start[i]), int(upto[i]))
        return ok

    def _resume(self, m: int, rows: np.ndarray) -> np.ndarray:
        """`rows` without those still preempted; they come back by age when there is room to spare, or nobody runs."""
        kv, slots = self.kv, self.slots
        room = kv.room(m)
        paused = rows[slots.paused[rows]]
        for s in paused[np.argsort(slots.arrival[paused])]:
            running = int(((slots.phase != Phase.FREE) & ~slots.paused).sum())
            need = kv.pages_for(int(slots.length[s]))
            if m == kv.trunk:  # its writer's own layers will want room too
                need += -(-need * kv.page_bytes[slots.writer[s]] // kv.page_bytes[m])
            if running and room < need + running:
                break
            slots.paused[s] = False
            room -= need
        return rows[~slots.paused[rows]]

    def _serve(self, m: int, s: int, start: int, upto: int) -> bool:
        kv = self.kv
        while True:
            if not kv.shared[m, s] or kv.make_writable(m, s, start, upto):
                n = int(kv.missing(m, np.array([s]), np.array([upto]))[0])
                pages = kv.alloc(m, n) if n else []
                if len(pages) == n:
                    kv.grow(m, s, pages)
                    return True
            if not self._relieve(m, s):
                return False

    def _relieve(self, m: int, s: int) -> bool:
        """Take pages from somebody, least painful first. False when nothing is left to take from younger sequences."""
        kv, slots = self.kv, self.slots
        held = (kv.num_pages > 0) & (kv.device_group == kv.device_group[m])[:, None]  # elsewhere it would not help
        idle = held & (np.arange(kv.num_parts)[:, None] != slots.writer)
        idle[0] &= slots.phase != Phase.SCOUT
        if kv.trunk is not None:
            idle[kv.trunk] = False
        idle[m, s] = False
        if idle.any():
            models, owners = np.nonzero(idle)
            youngest = int(np.argmax(slots.arrival[owners]))
            kv.drop(int(models[youngest]), int(owners[youngest]))
            kv.stats.idle_drops += 1
            return True
        others = held.any(0) & (slots.arrival > slots.arrival[s])
        if not others.any():
            own = [j for j in range(kv.num_parts) if j not in (m, kv.trunk) and held[j, s]]
            for j in own:
                kv.drop(j, s)
            return bool(own) or (kv.trunk not in (None, m) and kv.compact(kv.trunk, s))
        victim = int(np.argmax(np.where(others, slots.arrival, -1)))
        kv.free(victim)
        slots.paused[victim] = True
        kv.stats.preemptions += 1
        self.taken()
        return True
