"""JsonlStore: whole shards or none, no duplicates, nothing lost, faults named."""

from __future__ import annotations

import json

import pytest

from roro_fast.errors import DataError
from roro_fast.runs import JsonlStore, export_parquet


def rec(i, **more):
    return {"query_id": f"q{i}", "arm": "a", "sample": 0, "seed": 0, "i": i, **more}


def test_appends_in_chunks_and_reads_back_in_order(tmp_path):
    store = JsonlStore(tmp_path / "s", chunk=3)
    for i in range(7):
        assert store.append(rec(i))
    assert [p.name for p in store.shards()] == ["part-00000.jsonl", "part-00001.jsonl"]
    assert [r["i"] for r in store] == list(range(7))
    store.flush()
    assert [r["i"] for r in JsonlStore(tmp_path / "s")] == list(range(7))


def test_a_key_is_stored_once_across_sessions(tmp_path):
    with JsonlStore(tmp_path, chunk=2) as store:
        assert store.append(rec(1)) and not store.append(rec(1, late=True))
    with JsonlStore(tmp_path, chunk=2) as store:
        assert not store.append(rec(1)) and store.append(rec(2))
        assert ("q1", "a", 0, 0) in store and len(store) == 2
    assert [r["i"] for r in JsonlStore(tmp_path)] == [1, 2]
    assert len(list(tmp_path.glob("part-*.jsonl"))) == 2


def test_a_shard_copied_twice_is_read_once(tmp_path):
    with JsonlStore(tmp_path) as store:
        store.append(rec(1))
    (tmp_path / "part-00009.jsonl").write_bytes((tmp_path / "part-00000.jsonl").read_bytes())
    again = JsonlStore(tmp_path)
    assert [r["i"] for r in again] == [1]
    with again:
        again.append(rec(2))
    assert (tmp_path / "part-00010.jsonl").is_file()


def test_leftover_part_is_ignored_and_replaced(tmp_path):
    (tmp_path / "part-00000.jsonl.part").write_text('{"query_id": "torn')
    with JsonlStore(tmp_path) as store:
        assert len(store) == 0
        store.append(rec(5))
    assert [r["i"] for r in JsonlStore(tmp_path)] == [5]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("damage", [b'{"query_id": "q', b'{"arm": "a"}\n', b"[1]\n", b"\xff\xfe\n"])
def test_corrupt_shard_is_named_with_its_line(tmp_path, damage):
    with JsonlStore(tmp_path) as store:
        store.append(rec(1))
    with open(tmp_path / "part-00000.jsonl", "ab") as f:
        f.write(damage)
    with pytest.raises(DataError, match=r"part-00000\.jsonl:2: corrupt record"):
        JsonlStore(tmp_path)


def test_nan_is_refused_before_anything_is_written(tmp_path):
    store = JsonlStore(tmp_path, chunk=10)
    with pytest.raises(ValueError, match="JSON"):
        store.append(rec(1, x=float("nan")))
    assert len(store) == 0
    store.append(rec(1))
    store.flush()
    assert [r["i"] for r in JsonlStore(tmp_path)] == [1]


def test_line_separators_inside_text_survive(tmp_path):
    with JsonlStore(tmp_path) as store:
        store.append(rec(1, text="a\u2028b\x85c\n\nd"))
    assert next(iter(JsonlStore(tmp_path)))["text"] == "a\u2028b\x85c\n\nd"


def test_datasets_and_parquet_read_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    pq = pytest.importorskip("pyarrow.parquet")
    with JsonlStore(tmp_path / "s", chunk=2) as store:
        for i in range(5):
            store.append(rec(i, steps=[{"model": i % 2, "mean_logprob": -0.5}], meta={"free": i}))
    files = str(tmp_path / "s" / "part-*.jsonl")
    loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(loaded["i"]) == list(range(5))
    assert export_parquet(store, tmp_path / "out.parquet") == 5
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert table[3]["steps"] == [{"model": 1, "mean_logprob": -0.5}]
    assert json.loads(table[3]["meta"]) == {"free": 3}
