"""A fitted projection as a directory: config.json and safetensors, with the models it is for and how it was judged."""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from roro_fast.errors import CheckpointError, ConfigError, DataError
from roro_fast.files import read_json, write_bytes, write_json
from roro_fast.models.decoder import Decoder
from roro_fast.ops.kv_project import LinearMaps

FORMAT = "roro-kv-projection-1"
_SAMPLED = 64  # elements of each tensor that a fingerprint looks at


@dataclass(frozen=True, slots=True)
class Gate:
    """How far the receiver's next-token distributions move when its KV is projected; `gate.measure` says on what.

    kl_mean, kl_p99: KL(exact || projected) in nats per token; top1: share of tokens with the same most likely token;
    bound: what kl_mean was allowed.
    """

    kl_mean: float
    kl_p99: float
    top1: float
    tokens: int
    bound: float


@dataclass(frozen=True)
class KVProjection:
    """Linear maps from the KV of `source` to that of `target`, both given as fingerprints."""

    maps: LinearMaps
    source: dict[str, Any]
    target: dict[str, Any]
    fit: dict[str, Any] = field(default_factory=dict)
    gate: Gate | None = None

    def accept(self, max_kl: float | None = None) -> KVProjection:
        """Itself, if it was gated and its KL is within `max_kl` (default: the bound it was gated with).

        Raises ConfigError that names the figure, the bound and the fix otherwise.
        """
        if self.gate is None:
            raise ConfigError("projection: never gated, its error is unknown; pass it through projection.gate first")
        bound = self.gate.bound if max_kl is None else max_kl
        if not self.gate.kl_mean <= bound:
            g = self.gate
            raise ConfigError(
                f"projection: next-token KL {g.kl_mean:.4g} nats per token (p99 {g.kl_p99:.3g}, same top token "
                f"{100 * g.top1:.1f} %) is above projection.max_kl {bound:g}; fit it on more text or from more layers "
                "(projection.sources), allow more, or do without: exact catch-up needs no map"
            )
        return self

    def check_models(self, source: Decoder, target: Decoder) -> None:
        """ConfigError unless these are the models, weights included, that the maps were fitted on."""
        for role, model in (("source", source), ("target", target)):
            known, found = getattr(self, role), fingerprint(model)
            for key in found:
                if known.get(key) != found[key]:
                    raise ConfigError(
                        f"projection.{role}: made for {key} {known.get(key)!r}, the model has {found[key]!r}; fit again"
                    )

    def gated(self, gate: Gate) -> KVProjection:
        return replace(self, gate=gate)

    def save(self, directory: str | Path) -> None:
        path = Path(directory)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.maps._asdict().items()}
        write_bytes(path / "maps.safetensors", save(tensors, metadata={"format": "pt"}))
        gate = None if self.gate is None else {k: v if math.isfinite(v) else None for k, v in asdict(self.gate).items()}
        about = {"source": self.source, "target": self.target, "fit": self.fit, "gate": gate}
        write_json(path / "config.json", {"format": FORMAT, **about})

    @classmethod
    def load(cls, directory: str | Path) -> KVProjection:
        path = Path(directory)
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path}: no config.json; give a directory that `roro project` wrote")
        try:
            about = read_json(path / "config.json")
            if about["format"] != FORMAT:
                raise CheckpointError(f"{path}: format {about['format']!r} is not {FORMAT!r}; fit it again")
            maps = LinearMaps(**load_file(path / "maps.safetensors"))
            found: dict[str, Any] | None = about["gate"]
            numbers: dict[str, Any] = {k: math.inf if v is None else v for k, v in (found or {}).items()}
            return cls(maps, about["source"], about["target"], about["fit"], Gate(**numbers) if found else None)
        except (DataError, SafetensorError, OSError, KeyError, TypeError) as e:
            raise CheckpointError(f"{path}: not a readable projection ({e}); fit it again") from e


def fingerprint(model: Decoder) -> dict[str, Any]:
    """What keys and values depend on: shape, rotary tables, and the weights as a hash of elements of each tensor.

    Elements are compared as bfloat16, so that a checkpoint is itself in float32 and in bfloat16.
    """
    c = model.config
    sampled, rope = hashlib.sha256(), hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        flat = p.detach().flatten()
        at = torch.linspace(0, max(len(flat) - 1, 0), min(_SAMPLED, len(flat)), dtype=torch.float64).round().long()
        sampled.update(name.encode() + str(tuple(p.shape)).encode())
        sampled.update(_bytes(flat[at.to(flat.device)].bfloat16().float()))
    for table in (model.cos, model.sin):
        rope.update(_bytes(table[:: max(1, len(table) // _SAMPLED)].float()))
    return {
        "layers": c.num_layers,
        "kv_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "rope": rope.hexdigest()[:16],
        "weights": sampled.hexdigest()[:16],
    }


def _bytes(x: torch.Tensor) -> bytes:
    values = x.cpu().flatten().tolist()
    return struct.pack(f"<{len(values)}f", *values)
