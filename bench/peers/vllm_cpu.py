"""(c) Two vLLM engines with prefix caching in one process, compiled, each step a request of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from bench.peers.base import Pool, Stepwise

BLOCK = 32  # the smallest that vLLM takes on a CPU: a switch re-runs at most one partly filled block


class VLLM(Stepwise):
    def load(self, pool: Pool) -> dict[str, Any]:
        # VLLM_* must be set before the import: see `catalogue`.
        import vllm
        from vllm import LLM

        settings: dict[str, Any] = {
            "dtype": pool.dtype,
            "max_model_len": pool.max_len,
            "max_num_seqs": pool.concurrency,
            "block_size": BLOCK,
            "enable_prefix_caching": True,
            "enforce_eager": bool(int(os.environ.get("RORO_VLLM_EAGER", "0"))),
        }
        self.engines = [LLM(path, **settings).llm_engine for path in pool.models]
        self.asked: dict[str, tuple[int, int, int]] = {}
        self.issued = 0
        return {"vllm": vllm.__version__, **settings}

    def submit(self, seq: int, model: int, ids: list[int], new_tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.issued += 1
        name = f"{self.issued}"
        self.asked[name] = seq, model, len(ids)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            min_tokens=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.engines[model].add_request(name, {"prompt_token_ids": ids}, params)

    def advance(self) -> Iterator[tuple[int, list[int]]]:
        for engine in self.engines:
            if not engine.has_unfinished_requests():
                continue
            for out in engine.step():
                if not out.finished:
                    continue
                seq, model, n = self.asked.pop(out.request_id)
                tokens = list(out.outputs[0].token_ids)
                self.count(model, out.num_cached_tokens or 0, n + len(tokens) - 1)
                yield seq, tokens


PEER = VLLM
