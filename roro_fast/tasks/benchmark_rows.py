"""Rows of a benchmark, checked one by one: {id, problem, answer[, solution, ...]}."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from roro_fast.errors import DataError
from roro_fast.tasks.base import Query

FIELDS = ("id", "problem", "answer")
_FORMAT = '{"id": ..., "problem": ..., "answer": ...}'


def read_jsonl(path: str | Path, task: str | None = None, strict: bool = False) -> tuple[list[Query], list[str]]:
    """(queries, reasons for the rows that were skipped) of a JSONL file; blank lines do not count.

    `strict` raises at the first malformed row instead of skipping it.

    Raises:
        DataError: the file cannot be read or holds no good row; in strict mode also for any malformed row.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as e:
        raise DataError(f"task.name: cannot read {path} ({e.strerror}); give the path of a JSONL file") from e
    rows = ((i, line) for i, line in enumerate(lines, 1) if line.strip())
    return check_rows(rows, path.name, task or path.stem, strict)


def check_rows(
    rows: Iterable[tuple[int, Any]], source: str, task: str, strict: bool = False
) -> tuple[list[Query], list[str]]:
    """Queries of numbered rows, each a JSON line (bytes) or a mapping; `source` is how messages name their origin."""
    queries: list[Query] = []
    skipped: list[str] = []
    seen: dict[str, int] = {}
    for number, raw in rows:
        try:
            query = _query(_decode(raw) if isinstance(raw, bytes) else raw, task)
            if query.id in seen:
                raise DataError(f"field 'id': {query.id!r} is already used at line {seen[query.id]}; make ids unique")
        except DataError as e:
            reason = f"{source} line {number}: {e}"
            if strict:
                raise DataError(reason) from e
            skipped.append(reason)
            continue
        seen[query.id] = number
        queries.append(query)
    if not queries:
        why = f"the first of {len(skipped)} bad rows is {skipped[0]}" if skipped else "it is empty"
        raise DataError(f"{source}: no usable row ({why}); expected one JSON object per line: {_FORMAT}")
    return queries, skipped


def _decode(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise DataError(f"not UTF-8 (byte {e.start}); save the file as UTF-8") from e
    except json.JSONDecodeError as e:
        raise DataError(f"not JSON ({e.msg}, column {e.colno}); write one object per line: {_FORMAT}") from e
    except (ValueError, RecursionError) as e:  # integers of thousands of digits, thousands of brackets
        raise DataError(f"not readable as JSON ({type(e).__name__}); write one object per line: {_FORMAT}") from e


def _query(row: Any, task: str) -> Query:
    if not isinstance(row, dict):
        raise DataError(f"is a {type(row).__name__}, not an object; write {_FORMAT}")
    for field in FIELDS:
        if field not in row:
            have = ", ".join(sorted(map(str, row))) or "nothing"
            raise DataError(f"field {field!r} is missing (the row has {have[:200]}); add it or rename the right one")
    problem = row["problem"]
    if not isinstance(problem, str) or not problem.strip():
        raise DataError("field 'problem' is empty or not a string; give the problem's text")
    return Query(
        id=_scalar(row, "id"),
        prompt=problem,
        answer=_scalar(row, "answer"),
        task=task,
        meta={k: v for k, v in row.items() if k not in FIELDS},
    )


def _scalar(row: dict[str, Any], field: str) -> str:
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"field {field!r} is a {type(value).__name__}; give a string or a number")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(f"field {field!r} is {value}; give a finite number")
        value = int(value) if value.is_integer() else value
    text = str(value).strip()
    if not text:
        raise DataError(f"field {field!r} is empty; give a value")
    return text
