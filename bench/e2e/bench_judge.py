"""The Judge on groups of routed trajectories: dense rectangles, ragged forwards, ragged forwards that share prefixes.

    python -m bench.e2e.bench_judge [--queries 16] [--group 8] [--seconds 15] [--long-rounds 2] [--no-long]
                                      [--device cpu]

Nano cases: the packaged Judge on trajectories that the nano pair really wrote, routed at random. Long cases: a model of
SmolLM2-135M's shape with random weights on random ids; what a group has in common is as long as the case says.
Variants run interleaved in one process on one thread, after a gate on scores and advantages; figures are medians. All
read equal prompts once. "HF" is transformers' forward over the same rectangles with logits of the whole vocabulary:
what research code does. "rubric_first" counts the tokens of prompts with the rubric before the trajectory; it is not
timed, for the packaged Judge was trained on the order it has.
The last line of stdout is one JSON document, also written to bench/results/judge.json (judge_cuda.json).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from roro_fast.engine import Request, StepEngine
from roro_fast.engine.packing import pack
from roro_fast.engine.score import states
from roro_fast.files import write_json
from roro_fast.models import nano
from roro_fast.models.config import DecoderConfig
from roro_fast.models.decoder import Decoder
from roro_fast.models.inference import infer
from roro_fast.ops.judge_score import JudgeScores, judge_score
from roro_fast.routing.baselines import RandomRouter
from roro_fast.rubric.format import RESERVED, Rubric
from roro_fast.rubric.grammar import claims, criterion, verbs_of
from roro_fast.rubric.judge import VALENCE, Judge, JudgeInput
from roro_fast.rubric.prompts import JudgePrompt
from roro_fast.rubric.render import Pool, render, view_of
from roro_fast.runs.meta import provenance
from roro_fast.tasks.ledger import Ledger

RESULT = Path(__file__).parents[1] / "results" / "judge.json"
DENSE_TOKENS = 16384  # of a padded rectangle
Scorer = Callable[[], JudgeScores]


@dataclass
class Case:
    """Prompts of `len(prompts) / group` groups, one after the other, for `model` with verdict words `words`."""

    name: str
    model: Decoder
    words: torch.Tensor
    prompts: list[JudgePrompt]
    group: int
    max_tokens: int
    hf: Any = None
    rubric_first: list[list[int]] | None = None

    def verdicts(self, hidden: torch.Tensor, rows: torch.Tensor) -> JudgeScores:
        at = self.model.device
        weights = torch.tensor([w for p in self.prompts for w in p.weights], device=at)
        offsets = torch.tensor([0, *(len(p.rows) for p in self.prompts)], device=at).cumsum(0)
        groups = torch.arange(0, len(self.prompts) + 1, self.group, device=at)
        head = self.model.head.weight[self.words]
        return judge_score(hidden, rows.to(at), head, weights, offsets, torch.tensor(VALENCE, device=at), groups)

    def rectangles(self) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Indices of distinct prompts, longest first, and their ids padded on the right to DENSE_TOKENS at most."""
        first = {tuple(p.ids): i for i, p in reversed(list(enumerate(self.prompts)))}
        batch: list[int] = []
        for i in sorted(first.values(), key=lambda i: -len(self.prompts[i].ids)):
            if batch and (len(batch) + 1) * len(self.prompts[batch[0]].ids) > DENSE_TOKENS:
                yield batch, self.padded(batch)
                batch = []
            batch.append(i)
        yield batch, self.padded(batch)

    def padded(self, batch: list[int]) -> torch.Tensor:
        width = len(self.prompts[batch[0]].ids)
        ids = [self.prompts[i].ids + [0] * (width - len(self.prompts[i].ids)) for i in batch]
        return torch.tensor(ids, device=self.model.device)

    def in_order(self, parts: dict[int, torch.Tensor]) -> torch.Tensor:
        """What was found for distinct prompts, for all of them."""
        found = {tuple(self.prompts[i].ids): part for i, part in parts.items()}
        return torch.cat([found[tuple(p.ids)] for p in self.prompts])

    def dense(self) -> JudgeScores:
        parts = {}
        for batch, ids in self.rectangles():
            hidden = self.model.dense(ids)
            parts |= {i: hidden[row, self.prompts[i].rows] for row, i in enumerate(batch)}
        hidden = self.in_order(parts)
        return self.verdicts(hidden, torch.arange(len(hidden)))

    def transformers(self) -> JudgeScores:
        parts = {}
        for batch, ids in self.rectangles():
            lengths = torch.tensor([len(self.prompts[i].ids) for i in batch], device=ids.device)
            mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
            logits = self.hf(input_ids=ids, attention_mask=mask, use_cache=False).logits
            parts |= {i: logits[row, self.prompts[i].rows][:, self.words].softmax(-1) for row, i in enumerate(batch)}
        p = self.in_order(parts)
        weights = torch.tensor([w for x in self.prompts for w in x.weights], device=p.device)
        sizes = torch.tensor([len(x.rows) for x in self.prompts], device=p.device)
        value, mass = (torch.segment_reduce(x, "sum", lengths=sizes) for x in (weights * (p[:, 0] - p[:, 1]), weights))
        scores = (value / mass).view(-1, self.group)
        centred = scores - scores.mean(1, keepdim=True)
        std = scores.std(1, correction=0, keepdim=True)
        return JudgeScores(p, scores.flatten(), (centred / (std + 1e-6)).flatten())

    def ragged(self) -> JudgeScores:
        rows = {tuple(p.ids): i for i, p in enumerate(self.prompts)}
        mine, parts = list(rows.values()), {}
        for batch in pack(list(rows), self.max_tokens, share=False):
            hidden = infer(self.model, batch.on(self.model))
            parts |= {mine[j]: hidden[at[self.prompts[mine[j]].rows]] for j, at in batch.at.items()}
        hidden = self.in_order(parts)
        return self.verdicts(hidden, torch.arange(len(hidden)))

    def shared(self) -> JudgeScores:
        return self.verdicts(
            *states(self.model, [p.ids for p in self.prompts], [p.rows for p in self.prompts], self.max_tokens)
        )

    def variants(self) -> dict[str, Scorer]:
        found = {"shared": self.shared, "ragged": self.ragged, "dense": self.dense}
        return {**found, "HF": self.transformers} if self.hf is not None else found

    def tokens(self) -> dict[str, int]:
        def packed(ids: list[list[int]]) -> int:
            return sum(len(b.ids) for b in pack(ids, self.max_tokens))

        out = {
            "dense": sum(ids.numel() for _, ids in self.rectangles()),
            "ragged": sum(map(len, {tuple(p.ids) for p in self.prompts})),
            "shared": packed([p.ids for p in self.prompts]),
        }
        if self.rubric_first is not None:
            out["rubric_first"] = sum(map(len, self.rubric_first))
            out["rubric_first_shared"] = packed(self.rubric_first)
        return out


