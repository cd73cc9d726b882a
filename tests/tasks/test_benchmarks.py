from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from roro_fast.errors import ConfigError, DataError
from roro_fast.tasks.base import SPLITS
from roro_fast.tasks.benchmark_rows import check_rows, read_jsonl
from roro_fast.tasks.benchmarks import HUB, file_benchmark, hash_split, hub_benchmark, map_rows

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
GOOD = {"id": "a", "problem": "1 + 1?", "answer": "2"}


def line(**change) -> bytes:
    row = {**GOOD, **change}
    return json.dumps({k: v for k, v in row.items() if v is not ...}).encode()


MALFORMED = {
    "not JSON": (b'{"id": "b", "problem": ', "not JSON"),
    "two objects": (line(id="b") + line(id="c"), "not JSON"),
    "a list": (b'["b", "p", "1"]', "is a list, not an object"),
    "a number": (b"7", "is a int, not an object"),
    "not UTF-8": (b'{"id": "b\xff"}', "not UTF-8"),
    "deep": (b"[" * 100_000, "not readable as JSON"),
    "long integer": (b'{"id": ' + b"1" * 10_000 + b"}", "not readable as JSON"),
    "no id": (line(id=...), "field 'id' is missing .*has answer, problem"),
    "no problem": (line(id="b", problem=..., question="x"), "field 'problem' is missing .*question.* rename"),
    "no answer": (line(id="b", answer=...), "field 'answer' is missing"),
    "empty problem": (line(id="b", problem=" \n"), "field 'problem' is empty"),
    "problem a list": (line(id="b", problem=["x"]), "field 'problem' is empty or not a string"),
    "null problem": (line(id="b", problem=None), "field 'problem' is empty or not a string"),
    "empty answer": (line(id="b", answer="  "), "field 'answer' is empty"),
    "null answer": (line(id="b", answer=None), "field 'answer' is a NoneType"),
    "boolean answer": (line(id="b", answer=True), "field 'answer' is a bool"),
    "list answer": (line(id="b", answer=["1"]), "field 'answer' is a list"),
    "infinite answer": (b'{"id": "b", "problem": "p", "answer": Infinity}', "field 'answer' is inf"),
    "empty id": (line(id=""), "field 'id' is empty"),
    "duplicate id": (line(problem="other"), "field 'id': 'a' is already used at line 1"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_rows_are_skipped_with_line_and_field(tmp_path, name):
    bad, reason = MALFORMED[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([line(), b"", bad, line(id="z")]))
    queries, skipped = read_jsonl(path)
    assert [q.id for q in queries] == ["a", "z"]
    assert len(skipped) == 1
    with pytest.raises(DataError, match=rf"^rows\.jsonl line 3: {reason}") as caught:
        read_jsonl(path, strict=True)
    assert skipped == [str(caught.value)]


def test_good_rows_become_queries(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"id": 7, "problem": " p\n", "answer": 2.0, "solution": "s", "level": 3}, {**GOOD, "answer": 0.5}]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(r) for r in rows).encode() + b"\n\n")
    (first, second), skipped = read_jsonl(path)
    assert skipped == []
    assert (first.id, first.prompt, first.answer, first.task) == ("7", " p\n", "2", "mine")
    assert first.meta == {"solution": "s", "level": 3}
    assert second.answer == "0.5"


def test_a_file_without_a_usable_row_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n\n")
    with pytest.raises(DataError, match=r"rows\.jsonl: no usable row \(it is empty\)"):
        read_jsonl(path)
    path.write_bytes(b"x\ny")
    with pytest.raises(DataError, match=r"the first of 2 bad rows is rows\.jsonl line 1: not JSON"):
        read_jsonl(path)
    with pytest.raises(DataError, match=r"task\.name: cannot read .*nothing\.jsonl"):
        read_jsonl(tmp_path / "nothing.jsonl")


@pytest.fixture
def hundred(tmp_path):
    path = tmp_path / "hundred.jsonl"
    path.write_bytes(b"\n".join([*(line(id=f"q{i}", answer=i) for i in range(100)), b"bad"]))
    return path


def test_a_file_is_one_split(hundred):
    task = file_benchmark(hundred)
    queries = task.queries("test")
    assert [q.id for q in queries] == [f"q{i}" for i in range(100)]
    assert {q.split for q in queries} == {"test"} and task.name == "hundred"
    assert len(task.skipped) == 1 and "line 101" in task.skipped[0]
    with pytest.raises(
        ConfigError, match=r"task\.split: hundred has no 'train' split, only test; set task\.split_by=hash"
    ):
        task.queries("train")
    assert len(file_benchmark(hundred, split_by="train").queries("train")) == 100


def test_hash_splits_are_disjoint_whole_and_independent_of_order(hundred, tmp_path):
    task = file_benchmark(hundred, split_by="hash")
    ids = {s: {q.id for q in task.queries(s)} for s in SPLITS}
    assert sum(len(v) for v in ids.values()) == len(set().union(*ids.values())) == 100
    assert all(ids.values())
    assert all(q.split == s and hash_split(q.id) == s for s in SPLITS for q in task.queries(s))
    assert len(task.skipped) == 1
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_bytes(b"\n".join(reversed(hundred.read_bytes().splitlines())))
    assert {q.id for q in file_benchmark(backwards, split_by="hash").queries("test")} == ids["test"]


def test_hash_split_shares():
    drawn = [hash_split(f"id-{i}") for i in range(5000)]
    assert abs(drawn.count("train") / 5000 - 0.7) < 0.03
    assert abs(drawn.count("calibrate") / 5000 - 0.1) < 0.02


