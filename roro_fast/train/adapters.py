"""Train the LoRA adapters of the smol pair on worked reasoning-gym solutions (`train.adapter_data`).

    python -m roro_fast.train.adapters large --out runs/smol-large
    python -m roro_fast.train.adapters middle --out runs/smol-middle
    python -m roro_fast.train.adapters small --out runs/smol-small

Middle is large without ten of its layers and starts from its factors; small is made of middle in the same way.
The same command resumes an interrupted run and continues to the identical loss curve: data are a function of
(seed, step), and factors and optimiser state are checkpointed together. The learning rate is constant until its linear
decay to zero over the last part of `steps` (Hu et al., arXiv 2404.06395), so `--set steps=N` may shorten or lengthen a
run until its decay has begun.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from roro_fast.errors import CheckpointError
from roro_fast.models import smol
from roro_fast.models.loading import load_config, load_decoder
from roro_fast.models.train_nano import override
from roro_fast.train.adapter_data import Batch, Corpus
from roro_fast.train.lm import IGNORE
from roro_fast.train.lora_layers import LoraDecoder

LOG, STATE = "train_log.jsonl", "state.safetensors"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Adapter and schedule of one model: the base's `first` layers, not adapted, and of the others those in `upper`.

    `upper` lists numbers ("20 29"; empty: all), `init` is an adapter of the same rank to start from (empty: none).
    `batch` counts problems, `decay` is the last share of `steps`.
    """

    upper: str
    rank: int
    alpha: int
    steps: int
    batch: int
    lr: float
    first: int = 8
    init: str = ""
    warmup: int = 30
    decay: float = 0.3
    seed: int = 0
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 8

    def layers(self, total: int) -> list[int]:
        """Which of the base's `total` layers the model has."""
        return [*range(self.first), *(map(int, self.upper.split()) if self.upper else range(self.first, total))]

    def learning_rate(self, step: int) -> float:
        """`step` counts from 0."""
        tail = max(1.0, self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup, (self.steps - step) / tail)

    def constant_until(self) -> int:
        return int(self.steps - max(1.0, self.decay * self.steps))


RECIPES = {
    "large": Recipe("", rank=32, alpha=32, steps=800, batch=8, lr=7e-4),
    "middle": Recipe(
        "8 9 10 11 15 16 19 20 23 24 28 29",
        rank=32,
        alpha=32,
        steps=480,
        batch=8,
        lr=1e-3,
        init="runs/smol-large/adapter",
    ),
    "small": Recipe(
        "8 10 11 19 20 23 24 29", rank=32, alpha=32, steps=200, batch=8, lr=1e-3, init="runs/smol-middle/adapter"
    ),
}


