"""Teach SmolLM2 to read: the language model that Rubricor and Judge of the smol tier start from.

    python -m roro_fast.train.smol_reader --out runs/smol_reader      # about half an hour of one CPU core; resumable

As `pretrain_reader`, on worked solutions of the `arithmetic` task's train questions, from the pretrained weights: its
upper layers learn, in bfloat16 under float32 weights. A verdict compares what a sentence says with what it finds, and
until it finds anything its loss says nothing, so the place of the verdict is also asked for what was to be found
(`facts`), by other words. Measured on calibrate questions. Nothing here depends on the collection of a run, so one
reader serves all runs (`rubric.judge=runs/smol_reader/model`).
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from roro_fast.models import smol
from roro_fast.models.decoder import Decoder
from roro_fast.models.training_run import override
from roro_fast.rubric import checkpoint
from roro_fast.rubric.grammar import Claim
from roro_fast.rubric.render import View
from roro_fast.tasks.mixture import Mixture
from roro_fast.tasks.worked import DELIMITER, solution
from roro_fast.train.lm import cross_entropy, sft_loss
from roro_fast.train.pretrain_reader import Pretraining, Recipe
from roro_fast.train.reader_data import LABELS, ReaderBatch, blur

TASK, QUESTIONS = "arithmetic", 1200


@dataclass(frozen=True, slots=True)
class SmolRecipe(Recipe):
    """The shape is the pretrained model's; that of the class above is not used. `facts`: weight of their loss."""

    steps: int = 240
    lr: float = 3e-4
    warmup: int = 10
    log_every: int = 4
    eval_every: int = 40
    read: int = 4
    write: int = 1
    recite: float = 0.3
    least: int = 10
    most: int = 18
    frozen: int = 12
    bf16: bool = True
    facts: float = 0.5


class WorkedSource:
    """Questions of a mixture's split with their worked solutions; a batch is of one number of steps."""

    price = (1.2, 4.0)

    def __init__(self, split: str, n: int = QUESTIONS, seed: int = 0) -> None:
        task = Mixture(TASK)
        plans = {part.name: part.part.plan for part in task.parts}
        self.by_steps: dict[int, list[tuple[str, list[str]]]] = defaultdict(list)
        for q in task.queries(split, n, seed):
            steps = solution(plans[q.task], q.prompt).split(DELIMITER)
            self.by_steps[len(steps)].append((q.prompt, steps))
        self.counts = [k for k, found in sorted(self.by_steps.items()) for _ in found]

    def size(self, rng: random.Random) -> int:
        return rng.choice(self.counts)

    def draw(self, rng: random.Random, size: int) -> tuple[str, list[str]]:
        prompt, steps = rng.choice(self.by_steps[size])
        return prompt, [blur(rng, s) for s in steps] if rng.random() < 0.5 else steps

    def verbs(self, prompt: str) -> tuple[str, ...]:
        return ()  # lines are spoken of by number


WORDS = {
    "writer": (" small", " large", " none"),
    "writer before": (" Small", " Large"),
    "number": tuple("0123456789"),
}


def facts(claim: Claim, view: View) -> list[tuple[str, int]]:
    """What a reader must find to judge a claim: (key of WORDS, index of the word)."""
    models, k = view.models, claim.number
    if claim.kind == "switches":
        return [("number", view.switches)]
    if claim.kind == "writes at most":
        return [("number", sum(LABELS[m] == claim.label for m in models))]
    if claim.kind == "takes over after":
        return [("writer", models[k] if k < len(models) else 2), ("writer before", models[k - 1])]
    return [("writer", models[k - 1] if k <= len(models) else 2)]


class SmolReading(Pretraining):
    """One run that begins with the pretrained model."""

    checkpoint_every = 40

    def start(self) -> tuple[Any, Decoder, int]:
        model, tokenizer, _ = checkpoint.load(smol.ensure(), "reader")
        return tokenizer, model, int(tokenizer.eos_token_id)

    def losses(self, b: ReaderBatch) -> dict[str, torch.Tensor]:
        """As the nano reader's, but verdicts and facts are each a choice among their own words."""
        hidden = self.model.dense(b.read).flatten(0, 1)
        logits = self.model.logits(hidden[b.rows])
        recital = cross_entropy(self.model.logits(hidden[b.recited[:, 0]]), b.recited[:, 1])
        asked: dict[str, list[tuple[int, int]]] = defaultdict(list)  # words: (slot, which of them)
        for slot, (claim, view) in enumerate(b.judged):
            for words, at in facts(claim, view):
                asked[words].append((slot, at))
        found = []
        for words, answers in asked.items():
            ids = [self.encoder.piece(w)[-1] for w in WORDS[words]]
            slots, at = torch.tensor(answers).T
            found.append(cross_entropy(logits[slots][:, ids], at))
        return {
            "verdict": cross_entropy(logits[:, self.verdicts], (~b.verdicts).long()),
            "recital": recital,
            "facts": torch.stack(found).mean(),
            "format": sft_loss(self.model, b.write, b.targets),
        }

    def total(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        assert isinstance(self.recipe, SmolRecipe)
        return super().total(losses) + self.recipe.facts * losses["facts"]

    def accuracy(self, batches: int = 4, size: int = 8) -> dict[str, float]:
        return super().accuracy(batches, size)


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach SmolLM2 to read trajectories.")
    parser.add_argument("--out", type=Path, required=True, help="run directory; an existing one is resumed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = override(SmolRecipe(), args.set)
    run = SmolReading(recipe, args.out, WorkedSource("train"), WorkedSource("calibrate", 200))
    run.run()
    print(f"{run.step} steps, {run.tokens} tokens, {run.seconds:.0f} CPU seconds -> {args.out / 'model'}")


if __name__ == "__main__":
    main()
