"""One model's turn in an iteration: schedule its rows, run them, sample, and send what was sampled to the host.

`launch` only queues work on the model's device. On a GPU each model has a stream of its own, so that the models of a
pool run at the same time and the host waits for all of them at once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from roro_fast.engine.kv import KVCache
from roro_fast.engine.memory import Memory
from roro_fast.engine.rng import uniforms
from roro_fast.engine.slots import Slots
from roro_fast.engine.transfer import Download, upload
from roro_fast.models.decoder import Decoder
from roro_fast.models.inference import PagedBatch, infer
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
        self, models: list[Decoder], slots: Slots, kv: KVCache, memory: Memory, vocab_size: int, max_tokens: int
    ) -> None:
        self.models, self.slots, self.kv, self.memory = models, slots, kv, memory
        self.vocab_size, self.max_tokens = vocab_size, max_tokens
        self._streams = [torch.cuda.Stream(m.device) if m.device.type == "cuda" else None for m in models]
        for stream in filter(None, self._streams):
            stream.wait_stream(torch.cuda.current_stream(stream.device))  # the KV arena and the weights are ready
        self._marks = [mark(f"forward/{m}") for m in range(len(models))]

    def on(self, m: int) -> AbstractContextManager[object]:
        """Work queued inside goes to the stream of model m, after its forward."""
        stream = self._streams[m]
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def launch(self, m: int, rows: np.ndarray) -> Launched | None:
        """Queue model m's forward over the missing tokens of `rows`, and the draw of their next tokens.

        None when no row could get memory.
        """
        with self.on(m):
            preempted = self.kv.stats.preemptions
            with mark("schedule"):
                rows, start, count, keys = self.memory.schedule(m, rows, self.max_tokens)
                if not len(rows):
                    return None
                batch = self._paged(m, rows, start, count)
            if self.kv.stats.preemptions > preempted:
                self._after_all(m)
            with self._marks[m]:
                launched = self._run(m, rows, start, count, batch)
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

    def _run(self, m: int, rows: np.ndarray, start: np.ndarray, count: np.ndarray, batch: PagedBatch) -> Launched:
        slots, model, context = self.slots, self.models[m], start + count
        hidden = infer(model, batch)
        self.kv.kv_len[m, rows] = context
        slots.forward_tokens[m, rows] += count
        slots.forward_pairs[m, rows] += count * context - count * (count - 1) / 2
        whole = context == slots.length[rows]
        ends, rows = np.cumsum(count)[whole] - 1, rows[whole]
        truncated = bool(slots.top_k[rows].any() or (slots.top_p[rows] < 1).any())
        draws = uniforms(slots.key[rows], slots.length[rows] + slots.rewrites[rows] * DRAW_STRIDE)
        arrays = (ends, draws, slots.temperature[rows], slots.top_k[rows], slots.top_p[rows])
        last, u, temperature, top_k, top_p = upload(arrays, model.device)
        hidden = hidden[last]
        logits = model.logits(hidden)[:, : self.vocab_size]
        with mark("sample"):
            sampled = sample_step(logits, u, temperature, *((top_k, top_p) if truncated else (None, None)))
            return Launched(m, rows, hidden, sampled, Download(sampled))

    def _paged(self, m: int, rows: np.ndarray, start: np.ndarray, count: np.ndarray) -> PagedBatch:
        kv, context = self.kv, start + count
        table = kv.table[m, rows, : kv.pages_for(int(context.max()))]
        batch: CatchUpBatch = plan(self.slots.tokens, rows, start, count, kv.table[m], kv.page_size)
        prefix = shared_prefixes(table, start, kv.page_size) or ()
        parts = (batch.ids, batch.positions, batch.slots, table, context, batch.cu_seqlens)
        ids, positions, where, pages, lens, cu, *shared = upload((*parts, *prefix), self.models[m].device)
        groups = PrefixGroups(*shared) if shared else None
        return PagedBatch(ids, positions, where, kv.pages[m], pages, lens, cu, groups)
