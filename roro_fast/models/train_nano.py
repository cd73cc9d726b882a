"""Train one model of the nano pair on the train split of the ledger task.

    python -m roro_fast.models.train_nano small --out runs/nano-small
    python -m roro_fast.models.train_nano large --out runs/nano-large

The same command resumes an interrupted run and continues to the identical loss curve: data are a function of
(seed, step), and weights and optimiser state are checkpointed together.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from roro_fast.errors import ConfigError
from roro_fast.models import nano_tokenizer
from roro_fast.models.config import DecoderConfig
from roro_fast.models.decoder import Decoder
from roro_fast.models.lm_trainer import LMTrainer
from roro_fast.models.loading import save_decoder
from roro_fast.models.nano_data import IGNORE, Batch, make_batch
from roro_fast.models.training_run import TrainingRun, override
from roro_fast.tasks.ledger import KINDS

EVAL_SEED = 1_000_003


@dataclass(frozen=True, slots=True)
class Recipe:
    """Shape, corpus and training schedule of one model; `batch` counts problems.

    `narrow` ("sub2=29 mul=3") is the largest operand in the corpus of those kinds, `noise` the share of wrong results
    in it (`nano_data.make_batch`): a small model of real life has seen less, and worse, than a large one, so that what
    it is unsure of and what it gets wrong are not the same steps.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    steps: int
    narrow: str = ""
    noise: float = 0.0
    batch: int = 64
    lr: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.01
    seed: int = 0
    log_every: int = 50
    eval_every: int = 1000

    @property
    def coverage(self) -> dict[str, int]:
        """`narrow` as kind -> largest operand."""
        pairs = [item.partition("=") for item in self.narrow.split()]
        if any(kind not in {k.name for k in KINDS} or not high.isdecimal() for kind, _, high in pairs):
            raise ConfigError(f"narrow: {self.narrow!r} is not of the form 'sub2=19 mul=2'")
        return {kind: int(high) for kind, _, high in pairs}


RECIPES = {
    "small": Recipe(
        32,
        2,
        heads=2,
        kv_heads=1,
        head_dim=16,
        intermediate=96,
        steps=5000,
        narrow="sub2=29 mul=3",
        noise=0.15,
        lr=0.01,
        eval_every=500,
    ),
    "large": Recipe(96, 2, heads=6, kv_heads=6, head_dim=16, intermediate=256, steps=4000, lr=0.003, eval_every=250),
}


def decoder_config(recipe: Recipe) -> DecoderConfig:
    from transformers import Qwen3Config

    vocabulary = nano_tokenizer.vocabulary()
    return DecoderConfig.from_hf(
        Qwen3Config(
            vocab_size=len(vocabulary),
            hidden_size=recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=recipe.head_dim,
            intermediate_size=recipe.intermediate,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=vocabulary.index("<bos>"),
            eos_token_id=vocabulary.index("<eos>"),
            pad_token_id=vocabulary.index("<pad>"),
            architectures=["Qwen3ForCausalLM"],
            dtype="float32",
        )
    )


def initialise(model: Decoder, seed: int) -> None:
    """Normal weights: 1/sqrt(fan in), residual outputs down by sqrt(2 layers), embeddings at 0.1; norms stay 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() < 2:
            continue
        std = 0.1 if name.startswith("embed") else p.shape[1] ** -0.5
        if name.endswith(("o.weight", "down.weight")):
            std /= math.sqrt(2 * model.config.num_layers)
        torch.nn.init.normal_(p, std=std, generator=generator)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine to zero; `step` counts from 0."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))


def batch_loss(model: Decoder, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over completion tokens; logits are computed for those rows only."""
    hidden = model.dense(batch.ids).flatten(0, 1)
    targets = batch.targets.flatten()
    rows = (targets != IGNORE).nonzero().squeeze(1)
    return F.cross_entropy(model.logits(hidden[rows]), targets[rows])


@torch.no_grad()
def result_errors(model: Decoder, recipe: Recipe, batches: int = 8) -> dict[str, float]:
    """Error rate of the result token per step kind, on correct prefixes of fresh train-split problems."""
    wrong, total = torch.zeros(len(KINDS)), torch.zeros(len(KINDS))
    for i in range(batches):
        b = make_batch(EVAL_SEED + recipe.seed, i, 128)
        rows = torch.arange(len(b.ids)).unsqueeze(1)
        predicted = model.logits(model.dense(b.ids)[rows, b.results]).argmax(-1)
        missed = (predicted != b.targets[rows, b.results]).float().flatten()
        wrong.index_add_(0, b.kinds.flatten(), missed)
        total.index_add_(0, b.kinds.flatten(), torch.ones_like(missed))
    return {k.name: round(float(e), 4) for k, e in zip(KINDS, wrong / total, strict=True)}


class Trainer(TrainingRun[Recipe]):
    """One training run; at the end `model/` is a Hugging Face directory with tokenizer, log and `train.json`."""

    log_first = 30

    def __init__(self, recipe: Recipe, out: Path) -> None:
        super().__init__(recipe, out)
        self.model = Decoder(decoder_config(recipe))
        initialise(self.model, recipe.seed)
        self.trainer = LMTrainer(self.model, recipe.lr, weight_decay=recipe.weight_decay)
        self.begin(dict(self.model.named_parameters()), self.trainer.optimizer)

    def train_step(self) -> dict[str, float]:
        r = self.recipe
        batch = make_batch(r.seed, self.step, r.batch, narrow=r.coverage, noise=r.noise)
        loss = batch_loss(self.model, batch)
        self.trainer.step(loss, learning_rate(r, self.step))
        self.step += 1
        self.tokens += batch.ids.numel()
        return {"loss": round(loss.item(), 6)}

    def measure(self) -> dict[str, Any]:
        return {"result_errors": result_errors(self.model, self.recipe)}

    def run(self, until: int | None = None, quiet: bool = False) -> None:
        with self.trainer:
            super().run(until, quiet)

    def export(self) -> None:
        save_decoder(self.model, self.out / "model")
        nano_tokenizer.save(self.out / "model")
        self.record(self.out / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one model of the nano pair.")
    parser.add_argument("size", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="run directory; an existing one is resumed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trainer = Trainer(override(RECIPES[args.size], args.set), args.out)
    trainer.run()
    print(f"{trainer.step} steps, {trainer.tokens} tokens, {trainer.seconds:.0f} CPU seconds -> {args.out / 'model'}")


if __name__ == "__main__":
    main()
