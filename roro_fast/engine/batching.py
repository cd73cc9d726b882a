"""What every iteration does for all rows of a forward at once: take them, lay their batch out, add their new tokens.

`PythonBatcher` is the specification; `_host.Batcher` (csrc/host/batcher.cpp) does the same to the bit in one call each,
and finds by itself the rows of an iteration in which none needs more than free pages. `make_batcher` gives the best
available.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from roro_fast.engine.kv import KVCache
from roro_fast.engine.pages import native_module
from roro_fast.engine.rng import uniforms
from roro_fast.engine.slots import Phase, Slots
from roro_fast.ops.kv_handoff import plan

DRAW_STRIDE = 1 << 32  # separates the token draws of a rewritten step from those of its discarded draft

_STATE = (
    "tokens length max_total max_step_tokens writer arrival rewrites top_k step_start matched written "
    "forward_tokens phase paused ignore_eos drafting temperature top_p key sum_logprob min_logprob "
    "first_entropy sum_entropy flops flops_per_token flops_per_pair window_flops_per_pair windows "
    "last_tokens last_model last_mean_logprob last_min_logprob last_first_entropy last_mean_entropy "
    "run_min_conf run_prod_conf budget step_index route_key draws"
)


class Batch(NamedTuple):
    """How much of a `Stage` a forward fills: rows, tokens, rows that it runs to their last token, and columns of the
    page table. `truncated`: a row draws by top-k or top-p. `alike`: rows begin with the same page."""

    rows: int
    tokens: int
    wanted: int
    pages: int
    truncated: bool
    alike: bool


class Stage:
    """The batch of the next forward, in arrays made once.

    tokens [4, T] int64: ids, positions, KV slots and, where first layers are shared, those of the residual stream. rows
    [5, N + 1] int64: engine slots of the wanted rows, then kv_lens, cu_seqlens, wanted tokens and top_k. numbers [3, N]
    float32: draw, temperature and top_p of the wanted rows. pages [N, P] int64: the page table.
    """

    def __init__(self, num_slots: int, max_tokens: int, table_width: int) -> None:
        self.tokens = np.zeros((4, max_tokens), np.int64)
        self.rows = np.zeros((5, num_slots + 1), np.int64)
        self.numbers = np.zeros((3, num_slots), np.float32)
        self.pages = np.zeros((num_slots, table_width), np.int64)
        self.tensors = [torch.from_numpy(a) for a in (self.tokens, self.rows, self.numbers, self.pages)]


class PythonBatcher:
    """Array by array in numpy. `delimiters`, `eos` per model: `StepBoundary.table` and EOS ids, int64."""

    def __init__(
        self, slots: Slots, kv: KVCache, stage: Stage, delimiters: Sequence[np.ndarray], eos: Sequence[np.ndarray]
    ) -> None:
        self.slots, self.kv, self.stage, self.delimiters, self.eos = slots, kv, stage, delimiters, eos

    def census(self) -> tuple[bool, int, np.ndarray]:
        """(whether a row is preempted, free slots, the rows that the policy can decide now [N] int64)."""
        phase = self.slots.phase
        ready = np.flatnonzero(phase == Phase.DECIDE)
        return bool(self.slots.paused.any()), int((phase == Phase.FREE).sum()), ready

    def schedule(self, part: int) -> tuple[int, ...] | None:
        """Take all rows that a forward of `part` has something to do for, with the pages that it takes, and lay them
        out. None, with nothing changed, when `Memory.schedule` must look: always."""
        return None

    def lay_out(self, part: int, rows: np.ndarray, start: np.ndarray, count: np.ndarray) -> tuple[int, ...]:
        """Put tokens [start, start + count) of `rows` into the stage as a forward of `part`, which is charged for; from
        now on the part has seen them. Returns the fields of a `Batch`. All arguments int64 [N]."""
        slots, kv, stage, context, home = self.slots, self.kv, self.stage, start + count, self.kv.home(part)
        n, pages = len(rows), kv.pages_for(int(context.max()))
        table = stage.pages[:n, :pages] = kv.table[home, rows, :pages]
        batch = plan(slots.tokens, rows, start, count, kv.table[home], kv.page_size)
        states = plan(slots.tokens, rows, start, count, kv.table[home if kv.trunk is None else kv.trunk], kv.page_size)
        tokens = len(batch.ids)
        stage.tokens[:, :tokens] = batch.ids, batch.positions, batch.slots, states.slots
        slots.charge(part, rows, count, context)
        slots.forward_tokens[part, rows] += context - np.minimum(kv.kv_len[part, rows], start)
        kv.kv_len[part, rows] = context
        whole = context == slots.length[rows]
        ends = rows[whole]
        columns = ends, context, batch.cu_seqlens, np.cumsum(count)[whole] - 1, slots.top_k[ends]
        for line, values in zip(stage.rows, columns, strict=True):
            line[: len(values)] = values
        draws = uniforms(slots.key[ends], slots.length[ends] + slots.rewrites[ends] * DRAW_STRIDE)
        stage.numbers[:, : len(ends)] = draws, slots.temperature[ends], slots.top_p[ends]
        truncated = bool(slots.top_k[ends].any() or (slots.top_p[ends] < 1).any())
        alike = home == part and len(np.unique(table[:, 0])) < n
        return n, tokens, len(ends), pages, truncated, alike

    def plain(self, model: int, rows: np.ndarray, finite: np.ndarray) -> bool:
        """Every row has a number and is written by `model`, and no draft begins with it."""
        slots = self.slots
        written = (slots.phase[rows] == Phase.WRITE) & (slots.writer[rows] == model)
        begins = slots.drafting[rows] & (slots.length[rows] == slots.step_start[rows])
        return bool((finite & written & ~begins).all())

    def append(
        self, model: int, rows: np.ndarray, token: np.ndarray, logprob: np.ndarray, entropy: np.ndarray
    ) -> list[tuple[int, bool, bool, bool]]:
        """Add a token to each of `rows` and fold its statistics into the current step.

        Returns (slot, closed, ended, full) of the rows whose step ends with it: by the delimiter or EOS, by EOS,
        because the answer may grow no more; none of these when the step may not.
        """
        slots = self.slots
        slots.append(rows, token, logprob, entropy)
        heeded = ~slots.ignore_eos[rows]
        ended = heeded & np.isin(token, self.eos[model])
        full = slots.length[rows] >= slots.max_total[rows]
        table = self.delimiters[model]
        slots.matched[rows] = np.where(heeded, table[slots.matched[rows], token], 0)
        closed = ended | (slots.matched[rows] == len(table))
        capped = slots.length[rows] - slots.step_start[rows] >= slots.max_step_tokens[rows]
        at = np.flatnonzero(closed | full | capped)
        return list(zip(*(x[at].tolist() for x in (rows, closed, ended, full)), strict=True))

    def boundary(self, rows: np.ndarray, drafts: bool) -> tuple[np.ndarray, np.ndarray]:
        """What a policy sees of `rows` [N]: step_index, step_tokens and last_model [3, N] int64; mean_logprob to
        large_share of a `BoundaryBatch`, budget and uniforms [9, N] float32. drafts: of the step being written, not of
        the last one."""
        slots = self.slots
        tokens, model = slots.last_tokens[rows], slots.last_model[rows]
        stats = [slots.last_mean_logprob, slots.last_min_logprob, slots.last_first_entropy, slots.last_mean_entropy]
        seen = [x[rows] for x in stats]
        if drafts:
            tokens, model = slots.length[rows] - slots.step_start[rows], slots.writer[rows]
            n = np.maximum(tokens, 1)
            seen = [slots.sum_logprob[rows] / n, slots.min_logprob[rows], slots.first_entropy[rows]]
            seen.append(slots.sum_entropy[rows] / n)
        written = slots.written[:, rows]
        share = written[1:].sum(0) / np.maximum(written.sum(0), 1)
        run = slots.run_min_conf[rows], slots.run_prod_conf[rows]
        draws = uniforms(slots.route_key[rows], slots.draws[rows])
        numbers = np.array([*seen, *run, share, slots.budget[rows], draws], np.float32)
        return np.array([slots.step_index[rows], tokens, model]), numbers


def make_batcher(
    slots: Slots, kv: KVCache, stage: Stage, delimiters: Sequence[np.ndarray], eos: Sequence[np.ndarray]
) -> Any:
    """The C++ one where it is built and not declined by RORO_HOST, else the Python one; both have the same methods."""
    native = native_module()
    if native is None:
        return PythonBatcher(slots, kv, stage, delimiters, eos)
    arrays = {name: np.asarray(getattr(slots, name)) for name in _STATE.split()}
    arrays |= {name: getattr(kv, name) for name in ("table", "num_pages", "kv_len", "shared")}
    arrays["home"] = np.array([kv.home(c) for c in range(kv.num_parts)])
    arrays |= {f"batch_{name}": getattr(stage, name) for name in ("tokens", "rows", "numbers", "pages")}
    sizes = {
        "num_slots": len(slots.phase),
        "max_len": slots.tokens.shape[1],
        "num_models": kv.num_models,
        "num_parts": kv.num_parts,
        "table_width": kv.table.shape[2],
        "page_size": kv.page_size,
        "trunk": -1 if kv.trunk is None else kv.trunk,
        "max_tokens": stage.tokens.shape[1],
    }
    return native.Batcher(arrays, sizes, kv.pools, list(delimiters), list(eos))
