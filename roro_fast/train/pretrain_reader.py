"""Pretrain the nano reader: the small language model that Rubricor and Judge start from.

    python -m roro_fast.train.pretrain_reader --out runs/reader

It learns to read (who wrote which line, is a sentence true) and to write the rubric format, from `reader_data` only.
The same command resumes an interrupted run and continues to the identical loss curve.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roro_fast.models import nano_tokenizer, train_nano
from roro_fast.models.decoder import Decoder
from roro_fast.models.lm_trainer import LMTrainer
from roro_fast.models.training_run import TrainingRun, override
from roro_fast.rubric import checkpoint
from roro_fast.rubric.grammar import KINDS
from roro_fast.rubric.prompts import PromptEncoder, verdict_ids
from roro_fast.train.lm import cross_entropy, sft_loss
from roro_fast.train.reader_data import (
    CLAIMS_PER_TRAJECTORY,
    LABELS,
    LEDGER,
    ReaderBatch,
    Source,
    make_batch,
    reading_sets,
)

HELD_OUT_SEED = 1_000_003


@dataclass(frozen=True, slots=True)
class Recipe(train_nano.Recipe):
    """Shape and schedule; `read` Judge prompts and `write` rubrics a step; `recite`, `format`: loss weights.

    `least` to `most` claims are made about a trajectory. `frozen`, `bf16`: see LMTrainer.
    """

    hidden: int = 96
    layers: int = 4
    heads: int = 3
    kv_heads: int = 3
    head_dim: int = 32
    intermediate: int = 256
    steps: int = 2500
    lr: float = 2e-3
    eval_every: int = 500
    read: int = 8
    write: int = 4
    recite: float = 0.5
    format: float = 0.3
    least: int = CLAIMS_PER_TRAJECTORY[0]
    most: int = CLAIMS_PER_TRAJECTORY[1]
    frozen: int = 0
    bf16: bool = False


def nano_tokenizer_at(directory: Path) -> object:
    from transformers import AutoTokenizer

    nano_tokenizer.save(directory)
    return AutoTokenizer.from_pretrained(directory)


class Pretraining(TrainingRun[Recipe]):
    """One run; at the end `model/` is a Hugging Face directory with tokenizer, roro.json, log and `train.json`.

    `source` gives the queries to learn on, `held_out` (default: the same, other draws) those to measure on.
    """

    log_first = 20
    checkpoint_every = 250

    def __init__(self, recipe: Recipe, out: Path, source: Source = LEDGER, held_out: Source | None = None) -> None:
        super().__init__(recipe, out)
        self.source, self.held_out = source, held_out or source
        self.tokenizer, self.model, self.pad = self.start()
        self.encoder = PromptEncoder(self.tokenizer, LABELS)
        self.verdicts = torch.tensor(verdict_ids(self.tokenizer))
        self.trainer = LMTrainer(
            self.model, recipe.lr, weight_decay=recipe.weight_decay, frozen=recipe.frozen, bf16=recipe.bf16
        )
        self.begin(dict(self.model.named_parameters()), self.trainer.optimizer)

    def start(self) -> tuple[Any, Decoder, int]:
        """(tokenizer, model, id to pad with) to begin from: nothing learned yet."""
        model = Decoder(train_nano.decoder_config(self.recipe))
        train_nano.initialise(model, self.recipe.seed)
        return nano_tokenizer_at(self.out / "tokenizer"), model, nano_tokenizer.vocabulary().index("<pad>")

    def losses(self, b: ReaderBatch) -> dict[str, torch.Tensor]:
        """Cross-entropies over the whole vocabulary: verdicts, recital, rubrics written."""
        hidden = self.model.dense(b.read).flatten(0, 1)
        verdict = cross_entropy(self.model.logits(hidden[b.rows]), self.verdicts[(~b.verdicts).long()])
        recital = cross_entropy(self.model.logits(hidden[b.recited[:, 0]]), b.recited[:, 1])
        return {"verdict": verdict, "recital": recital, "format": sft_loss(self.model, b.write, b.targets)}

    def total(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """What is descended."""
        return losses["verdict"] + self.recipe.recite * losses["recital"] + self.recipe.format * losses["format"]

    def train_step(self) -> dict[str, float]:
        r = self.recipe
        batch = make_batch(self.encoder, self.pad, r.seed, self.step, r.read, r.write, (r.least, r.most), self.source)
        losses = self.losses(batch)
        self.trainer.step(self.total(losses), train_nano.learning_rate(r, self.step))
        self.step += 1
        self.tokens += batch.read.numel() + batch.write.numel()
        return {k: round(float(v.detach()), 5) for k, v in losses.items()}

    @torch.no_grad()
    def accuracy(self, batches: int = 12, size: int = 32) -> dict[str, float]:
        """Share of right verdicts on fresh trajectories under ordinary rubrics, in all and per kind of sentence."""
        hit, total = torch.zeros(len(KINDS)), torch.zeros(len(KINDS))
        seed = HELD_OUT_SEED + self.recipe.seed
        for b in reading_sets(self.encoder, self.pad, seed, batches, size, self.held_out):
            logits = self.model.logits(self.model.dense(b.read).flatten(0, 1)[b.rows])[:, self.verdicts]
            right = ((logits[:, 0] > logits[:, 1]) == b.verdicts).float()
            hit.index_add_(0, b.kinds, right)
            total.index_add_(0, b.kinds, torch.ones_like(right))
        per_kind = {k: round(float(h / t), 4) for k, h, t in zip(KINDS, hit, total, strict=True) if t}
        return {"all": round(float(hit.sum() / total.sum()), 4), **per_kind}

    def measure(self) -> dict[str, Any]:
        return {"verdict_accuracy": self.accuracy()}

    def run(self, until: int | None = None, quiet: bool = False) -> None:
        with self.trainer:
            super().run(until, quiet)

    def export(self) -> None:
        checkpoint.save(self.out / "model", self.model, self.tokenizer, {"role": "reader", "labels": LABELS})
        self.record(self.out / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the nano reader.")
    parser.add_argument("--out", type=Path, required=True, help="run directory; an existing one is resumed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = Pretraining(override(Recipe(), args.set), args.out)
    run.run()
    print(f"{run.step} steps, {run.tokens} tokens, {run.seconds:.0f} CPU seconds -> {args.out / 'model'}")


if __name__ == "__main__":
    main()
