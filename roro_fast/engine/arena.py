"""The memory behind the page tables: models on one device share an arena of slabs, every device has its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from roro_fast.engine.pages import PagePool
from roro_fast.errors import ConfigError
from roro_fast.models.decoder import Decoder


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


class Arena:
    """`pages[m]` [pages, layers, 2, page_size, Hkv, D] of each model, and the `pool` that hands their numbers out.

    kv_bytes: per device. capacity[m]: pages, when model m has the whole arena of its device. scratch[m]: one page more,
    which no sequence ever holds: padded rows of a CUDA graph write there.
    """

    def __init__(self, models: Sequence[Decoder], kv_bytes: int, page_size: int) -> None:
        self.page_bytes = [m.config.kv_bytes_per_token(m.dtype.itemsize) * page_size for m in models]
        self.group = device_groups(models)
        self.capacity = [0] * len(models)
        self.pages = [torch.empty(0)] * len(models)
        pools, where = [], [(0, 0)] * len(models)
        for g in range(max(self.group) + 1):
            mine = [m for m, of in enumerate(self.group) if of == g]
            slab = math.lcm(*(self.page_bytes[m] for m in mine))
            num_slabs = kv_bytes // slab
            if num_slabs < 1:
                raise ConfigError(f"engine.kv_bytes: {kv_bytes} is smaller than one slab of {slab} bytes; raise it")
            memory = torch.empty((num_slabs + 1) * slab, dtype=torch.uint8, device=models[mine[0]].device)
            for k, m in enumerate(mine):
                c = models[m].config
                self.capacity[m] = num_slabs * (slab // self.page_bytes[m])
                shape = c.num_layers, 2, page_size, c.num_kv_heads, c.head_dim
                self.pages[m] = memory.view(models[m].dtype).view(-1, *shape)
                where[m] = g, k
            pools.append(PagePool(num_slabs, [slab // self.page_bytes[m] for m in mine]))
        self.scratch = list(self.capacity)
        self.pool: PagePool | Pools = pools[0] if len(pools) == 1 else Pools(pools, where)