class Trainer:
    """One training run in one directory: `train_log.jsonl`, and as of the last checkpoint `state.safetensors` and
    `adapter/`.
    """

    def __init__(self, recipe: Recipe, out: Path, base: Path, named: str = "smol") -> None:
        from transformers import AutoTokenizer

        self.recipe, self.out, self.named = recipe, out, named
        layers = recipe.layers(load_config(base).num_layers)
        decoder = load_decoder(base, torch.bfloat16, "cpu", layers=layers)
        self.model = LoraDecoder(decoder, recipe.first, recipe.rank, recipe.alpha, recipe.seed, layers)
        tokenizer = AutoTokenizer.from_pretrained(base)
        self.corpus = Corpus(tokenizer, recipe.batch, recipe.seed)
        self.held_out = Corpus(tokenizer, recipe.batch, recipe.seed, recipe.eval_batches, split="calibrate")
        self.optimizer = torch.optim.AdamW(
            self.model.factors(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        out.mkdir(parents=True, exist_ok=True)
        if (out / STATE).is_file():
            self._restore()
        else:
            if recipe.init:
                self.model.load(Path(recipe.init))
            (out / LOG).write_text("")

    def train_step(self) -> float:
        batch = self.corpus(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.step)
        loss = self.model.token_losses(batch.ids, batch.targets, IGNORE).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.factors(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.tokens += batch.tokens
        return loss.item()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss, and the share of solutions of which greedy decoding writes every token, on calibrate queries."""
        losses, whole = [], []
        for i in range(self.recipe.eval_batches):
            batch: Batch = self.held_out(i)
            loss, right = self.model.token_losses_and_hits(batch.ids, batch.targets, IGNORE)
            losses.append(loss)
            whole += [bool(r.all()) for r in right.split((batch.targets != IGNORE).sum(1).tolist())]
        return {"held_out_loss": round(float(torch.cat(losses).mean()), 4), "whole": round(sum(whole) / len(whole), 4)}

    def run(self, until: int | None = None, checkpoint_every: int = 50, quiet: bool = False) -> None:
        """Train up to step `until` (default: the recipe's last), writing a checkpoint every so many steps."""
        r = self.recipe
        end = min(until or r.steps, r.steps)
        started = time.process_time() - self.seconds
        with (self.out / LOG).open("a") as log:
            while self.step < end:
                loss = self.train_step()
                self.seconds = time.process_time() - started
                last = self.step == r.steps
                row: dict[str, Any] = {}
                if self.step % r.log_every == 0 or last:
                    row = {"step": self.step, "tokens": self.tokens, "loss": round(loss, 5)}
                if self.step % r.eval_every == 0 or last:
                    row |= self.evaluate() | {"cpu_s": round(self.seconds, 1), "time": round(time.time())}
                if row:
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    if not quiet:
                        print(json.dumps(row), flush=True)
                if self.step % checkpoint_every == 0 or self.step == end:
                    self.save()
                    log.flush()
                    self.export(self.out / "adapter")

    def save(self) -> None:
        """Factors, optimiser state and counters in one file, renamed into place."""
        tensors: dict[str, torch.Tensor] = {}
        for i, p in enumerate(self.model.factors()):
            tensors[f"weight/{i}"] = p.detach()
            tensors |= {f"{key}/{i}": value for key, value in self.optimizer.state[p].items()}
        meta = {"recipe": asdict(self.recipe), "step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        part = self.out / (STATE + ".part")
        save_file(tensors, part, metadata={"state": json.dumps(meta)})
        part.replace(self.out / STATE)

    def _restore(self) -> None:
        path = self.out / STATE
        try:
            with safe_open(path, "pt") as f:
                meta = json.loads(f.metadata()["state"])
            tensors = load_file(path)
        except (SafetensorError, OSError, KeyError, TypeError) as e:
            raise CheckpointError(f"{path}: corrupt training state ({e}); delete the directory to start again") from e
        before = Recipe(**meta["recipe"])
        constant = min(before.constant_until(), self.recipe.constant_until())
        if before != self.recipe and (
            replace(before, steps=self.recipe.steps) != self.recipe or meta["step"] > constant
        ):
            raise CheckpointError(
                f"{path}: belongs to another recipe, or its learning rate decays already; choose another --out or "
                "delete the directory"
            )
        with torch.no_grad():
            for i, p in enumerate(self.model.factors()):
                p.copy_(tensors[f"weight/{i}"])
                self.optimizer.state[p] = {k: tensors[f"{k}/{i}"] for k in ("step", "exp_avg", "exp_avg_sq")}
        self.step, self.tokens, self.seconds = meta["step"], meta["tokens"], meta["seconds"]
        log = self.out / LOG
        kept = [line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= self.step]
        part = log.with_suffix(".jsonl.part")
        part.write_text("".join(kept))
        part.replace(log)

    def export(self, directory: Path) -> None:
        """The adapter in PEFT's format, with its log and `train.json`."""
        self.model.export(directory, self.named)
        (directory / LOG).write_text((self.out / LOG).read_text())
        record = {
            "recipe": asdict(self.recipe),
            "parameters": sum(p.numel() for p in self.model.factors()),
            "steps": self.step,
            "tokens": self.tokens,
            "cpu_seconds": round(self.seconds, 1),
            "torch": torch.__version__,
        }
        (directory / "train.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one LoRA adapter of the smol pair.")
    parser.add_argument("size", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="run directory; an existing one is resumed")
    parser.add_argument("--base", type=Path, help="directory of the base model; default: fetched")
    parser.add_argument("--until", type=int, help="stop after this step, to go on later")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trainer = Trainer(override(RECIPES[args.size], args.set), args.out, args.base or smol.ensure())
    trainer.run(args.until)
    print(f"{trainer.step} steps, {trainer.tokens} tokens, {trainer.seconds:.0f} CPU seconds -> {args.out / 'adapter'}")


if __name__ == "__main__":
    main()
