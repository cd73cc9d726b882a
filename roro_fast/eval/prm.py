"""The step scorers an evaluation names: a packaged head, a Hugging Face classifier, or a model asked for a verdict."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from roro_fast.config import Config
from roro_fast.errors import CheckpointError, ConfigError
from roro_fast.models import lora
from roro_fast.models.decoder import Decoder
from roro_fast.models.loading import load_decoder
from roro_fast.routing.probe import KIND, ProbeScorer, settings
from roro_fast.routing.scorers import ClassifierScorer, VerdictScorer
from roro_fast.routing.scoring import StepScorer
from roro_fast.train.setup import Workbench, load_tokenizer, model_files, resolve_model

HEADS = {"nano/small": "nano/prm-small", "nano/large": "nano/prm-large"}
PRM_ARMS = ("trim_thr", "trim_agg", "trim_pomdp", "rsd")


def load_scorer(name: str, bench: Workbench, key: str = "eval.prm") -> StepScorer:
    """The scorer that `name` holds, a packaged head or any model as `resolve_model` finds it.

    prm.json says what kind it is, else config.json does; a LoRA adapter is one on a model that is asked for a verdict.
    """
    if name not in bench.scorers:
        bench.scorers[name] = _load(name, bench, key)
    return bench.scorers[name]


def _load(name: str, bench: Workbench, key: str) -> StepScorer:
    path = _find(name, key)
    said = settings(path)
    if said.get("kind") == KIND:
        model, tokenizer = _body(said["body"], bench, key, said.get("layers"))
        return ProbeScorer.load(path, model, tokenizer, said.get("system", ""))
    if said.get("kind") == "verdict":
        model, tokenizer = _body(said.get("model", name), bench, key)
        options = {k: said[k] for k in ("labels", "values", "question") if k in said}
        return VerdictScorer(model, tokenizer, **options)
    if said:
        raise CheckpointError(f"{path}/prm.json: kind {said.get('kind')!r} is unknown; use {KIND!r} or 'verdict'")
    if lora.is_adapter(path):
        return VerdictScorer(*_body(name, bench, key))
    try:
        architecture = (json.loads((path / "config.json").read_text()).get("architectures") or [""])[0]
    except (OSError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{key}: {path} has neither prm.json nor a readable config.json ({e})") from e
    if architecture.endswith("Classification"):
        return ClassifierScorer.from_pretrained(path, bench.models[0].device)
    return VerdictScorer(*_body(name, bench, key))


def prm(bench: Workbench, arm: str) -> StepScorer:
    """The process reward model of `eval.prm`; for the packaged pool the head on its small model."""
    return load_scorer(_prm_name(bench.config, arm), bench)


def rating(bench: Workbench) -> StepScorer:
    """What SpecReason asks the large model: `eval.rating`, the packaged head on nano/large, or its digit of 0-9."""
    name = _rating_name(bench.config)
    return (
        load_scorer(name, bench, "eval.rating")
        if name
        else VerdictScorer.digits(bench.models[-1], bench.tokenizers[-1])
    )


def check_scorers(config: Config, arm: str) -> None:
    """Refuse an arm whose scorer is not named or not there; of one on the hub no weights are fetched."""
    if arm in PRM_ARMS:
        _find(_prm_name(config, arm), "eval.prm", weights=False)
    elif arm == "spec_reason" and (name := _rating_name(config)):
        _find(name, "eval.rating", weights=False)


def _prm_name(config: Config, arm: str) -> str:
    name = config.eval.prm or HEADS.get(config.models.paths[0], "")
    if not name:
        raise ConfigError(f"eval.prm: arm {arm!r} needs a process reward model; name one or drop the arm")
    return name


def _rating_name(config: Config) -> str:
    return config.eval.rating or HEADS.get(config.models.paths[-1], "")


def _find(name: str, key: str, weights: bool = True) -> Path:
    if name in HEADS.values() and not Path(name).is_dir():
        return Path(str(files("roro_fast") / "assets" / name))
    if name.startswith("nano/") and not Path(name).is_dir():  # they know no verdicts
        raise CheckpointError(f"{key}: no directory {name!r}; give one or choose {', '.join(HEADS.values())}")
    return resolve_model(name, key, weights)


def _body(name: str, bench: Workbench, key: str, layers: Any = None) -> tuple[Decoder, Any]:
    """A model of the pool where it is one, else loaded beside it; `layers` as in models.layers (None or 0: all)."""
    c = bench.config.models
    if name in c.paths:
        at = c.paths.index(name)
        if (c.layers[at] if c.layers else 0) == (layers or 0):
            return bench.models[at], bench.tokenizers[at]
    if layers:
        raise CheckpointError(f"{key}: its head is for {name} with layers {layers}, which models.layers does not have")
    found, first = model_files(name, key), bench.models[0]
    return load_decoder(found.path, first.dtype, first.device, base=found.weights), load_tokenizer(found.tokenizer, key)
