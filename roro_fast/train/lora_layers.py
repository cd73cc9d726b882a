"""Trainable LoRA (Hu et al., arXiv 2106.09685) on the upper layers of a decoder, written in PEFT's format.

Layers below `first` stay as they are and run without autograd, so that models adapted from one base share them, and
their KV cache, bit for bit. Factors are kept in float32 and cast to the base's dtype where they are used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from roro_fast.errors import CheckpointError
from roro_fast.models.decoder import Decoder
from roro_fast.models.lora import CONFIG, WEIGHTS

# Our fused projections, and the Hugging Face modules that each of them stands for.
MODULES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


class LoraLinear(nn.Module):
    """x W^T + scale * x A_i^T B_i^T in each of the column blocks `sizes` of a frozen linear layer."""

    def __init__(self, base: nn.Linear, sizes: list[int], rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.sizes, self.rank, self.scale = base, sizes, rank, scale
        bound = 1 / math.sqrt(base.in_features)  # as PEFT: kaiming_uniform_(a=sqrt(5))
        a = torch.rand(len(sizes) * rank, base.in_features, generator=generator)
        self.a = nn.Parameter(bound * (2 * a - 1))
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(n, rank)) for n in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = F.linear(x, self.a.to(x.dtype)).split(self.rank, dim=-1)
        parts = self.base(x).split(self.sizes, dim=-1)
        scaled = [(self.scale * b).to(x.dtype).t() for b in self.b]
        return torch.cat([torch.addmm(p, h, b) for p, h, b in zip(parts, low, scaled, strict=True)], dim=-1)


class PrefixAttention:
    """Causal attention over a flat batch of `prefix` tokens and, after each other, `batch` rows that all continue them.

    In two batched products, which on CPU and at such lengths are several times as fast in bfloat16 as torch's fused
    kernel and its backward pass.
    """

    def __init__(self, prefix: int, batch: int, length: int) -> None:
        self.prefix, self.batch, self.length = prefix, batch, length

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        p, b, s = self.prefix, self.batch, self.length
        shared = [t[None, :p] for t in (q, k, v)]
        rows = [t[p:].view(b, s, *t.shape[1:]) for t in (q, k, v)]
        k, v = (torch.cat([t.expand(b, -1, -1, -1), r], 1) for t, r in zip(shared[1:], rows[1:], strict=True))
        out = attend(rows[0], k, v).flatten(0, 1)
        return torch.cat([attend(*shared)[0], out]) if p else out


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last S of L positions: q [B, S, Hq, D], k and v [B, L, Hkv, D], result as q."""
    (b, s, heads, dim), (length, kv_heads) = q.shape, k.shape[1:3]
    group = heads // kv_heads
    q = q.view(b, s, kv_heads, group, dim).permute(0, 2, 3, 1, 4).reshape(b * kv_heads, group * s, dim)
    k, v = (t.transpose(1, 2).reshape(b * kv_heads, length, dim) for t in (k, v))
    future = torch.ones(s, length, dtype=torch.bool, device=q.device).triu(length - s + 1)
    scores = torch.bmm(q * dim**-0.5, k.transpose(1, 2)).float().view(b, kv_heads, group, s, length)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1).to(v.dtype)
    out = torch.bmm(weights.view(b * kv_heads, group * s, length), v).view(b, kv_heads, group, s, dim)
    return out.permute(0, 3, 1, 2, 4).reshape(b, s, heads, dim)


def common_prefix(ids: torch.Tensor, targets: torch.Tensor, ignore: int) -> int:
    """How many tokens all rows of ids [B, S] begin with, none of which has a target."""
    same = (ids == ids[:1]).all(0) & (targets == ignore).all(0)
    return int(same.long().cumprod(0).sum())


