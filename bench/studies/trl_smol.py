"""Rubricor and Judge as real language models: SmolLM2-135M-Instruct trained by TRL around our engine.

    python -m bench.studies.trl_smol train       # resumable; about ten CPU minutes on one AVX-512-BF16 core
    python -m bench.studies.trl_smol majority    # afterwards: what always the same verdict would have read right
    python -m bench.studies.trl_smol nano        # the nano reader by TRL and by the native trainer, some minutes
    python -m bench.studies.trl_smol rollouts    # our engine against `generate` of transformers, on the same weights

Pairs come from the nano pair's trajectories on the built-in task, as the text that SmolLM2 reads: queries of four
lines, rubrics of three criteria. Held-out queries are measured before, after the warm-up and after each side of one
round. Results go to bench/results/trl_smol.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from roro_fast.cli_stages import run_stages
from roro_fast.config import Config, RubricConfig
from roro_fast.config_io import load_config
from roro_fast.config_trl import TrlConfig
from roro_fast.files import write_json
from roro_fast.models import smol
from roro_fast.rubric.format import Rubric
from roro_fast.rubric.judge import Judge, JudgeInput
from roro_fast.rubric.pair_files import load_pairs
from roro_fast.rubric.pairs import Pair
from roro_fast.rubric.rubricor import Rubricor
from roro_fast.rubric.seeds import group_by_query, seed_rubrics
from roro_fast.runs import RunDirectory
from roro_fast.runs.meta import provenance
from roro_fast.tasks.ledger import parse_query
from roro_fast.train.alternate import alternate, evaluate
from roro_fast.train.judge_training import truths
from roro_fast.train.pipeline import PAIRS
from roro_fast.train.setup import resolve_model
from roro_fast.train.trainers import NATIVE, Trainers
from roro_fast.train.trl.actor import load_actor
from roro_fast.train.trl.trainers import TrlTrainers

RESULT = Path(__file__).parents[1] / "results" / "trl_smol.json"
LINES, PER_QUERY, HELD_OUT_QUERIES = 4, 3, 10
RUBRIC = RubricConfig(
    rubricor="smol", judge="smol", trainer="trl", rounds=1, max_criteria=3, max_tokens=72, batch_size=4, group_size=4,
    sft_steps=48, sft_lr=1e-4, steps=3, judge_lr=2e-5, rubricor_lr=2e-5,
)  # fmt: skip
TRL = TrlConfig(micro_batch=8, checkpoint_every=6)


def nano_pairs(root: Path) -> list[Pair]:
    """Pairs of the nano pair's rollouts: short queries, few pairs of each, few held-out queries."""
    config: Config = load_config("nano", [f"run.dir={root}", "run.name=pairs", "task.n_train=1200",
                                          "collect.n_queries=1200"])  # fmt: skip
    run = RunDirectory.for_config(config)
    run_stages(run, "pairs", Console(quiet=True))
    groups = group_by_query(p for p in load_pairs(run.path / PAIRS) if len(parse_query(p.prompt)[1]) == LINES)
    held = [q for q in sorted(groups) if groups[q][0].split == "heldout"][:HELD_OUT_QUERIES]
    kept = [q for q in sorted(groups) if groups[q][0].split == "train" or q in held]
    return [p for q in kept for p in groups[q][:PER_QUERY]]


def seed_accuracy(judge: Judge, pairs: list[Pair], rubrics: dict[str, Rubric]) -> float:
    """The Judge alone: share of pairs it orders right under seed rubrics, which are well-formed from the start."""
    inputs = [JudgeInput(p.prompt, c.view, rubrics[p.query_id]) for p in pairs for c in (p.chosen, p.rejected)]
    s = [j.score for j in judge.score(inputs)]
    return round(sum(a > b for a, b in zip(s[0::2], s[1::2], strict=True)) / len(pairs), 4)


