"""One model's turn in an iteration: schedule its rows, run them, sample, and send what was sampled to the host.

`launch` only queues work on the model's device. On a GPU each model has a stream of its own, so that the models of a
pool run at the same time and the host waits for all of them at once. Where the models share their first layers,
`launch_shared` runs these for all rows before any model begins, and all work is queued on one stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from roro_fast.engine.batching import Batch, Stage
from roro_fast.engine.graphs import StepGraphs, replayable
from roro_fast.engine.kv import KVCache
from roro_fast.engine.memory import Memory
from roro_fast.engine.padding import StepRows
from roro_fast.engine.projection.catch_up import ProjectedCatchUp
from roro_fast.engine.slots import Phase, Slots
from roro_fast.engine.transfer import Download, upload
from roro_fast.errors import ConfigError
from roro_fast.models.decoder import Decoder
from roro_fast.models.inference import Cut, PagedBatch, infer, logits
from roro_fast.models.trunk import trunk_params
from roro_fast.ops.decoder_step import Drawn, StepWeights, decoder_step, step_weights, usable
from roro_fast.ops.paged_attention import PrefixGroups, shared_prefixes
from roro_fast.ops.sample_step import SampledStep, sample_step
from roro_fast.profiling import mark

_HERE = nullcontext()  # one for all: making it would cost as much as entering it


@dataclass(slots=True)
class Launched:
    """A forward in flight. `rows` [N] slots whose last token it runs, `hidden` [N, H] their states and `sampled` their
    next tokens (and perhaps more rows), on the model's device; `fetched` brings the latter to the host. They are good
    until the model's next forward. N may be 0: prompts still in chunks."""

    model: int
    rows: np.ndarray
    hidden: torch.Tensor
    sampled: SampledStep
    fetched: Download | Drawn


