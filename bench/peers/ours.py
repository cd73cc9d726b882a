"""This project's engine behind the peers' interface: one StepEngine, a scripted policy, forced step lengths.

A learned router of default size scores every boundary, as in real use; the script then overrides its choice.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.e2e.workload import Sequence, Workload, span_pairs
from bench.peers.base import Outcome, Peer, Pool
from roro_fast import profiling
from roro_fast.engine import BoundaryBatch, Decisions, Request, StepEngine, Trajectory
from roro_fast.models.loading import load_decoder
from roro_fast.ops import native
from roro_fast.ops.registry import select
from roro_fast.routing import PolicyConfig, PolicyNetwork

PAGE = 16


class Script:
    """Follows tag["steps"]; notes when every step was decided."""

    action_space = "next"
    needs_scout = False
    name = "script"

    def __init__(self, num_models: int) -> None:
        self.router = PolicyNetwork(PolicyConfig(num_models=num_models)) if num_models > 1 else None
        self._log: list[tuple[float, list[dict[str, Any]]]] = []
        self._answers: dict[tuple[int, ...], Decisions] = {}

    def decide(self, batch: BoundaryBatch) -> Decisions:
        now = time.perf_counter()
        if self.router is not None:
            self.router.decide(batch)
        self._log.append((now, batch.tags))
        key = tuple([tag["steps"][len(tag["actions"])][0] for tag in batch.tags])
        if key not in self._answers:
            probs = [[float(m == k) for k in range(batch.num_models)] for m in key]
            self._answers[key] = Decisions(torch.tensor(key), torch.zeros(len(key)), torch.tensor(probs))
        return self._answers[key]

    def decided(self) -> dict[int, list[float]]:
        """When the steps of each sequence were decided, by tag["at"]."""
        found: dict[int, list[float]] = {}
        for when, tags in self._log:
            for tag in tags:
                found.setdefault(tag["at"], []).append(when)
        return found


def request(at: int, s: Sequence) -> Request:
    """A sequence as a request; all steps but the last are equally long. One step cap serves all, as in real use: a
    policy is asked apart about rows of different caps."""
    return Request(
        s.prompt,
        sample=at,
        max_new_tokens=s.new_tokens,
        max_steps=s.new_tokens,
        max_step_tokens=s.steps[0][1],
        ignore_eos=True,
        tag={"at": at, "steps": s.steps},
    )


class Ours(Peer):
    share_layers: bool | None = None

    def load(self, pool: Pool) -> dict[str, Any]:
        torch.set_num_threads(pool.threads)
        dtype = getattr(torch, pool.dtype)
        if pool.random:
            from bench.e2e import random_pair

            models = [random_pair.decoder(spec, dtype, pool.device) for spec in pool.random]
            tokenizer: Any = random_pair.tokenizer(min(m.config.vocab_size for m in models))
        else:
            from transformers import AutoTokenizer

            models = [load_decoder(Path(p), dtype, pool.device) for p in pool.models]
            tokenizer = AutoTokenizer.from_pretrained(pool.models[0])
        per_token = sum(m.config.kv_bytes_per_token(m.dtype.itemsize) for m in models)
        tokens = pool.kv_tokens + pool.concurrency * 2 * PAGE
        self.engine = StepEngine(
            models,
            tokenizer,
            max_num_seqs=pool.concurrency,
            kv_bytes=max(tokens * per_token * 5 // 4, 8 << 20),
            page_size=PAGE,
            max_batch_tokens=max(2048, pool.concurrency),
            max_model_len=pool.max_len,
            share_layers=self.share_layers,
        )
        self.hits = [[0, 0.0] for _ in models]  # prompt tokens and pairs that the prefix cache saved, per model
        self.shared_hits: dict[int, int] = {}  # such tokens in the layers that all models share, per sequence
        self.hit_flops = 0.0
        slots = self.engine.slots
        charge = slots.charge_cached

        def charged(c: int, s: int, n: int) -> None:
            if c < len(models):
                self._hit(c, n)
            elif (r := slots.request[s]) is not None:
                self.shared_hits[r.tag["at"]] = n
            before = slots.flops[s]
            charge(c, s, n)
            self.hit_flops += slots.flops[s] - before

        slots.charge_cached = charged  # type: ignore[method-assign]
        self.passes = [0] * len(models)
        self.shared_passes = 0
        launch = self.engine.forward.launch

        def launched(m: int) -> Any:
            out = launch(m)
            self.passes[m] += out is not None
            return out

        self.engine.forward.launch = launched  # type: ignore[method-assign]
        launch_shared = self.engine.forward.launch_shared

        def launched_shared() -> bool:
            out = launch_shared()
            self.shared_passes += out
            return out

        self.engine.forward.launch_shared = launched_shared  # type: ignore[method-assign]
        device, kind = models[0].device, models[0].dtype
        served = {
            op: select(op, device, kind).__module__ for op in ("decoder_forward", "paged_attention", "sample_step")
        }
        cpu = native.isa() if native.available() else "reference"
        return {"torch": torch.__version__, "cpu": cpu, "shared_layers": self.engine.shared_layers, **served}

    def run(self, work: Workload) -> Outcome:
        engine, script = self.engine, Script(work.num_models)
        k = work.num_models
        for h in self.hits:
            h[:] = [0, 0.0]
        self.passes[:] = [0] * k
        self.shared_passes, self.hit_flops = 0, 0.0
        self.shared_hits.clear()
        nothing_else = [m for m in range(k) if engine.kv.home(m) != m]
        before, rows = engine.iterations, {i: request(i, s) for i, s in enumerate(work.sequences)}
        tokens: list[list[int]] = [[] for _ in rows]
        steps: list[float] = []
        ran, pairs, flops = [0] * k, [0.0] * k, 0.0
        finished: list[tuple[float, Trajectory]] = []
        held: list[tuple[np.ndarray, np.ndarray]] = []  # page tables and pages per row, to be counted afterwards
        phases = profiling.seconds()
        begin = time.perf_counter()
        # The engine never runs more than its own slots; a smaller workload is fed as its sequences finish.
        waiting, active = list(reversed(rows.items())), 0
        while waiting or active:
            while waiting and active < work.concurrency:
                engine.add(waiting.pop()[1], script)
                active += 1
            done = engine.step(same_weights=engine.iterations > before)
            if engine.iterations % 8 == 0:  # rarely enough not to be seen in the time
                held.append((engine.kv.table.copy(), engine.kv.num_pages.copy()))
            active -= len(done)
            now = time.perf_counter()
            finished += [(now, t) for t in done]
        seconds = time.perf_counter() - begin
        decided = script.decided()
        for now, t in finished:
            at = t.meta["at"]
            tokens[at] = t.token_ids
            marks = [*decided[at], now]
            steps += [b - a for a, b in zip(marks, marks[1:], strict=False)]
            wanted = [(m, n) for m, n in work.sequences[at].steps]
            if [(s.model, s.end - s.start) for s in t.steps] != wanted:
                raise RuntimeError(f"sequence {at}: its steps are not those of the script")
            for m, n in enumerate(t.cost.forward_tokens):
                ran[m] += n
                if n and m in nothing_else:
                    self._hit(m, self.shared_hits.get(at, 0))
            flops += t.cost.total_flops
        for s in work.sequences:
            for m, n in enumerate(_seen(s, k)):
                pairs[m] += span_pairs(0, n)
        saved = [int(h[0]) for h in self.hits]
        extra: dict[str, Any] = {"iterations": engine.iterations - before, "cached_tokens": saved}
        extra |= {"passes": list(self.passes), "shared_passes": self.shared_passes}
        extra["kv_bytes_peak"] = max((self._kv_bytes(*h) for h in held), default=0)
        extra |= _phases(phases, profiling.seconds(), seconds, str(engine.models[0].device))
        return Outcome(
            seconds,
            tokens,
            steps,
            [a - b for a, b in zip(ran, saved, strict=True)],
            [a - h[1] for a, h in zip(pairs, self.hits, strict=True)],
            flops - self.hit_flops,
            extra,
        )

    def _hit(self, m: int, n: int) -> None:
        self.hits[m][0] += n
        self.hits[m][1] += span_pairs(0, n)

    def _kv_bytes(self, tables: np.ndarray, num_pages: np.ndarray) -> int:
        """Bytes of the pages that sequences held, shared ones once; the prefix cache's own are not counted."""
        return sum(
            distinct(t, n) * size for t, n, size in zip(tables, num_pages, self.engine.kv.page_bytes, strict=True)
        )


