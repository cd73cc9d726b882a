"""A training in a directory of its own that may be cut anywhere and goes on to the identical result."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import Field, asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from roro_fast.errors import CheckpointError, ConfigError

LOG, STATE = "train_log.jsonl", "state.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a weight


class Schedule(Protocol):
    """A dataclass that says, in steps, how long to train, how often to log and how often to measure."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def steps(self) -> int: ...

    @property
    def log_every(self) -> int: ...

    @property
    def eval_every(self) -> int: ...


R = TypeVar("R", bound=Schedule)


class TrainingRun(ABC, Generic[R]):
    """`train_log.jsonl`, `state.safetensors`, and what `export` leaves. Data must be a function of the step.

    The state is one file, so weights, optimiser and counters can never be from different steps; log lines written
    after the restored state are dropped.
    """

    log_first = 0  # steps at the beginning that are all logged
    checkpoint_every = 500

    def __init__(self, recipe: R, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        out.mkdir(parents=True, exist_ok=True)

    def begin(self, weights: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Train these `weights` with this `optimizer`, from the state that `out` holds, if it does."""
        self._weights, self.optimizer = weights, optimizer
        if (self.out / STATE).is_file():
            self._restore()
        else:
            (self.out / LOG).write_text("")

    @abstractmethod
    def train_step(self) -> dict[str, float]:
        """One update, counted in `step` and `tokens`; what to log of it."""

    @abstractmethod
    def measure(self) -> dict[str, Any]:
        """How good the model is now, for the log."""

    @abstractmethod
    def export(self) -> None:
        """Write the model as others read it."""

    def run(self, until: int | None = None, quiet: bool = False) -> None:
        """Train up to step `until` (default: the recipe's last, which also exports), checkpointing on the way."""
        r = self.recipe
        end = min(until or r.steps, r.steps)
        started = time.process_time() - self.seconds
        with (self.out / LOG).open("a") as log:
            while self.step < end:
                found: dict[str, Any] = self.train_step()
                self.seconds = time.process_time() - started
                last = self.step == r.steps
                measured = self.step % r.eval_every == 0 or last
                if measured:
                    found = {**found, **self.measure(), "cpu_s": round(self.seconds, 1)}
                if measured or self.step <= self.log_first or self.step % r.log_every == 0:
                    row = json.dumps({"step": self.step, "tokens": self.tokens, **found})
                    log.write(row + "\n")
                    log.flush()
                    if measured and not quiet:
                        print(row, flush=True)
                if self.step % self.checkpoint_every == 0 or self.step == end:
                    self.save()
        if self.step == r.steps:
            self.export()

    def save(self) -> None:
        """Weights, optimiser state and counters in one file, renamed into place."""
        tensors: dict[str, torch.Tensor] = {}
        for name, p in self._weights.items():
            tensors[f"weight/{name}"] = p.detach()
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state[p].items()}
        meta = {"recipe": asdict(self.recipe), "step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        part = self.out / f"{STATE}.part"
        save_file(tensors, part, metadata={"state": json.dumps(meta)})
        part.replace(self.out / STATE)

    def record(self, directory: Path) -> None:
        """Put the log and `train.json` beside an exported model."""
        (directory / LOG).write_text((self.out / LOG).read_text())
        record = {
            "recipe": asdict(self.recipe),
            "parameters": sum(p.numel() for p in self._weights.values()),
            "steps": self.step,
            "tokens": self.tokens,
            "cpu_seconds": round(self.seconds, 1),
            "torch": torch.__version__,
        }
        (directory / "train.json").write_text(json.dumps(record, indent=2) + "\n")

    def refusal(self, recipe: dict[str, Any], step: int) -> str:
        """Why a state of this `recipe` and `step` is not one to go on from; empty if it is."""
        return "" if recipe == asdict(self.recipe) else "belongs to another recipe"

    def _restore(self) -> None:
        path = self.out / STATE
        try:
            with safe_open(path, "pt") as f:
                meta = json.loads(f.metadata()["state"])
            tensors = load_file(path)
        except (SafetensorError, OSError, KeyError, TypeError) as e:
            raise CheckpointError(f"{path}: corrupt training state ({e}); delete the directory to start again") from e
        if why := self.refusal(meta["recipe"], meta["step"]):
            raise CheckpointError(f"{path}: {why}; choose another --out or delete the directory")
        with torch.no_grad():
            for name, p in self._weights.items():
                p.copy_(tensors[f"weight/{name}"])
                self.optimizer.state[p] = {k: tensors[f"{k}/{name}"] for k in MOMENTS if f"{k}/{name}" in tensors}
        self.step, self.tokens, self.seconds = meta["step"], meta["tokens"], meta["seconds"]
        log = self.out / LOG
        kept = [line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= self.step]
        part = log.with_name(f"{LOG}.part")
        part.write_text("".join(kept))
        part.replace(log)


def override(recipe: R, settings: list[str]) -> R:
    """Recipe with `key=value` settings applied; refuses unknown keys and values of the wrong type by name."""
    known = asdict(recipe)
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            raise ConfigError(f"--set {key}: unknown recipe key; choose one of {', '.join(known)}")
        try:
            recipe = replace(recipe, **{key: type(known[key])(value)})
        except ValueError:
            raise ConfigError(f"--set {key}: {value!r} is not a {type(known[key]).__name__}") from None
    return recipe