def nano_trajectories(queries: list, group: int) -> list:
    """`group` answers to each query by the nano pair, routed at random, at temperature 1; query by query."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nano.path("small"))
    engine = StepEngine(nano.load_pair(), tokenizer)
    requests = (
        Request(tokenizer(q.prompt)["input_ids"], query=q, sample=j, temperature=1.0, max_new_tokens=160)
        for q in queries
        for j in range(group)
    )
    done = {(t.query_id, t.sample): t for t in engine.rollout(requests, RandomRouter(0.5))}
    return [done[q.id, j] for q in queries for j in range(group)]


def rubric_of(prompt: str, criteria: int, labels: tuple[str, ...], draft: int) -> Rubric:
    rng = np.random.default_rng([draft, len(prompt)])
    pool = claims(verbs_of(prompt), labels)
    picks = rng.choice(len(pool), criteria, replace=False)
    return Rubric(tuple(criterion(pool[i], ("Hard Rule", "Principle")[j % 2], labels) for j, i in enumerate(picks)))


def rubric_first(judge: Judge, x: JudgeInput) -> list[int]:
    """The tokens that a prompt with the rubric before the trajectory and bare verdict slots at its end would have."""
    e = judge.encoder
    rubric = "Rubric:\n" + "".join(f"{c}\n" for c in x.rubric.criteria)
    slots = "".join(f"#{i} {RESERVED}\n" for i in range(1, len(x.rubric) + 1))
    parts = (rubric, "Trajectory:\n" + render(x.view, e.labels), slots)
    return [*e.query(x.prompt), *(i for part in parts for i in e.piece(part))]


def nano_cases(n: int, group: int, max_tokens: int, device: str) -> Iterator[Case]:
    from transformers import AutoModelForCausalLM

    directory = nano.path("small").parent / "reader"
    judge = Judge.load(directory, device=device)
    hf = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().to(device)
    queries = Ledger().queries("test", n)
    trajectories = nano_trajectories(queries, group)
    pool = Pool(judge.encoder.labels, tuple(m.config.num_params for m in nano.load_pair()))
    views = [view_of(t, pool) for t in trajectories]
    for criteria, drafts in ((3, 1), (6, 1), (6, 4)):
        inputs = [
            JudgeInput(q.prompt, views[i * group + j], rubric_of(q.prompt, criteria, judge.encoder.labels, d))
            for i, q in enumerate(queries[: max(1, n // drafts)])
            for d in range(drafts)
            for j in range(group)
        ]
        what = f"{criteria} criteria" + (f", {drafts} rubrics each" if drafts > 1 else "")
        yield Case(
            name=f"nano: {len(inputs) // group // drafts} queries x {group} trajectories, {what}",
            model=judge.model,
            words=judge.verdict_ids,
            prompts=judge.encode(inputs),
            group=group,
            max_tokens=max_tokens,
            hf=hf,
            rubric_first=[rubric_first(judge, x) for x in inputs],
        )


def long_case(group: int, common: int, own: int, criteria: int, dtype: torch.dtype, device: str) -> Case:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Decoder(DecoderConfig.from_hf(config)).to(device, dtype).eval().requires_grad_(False)
    for p in model.parameters():
        if p.dim() > 1:
            p.normal_(std=0.02)
    rng = np.random.default_rng(0)
    head = rng.integers(0, 49152, common).tolist()
    rows = [common + own - 1 - 16 * i for i in range(criteria)][::-1]
    prompts = [JudgePrompt(head + rng.integers(0, 49152, own).tolist(), rows, [1.0] * criteria) for _ in range(group)]
    kind = str(dtype).removeprefix("torch.")
    name = f"SmolLM2-135M shape, {kind}: {group} trajectories, {common} tokens in common, {own} own"
    return Case(name, model, torch.tensor([42, 43], device=device), prompts, group, 8192)


def gate(case: Case, variants: dict[str, Scorer], tolerance: float) -> float:
    """The largest difference of a score between two variants; advantages must order a group alike where scores do."""
    results = {name: fn() for name, fn in variants.items()}
    base, worst = results["dense"], 0.0
    for name, r in results.items():
        worst = max(worst, float((r.scores - base.scores).abs().max()))
        apart = (base.scores.view(-1, case.group).amax(1) - base.scores.view(-1, case.group).amin(1)) > 100 * tolerance
        gap = (r.advantages - base.advantages).view(-1, case.group)[apart].abs()
        if worst > tolerance or (gap.numel() and float(gap.max()) > 0.2):
            raise SystemExit(f"gate: {case.name}: {name} is off by {worst:.2g}; no times")
    return worst


@torch.no_grad()
def measure(case: Case, seconds: float, rounds: int, tolerance: float) -> dict[str, Any]:
    variants = case.variants()
    error = gate(case, variants, tolerance)
    times: dict[str, list[float]] = {name: [] for name in variants}
    end, i = time.perf_counter() + seconds, 0
    while i < rounds or time.perf_counter() < end:
        names = list(variants)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            variants[name]().scores.cpu()
            times[name].append(time.perf_counter() - start)
        i += 1
    tokens = case.tokens()
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        "case": case.name,
        "trajectories": len(case.prompts),
        "verdict_slots": sum(len(p.rows) for p in case.prompts),
        "tokens": tokens,
        "saved_by_ragged": 1 - tokens["ragged"] / tokens["dense"],
        "saved_by_prefix": 1 - tokens["shared"] / tokens["ragged"],
        "max_score_difference": error,
        "rounds": i,
        "trajectories_per_second": {n: len(case.prompts) / t for n, t in medians.items()},
        "seconds": {n: {"median": medians[n], "best": min(t), "worst": max(t)} for n, t in times.items()},
        "speedup": {n: t / medians["shared"] for n, t in medians.items() if n != "shared"},
        "speedup_of_bests": {n: min(t) / min(times["shared"]) for n, t in times.items() if n != "shared"},
    }


def show(r: dict[str, Any]) -> None:
    t = r["tokens"]
    print(f"{r['case']}\n  tokens: dense {t['dense']}, ragged {t['ragged']}, shared {t['shared']}", end="")
    first = t.get("rubric_first_shared")
    print(f" (rubric before trajectory: {first} of {t['rubric_first']})" if first else "")
    for name, rate in r["trajectories_per_second"].items():
        print(f"  {name:8} {rate:9.1f} trajectories/s   {r['speedup'].get(name, 1.0):5.2f}x of its time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15.0, help="per nano case")
    parser.add_argument("--max-tokens", type=int, default=4096, help="computed tokens per forward of the nano Judge")
    parser.add_argument("--long-rounds", type=int, default=2)
    parser.add_argument("--no-long", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="default: bench/results/judge.json, judge_cuda.json on a GPU")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for case in nano_cases(args.queries, args.group, args.max_tokens, args.device):
        results.append(measure(case, args.seconds, 3, 1e-4))
        show(results[-1])
    if not args.no_long:
        for common, own in ((384, 128), (96, 416)):
            case = long_case(args.group, common, own, 4, torch.bfloat16, args.device)
            results.append(measure(case, 0.0, args.long_rounds, 2e-2))
            show(results[-1])
    document = {
        "bench": "judge",
        "device": args.device,
        "group": args.group,
        "cases": results,
        "provenance": provenance(),
    }
    write_json(args.out or (RESULT if args.device == "cpu" else RESULT.with_name("judge_cuda.json")), document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
