"""reasoning-gym's procedural tasks as `gym:<name>`.

An answer is extracted from the completion first. Where the gold answer is a plain number it is compared here, exactly:
several of the package's scorers read the first number of a text, drop its sign or give partial credit. Other answers go
to the task's own scorer, in a worker process with a time limit, and count as correct at full score only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from roro_fast.errors import ConfigError
from roro_fast.tasks import checkers
from roro_fast.tasks.answers import MAX_ANSWER, compare, extract_final_answer, marked_answer
from roro_fast.tasks.base import SPLITS, Outcome, Query
from roro_fast.tasks.benchmarks import ANSWER_SECONDS, hash_split
from roro_fast.tasks.thinking import said

PREFIX = "gym:"
CHUNK = 256
_MAX_CHUNKS = 1 << 12
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?")


def names() -> list[str]:
    """The tasks the installed reasoning-gym offers."""
    return sorted(n for n in _library().factory.DATASETS if n != "composite")


class Gym:
    """One reasoning-gym task. Splits draw from disjoint seeds and keep a question only if its hash falls in the split.

    Args:
        task: reasoning-gym's name, without the prefix.
        timeout: seconds per scored answer.
        config: reasoning-gym's own options for the task, for example `max_terms=3` for chain_sum.
    """

    def __init__(self, task: str, timeout: float = ANSWER_SECONDS, **config: Any) -> None:
        if task not in names():
            close = [n for n in names() if task and (task in n or n in task)]
            raise ConfigError(
                f"task.name: reasoning-gym has no task {task!r}; "
                + (
                    f"did you mean {', '.join(PREFIX + n for n in close)}?"
                    if close
                    else "see `roro_fast.tasks.gym.names()`"
                )
            )
        self.name = PREFIX + task
        self.task = task
        self.timeout = timeout
        self.config = config
        self._dataset(0)  # refuses a wrong option now

    def queries(self, split: str, n: int | None = None, seed: int = 0) -> list[Query]:
        """`n` distinct questions (1000 if None).

        Raises:
            ConfigError: the task does not have that many distinct questions.
        """
        if split not in SPLITS:
            raise ConfigError(f"task.split: unknown split {split!r}; choose one of {', '.join(SPLITS)}")
        want = 1000 if n is None else n
        out: list[Query] = []
        seen: set[str] = set()
        for drawn, (item_seed, index, item) in enumerate(self._draw(split, seed) if want else ()):
            question = item["question"]
            if question not in seen and hash_split(f"{self.name}/{question}") == split:
                seen.add(question)
                out.append(self._query(item, split, seed, len(out), item_seed, index))
                if len(out) == want:
                    break
            if drawn > 100 * want + 20 * CHUNK:
                raise ConfigError(
                    f"task.n: {self.name} gave only {len(out)} distinct {split} questions in {drawn} draws; "
                    "ask for fewer"
                )
        return out

    def verify(self, query: Query, steps: Sequence[str]) -> Outcome:
        text = said(query, steps)
        if _NUMBER.fullmatch(query.answer):
            answer = extract_final_answer(text)
            if answer is None:
                return Outcome(False, None, None, "no answer")
            verdict = compare(answer, query.answer, self.timeout)
            return Outcome(verdict.correct, verdict.predicted, None, verdict.error)
        answer = marked_answer(text) or text.strip().rsplit("\n\n", 1)[-1].strip()
        if not answer or len(answer) > MAX_ANSWER:
            return Outcome(False, answer[:100] or None, None, "too long" if answer else "no answer")
        item = {"name": self.task, "config": json.dumps(self.config), "size": CHUNK}
        request = {**item, "seed": query.meta["seed"], "index": query.meta["index"], "predicted": answer}
        try:
            score, error = checkers.shared_pool("gym").ask(request, self.timeout)
        except checkers.WorkerTimeout:
            return Outcome(False, answer, None, "timeout")
        except checkers.WorkerDied:
            return Outcome(False, answer, None, "worker died")
        return Outcome(score >= 1.0, answer, None, error)

    def _draw(self, split: str, seed: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        # item i of a data set uses seed + i, so chunks must lie CHUNK apart to be disjoint
        key = hashlib.sha256(f"{split}/{seed}".encode()).digest()
        base = SPLITS.index(split) << 29 | (int.from_bytes(key[:2], "big") % 512) << 20
        for chunk in range(_MAX_CHUNKS):
            start = base + chunk * CHUNK
            data = self._dataset(start)
            for i in range(CHUNK):
                yield start, i, data[i]

    def _dataset(self, seed: int) -> Any:
        try:
            return _library().create_dataset(self.task, seed=seed, size=CHUNK, **self.config)
        except (TypeError, ValueError, AssertionError) as e:
            raise ConfigError(
                f"task.options: {self.name} refuses {self.config} ({e}); see reasoning-gym's config"
            ) from e

    def _query(self, item: dict[str, Any], split: str, seed: int, number: int, item_seed: int, index: int) -> Query:
        meta: dict[str, Any] = {"seed": item_seed, "index": index}
        solution = item.get("metadata", {}).get("answer_cot")
        if isinstance(solution, str):
            meta["solution"] = solution
        return Query(
            id=f"{self.name}-{split}-{seed}-{number}",
            prompt=item["question"],
            answer="" if item["answer"] is None else str(item["answer"]),
            task=self.name,
            split=split,
            meta=meta,
        )


def _library() -> Any:
    try:
        import reasoning_gym
    except ImportError as e:
        raise ConfigError("task.name: gym: tasks need `pip install reasoning-gym`") from e
    return reasoning_gym
