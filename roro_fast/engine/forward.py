"""One model's turn in an iteration: schedule its rows, run them, sample, and send what was sampled to the host.

`launch` only queues work on the model's device. On a GPU each model has a stream of its own, so that the models of a
pool run at the same time and the host waits for all of them at once. Where the models share their first layers,
`launch_shared` runs these for all rows before any model begins, and all work is queued on one stream.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from roro_fast.engine.graphs import DecodeGraphs, DecodeRows
from roro_fast.engine.kv import KVCache
from roro_fast.engine.memory import Memory
from roro_fast.engine.projection.catch_up import ProjectedCatchUp
from roro_fast.engine.rng import uniforms
from roro_fast.engine.slots import Slots
from roro_fast.engine.transfer import Download, upload
from roro_fast.models.decoder import Decoder
from roro_fast.models.inference import Cut, PagedBatch, infer, logits
from roro_fast.models.trunk import trunk_params
from roro_fast.ops.kv_handoff import CatchUpBatch, plan
from roro_fast.ops.paged_attention import PrefixGroups, shared_prefixes
from roro_fast.ops.sample_step import SampledStep, sample_step
from roro_fast.profiling import mark

DRAW_STRIDE = 1 << 32  # separates the token draws of a rewritten step from those of its discarded draft


@dataclass(slots=True)
class Launched:
    """A forward in flight. `rows` [N] slots whose last token it runs, `hidden` [N, H] their states and `sampled` their
    next tokens, on the model's device; `fetched` brings the latter to the host. N may be 0: prompts still in chunks."""

    model: int
    rows: np.ndarray
    hidden: torch.Tensor
    sampled: SampledStep
    fetched: Download


