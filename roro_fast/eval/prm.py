"""The step scorers an evaluation names: a packaged head, a Hugging Face classifier, or a model asked for a verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from roro_fast.config import Config
from roro_fast.errors import CheckpointError, ConfigError
from roro_fast.models import lora
from roro_fast.models.decoder import Decoder
from roro_fast.models.loading import load_decoder
from roro_fast.routing.probe import KIND, ProbeScorer, settings
from roro_fast.routing.scorers import DIGITS, LABELS, ClassifierScorer, VerdictScorer, label_ids
from roro_fast.routing.scoring import StepScorer
from roro_fast.train.setup import Workbench, load_tokenizer, model_files, resolve_model

HEADS = {"nano/small": "nano/prm-small", "nano/large": "nano/prm-large"}
CLASSIFIER, VERDICT = "classifier", "verdict"  # beside the packaged heads' kind
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
    kind, said = _kind(path, key)
    if kind == KIND:
        model, tokenizer = _body(said["body"], bench, key, said.get("layers"))
        return ProbeScorer.load(path, model, tokenizer, said.get("system", ""))
    if kind == VERDICT:
        model, tokenizer = _body(said.get("model", name), bench, key)
        options = {k: said[k] for k in ("labels", "values", "question") if k in said}
        return VerdictScorer(model, tokenizer, **options)
    return ClassifierScorer.from_pretrained(path, bench.models[0].device)


def _kind(path: Path, key: str) -> tuple[str, dict[str, Any]]:
    """(kind, prm.json) of a scorer's directory."""
    said = settings(path)
    if said:
        if said.get("kind") not in (KIND, VERDICT):
            raise CheckpointError(f"{path}/prm.json: kind {said.get('kind')!r} is unknown; use {KIND!r} or {VERDICT!r}")
        return said["kind"], said
    if lora.is_adapter(path):
        return VERDICT, {}
    try:
        architecture = (json.loads((path / "config.json").read_text()).get("architectures") or [""])[0]
    except (OSError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{key}: {path} has neither prm.json nor a readable config.json ({e})") from e
    return CLASSIFIER if architecture.endswith("Classification") else VERDICT, {}


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
    """Refuse an arm whose scorer is not named, not there, or asked for labels that are no tokens; loads no weights."""
    if arm in PRM_ARMS:
        name, key = _prm_name(config, arm), "eval.prm"
    elif arm == "spec_reason":
        name, key = _rating_name(config), "eval.rating"
    else:
        return
    labels: Sequence[str] = DIGITS
    if name:
        path = _find(name, key, weights=False)
        kind, said = _kind(path, key)
        if kind != VERDICT:
            return
        labels = said.get("labels", LABELS)
        name = said.get("model", name)
    found = model_files(name or config.models.paths[-1], key, weights=False)
    label_ids(load_tokenizer(found.tokenizer, key), labels)


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
