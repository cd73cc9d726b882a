"""Shape of one decoder of the Llama / Qwen2 / Qwen3 / Gemma 3 family, read from a Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from roro_fast.errors import CheckpointError

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")


def pairs(tokens: Any, context: Any, window: int = 0) -> Any:
    """(query, key) pairs of the last `tokens` of `context` tokens under a causal mask; of numbers or arrays of them."""
    whole = tokens * context - tokens * (tokens - 1) / 2
    if not window:
        return whole
    first, last = np.maximum(context - tokens - window, 0), np.maximum(context - window, 0)
    return whole - (last * (last + 1) - first * (first + 1)) / 2  # keys that have left the window


def unsupported(family: object) -> str:
    """What is said of a model_type that no decoder here computes."""
    hint = "; of a multimodal Gemma 3 only the text model (gemma3_text) is" if family == "gemma3" else ""
    return f"{family!r} is not supported{hint}; use one of {', '.join(FAMILIES)}"


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything the decoder's arithmetic depends on. `hf` is the source config, used for saving and RoPE set-up.

    windows: per layer the tokens a query sees, itself included, 0 for all; empty when all layers see everything.
    q_gain: what attention scores are multiplied by on top of 1 / sqrt(head_dim).
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    max_position: int
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    eos_ids: tuple[int, ...]
    hf: Any
    windows: tuple[int, ...] = ()
    q_gain: float = 1.0

    @classmethod
    def from_hf(cls, hf: Any) -> DecoderConfig:
        """From a `transformers` config object; raises CheckpointError for what this decoder does not compute."""
        family = hf.model_type
        if family not in FAMILIES:
            raise CheckpointError(f"config.model_type: {unsupported(family)}")
        gemma = family == "gemma3_text"
        if getattr(hf, "use_sliding_window", False):
            raise CheckpointError(f"config.use_sliding_window: {family} has no sliding windows here; set it to false")
        field, known = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
        if getattr(hf, field) != known:
            raise CheckpointError(f"config.{field}: {getattr(hf, field)!r} is not supported; only {known!r} is")
        for field in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
            if getattr(hf, field, None):
                raise CheckpointError(f"config.{field}: {getattr(hf, field)!r} is not supported; it must be off")
        head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        bias = bool(getattr(hf, "attention_bias", False))
        eos = hf.eos_token_id
        return cls(
            family=family,
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            num_layers=hf.num_hidden_layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=head_dim,
            intermediate_size=hf.intermediate_size,
            rms_norm_eps=hf.rms_norm_eps,
            max_position=hf.max_position_embeddings,
            tie_embeddings=bool(hf.tie_word_embeddings),
            qkv_bias=bias or family == "qwen2",
            o_bias=bias and family != "qwen2",
            mlp_bias=bool(getattr(hf, "mlp_bias", False)),
            qk_norm=gemma or family == "qwen3",
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
            hf=hf,
            windows=tuple(hf.sliding_window * (t == "sliding_attention") for t in hf.layer_types) if gemma else (),
            q_gain=(head_dim / hf.query_pre_attn_scalar) ** 0.5 if gemma else 1.0,
        )

    @property
    def gemma(self) -> bool:
        return self.family == "gemma3_text"

    @property
    def num_params(self) -> int:
        """Parameters, a tied embedding counted once: the N of the papers' 2N FLOPs per token."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        attn = self.hidden_size * qkv + self.num_heads * self.head_dim * self.hidden_size
        attn += qkv * self.qkv_bias + self.hidden_size * self.o_bias + 2 * self.head_dim * self.qk_norm
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        layer = attn + mlp + (4 if self.gemma else 2) * self.hidden_size
        embed = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embed + self.hidden_size

    def forward_flops(self, tokens: int, context: int) -> float:
        """FLOPs of running `tokens` new tokens whose last one sees `context` tokens: 2N each plus attention.

        Attention costs 4 * heads * head_dim per layer for every (query, key) pair that the layer looks at: one
        multiply-add for the score and one for the value.
        """
        windows = self.windows or (0,) * self.num_layers
        seen = {w: float(pairs(tokens, context, w)) for w in set(windows)}
        return 2.0 * self.num_params * tokens + self.flops_per_pair * sum(seen[w] for w in windows)

    @property
    def flops_per_pair(self) -> float:
        """Of one layer."""
        return 4.0 * self.num_heads * self.head_dim

    def kv_bytes_per_token(self, itemsize: int) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize
