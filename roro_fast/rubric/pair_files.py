"""Pairs on disk: JSONL or Parquet by the file's suffix, both readable by `datasets`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from roro_fast.errors import DataError
from roro_fast.rubric.pairs import Pair, from_row, to_row


def save_pairs(pairs: Sequence[Pair], path: str | Path) -> None:
    """Write to `<path>.part`, then rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if path.suffix == ".jsonl":
        with part.open("w") as f:
            f.writelines(json.dumps(to_row(p), ensure_ascii=False) + "\n" for p in pairs)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([to_row(p) for p in pairs]), part)
    else:
        raise DataError(f"{path}: pairs are saved as .jsonl or .parquet; name the file so")
    part.replace(path)


def load_pairs(path: str | Path) -> list[Pair]:
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; build pairs first (`roro pairs`)")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return [from_row(r) for r in pq.read_table(path).to_pylist()]
        except pa.ArrowInvalid as e:
            raise DataError(f"{path}: not a Parquet file ({e})") from None
    out = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            out.append(from_row(json.loads(line)))
        except (json.JSONDecodeError, DataError) as e:
            raise DataError(f"{path}:{number}: {e}") from None
    return out