def distinct(table: np.ndarray, num_pages: np.ndarray) -> int:
    """How many pages there are in the first num_pages[s] entries of the rows s."""
    table = table[:, : num_pages.max()]
    if not table.size:
        return 0
    seen = np.zeros(table.max() + 1, bool)
    seen[table[np.arange(table.shape[1])[None] < num_pages[:, None]]] = True
    return int(np.count_nonzero(seen))


def _phases(before: dict[str, float], after: dict[str, float], total: float, device: str) -> dict[str, Any]:
    """Shares of the time per phase; on a CPU also that of everything but model forwards (sampling is not one)."""
    spent = {k: (v - before.get(k, 0.0)) / total for k, v in after.items()}
    out: dict[str, Any] = {"phase_shares": {k: round(v, 4) for k, v in sorted(spent.items()) if v > 0}}
    if device == "cpu" and spent:
        forward = sum(v for k, v in spent.items() if k.startswith(("forward", "catch-up")))
        out["outside_forward"] = round(1 - forward + spent.get("sample", 0.0), 4)
    return out


def _seen(s: Sequence, num_models: int) -> list[int]:
    out, end = [0] * num_models, len(s.prompt)
    for model, n in s.steps:
        end += n
        out[model] = end - 1
    return out


PEER = Ours
