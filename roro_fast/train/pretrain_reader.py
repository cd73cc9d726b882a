"""Pretrain the nano reader: the small language model that Rubricor and Judge start from.

    python -m roro_fast.train.pretrain_reader --out runs/reader

It learns to read (who wrote which line, is a sentence true) and to write the rubric format, from `reader_data` only.
The same command resumes an interrupted run and continues to the identical loss curve.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from roro_fast.errors import CheckpointError
from roro_fast.models import nano_tokenizer, train_nano
from roro_fast.models.decoder import Decoder
from roro_fast.rubric import checkpoint
from roro_fast.rubric.grammar import KINDS
from roro_fast.rubric.prompts import PromptEncoder, verdict_ids
from roro_fast.train.lm import LMTrainer, cross_entropy, sft_loss
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


class Pretraining:
    """One run in one directory: `train_log.jsonl`, `state.safetensors`, and at the end `model/`.

    `source` gives the queries to learn on, `held_out` (default: the same, other draws) those to measure on.
    """

    def __init__(self, recipe: Recipe, out: Path, source: Source = LEDGER, held_out: Source | None = None) -> None:
        self.recipe, self.out, self.source, self.held_out = recipe, out, source, held_out or source
        out.mkdir(parents=True, exist_ok=True)
        self.tokenizer, self.model, self.pad = self.start()
        self.encoder = PromptEncoder(self.tokenizer, LABELS)
        self.verdicts = torch.tensor(verdict_ids(self.tokenizer))
        self.trainer = LMTrainer(
            self.model, recipe.lr, weight_decay=recipe.weight_decay, frozen=recipe.frozen, bf16=recipe.bf16
        )
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        if (out / "state.safetensors").is_file():
            self._restore()
        else:
            (out / "train_log.jsonl").write_text("")

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

    def run(self, until: int | None = None, checkpoint_every: int = 250, quiet: bool = False) -> None:
        """Train up to step `until` (default: the recipe's last); the last step also writes the model."""
        r = self.recipe
        end = min(until or r.steps, r.steps)
        started = time.process_time() - self.seconds
        with (self.out / "train_log.jsonl").open("a") as log, self.trainer:
            while self.step < end:
                losses = self.train_step()
                self.seconds = time.process_time() - started
                row: dict[str, object] = {}
                if self.step <= 20 or self.step % r.log_every == 0 or self.step == r.steps:
                    row = {"step": self.step, "tokens": self.tokens, **losses}
                if self.step % r.eval_every == 0 or self.step == r.steps:
                    row |= {"verdict_accuracy": self.accuracy(), "cpu_s": round(self.seconds, 1)}
                    if not quiet:
                        print(json.dumps(row), flush=True)
                if row:
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                if self.step % checkpoint_every == 0 or self.step == end:
                    log.flush()
                    self._save()
        if self.step == r.steps:
            self.export()

    def _save(self) -> None:
        meta = {"recipe": asdict(self.recipe), "step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        self.trainer.save(self.out / "state.safetensors", meta)

    def _restore(self) -> None:
        path = self.out / "state.safetensors"
        meta = self.trainer.load(path)
        if meta["recipe"] != asdict(self.recipe):
            raise CheckpointError(f"{path}: belongs to another recipe; choose another --out or delete the directory")
        self.step, self.tokens, self.seconds = meta["step"], meta["tokens"], meta["seconds"]
        log = self.out / "train_log.jsonl"
        kept = [line for line in log.read_text().splitlines(True) if json.loads(line)["step"] <= self.step]
        part = log.with_name(log.name + ".part")
        part.write_text("".join(kept))
        part.replace(log)

    def export(self) -> None:
        """`<out>/model`: a Hugging Face directory with tokenizer, roro.json, `train.json` and the log."""
        path = self.out / "model"
        checkpoint.save(path, self.model, self.tokenizer, {"role": "reader", "labels": LABELS})
        (path / "train_log.jsonl").write_text((self.out / "train_log.jsonl").read_text())
        record = {
            "recipe": asdict(self.recipe),
            "parameters": self.model.config.num_params,
            "tokens": self.tokens,
            "cpu_seconds": round(self.seconds, 1),
            "torch": torch.__version__,
        }
        (path / "train.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the nano reader.")
    parser.add_argument("--out", type=Path, required=True, help="run directory; an existing one is resumed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = Pretraining(train_nano.override(Recipe(), args.set), args.out)
    run.run()
    print(f"{run.step} steps, {run.tokens} tokens, {run.seconds:.0f} CPU seconds -> {args.out / 'model'}")


if __name__ == "__main__":
    main()
