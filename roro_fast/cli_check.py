"""`roro doctor`'s part about models: can they be one pool, and what would a run with this config be refused for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from roro_fast.cli_doctor import Finding
from roro_fast.cli_stages import STAGES
from roro_fast.config import Config
from roro_fast.errors import RoroError
from roro_fast.models.delimiter import StepBoundary
from roro_fast.models.loading import check_decoder, load_config
from roro_fast.tasks.base import SPLITS
from roro_fast.tasks.ledger import Ledger
from roro_fast.tasks.prompting import check_chats
from roro_fast.train.setup import (
    Workbench,
    distinct,
    load_tokenizer,
    model_files,
    pool_tokenizers,
    published,
)

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def models(names: Sequence[str], delimiter: str, layers: Sequence[Any] = ()) -> Iterator[Finding]:
    """Can these models be one pool: configs, weights, delimiter, tokenizers and their kinds, FLOPs ratio.

    Of a model on the hub only the config and the tokenizer are fetched, of weights that are here only the headers read.
    `layers`: see `ModelsConfig`.
    """
    flops: list[float] = []
    known: dict[str, Path] = {}
    families: list[str] = []
    for name, kept in zip(names, layers or [0] * len(names), strict=True):
        try:
            files = model_files(name, "doctor", weights=False)
            here = any(f.suffix in _WEIGHTS for f in files.weights.iterdir())
            c = check_decoder(files.path, kept or None, files.weights) if here else load_config(files.weights)
            tokenizer = load_tokenizer(files.tokenizer, "doctor")
        except RoroError as e:
            yield Finding("models", name, "fault", str(e))
            continue
        flops.append(c.forward_flops(1, 1))
        known[name] = files.tokenizer
        families.append(c.family)
        detail = (
            "LoRA adapter on " * (files.path != files.weights)
            + f"{c.family}, {c.num_params:,} parameters, {c.num_layers} layers, context {c.max_position}"
        )
        detail += (
            f" (windows of {max(c.windows, default=0)})" * any(c.windows) + f", {c.forward_flops(1, 1):.3g} FLOPs/token"
        )
        on_hub = here or published(name)
        detail += "" if here else "; weights not here yet, a run fetches them" if on_hub else "; no safetensors weights"
        yield Finding("models", name, "ok" if on_hub else "fault", detail)
        try:
            ends = StepBoundary(tokenizer, delimiter)
            alone = int((ends.table[0] == ends.closed).sum())
            yield Finding(
                "models", f"{name} delimiter", "ok", f"{delimiter!r}: {alone} token(s) end a step by themselves"
            )
        except RoroError as e:
            yield Finding("models", f"{name} delimiter", "fault", str(e))
    if len(names) < 2:
        yield Finding("models", "pool", "absent", "one model only; routing needs at least two")
    elif len(families) == len(names):
        try:
            found = pool_tokenizers([known[n] for n in names], "doctor")
            kinds = distinct(found)
            groups = [" + ".join(n for n, t in zip(names, found, strict=True) if t is kind) for kind in kinds]
            detail = f"{len(kinds)} tokenizers ({'; '.join(groups)}): each step is tokenised again for the others"
            yield Finding("models", "tokenizer", "ok", detail if len(kinds) > 1 else "one tokenizer for all")
        except RoroError as e:
            yield Finding("models", "tokenizer", "fault", str(e))
        same = "one family" if len(set(families)) == 1 else "across families"
        yield Finding("models", "families", "ok", f"{', '.join(families)}: {same}")
        ratio = flops[-1] / flops[0]
        detail = f"the last costs {ratio:.2f}x the first per token"
        if ratio > 1:
            yield Finding("models", "cost ratio", "ok", detail)
        else:
            yield Finding("models", "cost ratio", "fault", f"{detail}; list the smallest first")


def run(config: Config) -> Iterator[Finding]:
    """The pool of a config, its task, and what each stage checks before any work."""
    c, t, bench = config.models, config.task, Workbench(config)
    yield from models(c.paths, config.engine.delimiter, c.layers)
    try:
        counts = [len(bench.drawn(s)) for s in SPLITS]
        detail = ", ".join(f"{n} {s}" for n, s in zip(counts, SPLITS, strict=True))
        if t.name != Ledger.name and t.chat:
            check_chats([load_tokenizer(model_files(p, weights=False).tokenizer) for p in c.paths], t.chat)
        yield Finding("run", f"task {t.name}", "ok", f"{detail} queries")
    except RoroError as e:
        yield Finding("run", f"task {t.name}", "fault", str(e))
    for stage in STAGES:
        if stage.check is not None and stage.wanted(config):
            try:
                stage.check(bench)
                yield Finding("run", f"stage {stage.name}", "ok", "has what it needs")
            except RoroError as e:
                yield Finding("run", f"stage {stage.name}", "fault", str(e))
