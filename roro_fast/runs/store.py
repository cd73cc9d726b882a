"""An append-only store of JSON records in numbered shards, each written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

from roro_fast.errors import DataError
from roro_fast.files import write_bytes

Record = Mapping[str, Any]
_SHARD = re.compile(r"^part-(\d{5,})\.jsonl$")


def trajectory_key(record: Record) -> Hashable:
    """What makes a rollout the same rollout."""
    return record["query_id"], record["arm"], record["sample"], record["seed"]


class JsonlStore:
    """Records in `directory/part-00000.jsonl`, ...; a record whose key is already stored is not stored twice.

    `append` buffers; a shard is written when `chunk` records are waiting, and by `flush`. Killing the process loses at
    most the buffer. `datasets.load_dataset("json", data_files="<directory>/part-*.jsonl")` reads the files.
    """

    def __init__(
        self, directory: str | Path, key: Callable[[Record], Hashable] = trajectory_key, chunk: int = 64
    ) -> None:
        if chunk < 1:
            raise ValueError(f"chunk: {chunk} must be at least 1")
        self.directory = Path(directory)
        self.key = key
        self.chunk = chunk
        self._buffer: list[str] = []
        self._keys = {key(r) for r in self._read_shards()}
        self._next = max((int(_SHARD.match(p.name)[1]) for p in self.shards()), default=-1) + 1  # type: ignore[index]

    def shards(self) -> list[Path]:
        """Complete shards in writing order; a leftover `.part` of a killed writer is not one."""
        if not self.directory.is_dir():
            return []
        named = [(int(m[1]), p) for p in self.directory.iterdir() if (m := _SHARD.match(p.name))]
        return [p for _, p in sorted(named)]

    def append(self, record: Record) -> bool:
        """Store a record; False when its key is stored already. Raises ValueError for what JSON cannot hold."""
        key = self.key(record)
        if key in self._keys:
            return False
        self._buffer.append(json.dumps(record, ensure_ascii=False, allow_nan=False))
        self._keys.add(key)
        if len(self._buffer) >= self.chunk:
            self.flush()
        return True

    def flush(self) -> None:
        """Write the buffered records as one shard."""
        if not self._buffer:
            return
        write_bytes(self.directory / f"part-{self._next:05d}.jsonl", ("\n".join(self._buffer) + "\n").encode())
        self._next += 1
        self._buffer.clear()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records, stored then buffered, in writing order."""
        yield from self._read_shards()
        yield from (json.loads(line) for line in self._buffer)

    def _read_shards(self) -> Iterator[dict[str, Any]]:
        seen: set[Hashable] = set()
        for path in self.shards():
            for number, line in enumerate(path.read_text(errors="replace").split("\n"), 1):
                if not line:
                    continue
                try:
                    record = json.loads(line)
                    key = self.key(record)
                except (json.JSONDecodeError, KeyError, TypeError) as e:
                    raise DataError(
                        f"{path}:{number}: corrupt record ({e}); restore the file or delete it to redo its records"
                    ) from e
                if key not in seen:
                    seen.add(key)
                    yield record

    def __enter__(self) -> JsonlStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()


def export_parquet(store: JsonlStore, path: str | Path) -> int:
    """Write all records to one Parquet file; returns how many. Raises DataError when pyarrow is not installed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise DataError(f"{path}: Parquet export needs pyarrow; `pip install pyarrow`, or read the JSONL shards") from e
    rows = [{**r, "meta": json.dumps(r["meta"])} if isinstance(r.get("meta"), Mapping) else r for r in store]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    pq.write_table(pa.Table.from_pylist(rows), part)
    part.replace(path)
    return len(rows)
