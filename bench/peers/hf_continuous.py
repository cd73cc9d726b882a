"""(e) Continuous batching of `transformers`: one manager per model with a paged, prefix-sharing cache.

Each manager runs its own thread, as its public interface has it; a finished step is handed on at once.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

from bench.peers import hf
from bench.peers.base import Pool, Stepwise

PAGE = 16  # a switch re-runs at most the last, partly filled page


class HFContinuous(Stepwise):
    def load(self, pool: Pool) -> dict[str, Any]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.done: queue.Queue[Any] = queue.Queue()
        self.managers: list[Any] = []
        self.closing = threading.Event()
        self.issued = 0
        self.asked: dict[str, tuple[int, int]] = {}
        blocks = (pool.kv_tokens + pool.concurrency * PAGE) // PAGE * 5 // 4 + 8
        for model in hf.load_models(pool):
            config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=pool.max_len)
            batching = ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=blocks,
                max_batch_tokens=2048,
                max_requests_per_batch=pool.concurrency,
                allow_block_sharing=True,
            )
            manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=batching)
            manager.start()
            self.managers.append(manager)
            threading.Thread(target=self._forward_results, args=(manager,), daemon=True).start()
        return {**hf.about(), "note": f"page size {PAGE}, {blocks} pages a model, block sharing on"}

    def submit(self, seq: int, model: int, ids: list[int], new_tokens: int) -> None:
        self.uncounted()
        self.issued += 1
        name = f"{self.issued}"
        self.asked[name] = seq, new_tokens
        self.managers[model].add_request(ids, request_id=name, max_new_tokens=new_tokens, eos_token_id=-1)

    def _forward_results(self, manager: Any) -> None:
        while not self.closing.is_set():
            result = manager.get_result(timeout=1.0)
            if result is not None:
                self.done.put(result)
            elif not manager.is_running():
                break

    def advance(self) -> Iterator[tuple[int, list[int]]]:
        out = self.done.get(timeout=600)
        if out.error:
            raise RuntimeError(f"continuous batching: {out.error}")
        seq, _ = self.asked.pop(out.request_id)
        yield seq, list(out.generated_tokens)

    def close(self) -> None:
        self.closing.set()
        for manager in self.managers:
            manager.stop(block=True, timeout=10, hard_stop=True)


PEER = HFContinuous