def curve(logs: Path) -> dict[str, dict[str, list[float]]]:
    """The TensorBoard scalars of every phase that show whether it learned."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = {}
    for folder in sorted(logs.iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        tags = [t for t in ("train/loss", "train/reward", "train/malformed") if t in events.Tags()["scalars"]]
        tags = [t for t in tags if t != "train/loss" or "sft" in folder.name]
        out[folder.name] = {t.removeprefix("train/"): [round(e.value, 4) for e in events.Scalars(t)] for t in tags}
    return out


def train(root: Path) -> dict[str, Any]:
    pairs = nano_pairs(root)
    train_pairs, held = ([p for p in pairs if (p.split == "train") == side] for side in (True, False))
    judge, rubricor = Judge.load(smol.ensure()), Rubricor.load(smol.ensure())
    rubricor.max_criteria = RUBRIC.max_criteria
    asked = {p.query_id: p.prompt for p in held}
    seeds = seed_rubrics(train_pairs, judge.encoder.labels, most=RUBRIC.max_criteria, others=asked)
    first = root / "before.json"
    if not first.is_file():
        row = {"phase": "before", **evaluate(judge, rubricor, held, RUBRIC)}
        write_json(first, {**row, "seed_accuracy": seed_accuracy(judge, held, seeds)})
        print(first.read_text(), flush=True)
    begin, cpu = time.perf_counter(), time.process_time()
    result = alternate(
        judge, rubricor, pairs, RUBRIC, out=root / "alternation", log=lambda row: print(row, flush=True),
        trainers=TrlTrainers(TRL, root / "state", root / "logs"),
    )  # fmt: skip
    last = {**result.history[-1], "seed_accuracy": seed_accuracy(judge, held, seeds)}
    judge.save(root / "judge")
    rubricor.save(root / "rubricor")
    return {
        "model": "SmolLM2-135M-Instruct", "rubric": vars(RUBRIC), "trl": vars(TRL),
        "pairs": {"train": len(train_pairs), "held_out": len(held), "held_out_queries": len(asked)},
        "phases": [json.loads(first.read_text()), *result.history[:-1], last],
        "curves": curve(root / "logs"),
        "seconds": {"wall": round(time.perf_counter() - begin, 1), "cpu": round(time.process_time() - cpu, 1)},
    }  # fmt: skip


def nano(root: Path) -> dict[str, Any]:
    """The nano reader by either trainer on the same pairs: held-out pair accuracy after each phase, CPU seconds."""
    config: Config = load_config(
        "nano", [f"run.dir={root}", "run.name=nano", "rubric.rounds=1", "rubric.sft_steps=150"]
    )
    run = RunDirectory.for_config(config)
    run_stages(run, "pairs", Console(quiet=True))
    pairs = load_pairs(run.path / PAIRS)
    out: dict[str, Any] = {"pairs": len(pairs)}
    made: dict[str, Trainers] = {"native": NATIVE, "trl": TrlTrainers(TrlConfig(bf16=False, micro_batch=64))}
    for name, trainers in made.items():
        reader = resolve_model("nano/reader")
        judge, rubricor = Judge.load(reader), Rubricor.load(reader)
        before = {
            "phase": "before",
            **evaluate(judge, rubricor, [p for p in pairs if p.split != "train"], config.rubric),
        }
        cpu = time.process_time()
        result = alternate(judge, rubricor, pairs, config.rubric, trainers=trainers)
        rows = [{k: r.get(k) for k in ("phase", "accuracy", "reading", "heldout_malformed")}
                for r in (before, *result.history)]  # fmt: skip
        out[name] = {"phases": rows, "cpu_s": round(time.process_time() - cpu, 1)}
        print(name, out[name], flush=True)
    return out


def majority(root: Path) -> dict[str, Any]:
    """What `reading` is to be held against: the share of the commoner verdict under the trained Rubricor's rubrics."""
    held = [p for p in nano_pairs(root) if p.split == "heldout"]
    rubricor = Rubricor.load(root / "rubricor")
    prompts = sorted({p.prompt for p in held})
    drafts = dict(zip(prompts, rubricor.write(prompts, max_new_tokens=RUBRIC.max_tokens), strict=True))
    written = {q: d[0].rubric for q, d in drafts.items()}
    found = [
        t for p in held for c in (p.chosen, p.rejected) if isinstance(r := written[p.prompt], Rubric)
        for t in truths(JudgeInput(p.prompt, c.view, r), rubricor.encoder.labels) if t is not None
    ]  # fmt: skip
    true = sum(found) / max(1, len(found))
    return {"verdicts": len(found), "reading": round(max(true, 1 - true), 4)}


def rollouts(root: Path, queries: int = 2, repeats: int = 2) -> dict[str, Any]:
    """CPU seconds for groups of rubrics, interleaved: the untrained model writes on to the cap, or stops at EOS."""
    rubricor = Rubricor.load(smol.ensure())
    prompts = sorted({p.prompt for p in nano_pairs(root)})[:queries]
    ids = [rubricor.encoder.rubricor(p) for p in prompts for _ in range(RUBRIC.group_size)]
    with tempfile.TemporaryDirectory() as scratch:
        twin = load_actor(rubricor.model, Path(scratch), TRL).eval()
    width = max(map(len, ids))
    eos = rubricor.encoder.eos
    padded = torch.tensor([[eos] * (width - len(i)) + i for i in ids])
    mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
    took: dict[str, list[float]] = {"engine": [], "transformers": []}
    written: dict[str, list[int]] = {"engine": [], "transformers": []}
    for seed in range(repeats):
        begin = time.process_time()
        groups = rubricor.write(prompts, n=RUBRIC.group_size, temperature=1.0, seed=seed, max_new_tokens=72)
        took["engine"].append(time.process_time() - begin)
        written["engine"].append(sum(len(d.ids) for g in groups for d in g))
        begin = time.process_time()
        with torch.no_grad():
            out = twin.generate(input_ids=padded, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                                max_new_tokens=72, eos_token_id=eos, pad_token_id=eos)  # fmt: skip
        took["transformers"].append(time.process_time() - begin)
        tails = out[:, width:].tolist()
        written["transformers"].append(sum(t.index(eos) + 1 if eos in t else len(t) for t in tails))
    rate = {k: statistics.median(n / s for n, s in zip(written[k], took[k], strict=True)) for k in took}
    return {
        "samples": len(ids), "tokens": {k: statistics.median(v) for k, v in written.items()},
        "cpu_s": {k: round(statistics.median(v), 2) for k, v in took.items()},
        "tokens_per_cpu_s": {k: round(v, 1) for k, v in rate.items()},
        "ratio": round(rate["engine"] / rate["transformers"], 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "majority", "nano", "rollouts"))
    parser.add_argument("--root", type=Path, default=Path("runs/trl_smol"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.root.mkdir(parents=True, exist_ok=True)
    found = {"train": train, "majority": majority, "nano": nano, "rollouts": rollouts}[args.what](args.root)
    kept = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    write_json(RESULT, {**kept, args.what: {**found, "provenance": provenance()}})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
