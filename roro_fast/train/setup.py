"""From a config to the things a run works with: task, tokenizer, pool of decoders, engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch

from roro_fast.config import Config, EngineConfig, ModelsConfig
from roro_fast.engine import StepEngine
from roro_fast.engine.projection import load_projections
from roro_fast.errors import CheckpointError, ConfigError
from roro_fast.models import gemma_270m, lora, smol
from roro_fast.models.decoder import Decoder
from roro_fast.models.delimiter import StepBoundary
from roro_fast.models.loading import load_config, load_decoder
from roro_fast.models.token_bytes import TokenBytes
from roro_fast.tasks import registry
from roro_fast.tasks.base import Query, Task
from roro_fast.tasks.benchmarks import HASH, HUB
from roro_fast.tasks.gym import PREFIX
from roro_fast.tasks.ledger import Ledger
from roro_fast.tasks.mixture import MIXTURES
from roro_fast.tasks.prompting import RAW_TASKS, check_chats, encode_prompts
from roro_fast.tasks.thinking import in_thought, opens_thought

PACKAGED = ("nano/small", "nano/large", "nano/reader", "smol/small", "smol/large", "smol_gsm/small", "smol_gsm/large")
FETCHED: dict[str, Callable[[], Path]] = {"smol": smol.ensure, gemma_270m.NAME: gemma_270m.ensure}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(name: str, key: str = "models.paths", weights: bool = True) -> Path:
    """Directory of a model given as a path, a packaged name such as 'nano/small', a key of `FETCHED` or a hub id.

    The last two are fetched on first use; without `weights`, a hub id's config and tokenizer only.
    """
    if Path(name).is_dir():
        return Path(name)
    packaged = files("roro_fast") / "assets" / name
    if name in PACKAGED and packaged.is_dir():
        return Path(str(packaged))
    if name in FETCHED:
        return FETCHED[name]()
    if is_hub_id(name):
        return fetch(name, key, weights)
    raise CheckpointError(
        f"{key}: no directory {name!r}; give a model directory, a hub id such as Qwen/Qwen3-1.7B, 'smol' or one of "
        f"{', '.join(PACKAGED)}"
    )


def is_hub_id(name: str) -> bool:
    return (
        bool(HUB_ID.fullmatch(name))
        and not name.startswith(("nano/", "smol/", "smol_gsm/"))
        and not Path(name).is_dir()
    )


def fetch(name: str, key: str = "models.paths", weights: bool = True) -> Path:
    """The snapshot of a model on the Hugging Face hub, safetensors only; from the local cache when it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*(["*.safetensors"] if weights else []), "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        path = Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as e:
        reason = str(e).splitlines()[0][:200]
        raise CheckpointError(
            f"{key}: no directory {name!r}, and the Hugging Face hub does not give it ({reason}); without network run "
            f"`hf download {name} --local-dir DIR` elsewhere and give DIR"
        ) from e
    if weights and not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{key}: {name} on the Hugging Face hub holds no safetensors, and pickled weights, which can run code when "
            "loaded, are not fetched; choose a revision with safetensors, or convert it where you trust it with "
            f"`AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(DIR)` and give DIR"
        )
    return path


def published(name: str) -> bool:
    """Whether the Hugging Face hub holds safetensors of this model; False as well when it cannot be asked."""
    from huggingface_hub import list_repo_files

    try:
        return is_hub_id(name) and any(f.endswith(".safetensors") for f in list_repo_files(name))
    except Exception:  # no network: whatever the hub's HTTP library raises
        return False


class ModelFiles(NamedTuple):
    """Directories of one model: what was named, the (base) weights and config, the tokenizer."""

    path: Path
    weights: Path
    tokenizer: Path


def model_files(name: str, key: str = "models.paths", weights: bool = True) -> ModelFiles:
    """Where the parts of a model are; a LoRA adapter has its weights, and perhaps its tokenizer, from its base."""
    path = resolve_model(name, key, weights)
    base = resolve_model(lora.base_of(path), key, weights) if lora.is_adapter(path) else path
    return ModelFiles(path, base, path if has_tokenizer(path) else base)