def test_seeds_shuffle_and_prefixes_hold(hundred):
    task = file_benchmark(hundred)
    assert task.queries("test", 10, seed=5) == task.queries("test", 30, seed=5)[:10]
    assert task.queries("test", 10, seed=5) != task.queries("test", 10, seed=6)
    assert sorted(q.id for q in task.queries("test", seed=5)) == sorted(q.id for q in task.queries("test"))
    assert task.queries("test", 0) == []


def test_unknown_splits_are_named(hundred):
    with pytest.raises(ConfigError, match=r"task\.split: unknown split 'dev'"):
        file_benchmark(hundred).queries("dev")
    with pytest.raises(ConfigError, match=r"task\.split_by: 'half'"):
        file_benchmark(hundred, split_by="half")


def test_verify_reads_the_joined_steps(hundred):
    task = file_benchmark(hundred)
    query = task.queries("test", 13)[12]
    assert task.verify(query, ["3 * 4\n\n", "The answer is 1", "2."]).correct
    outcome = task.verify(query, ["so 13"])
    assert (outcome.correct, outcome.predicted, outcome.steps, outcome.error) == (False, "13", None, "")
    assert task.verify(query, []).error == "no answer"


@pytest.mark.parametrize(
    ("name", "row", "query"),
    [
        ("gsm8k", {"question": "q", "answer": "1+1=<<1+1=2>>2\n#### 1,002"}, ("gsm8k-test-0", "q", "1,002")),
        ("math500", {"problem": "q", "solution": "s", "answer": r"\pi", "unique_id": "u"}, ("u", "q", r"\pi")),
        ("aime24", {"id": 60, "problem": "q", "solution": "s", "answer": "204", "url": "-"}, ("60", "q", "204")),
        ("aime25", {"id": "0", "problem": "q", "answer": "70"}, ("0", "q", "70")),
        ("amc23", {"id": 0, "question": "q", "answer": 27.0, "url": "-"}, ("0", "q", "27")),
        (
            "olympiadbench",
            {"id": 1, "question": "q", "final_answer": ["2", "3"], "solution": ["s"]},
            ("1", "q", "2, 3"),
        ),
        ("olympiadbench", {"id": 1, "question": "q", "final_answer": "['$2$']"}, ("1", "q", "$2$")),
        ("svamp", {"ID": "chal-1", "question_concat": "q", "Answer": "51.0", "Body": "-"}, ("chal-1", "q", "51.0")),
    ],
)
def test_hub_columns_are_mapped(name, row, query):
    (found,), skipped = check_rows(enumerate(map_rows(name, "test", [row]), 1), name, name, strict=True)
    assert skipped == []
    assert (found.id, found.prompt, found.answer) == query


def test_hub_rows_with_absent_columns_or_repeated_ids():
    rows = [
        {"id": 1, "problem": "a", "answer": "1"},
        {"id": 1, "problem": "b", "answer": "2"},
        {"id": 2, "problem": "c"},
    ]
    queries, skipped = check_rows(enumerate(map_rows("aime25", "test", rows), 1), "hub", "aime25")
    assert [q.id for q in queries] == ["1-0", "1-1"]
    assert len(skipped) == 1 and "line 3: field 'answer' is missing" in skipped[0]


def test_a_hub_benchmark_loads_through_datasets(tmp_path, monkeypatch):
    """`datasets` reads a local directory of the same name exactly as it reads the hub's."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path / "openai" / "gsm8k"
    root.mkdir(parents=True)
    parts = "".join(f"  - split: {s}\n    path: {s}.jsonl\n" for s in ("train", "test"))
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{parts}---\n")
    for split, n in (("train", 60), ("test", 5)):
        rows = [{"question": f"{split} {i}?", "answer": f"work\n#### {i}"} for i in range(n)]
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = hub_benchmark("gsm8k")
    test, train, calibrate = (task.queries(s) for s in ("test", "train", "calibrate"))
    assert [(q.prompt, q.answer) for q in test] == [(f"test {i}?", str(i)) for i in range(5)]
    assert test[3].meta["solution"] == "work\n#### 3"
    assert {q.prompt for q in train} | {q.prompt for q in calibrate} == {f"train {i}?" for i in range(60)}
    assert len(train) + len(calibrate) == 60 and calibrate
    assert sum(len(hub_benchmark("gsm8k", split_by="hash").queries(s)) for s in SPLITS) == 5


def test_without_network_the_error_says_how_to_pass_a_file(tmp_path):
    pytest.importorskip("datasets")
    code = "from roro_fast.tasks.registry import load_task\nload_task('aime24').queries('test')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("roro_fast.errors.DataError: task.name: aime24 (HuggingFaceH4/aime_2024")
    assert last.endswith("task.name=path/to/aime24.jsonl")


def test_hub_split_options():
    with pytest.raises(ConfigError, match=r"task\.split_by: 'test' does not fit math500"):
        hub_benchmark("math500", split_by="test")
    with pytest.raises(ConfigError, match="math500 has no 'train' split"):
        hub_benchmark("math500").queries("train")


@pytest.mark.parametrize("name", [*(n for n in HUB if n != "gsm8k"), "gsm8k_train", "gsm8k_test"])
def test_real_files_load_strictly_and_their_gold_answers_verify(name):
    path = SHARED / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {name}.jsonl in ../shared/data")
    task = file_benchmark(path, strict=True)
    queries = task.queries("test")
    assert len(queries) == sum(1 for x in path.read_bytes().split(b"\n") if x.strip())
    assert task.skipped == []
    for q in queries:
        assert task.verify(q, ["work\n\n", f"so \\boxed{{{q.answer}}}"]).correct, q
