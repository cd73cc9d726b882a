"""The engine's approximate catch-up: project the KV of missing tokens that another model of the pool has seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from roro_fast.engine.kv import KVCache
from roro_fast.engine.projection.artifact import KVProjection
from roro_fast.engine.projection.gate import maps_on, rotary
from roro_fast.engine.slots import Slots
from roro_fast.engine.trajectory import Trajectory
from roro_fast.engine.transfer import upload
from roro_fast.errors import ConfigError
from roro_fast.models.decoder import Decoder
from roro_fast.ops.kv_handoff import plan
from roro_fast.ops.kv_project import LinearMaps, Rotary, kv_project

Projections = Mapping[tuple[int, int], KVProjection]


class _Route(NamedTuple):
    source: int
    maps: LinearMaps
    flops: float  # per token


class ProjectedCatchUp:
    """Fills the KV a model is missing before its forward is scheduled; the last token always runs for real.

    What is projected never enters the prefix cache, and pages from there do not replace it, so that an answer depends
    on its own sequence only. Where memory is short or no source has seen the tokens, the exact catch-up does it all.
    After `StepEngine.update_weights` of either model a map is not used any more. Arrays are indexed by slot.
    """

    def __init__(self, models: list[Decoder], kv: KVCache, slots: Slots, projections: Projections) -> None:
        self.kv, self.slots = kv, slots
        self._rotary = [rotary(m) for m in models]
        self._routes: list[list[_Route]] = [[] for _ in models]
        for (j, m), projection in projections.items():
            if j == m or not (0 <= j < len(models) and 0 <= m < len(models)):
                raise ConfigError(f"projections: ({j}, {m}) is no pair of different models of a pool of {len(models)}")
            if models[j].device != models[m].device:
                raise ConfigError(f"projections: models {j} and {m} are on different devices; move them to one")
            projection.accept().check_models(models[j], models[m])
            maps = maps_on(projection.maps, models[m])
            self._routes[m].append(_Route(j, maps, maps.flops_per_token))
        self._versions = list(kv.versions)
        self._tokens = np.zeros((len(models), len(slots.phase)), np.int64)
        self._flops = np.zeros(len(slots.phase))
        self._approximate = np.zeros(len(slots.phase), bool)

    def admit(self, s: int) -> None:
        self._tokens[:, s] = 0
        self._flops[s] = 0
        self._approximate[s] = False

    def fork(self, source: int, target: int) -> None:
        """The fork shares whatever approximate KV its source has; what that cost is the source's."""
        self._approximate[target] = self._approximate[source]

    def label(self, s: int, t: Trajectory) -> None:
        """Say in a finished trajectory whether its KV was approximate, and count what projecting cost."""
        t.meta["approximate"] = bool(self._approximate[s])
        t.meta["projected_tokens"] = self._tokens[:, s].tolist()  # per model whose KV was filled
        t.meta["projection_flops"] = float(self._flops[s])
        t.cost.total_flops += float(self._flops[s])

    def project(self, m: int, rows: np.ndarray, meet: Callable[[], None]) -> None:
        """Give model m the KV of all but the last token of `rows`, as far as another model has them.

        `meet` makes the streams of all models wait for each other: the source's forward must be done, and its pages
        must not be given away before they are read.
        """
        kv, slots = self.kv, self.slots
        for source, maps, flops in self._routes[m]:
            if [kv.versions[source], kv.versions[m]] != [self._versions[source], self._versions[m]]:
                continue
            upto = np.minimum(kv.kv_len[source, rows], slots.length[rows] - 1)
            ahead = (upto > kv.kv_len[m, rows]) & ~slots.paused[rows]
            ready = [self._reserve(m, s, n) for s, n in zip(rows[ahead].tolist(), upto[ahead].tolist(), strict=True)]
            mine, upto = rows[ahead][ready], upto[ahead][ready]
            if not len(mine):
                continue
            start = kv.kv_len[m, mine]
            count = upto - start
            read = plan(slots.tokens, mine, start, count, kv.table[source], kv.page_size)
            write = plan(slots.tokens, mine, start, count, kv.table[m], kv.page_size)
            pages = kv.pages[source], kv.pages[m]
            at = upload((read.slots, write.slots, write.positions), pages[1].device)
            ropes: tuple[Rotary, Rotary] = self._rotary[source], self._rotary[m]
            meet()
            kv_project(pages[0], at[0], ropes[0], pages[1], at[1], ropes[1], at[2], maps)
            meet()
            kv.kv_len[m, mine] = upto
            self._tokens[m, mine] += count
            self._flops[mine] += count * flops
            self._approximate[mine] = True

    def _reserve(self, m: int, s: int, upto: int) -> bool:
        """Private pages for tokens [kv_len, upto) of slot s. False if memory is short; nobody has to give any back."""
        kv = self.kv
        if kv.shared[m, s] and not kv.make_writable(m, s, int(kv.kv_len[m, s]), upto):
            return False
        need = int(kv.missing(m, np.array([s]), np.array([upto]))[0])
        pages = kv.alloc(m, need) if need else []
        if len(pages) == need:
            kv.grow(m, s, pages)
        return len(pages) == need
