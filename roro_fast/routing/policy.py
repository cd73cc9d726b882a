"""The learned router: one hidden layer over scout hidden state and signals; saved as a Hugging Face style directory."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from roro_fast.engine.policy import BoundaryBatch, Decisions
from roro_fast.errors import CheckpointError, ConfigError
from roro_fast.ops import native
from roro_fast.ops.router_score import (
    PackedRouterWeights,
    RouterWeights,
    logits_of,
    pack_router,
    rms_norm,
    router_score,
    served_on_cpu,
)
from roro_fast.routing.state import SIGNALS, signals

MODEL_TYPE = "roro_router"


@dataclass(slots=True)
class PolicyConfig:
    """hidden_size 0 leaves the scout's hidden state out; `calibration` maps budgets to logit biases of model 0."""

    num_models: int = 2
    hidden_size: int = 0
    width: int = 64
    use_signals: bool = True
    action_space: str = "next"
    calibration: list[tuple[float, float]] = field(default_factory=list)
    signals: tuple[str, ...] = SIGNALS


class PolicyNetwork(nn.Module):
    """Routing policy pi(model | boundary). `decide` serves the engine, `logits` trains.

    `temperature` 0 takes the most likely action, 1 samples from the policy with the batch's uniforms. `bias` is added
    to the logit of model 0: positive is cheaper. With a calibration, a request's budget below 1 sets its own bias.
    """

    name = "router"
    on_device = True

    def __init__(self, config: PolicyConfig, *, seed: int = 0, temperature: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.config, self.temperature, self.bias = config, temperature, bias
        inputs = config.hidden_size + (len(SIGNALS) if config.use_signals else 0)
        if inputs == 0:
            raise ConfigError("router.signals: off and so is router.hidden; switch one on")
        g = torch.Generator().manual_seed(seed)
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.w1 = nn.Parameter(torch.randn(config.width, inputs, generator=g) / math.sqrt(inputs))
        self.b1 = nn.Parameter(torch.zeros(config.width))
        # Zero output weights: an untrained router is a fair coin, which is what exploration wants.
        self.w2 = nn.Parameter(torch.zeros(config.num_models, config.width))
        self.b2 = nn.Parameter(torch.zeros(config.num_models))
        self.register_buffer("shift", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self._packed: tuple[list[tuple[int, int]], PackedRouterWeights] | None = None

    @property
    def action_space(self) -> str:
        return self.config.action_space

    @property
    def needs_scout(self) -> bool:
        return self.config.hidden_size > 0

    @property
    def weights(self) -> RouterWeights:
        """What `router_score` takes: the input standardisation is folded into the first layer."""
        w1 = self.w1 / self.scale
        return RouterWeights(self.norm, w1, self.b1 - w1 @ self.shift, self.w2, self.b2)

    def packed_weights(self) -> PackedRouterWeights:
        """`weights` laid out for the kernels; made again when a tensor was replaced or changed in place."""
        tensors = (*self._parameters.values(), *self._buffers.values())
        state = [(t.data_ptr(), t._version) for t in tensors if t is not None]
        if self._packed is None or self._packed[0] != state:
            with torch.no_grad():
                self._packed = state, pack_router(self.weights)
        return self._packed[1]

    @torch.no_grad()
    def standardize(self, features: torch.Tensor, scale_hidden: bool = False) -> None:
        """Set the input standardisation from sample features [D, H + S]; constant inputs are left out.

        scale_hidden: a hidden state of more dimensions than there are signals is scaled down to the variance that all
        of these would have together, if none was constant.
        """
        h = self.config.hidden_size
        x = torch.cat((rms_norm(features[:, :h].float()), features[:, h:].float()), -1)
        std, self.shift = torch.std_mean(x, 0, correction=0)
        self.scale = torch.where(std > 1e-4, std, torch.full_like(std, 1e6))
        if scale_hidden and self.config.use_signals:
            self.scale[:h] *= max(1.0, math.sqrt(h / len(SIGNALS)))

    def inputs(self, batch: BoundaryBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden [N, H], signals [N, S]) as this policy uses them; either may have width 0."""
        n, device = len(batch), self.w1.device
        sig = signals(batch) if self.config.use_signals else torch.zeros(n, 0)
        sig = sig.to(device, non_blocking=True) if sig.device != device else sig
        if not self.config.hidden_size:
            return sig.new_zeros(n, 0), sig
        return self._states(batch).to(device, non_blocking=True), sig

    def _states(self, batch: BoundaryBatch) -> torch.Tensor:
        """The scout's states [N, H]; raises ConfigError where there are none, or of another width."""
        if batch.hidden is None or batch.hidden.shape[-1] != self.config.hidden_size:
            got = None if batch.hidden is None else batch.hidden.shape[-1]
            raise ConfigError(f"router.hidden: policy wants scout states of width {self.config.hidden_size}, got {got}")
        return batch.hidden

    def decide(self, batch: BoundaryBatch) -> Decisions:
        weights, bias = self.packed_weights(), None
        if self.bias or self.config.calibration:
            bias = torch.zeros(len(batch), self.config.num_models)
            bias[:, 0] = self.bias + self.budget_bias(batch.budget)
        packed = weights.packed if self.config.use_signals and served_on_cpu(weights.w1.dtype) else None
        if packed is not None and _plain(batch):
            return Decisions(*self._fused(batch, packed, bias))
        return self._apart(batch, weights, bias)

    @torch.no_grad()
    def _apart(self, batch: BoundaryBatch, weights: PackedRouterWeights, bias: torch.Tensor | None) -> Decisions:
        """Inputs, then `router_score`, where the policy is."""
        hidden, sig = self.inputs(batch)
        if bias is not None:
            bias = bias.to(sig.device, non_blocking=True)
        uniforms = batch.uniforms.to(sig.device, non_blocking=True)
        out = router_score(hidden, None, sig, weights, uniforms, bias, self.temperature)
        features = torch.cat((hidden, sig), -1) if self.config.hidden_size else sig
        return Decisions(out.action, out.logprob, out.probs, features)

    def _fused(
        self, batch: BoundaryBatch, packed: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The fields of `Decisions`, from the batch's matrices in one call; csrc/bind_torch_route.cpp."""
        hidden = self._states(batch) if self.config.hidden_size else None
        out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] = native.call(
            "route", batch.ints, batch.floats, batch.step_cap, batch.scout_entropy, batch.scout_maxprob, hidden, packed,
            self.config.num_models, bias, self.temperature,
        )  # fmt: skip
        return out

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """[N, K] logits from stored decision features [N, H + S], with autograd."""
        h = self.config.hidden_size
        return logits_of(features[:, :h], features[:, h:], self.weights)

    def budget_bias(self, budget: torch.Tensor) -> torch.Tensor:
        """[N] logit bias for requested budgets [N], linear between calibrated points; 0 for budget >= 1."""
        table = sorted(self.config.calibration)
        if not table or bool((budget >= 1).all()):
            return torch.zeros_like(budget)
        x = torch.tensor([b for b, _ in table])
        y = torch.tensor([v for _, v in table])
        hi = torch.searchsorted(x, budget.contiguous()).clamp(1, max(len(x) - 1, 1)).clamp_max(len(x) - 1)
        lo = (hi - 1).clamp_min(0)
        t = ((budget - x[lo]) / (x[hi] - x[lo]).clamp_min(1e-9)).clamp(0, 1)
        return torch.where(budget >= 1, torch.zeros_like(budget), y[lo] + t * (y[hi] - y[lo]))

    def save_pretrained(self, directory: str | Path) -> None:
        """config.json and model.safetensors, each renamed into place."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"model_type": MODEL_TYPE, **asdict(self.config)}
        (path / "config.json.part").write_text(json.dumps(config, indent=1))
        save_file({k: v.detach().contiguous() for k, v in self.state_dict().items()}, path / "model.safetensors.part")
        for name in ("model.safetensors", "config.json"):
            (path / f"{name}.part").replace(path / name)

    @classmethod
    def from_pretrained(cls, directory: str | Path, **kwargs: Any) -> PolicyNetwork:
        """Load what `save_pretrained` wrote; raises CheckpointError for anything else."""
        path = Path(directory)
        try:
            raw = json.loads((path / "config.json").read_text())
            state = load_file(path / "model.safetensors")
        except (OSError, json.JSONDecodeError, SafetensorError) as e:
            raise CheckpointError(f"{path}: not a readable router directory ({e})") from e
        if raw.pop("model_type", None) != MODEL_TYPE:
            raise CheckpointError(f"{path}/config.json: model_type is not {MODEL_TYPE!r}; is this a router directory?")
        if tuple(raw["signals"]) != SIGNALS:
            raise CheckpointError(f"{path}/config.json: signals differ from this version's; retrain the router")
        raw["signals"] = SIGNALS
        raw["calibration"] = [tuple(p) for p in raw["calibration"]]
        policy = cls(PolicyConfig(**raw), **kwargs)
        try:
            policy.load_state_dict(state)
        except RuntimeError as e:
            raise CheckpointError(f"{path}/model.safetensors: does not fit its config.json ({e})") from e
        return policy


def _plain(batch: BoundaryBatch) -> bool:
    """Whether the batch is as engines on CPU make it: what the scout saw in whole float32 arrays on the host."""
    seen = (batch.floats, batch.hidden, batch.scout_entropy, batch.scout_maxprob)
    return batch.ints.is_contiguous() and all(
        x is None or x.is_cpu and x.dtype == torch.float32 and x.is_contiguous() for x in seen
    )