def has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(path: Path, key: str = "models.paths") -> Any:
    """The Hugging Face tokenizer of a model directory."""
    from transformers import AutoTokenizer

    if not has_tokenizer(path):  # transformers makes up an empty one
        raise CheckpointError(f"{key}: {path} has no readable tokenizer; add tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as e:  # transformers and tokenizers raise many unrelated types
        reason = " ".join(str(e).split())[:200]
        raise CheckpointError(f"{key}: {path} has no readable tokenizer ({reason}); add tokenizer.json") from e


def fingerprint(tokenizer: Any) -> str:
    """Equal for tokenizers that give equal ids for every text: vocabulary, merges, splitting rules, added tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(sorted(tokenizer.get_vocab().items()))
    spec = json.loads(backend.to_str())
    kept = {k: spec.get(k) for k in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return json.dumps(kept, sort_keys=True)


def pool_tokenizers(paths: list[Path], key: str = "models.paths") -> list[Any]:
    """A tokenizer for each model: the same object where ids mean the same text.

    Different ones go together when each can spell any bytes; ConfigError names two that do not.
    """
    loaded = {path: load_tokenizer(path, key) for path in dict.fromkeys(paths)}
    first: dict[str, Path] = {}
    same = {path: first.setdefault(fingerprint(tokenizer), path) for path, tokenizer in loaded.items()}
    if len(first) > 1:
        a, b, *_ = first.values()
        for path in first.values():
            try:
                TokenBytes(loaded[path], name=str(path))
            except ConfigError as e:
                raise ConfigError(f"{key}: {a} and {b} have different tokenizers; {e}") from e
    return [loaded[same[path]] for path in paths]


def distinct(tokenizers: list[Any]) -> list[Any]:
    """Each object once, in order of appearance."""
    return list({id(t): t for t in tokenizers}.values())


def device_of(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ConfigError(f"models.device: {name!r} is not a device; use 'cpu' or 'cuda'") from e
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(f"models.device: {name!r} asked for, but torch sees {found or 'no'} GPU here; use 'cpu'")
    # Named by its number, so that "cuda" and "cuda:0" are one device.
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def load_pool(config: ModelsConfig) -> tuple[list[Decoder], list[Any]]:
    """(decoders smallest first, their tokenizers). Raises ConfigError or CheckpointError naming the model at fault."""
    devices, dtype = [device_of(d) for d in config.devices], getattr(torch, config.dtype)
    light = [model_files(p, weights=False) for p in config.paths]
    for f in light:
        load_config(f.weights)
    tokenizers = pool_tokenizers([f.tokenizer for f in light])
    found = [model_files(p) for p in config.paths]  # what does not go together was refused before its weights come
    layers = config.layers or [0] * len(found)
    models = [
        load_decoder(f.path, dtype, device, layers=n or None, base=f.weights)
        for f, device, n in zip(found, devices, layers, strict=True)
    ]
    for model, f, tokenizer in zip(models, found, tokenizers, strict=True):
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"models.paths: the tokenizer of {f.tokenizer} has {tokenizer.vocab_size:,} tokens, the model "
                f"{model.config.vocab_size:,}; they do not belong together, fetch both again"
            )
    sizes = [m.config.num_params for m in models]
    if sizes != sorted(sizes):
        listed = ", ".join(f"{label} {n:,}" for label, n in zip(config.labels, sizes, strict=True))
        raise ConfigError(f"models.paths: must be listed smallest first, parameters are {listed}; swap them")
    return models, tokenizers


def check_context(models: list[Decoder], engine: EngineConfig, labels: list[str]) -> None:
    """Refuse a model whose context cannot even hold an answer of `engine.max_new_tokens`."""
    for model, label in zip(models, labels, strict=True):
        if model.config.max_position <= engine.max_new_tokens:
            raise ConfigError(
                f"engine.max_new_tokens: {engine.max_new_tokens} leaves no room for a prompt in the context of model "
                f"{label!r} ({model.config.max_position} tokens); lower it"
            )


def load_task(config: Config) -> Task:
    """The task named by the config, with those of its options that the kind of task knows."""
    t = config.task
    options: dict[str, Any] = {}
    if t.name.partition(":")[0] != Ledger.name:
        options = {"timeout": t.timeout}
        if t.name.startswith(PREFIX):
            options |= t.options
        elif t.name not in MIXTURES:
            split_by = t.split_by or ("" if t.name in HUB else HASH)  # the stages of a run need all three of a file
            options |= {"strict": t.strict, "split_by": split_by}
    return registry.load_task(t.name, **options)


@dataclass
class Workbench:
    """What every stage of a run shares; each part is loaded on first use. `scorers` are the step scorers loaded."""

    config: Config
    scorers: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def task(self) -> Task:
        return load_task(self.config)

    @cached_property
    def pool(self) -> tuple[list[Decoder], list[Any]]:
        models, tokenizers = load_pool(self.config.models)
        if self.config.task.name != Ledger.name:
            check_chats(distinct(tokenizers), self.config.task.chat)
        for tokenizer in distinct(tokenizers):
            StepBoundary(tokenizer, self.config.engine.delimiter)
        check_context(models, self.config.engine, self.config.models.labels)
        return models, tokenizers

    @property
    def models(self) -> list[Decoder]:
        return self.pool[0]

    @property
    def tokenizers(self) -> list[Any]:
        """Of each model."""
        return self.pool[1]

    @property
    def tokenizer(self) -> Any:
        """Of the first model, in whose tokens trajectories are written."""
        return self.pool[1][0]

    @cached_property
    def engine(self) -> StepEngine:
        e, p = self.config.engine, self.config.projection
        return StepEngine(
            self.models,
            self.tokenizers,
            delimiter=e.delimiter,
            max_num_seqs=e.max_num_seqs,
            kv_bytes=e.kv_bytes,
            page_size=e.page_size,
            share_layers=None if e.share_layers else False,
            projections=load_projections(p.maps, self.models, p.max_kl),
        )

    def queries(self, split: str, n: int | None = None) -> list[Query]:
        """The first `n` (default: as configured) queries of a split."""
        return self.asked(self.drawn(split, n))

    def drawn(self, split: str, n: int | None = None) -> list[Query]:
        """The same as the task has them; needs no models."""
        asked = getattr(self.config.task, f"n_{split}") if n is None else n
        found = self.task.queries(split, asked, self.config.task.seed)
        if not found:
            raise ConfigError(f"task.name: {self.config.task.name!r} has no {split} queries; choose another source")
        return found

    def asked(self, queries: list[Query]) -> list[Query]:
        """The queries as this pool is asked them: marked where its chat template begins the answer inside a thought."""
        raw = all(q.task in RAW_TASKS for q in queries)
        if raw or not any(opens_thought(t, self.config.task.chat) for t in distinct(self.tokenizers)):
            return queries
        return [in_thought(q) for q in queries]

    def encode(self, query: Query, instruction: str = "") -> list[int]:
        """Prompt ids of a query, the tokenizer's chat template applied once; a `Prompt` where there are several.

        instruction: what the question is followed by where the configuration has no words for that.

        A prompt longer than the context is the engine's to refuse, so that a long run can count it and go on.
        """
        t = self.config.task
        words = t.instruction or instruction
        settings: dict[str, Any] = {"system": t.system or None, "instruction": words, "chat": t.chat}
        return encode_prompts(distinct(self.tokenizers), query, **settings)