class Forward:
    """Runs the models of a pool over the slots' missing tokens."""

    def __init__(
        self,
        models: list[Decoder],
        slots: Slots,
        kv: KVCache,
        memory: Memory,
        *,
        vocab_sizes: list[int],
        max_tokens: int,
        graph_rows: int = 0,
        depth: int = 0,
    ) -> None:
        self.models, self.slots, self.kv, self.memory = models, slots, kv, memory
        self.vocab_sizes, self.max_tokens, self.depth = vocab_sizes, max_tokens, depth
        self.projecting: ProjectedCatchUp | None = None
        self._streams = [torch.cuda.Stream(m.device) if m.device.type == "cuda" else None for m in models]
        if depth:
            self._streams = self._streams[:1] * kv.num_parts
        for stream in filter(None, self._streams):
            stream.wait_stream(torch.cuda.current_stream(stream.device))  # the KV arena and the weights are ready
        self._graphs = [self._graphs_of(m, graph_rows) if graph_rows else None for m in range(len(models))]
        self._name_flops()
        self.name_ranges()

    def _name_flops(self) -> None:
        """What a token costs in each part: 2 per parameter, and 4 a layer and element of the heads for every pair."""
        for m, model in enumerate(self.models):
            c, shared = model.config, trunk_params(model, self.depth)
            self.slots.flops_per_token[m] = 2.0 * (c.num_params - shared)
            self.slots.flops_per_token[-1] = 2.0 * shared
            for part, layers in ((m, range(self.depth, c.num_layers)), (-1, range(self.depth))):
                near = sum(bool(c.windows[i]) for i in layers) if c.windows else 0
                self.slots.flops_per_pair[part] = c.flops_per_pair * (len(layers) - near)
                self.slots.window_flops_per_pair[part] = c.flops_per_pair * near
                self.slots.windows[part] = max(c.windows, default=0) if near else 0

    def name_ranges(self) -> None:
        """Look the profiler's ranges up, once: per model one for decode batches, one for those with catch-up rows."""
        names = [*range(len(self.models)), "shared"][: self.kv.num_parts]
        self._decode_marks = [mark(f"forward/{name}") for name in names]
        self._catch_up_marks = [mark(f"catch-up/{name}") for name in names]

    def _graphs_of(self, m: int, rows: int) -> DecodeGraphs:
        kv, model = self.kv, self.models[m]
        return DecodeGraphs(
            model,
            kv.pages[m],
            kv.page_size,
            kv.scratch[m],
            self.vocab_sizes[m],
            max_rows=rows,
            max_pages=kv.table.shape[2],
            capture=model.device.type == "cuda",
        )

    def on(self, m: int) -> AbstractContextManager[object]:
        """Work queued inside goes to the stream of model m, after its forward."""
        stream = self._streams[m]
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def launch(self, m: int, rows: np.ndarray) -> Launched | None:
        """Queue model m's forward over the missing tokens of `rows`, and the draw of their next tokens.

        None when no row could get memory.
        """
        with self.on(m):
            if self.projecting is not None:
                self.projecting.project(m, rows, lambda: self._meet(m))
            preempted = self.kv.stats.preemptions
            with mark("schedule"):
                rows, start, count, keys = self.memory.schedule(m, rows, self.max_tokens)
                if not len(rows):
                    return None
            if self.kv.stats.preemptions > preempted:
                self._after_all(m)
            launched = self._run(m, rows, start, count)
        for s, chain in keys.items():
            self.kv.publish_prefix(m, s, chain, self.slots.tokens[s])
        return launched

    def _after_all(self, m: int) -> None:
        """Let model m's stream wait for the others: it was given pages that one of them may still be writing."""
        mine = self._streams[m]
        if mine is not None:
            for other in self._streams:
                if other is not None and other is not mine:
                    mine.wait_stream(other)

    def _meet(self, m: int) -> None:
        """Let all streams wait for each other."""
        self._after_all(m)
        for other in filter(None, self._streams):
            if (mine := self._streams[m]) is not None and other is not mine:
                other.wait_stream(mine)

    def launch_shared(self, rows: np.ndarray) -> bool:
        """Queue the forward of the shared layers over what they have not seen of `rows`. False when it is nothing."""
        c, kv = len(self.models), self.kv
        with self.on(0):
            with mark("schedule"):
                rows, start, count, keys = self.memory.schedule(c, rows, self.max_tokens)
                if not len(rows):
                    return False
            table, context, batch, prefix = self._plan(c, rows, start, count)
            self.slots.forward_tokens[c, rows] += count
            kv.kv_len[c, rows] = context
            with (self._decode_marks if len(rows) == len(batch.ids) else self._catch_up_marks)[c]:
                sent = upload((*batch[:3], table, context, batch.cu_seqlens, *(prefix or ())), kv.states.device)
                ids, positions, where, pages, lens, cu = sent[:6]
                groups = PrefixGroups(*sent[6:]) if prefix else None
                cut = Cut(self.depth, kv.states, where, True)
                paged = PagedBatch(ids, positions, where, kv.pages[c], pages, lens, cu, groups, cut=cut)
                infer(self.models[0], paged)
        for s, chain in keys.items():
            kv.publish_prefix(c, s, chain, self.slots.tokens[s])
        return True

    def _plan(
        self, c: int, rows: np.ndarray, start: np.ndarray, count: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, CatchUpBatch, tuple[np.ndarray, np.ndarray, np.ndarray] | None]:
        """(page table, context, batch, shared prefixes) of a forward of part c, which is charged for."""
        kv, context, home = self.kv, start + count, self.kv.home(c)
        table = kv.table[home, rows, : kv.pages_for(int(context.max()))]
        batch = plan(self.slots.tokens, rows, start, count, kv.table[home], kv.page_size)
        self.slots.charge(c, rows, count, context)
        alone = home != c or len(rows) == 1
        return table, context, batch, None if alone else shared_prefixes(table, start, kv.page_size)

    def _run(self, m: int, rows: np.ndarray, start: np.ndarray, count: np.ndarray) -> Launched:
        slots, kv = self.slots, self.kv
        table, context, batch, prefix = self._plan(m, rows, start, count)
        slots.forward_tokens[m, rows] += context - np.minimum(kv.kv_len[m, rows], start)
        kv.kv_len[m, rows] = context
        residuals = None
        if kv.trunk is not None:
            at = batch if kv.home(m) != m else plan(slots.tokens, rows, start, count, kv.table[kv.trunk], kv.page_size)
            residuals = at.slots
        whole = context == slots.length[rows]
        ends, rows = np.cumsum(count)[whole] - 1, rows[whole]
        draws = uniforms(slots.key[rows], slots.length[rows] + slots.rewrites[rows] * DRAW_STRIDE)
        settings = draws, slots.temperature[rows], slots.top_k[rows], slots.top_p[rows]
        graphs, decoding = self._graphs[m], len(rows) == len(batch.ids)
        with (self._decode_marks if decoding else self._catch_up_marks)[m]:
            if graphs is not None and decoding and len(rows) <= graphs.max_rows:
                decode = DecodeRows(batch.ids, batch.positions, batch.slots, table, context, *settings, prefix)
                hidden, sampled = graphs.run(decode)
            else:
                hidden, sampled = self._eager(m, batch, table, context, prefix, ends, settings, residuals)
            return Launched(m, rows, hidden, sampled, Download(sampled))

    def _eager(
        self,
        m: int,
        batch: CatchUpBatch,
        table: np.ndarray,
        context: np.ndarray,
        prefix: tuple[np.ndarray, ...] | None,
        ends: np.ndarray,
        settings: tuple[np.ndarray, ...],
        residuals: np.ndarray | None,
    ) -> tuple[torch.Tensor, SampledStep]:
        """Hidden states and samples of the tokens `ends` of the batch."""
        model, (draws, temperature, top_k, top_p) = self.models[m], settings
        parts = batch.ids, batch.positions, batch.slots, table, context, batch.cu_seqlens
        limits = (top_k, top_p) if top_k.any() or (top_p < 1).any() else ()
        sent = upload(
            (*parts, ends, draws, temperature, *limits, *(prefix or ()), *(() if residuals is None else (residuals,))),
            model.device,
        )
        ids, positions, where, pages, lens, cu, last, u, heat = sent[:9]
        cut = None if residuals is None else Cut(self.depth, self.kv.states, sent.pop(), False)
        groups = PrefixGroups(*sent[-3:]) if prefix else None
        paged = PagedBatch(ids, positions, where, self.kv.pages[m], pages, lens, cu, groups, last, cut)
        hidden = infer(model, paged)
        scores = logits(model, hidden)[:, : self.vocab_sizes[m]]
        with mark("sample"):
            return hidden, sample_step(scores, u, heat, *(sent[9:11] if limits else ()))
