"""Pairs on disk round-trip in both formats, are readable by `datasets`, and fail with the file and line named."""

from __future__ import annotations

import pytest

from roro_fast.errors import DataError
from roro_fast.rubric.pair_files import load_pairs, save_pairs
from roro_fast.rubric.pairs import build_pairs
from tests.rubric.samples import POOL, queries, routed


@pytest.fixture(scope="module")
def pairs():
    qs = queries(5)
    return build_pairs({q.id: q for q in qs}, [t for q in qs for t in routed(q, 6, {1})], POOL)[0]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_round_trip(pairs, tmp_path, suffix):
    path = tmp_path / f"pairs.{suffix}"
    save_pairs(pairs, path)
    assert load_pairs(path) == pairs
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("suffix", "builder"), [("jsonl", "json"), ("parquet", "parquet")])
def test_datasets_reads_it(pairs, tmp_path, suffix, builder, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from datasets import load_dataset

    path = tmp_path / f"pairs.{suffix}"
    save_pairs(pairs, path)
    rows = load_dataset(builder, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == len(pairs)
    assert rows[0]["chosen_models"] == list(pairs[0].chosen.view.models) and rows[0]["rule"] == pairs[0].rule


def test_errors_name_file_and_line(pairs, tmp_path):
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(DataError, match="no such file"):
        load_pairs(path)
    save_pairs(pairs, path)
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(DataError, match=rf"pairs\.jsonl:{len(pairs) + 1}"):
        load_pairs(path)
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="not a Parquet file"):
        load_pairs(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="jsonl or .parquet"):
        save_pairs(pairs, tmp_path / "pairs.csv")
