"""(f) Two openvino-genai continuous-batching pipelines that read F16 GGUF files, with prefix caching."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.peers.base import Pool, Stepwise


class OpenVINO(Stepwise):
    def load(self, pool: Pool) -> dict[str, Any]:
        import openvino_genai as ov

        scheduler = ov.SchedulerConfig()
        scheduler.cache_size = max(
            1, -(-pool.kv_tokens * 24576 * 2 // 2**30)
        )  # GB: 24 kB a token, twice what is needed
        scheduler.max_num_seqs = pool.concurrency
        scheduler.max_num_batched_tokens = 2048
        scheduler.enable_prefix_caching = True
        self.pipes = [
            ov.ContinuousBatchingPipeline(path, scheduler, "CPU", {"INFERENCE_NUM_THREADS": pool.threads})
            for path in pool.ggufs
        ]
        self.running: list[dict[int, tuple[int, Any]]] = [{} for _ in self.pipes]
        self.issued = 0
        note = "F16 GGUF weights, OpenVINO's own choice of compute and KV precision, prefix caching"
        return {"openvino_genai": ov.__version__, "cache_gb": scheduler.cache_size, "note": note}

    def submit(self, seq: int, model: int, ids: list[int], new_tokens: int) -> None:
        import numpy as np
        import openvino as ovc
        import openvino_genai as ov

        self.uncounted()
        config = ov.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        self.issued += 1
        tensor = ovc.Tensor(np.array([ids], np.int64))
        self.running[model][self.issued] = seq, self.pipes[model].add_request(self.issued, tensor, config)

    def advance(self) -> Iterator[tuple[int, list[int]]]:
        from openvino_genai.py_openvino_genai import GenerationStatus

        for pipe, running in zip(self.pipes, self.running, strict=True):
            if not running:
                continue
            pipe.step()
            for name, (seq, handle) in list(running.items()):
                if handle.get_status() == GenerationStatus.RUNNING:
                    continue
                del running[name]
                yield seq, list(handle.read_all()[0].generated_ids)


PEER = OpenVINO