class Forward:
    """Runs the models of a pool over the slots' missing tokens."""

    def __init__(
        self,
        models: list[Decoder],
        slots: Slots,
        kv: KVCache,
        memory: Memory,
        stage: Stage,
        *,
        vocab_sizes: list[int],
        graph_rows: int = 0,
        depth: int = 0,
    ) -> None:
        self.models, self.slots, self.kv, self.memory, self.stage = models, slots, kv, memory, stage
        self.vocab_sizes, self.max_tokens, self.depth = vocab_sizes, stage.tokens.shape[1], depth
        self.batcher: Any = None
        self._weights: list[StepWeights | None] = []
        self._drawn = [Drawn(len(slots.phase)) for _ in models]
        self._spans = [(model, (depth, model.config.num_layers), True) for model in models]
        if depth:
            self._spans.append((models[0], (0, depth), False))
        self.projecting: ProjectedCatchUp | None = None
        self._streams = [torch.cuda.Stream(m.device) if m.device.type == "cuda" else None for m in models]
        if depth:
            self._streams = self._streams[:1] * kv.num_parts
        memory.taken = self.settle
        for stream in filter(None, self._streams):
            stream.wait_stream(torch.cuda.current_stream(stream.device))  # the KV arena and the weights are ready
        self._graphs = [self._graphs_of(m, graph_rows) for m in range(len(models))]
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
        self._sample_mark, self._schedule_mark = mark("sample"), mark("schedule")

    def _graphs_of(self, m: int, rows: int) -> StepGraphs | None:
        kv, model = self.kv, self.models[m]
        if not rows or not replayable(model):
            return None
        return StepGraphs(
            model,
            kv.pages[m],
            kv.page_size,
            kv.scratch[m],
            self.vocab_sizes[m],
            max_rows=rows,
            max_pages=kv.table.shape[2],
            capture=model.device.type == "cuda",
        )

    def warm_up(self, context: int, *, shared: bool = False, truncated: bool = False) -> int:
        """Capture ahead of time, see `StepGraphs.warm_up`; returns how many graphs the models have together."""
        if context < 1:
            raise ConfigError(f"context: {context}; give the tokens of the longest context, at least 1")
        self.look_at_weights()
        captured = 0
        for m, graphs in enumerate(self._graphs):
            if graphs is not None:
                with self.on(m):
                    captured += graphs.warm_up(context, shared=shared, truncated=truncated)
        return captured

    def on(self, m: int) -> AbstractContextManager[object]:
        """Work queued inside goes to the stream of model m, after its forward."""
        stream = self._streams[m]
        return _HERE if stream is None else torch.cuda.stream(stream)

    def launch(self, m: int) -> Launched | None:
        """Queue model m's forward over what it has not seen of the rows that wait for it, and the draw of their next
        tokens. None when there are no such rows, or none could get memory."""
        with self.on(m):
            batch, keys = self._next(m)
            if batch is None:
                return None
            launched = self._run(m, batch)
        for s, chain in keys.items():
            self.kv.publish_prefix(m, s, chain, self.slots.tokens[s])
        return launched

    def _next(self, part: int) -> tuple[Batch | None, dict[int, list[int]]]:
        """The next forward of `part`, on the stage and with its memory, and the prefix keys by slot to be published."""
        if self.projecting is None:
            with self._schedule_mark:
                found = self.batcher.schedule(part)
                if found is not None:
                    return (Batch(*found) if found[0] else None), {}
        rows = self._waiting(part)
        if self.projecting is not None and len(rows):
            self.projecting.project(part, rows, self.settle)
        with self._schedule_mark:
            rows, start, count, keys = self.memory.schedule(part, rows, self.max_tokens)
            if not len(rows):
                return None, {}
        return Batch(*self.batcher.lay_out(part, rows, start, count)), keys

    def _waiting(self, part: int) -> np.ndarray:
        """Slots that wait for a forward of `part`."""
        slots, scout = self.slots, part in (0, self.kv.trunk)
        mine = (slots.phase == Phase.WRITE) & ((slots.writer == part) | (part == self.kv.trunk))
        return np.flatnonzero(mine | (slots.phase == Phase.SCOUT)) if scout else np.flatnonzero(mine)

    def settle(self) -> None:
        """Let all streams, the caller's too, wait for each other: memory that a forward may still use changes hands."""
        streams = list(filter(None, self._streams))
        for mine in [*streams, *(torch.cuda.current_stream(s.device) for s in streams)]:
            for other in streams:
                if other is not mine:
                    mine.wait_stream(other)

    def launch_shared(self) -> bool:
        """Queue the forward of the shared layers over what they have not seen of all rows. False when it is nothing."""
        c, kv = len(self.models), self.kv
        with self.on(0):
            batch, keys = self._next(c)
            if batch is None:
                return False
            with (self._decode_marks if batch.wanted == batch.tokens else self._catch_up_marks)[c]:
                if self._weights[c] is not None:
                    self._compute(c, batch, below=True)
                else:
                    paged, _ = self._paged(c, batch, ())
                    infer(self.models[0], paged._replace(cut=Cut(self.depth, kv.states, paged.slots, True)))
        for s, chain in keys.items():
            kv.publish_prefix(c, s, chain, self.slots.tokens[s])
        return True

    def _run(self, m: int, batch: Batch) -> Launched:
        graphs, decoding = self._graphs[m], batch.wanted == batch.tokens
        rows = self.stage.rows[0, : batch.wanted].copy()
        with (self._decode_marks if decoding else self._catch_up_marks)[m]:
            if graphs is not None and graphs.shapes.fits(batch.rows, batch.tokens, batch.wanted):
                hidden, sampled = graphs.run(self._step_rows(batch))
            elif self._weights[m] is not None:
                hidden, scores = self._compute(m, batch)
                drawn, (_, settings, numbers, _) = self._drawn[m], self.stage.tensors
                with self._sample_mark:
                    drawn.draw(scores, batch.wanted, self.vocab_sizes[m], settings, numbers, batch.truncated)
                return Launched(m, rows, hidden, drawn.sampled, drawn)
            else:
                hidden, sampled = self._eager(m, batch)
            return Launched(m, rows, hidden, sampled, Download(sampled))

    def look_at_weights(self) -> None:
        """See what has changed of the weights that C++ kernels have packed; until the next call nothing may.

        On a GPU the models' streams wait for what was queued on the caller's: weights, a router's too, may be changing.
        """
        for stream in filter(None, self._streams):
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        for graphs in filter(None, self._graphs):
            graphs.look_at_weights()
        self._weights = [step_weights(*part) if usable(part[0]) else None for part in self._spans]

    def _compute(self, part: int, b: Batch, below: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and logits of the wanted tokens of the batch on the stage, in one C++ call."""
        weights, kv = self._weights[part], self.kv
        assert weights is not None
        tokens, rows, _, pages = self.stage.tensors
        prefix = self._prefix(b)
        groups = (None, None, None) if prefix is None else tuple(map(torch.from_numpy, prefix))
        states = None if kv.trunk is None else kv.states
        return decoder_step(weights, kv.pages[part], (tokens, rows, pages), b[:4], groups, states, below)

    def _step_rows(self, b: Batch) -> StepRows:
        stage, n, k = self.stage, b.rows, b.wanted
        ids, positions, where = stage.tokens[:3, : b.tokens]
        _, lens, cu, wanted, top_k = stage.rows
        at = stage.pages[:n, : b.pages], lens[:n], cu[: n + 1], wanted[:k]
        draws, temperature, top_p = stage.numbers[:, :k]
        return StepRows(ids, positions, where, *at, draws, temperature, top_k[:k], top_p, self._prefix(b))

    def _prefix(self, b: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """What `shared_prefixes` finds in the batch on the stage."""
        if not b.alike:
            return None
        stage, n = self.stage, b.rows
        before = stage.rows[1, :n] - np.diff(stage.rows[2, : n + 1])
        return shared_prefixes(stage.pages[:n, : b.pages], before, self.kv.page_size)

    def _paged(self, part: int, b: Batch, more: Sequence[np.ndarray]) -> tuple[PagedBatch, list[torch.Tensor]]:
        """The batch on the stage, and other arrays, where the part runs."""
        stage, n, prefix = self.stage, b.rows, self._prefix(b)
        parts = *stage.tokens[:3, : b.tokens], stage.pages[:n, : b.pages], stage.rows[1, :n], stage.rows[2, : n + 1]
        sent = upload((*parts, *(prefix or ()), *more), self.kv.pages[part].device)
        ids, positions, where, pages, lens, cu = sent[:6]
        groups = PrefixGroups(*sent[6:9]) if prefix else None
        batch = PagedBatch(ids, positions, where, self.kv.pages[part], pages, lens, cu, groups)
        return batch, sent[len(sent) - len(more) :]

    def _eager(self, m: int, b: Batch) -> tuple[torch.Tensor, SampledStep]:
        """Hidden states and samples of the wanted tokens of the batch on the stage."""
        model, stage, k = self.models[m], self.stage, b.wanted
        draws, temperature, top_p = stage.numbers[:, :k]
        more = stage.rows[3, :k], draws, temperature, stage.rows[4, :k], top_p, stage.tokens[3, : b.tokens]
        paged, (wanted, u, heat, *limits, residuals) = self._paged(m, b, more)
        cut = None if self.kv.trunk is None else Cut(self.depth, self.kv.states, residuals, False)
        hidden = infer(model, paged._replace(wanted=wanted, cut=cut))
        scores = logits(model, hidden)[:, : self.vocab_sizes[m]]
        with self._sample_mark:
            return hidden, sample_step(scores, u, heat, *(limits if b.truncated else ()))
