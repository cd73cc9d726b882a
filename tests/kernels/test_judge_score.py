"""judge_score in Triton: the shared cases, planted faults, memory bounds, batch invariance and bad input."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_fast.errors import ConfigError
from roro_fast.kernels import judge_score as kernel
from roro_fast.ops.judge_score import EPS, JudgeScores, judge_score
from tests.kernels.faults import plant
from tests.kernels.guard import guarded, run_guarded
from tests.ops.cases import judge_score as cases

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="guard pages are host memory")


def to(c: cases.Case, device: torch.device) -> cases.Case:
    return cases.Case(*(None if x is None else x.to(device) for x in c))


def run(c: cases.Case, device: torch.device, module: ModuleType | None = None) -> JudgeScores:
    got = judge_score(*to(c, device), impl="triton") if module is None else module.judge_score(*to(c, device))
    return JudgeScores(*(None if x is None else x.cpu() for x in got))


def test_one_epsilon():
    assert kernel.EPS == EPS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_no_worse_than_naive(device, size, dtype):
    c = cases.make(*size, dtype)
    cases.check(c, run(c, device), dtype)


@settings(max_examples=15)
@given(
    st.integers(1, 90), st.integers(1, 9), st.lists(st.integers(0, 20), max_size=10), st.integers(0, 5),
    st.sampled_from(DTYPES), st.integers(0, 10**6),
)  # fmt: skip
def test_any_size(width, labels, slots, cuts, dtype, seed):
    at = torch.randint(0, len(slots) + 1, (cuts,)).sort().values.tolist()
    groups = torch.tensor([0, *at, len(slots)]).diff().tolist() if cuts else None
    c = cases.make(width, labels, slots, groups, dtype, seed=seed)
    cases.check(c, run(c, torch.device("cuda" if torch.cuda.is_available() else "cpu")), dtype)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("mask=(k < K)[:, None] & (h < width)", "mask=(k < K)[:, None] & (h < width - 1)"),
        ("tl.where((k < K)[None, :], tl.sum(products, 2)", "tl.where((k < BLOCK_K)[None, :], tl.sum(products, 2)"),
        ("row = tl.load(rows + i,", "row = 1 + tl.load(rows + i,"),
        ("inside = slot < high[:, None]", "inside = slot <= high[:, None]"),
        ("for skip in range(0,", "for skip in range(BLOCK_C,"),
        ("d / scale, mask=s < last", "d / scale, mask=s < last - 1"),
        ("tl.where(s < last, tl.load(scores", "tl.where(s < n, tl.load(scores"),
        ("c * tl.sum(p * v[None, :], 1)", "tl.sum(p * v[None, :], 1)"),
    ],
)
def test_a_planted_fault_is_seen(tmp_path, device, right, wrong):
    c = cases.make(100, 3, [40, 2, 0, 5, 33], [3, 2])
    cases.check(c, run(c, device), torch.float32)
    with pytest.raises(AssertionError):
        cases.check(c, run(c, device, plant(kernel, tmp_path, right, wrong)), torch.float32)


@pytest.mark.parametrize("row", [-1, 10**12])
def test_a_wrong_row_or_offset_reads_nothing(device, row):
    c = to(cases.make(64, 2, [6] * 8, [4, 4]), device)
    bad = c.rows.index_fill(0, torch.tensor([40], device=device), row)
    got, want = judge_score(*c._replace(rows=bad), impl="triton"), judge_score(*c, impl="triton")
    assert torch.equal(got.scores[:6], want.scores[:6]) and got.probs.isfinite().all()
    wild = c.offsets.index_fill(0, torch.tensor([8], device=device), 10**9)
    assert torch.equal(judge_score(*c._replace(offsets=wild), impl="triton").scores, want.scores)


def under_guard(side: str) -> None:
    c = cases.make(100, 3, [40, 2, 0, 5, 33], [3, 2])
    c = cases.Case(*(guarded(x, side) for x in c))
    cases.check(c, JudgeScores(*kernel.judge_score(*c)), torch.float32)


@interpreted
@pytest.mark.parametrize("side", ["start", "end"])
def test_stays_within_its_tensors(side):
    assert run_guarded(__name__, "under_guard", side) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slot_alone_equals_the_slot_in_a_batch(device, dtype):
    c = to(cases.make(300, 3, [1] * 400, None, dtype), device)
    whole = judge_score(*c, impl="triton")
    one = c._replace(rows=c.rows[7:8], criterion_weight=c.criterion_weight[7:8], offsets=c.offsets[:2])
    alone = judge_score(*one, impl="triton")
    assert torch.equal(alone.probs[0], whole.probs[7]) and torch.equal(alone.scores[0], whole.scores[7])


def test_repeats_are_bit_equal(device):
    c = to(cases.make(64, 2, [6] * 8, [4, 4], torch.bfloat16), device)
    first = judge_score(*c, impl="triton")
    for _ in range(250 if device.type == "cuda" else 2):
        assert all(torch.equal(a, b) for a, b in zip(first, judge_score(*c, impl="triton"), strict=True))


@pytest.mark.parametrize(
    ("field", "change", "says"),
    [
        ("label_weight", lambda c: c.label_weight[:, :5], "label_weight: shape"),
        ("label_weight", lambda c: c.label_weight.repeat(20, 1), "40 is above this kernel's limit of 32"),
        ("rows", lambda c: c.rows.int(), "rows: dtype torch.int32"),
        ("criterion_weight", lambda c: c.criterion_weight[1:], "criterion_weight: shape"),
        ("valence", lambda c: c.valence[:1], "valence: shape"),
        ("offsets", lambda c: c.offsets[:0], "offsets: empty"),
        ("hidden", lambda c: c.hidden.long(), "cannot serve .*/torch.int64"),
        ("hidden", lambda c: c.hidden[0], r"hidden: torch.float32 \[64\]"),
    ],
)
def test_bad_input_is_one_clear_error(device, field, change, says):
    c = to(cases.make(64, 2, [6] * 8, [4, 4]), device)
    with pytest.raises(ConfigError, match=says):
        judge_score(*c._replace(**{field: change(c)}), impl="triton")


@pytest.mark.parametrize("wrong", [[0, 3, 2, 48], [1, 48], [0, 47]])
def test_offsets_are_checked_on_request(device, monkeypatch, wrong):
    c = to(cases.make(64, 2, [6] * 8, None), device)
    monkeypatch.setattr("roro_fast.kernels.checks.DEBUG", True)
    judge_score(*c, impl="triton")
    with pytest.raises(ConfigError, match="offsets: must ascend from 0 to 48"):
        judge_score(*c._replace(offsets=torch.tensor(wrong, device=device)), impl="triton")
