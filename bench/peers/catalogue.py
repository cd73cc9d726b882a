"""The peers there are, where each one runs, why one may be absent, and the process that runs it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.e2e.workload import Workload
from bench.peers import setup
from bench.peers.base import Pool

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Entry:
    """`venv`: environment of `bench.peers.setup`, empty for this project's own. `files`: what it reads. `preload`:
    gains from `preloads`, which are then used where they are found. `ablation`: this engine with something off; it runs
    routed workloads only."""

    module: str
    title: str
    venv: str = ""
    files: str = "models"  # "models", "ggufs" or "any"
    devices: tuple[str, ...] = ("cpu", "cuda")
    env: Mapping[str, str] = field(default_factory=dict)
    preload: bool = False
    ablation: bool = False


_VLLM = {
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its engine process would fight its worker for two cores
    "VLLM_USE_AOT_COMPILE": "0",  # the ahead-of-time cache fails to load and costs a compilation at every start
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

CATALOGUE = {
    "roro_fast": Entry("ours", "this engine", files="any", env={"RORO_PROFILE": "times"}),
    "roro_fast_apart": Entry(
        "ours_apart", "this engine, no layers shared", files="any", env={"RORO_PROFILE": "times"}, ablation=True
    ),
    "hf_reprefill": Entry("hf_reprefill", "HF generate, re-prefill at switches", files="any", preload=True),
    "hf_cached": Entry("hf_cached", "HF loop, KV cache per model, batched", files="any", preload=True),
    "vllm_cpu": Entry("vllm_cpu", "two vLLM engines", venv="vllm_cpu", devices=("cpu",), env=_VLLM, preload=True),
    "llama_cpp": Entry("llama_cpp", "llama.cpp", venv="llama_cpp", files="ggufs", devices=("cpu",)),
    "hf_continuous": Entry("hf_continuous", "transformers continuous batching", files="any", preload=True),
    "openvino_genai": Entry("openvino_genai", "openvino-genai", "openvino_genai", "ggufs", ("cpu",)),
}
OURS = "roro_fast"


def why_absent(name: str, pool: Pool) -> str:
    """Empty when the peer can run this pool here, else the reason in one line."""
    entry = CATALOGUE[name]
    if entry.venv and setup.absent(entry.venv):
        return setup.absent(entry.venv)
    if pool.device not in entry.devices:
        return f"does not run on {pool.device}"
    if entry.ablation and not pool.shared:
        return "the models of this pair share no layers"
    if entry.files == "ggufs" and len(pool.ggufs) != pool.num_models:
        return "reads GGUF files only, and this pair has none"
    if entry.files == "models" and not pool.models:
        return "reads checkpoints only, and this pair has random weights made in memory"
    return ""


def preloads() -> list[str]:
    """Intel's OpenMP and tcmalloc, where found: what vLLM recommends on a CPU, and faster for `transformers` too."""
    found = []
    for pattern in ("vllm_cpu/lib/libiomp5.so", "lib/libtcmalloc_minimal.so.4"):
        path = setup.root() / pattern
        if path.is_file():
            found.append(str(path))
    return found


def environment(entry: Entry, pool: Pool) -> dict[str, str]:
    threads = str(pool.threads)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH")}
    env |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    env |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", **entry.env}
    if entry.venv == "vllm_cpu":
        per_token = 24576  # bytes of SmolLM2-135M's keys and values, the largest model that is run with it
        env["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, -(-pool.kv_tokens * per_token * 2 // 2**30)))
        env["VLLM_CACHE_ROOT"] = str(setup.root() / "vllm_cache")
        env["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{pool.threads - 1}"
    return env


class Remote:
    """An engine in its own process. Calls block; a call past its limit or a dead process raises RuntimeError."""

    def __init__(self, name: str, pool: Pool, preload: bool = False) -> None:
        self.name, self.pool = name, pool
        entry = CATALOGUE[name]
        python = str(setup.python_of(entry.venv)) if entry.venv else sys.executable
        env = environment(entry, pool)
        if preload:
            env["LD_PRELOAD"] = ":".join(preloads())
        self.log = tempfile.NamedTemporaryFile("w+", prefix=f"roro-{name}-", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, "-m", "bench.peers.worker", entry.module],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def call(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = _line(process.stdout, limit)
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self.kill()
            raise RuntimeError(f"{self.name}: no answer within {limit:.0f} s") from None
        if not line:
            raise RuntimeError(f"{self.name}: the process ended; its last words: {self.last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def load(self, limit: float = 300) -> dict[str, Any]:
        return self.call({"op": "load", "pool": asdict(self.pool)}, limit)

    def run(self, work: Workload, limit: float = 300) -> dict[str, Any]:
        return self.call({"op": "run", "work": work.to_dict()}, limit)

    def last_words(self) -> str:
        text = Path(self.log.name).read_text(errors="replace").strip().splitlines()
        return text[-1][:300] if text else "none"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            try:
                self.call({"op": "close"}, 20)
                self.process.wait(20)
            except (RuntimeError, subprocess.TimeoutExpired):
                self.kill()
        self.log.close()


def _line(stream: IO[bytes], limit: float) -> bytes:
    """One line; answers come whole, so waiting for the first byte is enough."""
    ready, _, _ = select.select([stream], [], [], limit)
    if not ready:
        raise TimeoutError
    return stream.readline()
