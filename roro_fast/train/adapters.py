"""Train the LoRA adapters of the smol pairs on worked reasoning-gym solutions (`train.adapter_data`).

    python -m roro_fast.train.adapters large --out runs/smol-large
    python -m roro_fast.train.adapters middle --out runs/smol-middle
    python -m roro_fast.train.adapters small --out runs/smol-small
    python -m roro_fast.train.adapters gsm_large --out runs/smol-gsm-large
    python -m roro_fast.train.adapters gsm_small --out runs/smol-gsm-small

Middle is large without ten of its layers and starts from its factors; small is made of middle in the same way. The
gsm pair goes on from the packaged pair, with word problems in the style of GSM8K.
The same command resumes an interrupted run and continues to the identical loss curve: data are a function of
(seed, step), and factors and optimiser state are checkpointed together. The learning rate is constant until its linear
decay to zero over the last part of `steps` (Hu et al., arXiv 2404.06395), so `--set steps=N` may shorten or lengthen a
run until its decay has begun.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from roro_fast.models import smol
from roro_fast.models.loading import load_config, load_decoder
from roro_fast.models.training_run import STATE, TrainingRun, override
from roro_fast.train.adapter_data import Batch, Corpus
from roro_fast.train.lm import IGNORE
from roro_fast.train.lora_layers import LoraDecoder
from roro_fast.train.setup import resolve_model


@dataclass(frozen=True, slots=True)
class Recipe:
    """Adapter and schedule of one model: the base's `first` layers, not adapted, and of the others those in `upper`.

    `upper` lists numbers ("20 29"; empty: all), `init` is an adapter of the same rank to start from, a directory or a
    packaged name (empty: none).
    `batch` counts problems, `decay` is the last share of `steps`, `data` a key of `adapter_data.WEIGHTS`.
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
    data: str = "arithmetic"

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
    "gsm_large": Recipe("", rank=32, alpha=32, steps=700, batch=8, lr=6e-4, init="smol/large", data="gsm"),
    "gsm_small": Recipe(
        "8 10 11 19 20 23 24 29", rank=32, alpha=32, steps=400, batch=8, lr=8e-4, init="smol/small", data="gsm"
    ),
}


class Trainer(TrainingRun[Recipe]):
    """One training run; every checkpoint comes with `adapter/` in PEFT's format, with log and `train.json`."""

    checkpoint_every = 50

    def __init__(self, recipe: Recipe, out: Path, base: Path, named: str = "smol") -> None:
        from transformers import AutoTokenizer

        super().__init__(recipe, out)
        self.named = named
        layers = recipe.layers(load_config(base).num_layers)
        decoder = load_decoder(base, torch.bfloat16, "cpu", layers=layers)
        self.model = LoraDecoder(decoder, recipe.first, recipe.rank, recipe.alpha, recipe.seed, layers)
        tokenizer = AutoTokenizer.from_pretrained(base)
        self.corpus = Corpus(tokenizer, recipe.batch, recipe.seed, data=recipe.data)
        self.held_out = Corpus(tokenizer, recipe.batch, recipe.seed, recipe.eval_batches, "calibrate", recipe.data)
        if recipe.init and not (out / STATE).is_file():
            self.model.load(resolve_model(recipe.init, "init"))
        factors = self.model.factors()
        optimizer = torch.optim.AdamW(factors, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.begin({str(i): p for i, p in enumerate(factors)}, optimizer)

    def train_step(self) -> dict[str, float]:
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
        return {"loss": round(loss.item(), 5)}

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Mean loss, and the share of solutions of which greedy decoding writes every token, on calibrate queries."""
        losses, whole = [], []
        for i in range(self.recipe.eval_batches):
            batch: Batch = self.held_out(i)
            loss, right = self.model.token_losses_and_hits(batch.ids, batch.targets, IGNORE)
            losses.append(loss)
            whole += [bool(r.all()) for r in right.split((batch.targets != IGNORE).sum(1).tolist())]
        mean = round(float(torch.cat(losses).mean()), 4)
        return {"held_out_loss": mean, "whole": round(sum(whole) / len(whole), 4), "time": round(time.time())}

    def save(self) -> None:
        super().save()
        self.export()

    def refusal(self, recipe: dict[str, Any], step: int) -> str:
        before = Recipe(**recipe)
        constant = min(before.constant_until(), self.recipe.constant_until())
        if before == self.recipe or (replace(before, steps=self.recipe.steps) == self.recipe and step <= constant):
            return ""
        return "belongs to another recipe, or its learning rate decays already"

    def export(self) -> None:
        self.model.export(self.out / "adapter", self.named)
        self.record(self.out / "adapter")


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