class LoraDecoder(nn.Module):
    """A decoder whose layers from `first` on are adapted; only the factors are trainable.

    `numbers` are the layers' numbers in the base model, where some of its layers were left out.
    """

    def __init__(
        self, model: Decoder, first: int, rank: int, alpha: int, seed: int, numbers: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.numbers = list(range(len(model.layers)) if numbers is None else numbers)[first:]
        self.model, self.first, self.rank, self.alpha = model.requires_grad_(False), first, rank, alpha
        c, generator = model.config, torch.Generator().manual_seed(seed)
        heads = [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        for layer in self.upper:
            for name, parts in MODULES.items():
                base = getattr(layer, name)
                sizes = heads if name == "qkv" else [base.out_features // len(parts)] * len(parts)
                setattr(layer, name, LoraLinear(base, sizes, rank, alpha / rank, generator))

    @property
    def upper(self) -> list[nn.Module]:
        return list(self.model.layers)[self.first :]

    def factors(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def token_losses(self, ids: torch.Tensor, targets: torch.Tensor, ignore: int) -> torch.Tensor:
        """Cross-entropy [A] float32 of the targets that are not `ignore`, row by row; ids, targets [B, S]."""
        return self.token_losses_and_hits(ids, targets, ignore)[0]

    def token_losses_and_hits(
        self, ids: torch.Tensor, targets: torch.Tensor, ignore: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`token_losses`, and [A] bool: whether the target is the most likely token.

        Rows are right-padded; the tokens that all of them begin with are computed once.
        """
        model, p = self.model, common_prefix(ids, targets, ignore)
        (b, s), flat = ids[:, p:].shape, targets[:, p:].flatten()
        attention = PrefixAttention(p, b, s)
        places = torch.arange(p + s, device=ids.device)
        positions = torch.cat([places[:p], places[p:].repeat(b)])
        with torch.no_grad():
            x = model.embed(torch.cat([ids[0, :p], ids[:, p:].flatten()]))
            cos = model.cos[positions].unsqueeze(1).to(x.dtype)
            sin = model.sin[positions].unsqueeze(1).to(x.dtype)
            for layer in list(model.layers)[: self.first]:
                x = layer(x, cos, sin, attention)
        for layer in self.upper:
            x = layer(x, cos, sin, attention)
        rows = (flat != ignore).nonzero().squeeze(1)
        logits = model.logits(model.norm(x[p + rows])).float()
        return F.cross_entropy(logits, flat[rows], reduction="none"), logits.detach().argmax(-1) == flat[rows]

    def named_factors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """PEFT's name of every factor: A [rank, in] and B [out, rank] per Hugging Face module."""
        for index, layer in zip(self.numbers, self.upper, strict=True):
            for name, parts in MODULES.items():
                adapted: LoraLinear = getattr(layer, name)
                for part, a, b in zip(parts, adapted.a.detach().split(self.rank), adapted.b, strict=True):
                    prefix = f"base_model.model.model.layers.{index}.{part}.lora_"
                    yield f"{prefix}A.weight", a
                    yield f"{prefix}B.weight", b.detach()

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Take the factors of an exported adapter of the same rank, which may adapt further layers."""
        path = directory / WEIGHTS
        try:
            tensors = load_file(path)
            for name, t in self.named_factors():
                t.copy_(tensors[name])
        except (SafetensorError, OSError, KeyError, RuntimeError) as e:
            raise CheckpointError(f"{path}: not an adapter of these layers of rank {self.rank} ({e})") from e

    def export(self, directory: Path, base: str, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write adapter_config.json and adapter_model.safetensors; `base` names the base model."""
        directory.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(p.rpartition(".")[2] for parts in MODULES.values() for p in parts),
            "layers_to_transform": self.numbers,
            "layers_pattern": "layers",
            "inference_mode": True,
        }
        tensors = {name: t.to(dtype).contiguous() for name, t in self.named_factors()}
        part = directory / (WEIGHTS + ".part")
        save_file(tensors, part, metadata={"format": "pt"})
        part.replace(directory / WEIGHTS)
        part = directory / (CONFIG + ".part")
        part.write_text(json.dumps(config, indent=2) + "\n")
        part.replace(directory / CONFIG)
