"""(d) llama.cpp through llama-cpp-python: two contexts, all sequences of a model in one llama_batch per iteration.

The high-level class runs one sequence at a time, so this drives the low-level calls as llama-server does: a slot keeps
its keys and values between steps, only tokens it has not seen are decoded, decode and catch-up rows ride together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from bench.e2e.workload import Workload
from bench.peers.base import Pool, Stepwise

BATCH = 2048


@dataclass
class Slot:
    """`held[m]` are the tokens whose keys and values model m has for this slot."""

    held: list[list[int]]
    busy: bool = False
    model: int = 0
    ids: list[int] = field(default_factory=list)
    left: int = 0
    new: list[int] = field(default_factory=list)


class LlamaCpp(Stepwise):
    def load(self, pool: Pool) -> dict[str, Any]:
        import llama_cpp.llama_cpp as lib

        self.lib = lib
        lib.llama_backend_init()
        self.contexts, self.memories, self.vocab = [], [], 0
        unified = bool(int(os.environ.get("RORO_LLAMA_UNIFIED", "1")))
        paths = [_bf16(p) for p in pool.ggufs]
        for path in paths:
            model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
            params = lib.llama_context_default_params()
            params.n_ctx = pool.kv_tokens * 5 // 4 + 4096 if unified else pool.concurrency * pool.max_len
            params.n_batch, params.n_ubatch, params.n_seq_max = BATCH, 512, pool.concurrency
            params.n_threads = params.n_threads_batch = pool.threads
            params.kv_unified = unified
            params.no_perf = True
            context = lib.llama_init_from_model(model, params)
            if not model or not context:
                raise RuntimeError(f"{path}: llama.cpp cannot load it")
            self.contexts.append(context)
            self.memories.append(lib.llama_get_memory(context))
            self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self.slots = [Slot([[] for _ in pool.ggufs]) for _ in range(pool.concurrency)]
        self.batch = lib.llama_batch_init(BATCH, 0, 1)
        note = "low-level multi-sequence loop, greedy in numpy, KV in F16"
        files = [os.path.basename(p) for p in paths]
        return {"llama-cpp-python": version("llama-cpp-python"), "unified_kv": unified, "files": files, "note": note}

    def begin(self, work: Workload) -> None:
        super().begin(work)
        self.at: dict[int, int] = {}

    def submit(self, seq: int, model: int, ids: list[int], new_tokens: int) -> None:
        if seq not in self.at:
            free = [i for i, s in enumerate(self.slots) if not s.busy]
            self.at[seq] = max(free, key=lambda i: max(_common(h, ids) for h in self.slots[i].held))
        slot = self.slots[self.at[seq]]
        slot.busy, slot.model, slot.ids, slot.left, slot.new = True, model, list(ids), new_tokens, []
        held = slot.held[model]
        keep = min(_common(held, ids), len(ids) - 1)
        if keep < len(held):
            self.lib.llama_memory_seq_rm(self.memories[model], self.at[seq], keep, -1)
            del held[keep:]

    def advance(self) -> Iterator[tuple[int, list[int]]]:
        done = []
        for m in range(len(self.contexts)):
            rows = [(seq, i) for seq, i in self.at.items() if self.slots[i].left and self.slots[i].model == m]
            while rows:
                rows = self._decode(m, rows)
            for seq, i in self.at.items():
                slot = self.slots[i]
                if slot.model == m and slot.new and not slot.left:
                    done.append((seq, slot.new))
                    slot.new = []
        return iter(done)

    def _decode(self, m: int, rows: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """One llama_decode over as many rows as fit the batch; returns those left for the next."""
        import numpy as np

        b, n, served = self.batch, 0, []
        while rows:
            slot = self.slots[rows[0][1]]
            held = slot.held[m]
            missing = slot.ids[len(held) :][: BATCH - n]
            if not missing:
                break
            last = len(held) + len(missing) == len(slot.ids)
            for j, token in enumerate(missing):
                b.token[n], b.pos[n], b.n_seq_id[n], b.seq_id[n][0] = token, len(held) + j, 1, rows[0][1]
                b.logits[n] = last and j == len(missing) - 1
                n += 1
            self.count(m, len(held), len(held) + len(missing))
            held += missing
            if not last:
                break
            served.append(rows.pop(0))
        b.n_tokens = n
        if self.lib.llama_decode(self.contexts[m], b):
            self._forget_idle(m)
            if self.lib.llama_decode(self.contexts[m], b):
                raise RuntimeError("llama_decode failed: no room in the KV cache")
        if served:
            logits = self.lib.llama_get_logits(self.contexts[m])
            table = np.ctypeslib.as_array(logits, shape=(len(served), self.vocab))
            for (_, i), token in zip(served, table.argmax(1).tolist(), strict=True):
                slot = self.slots[i]
                slot.ids.append(token)
                slot.new.append(token)
                slot.left -= 1
        return rows

    def _forget_idle(self, m: int) -> None:
        """Drop what slots without a sequence still hold for model m."""
        for i, slot in enumerate(self.slots):
            if not slot.busy:
                self.lib.llama_memory_seq_rm(self.memories[m], i, -1, -1)
                slot.held[m] = []

    def finish(self, seq: int) -> None:
        self.slots[self.at.pop(seq)].busy = False


def _bf16(path: str) -> str:
    """The BF16 file beside an F16 one, where there is one: llama.cpp multiplies it as it is."""
    other = path.replace(".f16.", ".bf16.")
    return other if os.path.isfile(other) else path


def _common(a: list[int], b: list[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


PEER = LlamaCpp
