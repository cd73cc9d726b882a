"""The memory behind the page tables: models on one device share an arena of slabs, every device has its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from roro_fast.engine.pages import PagePool
from roro_fast.errors import ConfigError
from roro_fast.models.decoder import Decoder
from roro_fast.ops import native


class Pools:
    """The page pools of several devices behind the interface of one; `where[m]` is (pool, number within it)."""

    def __init__(self, pools: Sequence[PagePool], where: Sequence[tuple[int, int]]) -> None:
        self._of = [(pools[p], k) for p, k in where]

    @property
    def pages_per_slab(self) -> list[int]:
        return [pool.pages_per_slab[k] for pool, k in self._of]

    def alloc(self, model: int, n: int) -> list[int]:
        pool, k = self._of[model]
        return pool.alloc(k, n)

    def incref(self, model: int, pages: Sequence[int]) -> None:
        pool, k = self._of[model]
        pool.incref(k, pages)

    def decref(self, model: int, pages: Sequence[int]) -> None:
        pool, k = self._of[model]
        pool.decref(k, pages)

    def refcount(self, model: int, page: int) -> int:
        pool, k = self._of[model]
        return pool.refcount(k, page)

    def available(self, model: int) -> int:
        pool, k = self._of[model]
        return pool.available(k)

    def used(self, model: int) -> int:
        pool, k = self._of[model]
        return pool.used(k)


def device_groups(models: Sequence[Decoder]) -> list[int]:
    """Number of each model's device in order of appearance: models of one number share memory."""
    devices = list(dict.fromkeys(m.device for m in models))
    return [devices.index(m.device) for m in models]


@dataclass(frozen=True, slots=True)
class Part:
    """Layers whose keys and values are kept together: those of a model, or where models share their first layers, the
    shared ones, with `state` elements of residual stream a token, and each model's own, of which there may be none."""

    device: torch.device
    dtype: torch.dtype
    layers: int
    kv_heads: int
    head_dim: int
    state: int = 0

    @property
    def rows(self) -> int:
        """Layers a page has room for: the residual stream takes that of whole ones, so that slabs stay small."""
        return self.layers + -(-self.state // (2 * self.kv_heads * self.head_dim))

    def page_bytes(self, page_size: int) -> int:
        return self.rows * 2 * page_size * self.kv_heads * self.head_dim * self.dtype.itemsize


def parts_of(models: Sequence[Decoder], depth: int) -> list[Part]:
    """A part for each model; where their first `depth` layers are shared, one more for these."""
    configs = [(m, m.config) for m in models]
    parts = [Part(m.device, m.dtype, c.num_layers - depth, c.num_kv_heads, c.head_dim) for m, c in configs]
    if depth:
        first, c = configs[0]
        parts.append(Part(first.device, first.dtype, depth, c.num_kv_heads, c.head_dim, c.hidden_size))
    return parts


class Arena:
    """`pages[c]` [pages, layers, 2, page_size, Hkv, D] of each part, and the `pool` that hands their numbers out:
    that of the part's device, `pools[c]` with the part's number there.

    kv_bytes: per device. depth: first layers that the models share. A part is the model of its number; the shared
    layers come last, with `states` [pages, page_size, H]. whole[c]: all that pages hold. capacity[c]: pages, when part
    c has the whole arena of its device. scratch[c]: one page more, which no sequence ever holds: padded rows of a CUDA
    graph write there.
    """

    def __init__(self, models: Sequence[Decoder], kv_bytes: int, page_size: int, depth: int = 0) -> None:
        parts = parts_of(models, depth)
        self.page_bytes = [p.page_bytes(page_size) for p in parts]
        self.group = device_groups(models) + [0] * (len(parts) - len(models))
        self.capacity = [0] * len(parts)
        self.whole = [torch.empty(0)] * len(parts)
        self.slab_bytes = [0] * len(parts)
        pools, where = [], [(0, 0)] * len(parts)
        for g in range(max(self.group) + 1):
            mine = [c for c, of in enumerate(self.group) if of == g]
            slab = math.lcm(*(self.page_bytes[c] or 1 for c in mine))
            num_slabs = kv_bytes // slab
            if num_slabs < 1:
                raise ConfigError(f"engine.kv_bytes: {kv_bytes} is smaller than one slab of {slab} bytes; raise it")
            memory = torch.empty((num_slabs + 1) * slab, dtype=torch.uint8, device=parts[mine[0]].device)
            native.prefer_large_pages(memory)
            per_slab = [slab // self.page_bytes[c] if self.page_bytes[c] else 1 for c in mine]
            for k, c in enumerate(mine):
                p = parts[c]
                self.capacity[c] = num_slabs * per_slab[k]
                self.slab_bytes[c] = slab
                if p.layers:
                    self.whole[c] = memory.view(p.dtype).view(-1, p.rows, 2, page_size, p.kv_heads, p.head_dim)
                where[c] = g, k
            pools.append(PagePool(num_slabs, per_slab))
        self.pages = list(self.whole)
        if depth:
            self.states = _states(self.whole[-1], depth, page_size, parts[-1].state)
            self.pages[-1] = self.whole[-1][:, :depth]
            empty = self.pages[-1][:, :0]  # a model without layers of its own goes by the shared pages
            self.pages = [pages if p.layers else empty for pages, p in zip(self.pages, parts, strict=True)]
        self.scratch = list(self.capacity)
        self.pools = [(pools[p], k) for p, k in where]
        self.pool: PagePool | Pools = pools[0] if len(pools) == 1 else Pools(pools, where)


def _states(whole: torch.Tensor, depth: int, page_size: int, width: int) -> torch.Tensor:
    """The residual stream at the end of each page; [pages, page_size, width], a view."""
    flat = whole.view(len(whole), -1)
    begin = depth * (flat.shape[1] // whole.shape[1])
    return flat[:, begin : begin + page_size * width].view(len(whole), page_size, width)
