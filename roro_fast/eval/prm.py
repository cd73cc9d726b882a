"""The step scorers an evaluation names: a packaged head, a Hugging Face classifier, or a model asked for a verdict."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from roro_fast.errors import CheckpointError, ConfigError
from roro_fast.models.decoder import Decoder
from roro_fast.models.loading import load_decoder
from roro_fast.routing.probe import KIND, ProbeScorer, settings
from roro_fast.routing.scorers import ClassifierScorer, VerdictScorer
from roro_fast.routing.scoring import StepScorer
from roro_fast.train.setup import Workbench, load_tokenizer, resolve_model

HEADS = {"nano/small": "nano/prm-small", "nano/large": "nano/prm-large"}


def load_scorer(name: str, bench: Workbench, key: str = "eval.prm") -> StepScorer:
    """The scorer that `name` (a directory or a packaged head) holds; prm.json says what kind, else config.json does."""
    packaged = Path(str(files("roro_fast") / "assets" / name))
    path = Path(name) if Path(name).is_dir() else packaged
    if not path.is_dir() or (path is packaged and name not in HEADS.values()):
        raise CheckpointError(f"{key}: no directory {name!r}; give one or choose {', '.join(HEADS.values())}")
    said = settings(path)
    if said.get("kind") == KIND:
        model, tokenizer = _body(said["body"], bench, key)
        return ProbeScorer.load(path, model, tokenizer)
    if said.get("kind") == "verdict":
        model, tokenizer = _body(said.get("model", name), bench, key)
        options = {k: said[k] for k in ("labels", "values", "question") if k in said}
        return VerdictScorer(model, tokenizer, **options)
    if said:
        raise CheckpointError(f"{path}/prm.json: kind {said.get('kind')!r} is unknown; use {KIND!r} or 'verdict'")
    try:
        architecture = (json.loads((path / "config.json").read_text()).get("architectures") or [""])[0]
    except (OSError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{key}: {path} has neither prm.json nor a readable config.json ({e})") from e
    if architecture.endswith("Classification"):
        return ClassifierScorer.from_pretrained(path, bench.models[0].device)
    return VerdictScorer(*_body(str(path), bench, key))


def prm(bench: Workbench, arm: str) -> StepScorer:
    """The process reward model of `eval.prm`; for the packaged pool the head on its small model."""
    name = bench.config.eval.prm or HEADS.get(bench.config.models.paths[0], "")
    if not name:
        raise ConfigError(f"eval.prm: arm {arm!r} needs a process reward model; name a directory or drop the arm")
    return load_scorer(name, bench)


def rating(bench: Workbench) -> StepScorer:
    """What SpecReason asks the large model: `eval.rating`, the packaged head on nano/large, or its digit of 0-9."""
    name = bench.config.eval.rating or HEADS.get(bench.config.models.paths[-1], "")
    return (
        load_scorer(name, bench, "eval.rating")
        if name
        else VerdictScorer.digits(bench.models[-1], bench.tokenizers[-1])
    )


def _body(name: str, bench: Workbench, key: str) -> tuple[Decoder, Any]:
    """A model of the pool where it is one, else loaded beside it."""
    c = bench.config.models
    if name in c.paths and not c.layers:
        at = c.paths.index(name)
        return bench.models[at], bench.tokenizers[at]
    path = resolve_model(name, key)
    return load_decoder(path, bench.models[0].dtype, bench.models[0].device), load_tokenizer(path, key)
