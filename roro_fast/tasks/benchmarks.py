"""Benchmarks as tasks: JSONL files of {id, problem, answer} and well-known Hugging Face datasets by name."""

from __future__ import annotations

import ast
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from roro_fast.errors import ConfigError, DataError
from roro_fast.tasks.answers import check_answer
from roro_fast.tasks.base import SPLITS, Outcome, Query
from roro_fast.tasks.benchmark_rows import check_rows, read_jsonl
from roro_fast.tasks.thinking import said

HASH = "hash"
ANSWER_SECONDS = 2.0

Rows = tuple[list[Query], list[str]]


class Benchmark:
    """Problems with a final answer. `skipped` lists the reasons of malformed rows that were left out so far.

    Args:
        name: the task's name.
        parts: split -> loader of its (queries, skip reasons); a part is loaded when first asked for.
        timeout: seconds per answer.
    """

    def __init__(self, name: str, parts: Mapping[str, Callable[[], Rows]], timeout: float = ANSWER_SECONDS) -> None:
        self.name = name
        self.timeout = timeout
        self.skipped: list[str] = []
        self._parts = dict(parts)
        self._loaded: dict[str, list[Query]] = {}

    def queries(self, split: str, n: int | None = None, seed: int = 0) -> list[Query]:
        """The first `n` queries of a split, in file order for seed 0 and shuffled by `seed` otherwise."""
        if split not in SPLITS:
            raise ConfigError(f"task.split: unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        if split not in self._parts:
            raise ConfigError(
                f"task.split: {self.name} has no {split!r} split, only {', '.join(self._parts)}; "
                "set task.split_by=hash to divide its rows into train, calibrate and test by a hash of their ids"
            )
        if split not in self._loaded:
            queries, skipped = self._parts[split]()
            self._loaded[split] = [replace(q, split=split) for q in queries]
            self.skipped += [s for s in skipped if s not in set(self.skipped)]
        out = list(self._loaded[split])
        if seed:
            random.Random(f"{self.name}/{split}/{seed}").shuffle(out)
        return out if n is None else out[:n]

    def verify(self, query: Query, steps: Sequence[str]) -> Outcome:
        verdict = check_answer(said(query, steps), query.answer, self.timeout)
        return Outcome(verdict.correct, verdict.predicted, None, verdict.error)


def hash_split(identity: str) -> str:
    """70 % train, 10 % calibrate, 20 % test by a stable hash of a query's id."""
    bucket = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") % 10
    return "train" if bucket < 7 else "calibrate" if bucket < 8 else "test"


def by_hash(load: Callable[[], Rows], splits: Sequence[str] = SPLITS) -> dict[str, Callable[[], Rows]]:
    """Parts of one source, loaded once, divided by `hash_split`; what falls outside `splits` goes to the first."""
    cache: list[Rows] = []

    def part(split: str) -> Rows:
        if not cache:
            cache.append(load())
        queries, skipped = cache[0]
        assigned = [(q, hash_split(q.id)) for q in queries]
        return [q for q, s in assigned if (s if s in splits else splits[0]) == split], skipped

    return {s: (lambda s=s: part(s)) for s in splits}  # type: ignore[misc]


def file_benchmark(
    path: str | Path, split_by: str = "test", strict: bool = False, timeout: float = ANSWER_SECONDS
) -> Benchmark:
    """A JSONL file as one split (`split_by` names it: test, train or calibrate) or divided into three ("hash")."""
    path = Path(path)

    def load() -> Rows:
        return read_jsonl(path, strict=strict)

    if split_by == HASH:
        return Benchmark(path.stem, by_hash(load), timeout)
    if split_by not in SPLITS:
        raise ConfigError(f"task.split_by: {split_by!r} is not one of {HASH}, {', '.join(SPLITS)}")
    return Benchmark(path.stem, {split_by: load}, timeout)


@dataclass(frozen=True, slots=True)
class HubSource:
    """Where a benchmark lives on the Hugging Face hub; columns are tried in order."""

    repo: str
    config: str | None
    splits: Mapping[str, str]  # our split -> theirs
    problem: tuple[str, ...] = ("problem", "question")
    answer: tuple[str, ...] = ("answer",)
    solution: str | None = "solution"
    id: tuple[str, ...] = ("id", "unique_id", "ID")


_TEST = {"test": "test"}
HUB: dict[str, HubSource] = {
    "gsm8k": HubSource("openai/gsm8k", "main", {"train": "train", "test": "test"}, solution="answer"),
    "math500": HubSource("HuggingFaceH4/MATH-500", None, _TEST),
    "aime24": HubSource("HuggingFaceH4/aime_2024", None, {"test": "train"}),
    "aime25": HubSource("math-ai/aime25", None, _TEST),
    "amc23": HubSource("math-ai/amc23", None, _TEST),
    "olympiadbench": HubSource(
        "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", {"test": "train"}, answer=("final_answer", "answer")
    ),
    "svamp": HubSource(
        "ChilleD/SVAMP", None, {"train": "train", "test": "test"}, ("question_concat",), ("Answer",), None
    ),
}


def hub_benchmark(name: str, split_by: str = "", strict: bool = False, timeout: float = ANSWER_SECONDS) -> Benchmark:
    """A benchmark of `HUB` through `datasets`.

    Without `split_by`, a published train split serves as our train and calibrate splits (divided by a hash of the ids)
    and the published test split as test. `split_by="hash"` divides the test split in three.
    """
    source = HUB[name]
    if split_by not in ("", HASH):
        raise ConfigError(f"task.split_by: {split_by!r} does not fit {name}; leave it empty or set it to {HASH}")

    def test() -> Rows:
        return load_hub(name, source.splits["test"], strict)

    if split_by == HASH:
        return Benchmark(name, by_hash(test), timeout)
    parts: dict[str, Callable[[], Rows]] = {}
    if "train" in source.splits:
        parts = by_hash(lambda: load_hub(name, source.splits["train"], strict), ("train", "calibrate"))
    return Benchmark(name, {**parts, "test": test}, timeout)


def load_hub(name: str, split: str, strict: bool = False) -> Rows:
    """(queries, skip reasons) of one published split.

    Raises:
        DataError: `datasets` is not installed or the hub cannot be reached; says how to pass a file instead.
    """
    source = HUB[name]
    offline = f'pass a JSONL file of {{"id", "problem", "answer"}} rows instead: task.name=path/to/{name}.jsonl'
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise DataError(f"task.name: {name} needs `pip install datasets`; or {offline}") from e
    try:
        data = load_dataset(source.repo, source.config, split=split)
    except Exception as e:  # datasets raises its own, requests', huggingface_hub's and fsspec's kinds
        reason = " ".join(str(e).split())[:200]
        raise DataError(
            f"task.name: {name} ({source.repo} on the Hugging Face hub) could not be loaded ({reason}); "
            f"without network, {offline}"
        ) from e
    return check_rows(enumerate(map_rows(name, split, data), 1), f"{source.repo}[{split}]", name, strict)


def map_rows(name: str, split: str, rows: Any) -> list[dict[str, Any]]:
    """Hub rows with our field names; a column that is absent stays absent, for `check_rows` to report."""
    source = HUB[name]
    out = []
    for i, row in enumerate(rows):
        mapped: dict[str, Any] = {"id": f"{name}-{split}-{i}"}
        for field, columns in (("id", source.id), ("problem", source.problem), ("answer", source.answer)):
            present = [c for c in columns if row.get(c) is not None]
            if present:
                mapped[field] = row[present[0]]
        if source.solution and row.get(source.solution) is not None:
            mapped["solution"] = row[source.solution]
        if "answer" in mapped:
            mapped["answer"] = _gold(mapped["answer"])
        out.append(mapped)
    repeated = {k for k, count in Counter(str(r["id"]) for r in out).items() if count > 1}
    for i, r in enumerate(out):
        if str(r["id"]) in repeated:
            r["id"] = f"{r['id']}-{i}"
    return out


def _gold(value: Any) -> Any:
    """GSM8K keeps the answer behind "####", OlympiadBench in a list (in some copies the list's repr)."""
    if isinstance(value, str) and value.startswith("['") and value.endswith("']"):
        value = ast.literal_eval(value)
    if isinstance(value, list):
        return ", ".join(str(v) for v in value)
    return value.rsplit("####", 1)[1].strip() if isinstance(value, str) and "####" in value else value
