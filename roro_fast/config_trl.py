"""How TRL trains Rubricor and Judge (`rubric.trainer: trl`); what it trains them for stays in the section `rubric`."""

from __future__ import annotations

from dataclasses import dataclass

from roro_fast.config_checks import at_least, choose, require, share

TRAINERS = ("native", "trl")
ROLLOUTS = ("engine", "transformers", "vllm")
VLLM_MODES = ("colocate", "server")
ATTENTION = ("auto", "eager", "sdpa", "flash_attention_2")
LIGER = ("auto", "on", "off")
ACTOR_DTYPES = ("float32", "bfloat16")


@dataclass
class TrlConfig:
    """`lora_rank` 0 trains all weights, else an adapter (with `lora_alpha`) that every phase merges into them.

    `dtype` is the weights', `bf16` computes in bfloat16 around them. An update is split into forwards of at most
    `micro_batch` sequences. `rollouts` writes the Rubricor's samples; `vllm_mode`, `vllm_server` (its URL) and
    `vllm_memory` (share of the GPU) serve "vllm". "auto" attention and Liger take FlashAttention-2 and Liger on a GPU
    where they are installed. Checkpoints are written every `checkpoint_every` updates and kept until the next phase.
    """

    rollouts: str = "engine"
    vllm_mode: str = "colocate"
    vllm_server: str = "http://localhost:8000"
    vllm_memory: float = 0.3
    lora_rank: int = 0
    lora_alpha: int = 32
    dtype: str = "float32"
    bf16: bool = True
    micro_batch: int = 8
    attention: str = "auto"
    liger: str = "auto"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        choose(self.rollouts, "trl.rollouts", ROLLOUTS)
        choose(self.vllm_mode, "trl.vllm_mode", VLLM_MODES)
        choose(self.attention, "trl.attention", ATTENTION)
        choose(self.liger, "trl.liger", LIGER)
        choose(self.dtype, "trl.dtype", ACTOR_DTYPES)
        at_least(self.lora_rank, 0, "trl.lora_rank")
        share(self.vllm_memory, "trl.vllm_memory")
        for key in ("lora_alpha", "micro_batch", "checkpoint_every"):
            at_least(getattr(self, key), 1, f"trl.{key}")
        require(
            self.dtype == "float32" or self.lora_rank > 0,
            "trl.dtype",
            f"{self.dtype} weights swallow small updates; set trl.lora_rank, or keep float32 with trl.bf16",
        )
