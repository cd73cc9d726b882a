"""The CUDA judge_score against the reference's cases, on emulated kernels and on a GPU."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from roro_fast.errors import RoroError
from roro_fast.ops import native_cuda
from roro_fast.ops.judge_score import EPS, JudgeScores, cuda
from tests.cuda import emulator
from tests.kernels.guard import guarded
from tests.ops.cases import judge_score as cases

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def to(case: cases.Case, device: torch.device) -> cases.Case:
    return cases.Case(*(x if x is None else x.to(device) for x in case))


def run(case: cases.Case, device: torch.device | str = "cpu") -> JudgeScores:
    return JudgeScores(*(x if x is None else x.cpu() for x in cuda(*to(case, torch.device(device)))))


def same(a: JudgeScores, b: JudgeScores) -> bool:
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_every_size(size: tuple, dtype: torch.dtype, device: torch.device) -> None:
    case = cases.make(*size, dtype=dtype)
    cases.check(case, run(case, device), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size",
    [
        (8192, 8, [3, 2], [2]),  # the labels come in pieces
        (1000, 32, [3, 2], None),
        (64, 8, [5] * 300, [100, 200]),  # many blocks, each with several rows
        (0, 2, [3], None),
    ],
    ids=str,
)
def test_every_path(size: tuple, dtype: torch.dtype, device: torch.device) -> None:
    case = cases.make(*size, dtype=dtype, seed=1)
    cases.check(case, run(case, device), dtype)


@pytest.mark.parametrize("labels", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", DTYPES, ids=str)
def test_mixed_dtypes_compute_in_the_finer(hidden: torch.dtype, labels: torch.dtype, device: torch.device) -> None:
    case = cases.make(200, 3, [4, 0, 9], [3], dtype=labels)
    case = case._replace(hidden=case.hidden.to(hidden))
    cases.check(case, run(case, device), torch.float32 if hidden != labels else hidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_rows_apart_and_off_alignment(shift: int, dtype: torch.dtype, device: torch.device) -> None:
    case = cases.make(96, 2, [3, 4], [2], dtype=dtype)
    apart = {}
    for name in ("hidden", "label_weight"):
        x = getattr(case, name)
        apart[name] = torch.zeros(len(x), 128, dtype=dtype)
        apart[name][:, shift : 96 + shift] = x
    there = to(case._replace(**apart), device)
    views = {name: getattr(there, name)[:, shift : 96 + shift] for name in apart}
    cases.check(case, JudgeScores(*(x.cpu() for x in cuda(*there._replace(**views)))), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_bit_for_bit(dtype: torch.dtype, device: torch.device) -> None:
    case = to(cases.make(200, 2, [5] * 130, [65, 65], dtype=dtype), device)
    first = cuda(*case)
    for i in range(100 if device.type == "cuda" else 8):
        if device.type == "cpu":
            emulator.set_order(i % len(emulator.ORDERS))
        assert same(cuda(*case), first)


def test_a_slot_alone_equals_the_slot_in_a_batch(device: torch.device) -> None:
    case = cases.make(300, 2, [5] * 200, None)
    whole = run(case, device)
    for m in (0, 7, 8, 999):
        one = case._replace(
            rows=case.rows[m : m + 1], criterion_weight=torch.ones(1), offsets=torch.tensor([0, 1])
        )  # fmt: skip
        assert torch.equal(run(one, device).probs[0], whole.probs[m])


def test_wild_indices_are_not_read_through(device: torch.device) -> None:
    case = cases.make(64, 2, [3, 3, 3], [3])
    rows, offsets = case.rows.clone(), case.offsets.clone()
    rows[0], rows[1], offsets[-1] = -1, 10**12, 10**12
    got, want = run(case._replace(rows=rows, offsets=offsets), device), run(case, device)
    assert got.probs[:2].isnan().all() and got.scores[0].isnan()
    assert torch.equal(got.probs[2:], want.probs[2:]) and torch.equal(got.scores[1:], want.scores[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.tensor([0, 1, 2, 9999])}, r"rows: index 9999 is outside 0\.\.10"),
        ({"offsets": torch.tensor([0, 3, 2, 4])}, "offsets: must ascend from 0 to 4"),
        ({"group_offsets": torch.tensor([1, 2])}, "group_offsets: must ascend from 0 to 2"),
    ],
)
def test_debug_names_what_is_out_of_range(change, message, device, monkeypatch) -> None:
    monkeypatch.setattr("roro_fast.kernels.checks.DEBUG", True)
    with pytest.raises(RoroError, match=message):
        run(cases.make(64, 2, [2, 2], [2])._replace(**change), device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"hidden": c.hidden.double()}, "hidden: float64"),
        (lambda c: {"hidden": c.hidden[:, 1:]}, "label_weight: shape"),
        (lambda c: {"hidden": c.hidden.T.contiguous().T}, "hidden: elements of the last dimension are apart"),
        (lambda c: {"rows": c.rows.int()}, "rows: int32 but int64"),
        (lambda c: {"rows": c.rows[:-1]}, "criterion_weight: shape"),
        (lambda c: {"label_weight": c.label_weight[:0]}, "label_weight: 0 labels"),
        (lambda c: {"label_weight": torch.zeros(33, 64)}, "label_weight: 33 labels; the CUDA kernel takes 1 to 32"),
        (lambda c: {"valence": c.valence[:1]}, "valence: shape"),
        (lambda c: {"offsets": c.offsets.int()}, "offsets: int32 but int64"),
        (lambda c: {"offsets": c.offsets[:0]}, "offsets: empty"),
        (lambda c: {"group_offsets": c.group_offsets[:1]}, "group_offsets: 1 elements for 2 trajectories"),
    ],
)
def test_bad_input_is_one_clear_error(change, message: str, device: torch.device) -> None:
    case = cases.make(64, 2, [2, 2], [2])
    with pytest.raises(RoroError, match=message):
        run(case._replace(**change(case)), device)


def test_the_op_is_registered_properly(device: torch.device) -> None:
    case = to(cases.make(64, 2, [2, 2], [2]), device)
    torch.library.opcheck(native_cuda.op("judge_score"), (*case, EPS))


STAGED = "else stage(a, labels, first, count);\n    __syncthreads();"
FAULTS = {
    "labels used before they are there": (STAGED, "else stage(a, labels, first, count);"),
    "labels replaced while in use": ("if (!once) {\n        __syncthreads();", "if (!once) {"),
    "scores read before they are there": ("from == to) return;\n  __syncthreads();", "from == to) return;"),
    "a warp leaves early": ("const int64_t r = m <", "if (m >= a.M) return;\n    const int64_t r = m <"),
    "wrong label": ("(LABELS > 2 ? k : min", "(LABELS > 2 ? k ^ 1 : min"),
    "lanes forgotten": ("lanes = kSlotLanes / 2;", "lanes = kSlotLanes / 4;"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, emulated: None, tmp_path: Path) -> None:
    case = cases.make(8192, 8, [3, 5, 9], [2, 1])

    def run_in_every_order() -> None:
        for order in emulator.ORDERS:
            emulator.set_order(order)
            cases.check(case, run(case), torch.float32)

    assert emulator.in_child(run_in_every_order) == 0
    with emulator.using(emulator.plant(tmp_path, "judge_score.cu", *FAULTS[fault])):
        assert emulator.in_child(run_in_every_order) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_read_beyond_the_inputs(dtype: torch.dtype, emulated: None) -> None:
    for size in ((600, 2, [3, 5], [2]), (97, 3, [1] * 9, None), (1, 1, [1], [1])):
        for side in ("start", "end"):
            walled = cases.Case(*(x if x is None else guarded(x, side) for x in cases.make(*size, dtype=dtype)))
            assert emulator.in_child(lambda: run(walled)) == 0  # noqa: B023


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("row ? a.H - first : 0", "row ? a.H + 8 : 0"), ("r >= 0 && r < a.T;", "r >= 0;")],
)
def test_a_read_beyond_the_inputs_kills(right: str, wrong: str, emulated: None, tmp_path: Path) -> None:
    case = cases.make(597, 2, [2, 1], None)
    case = case._replace(hidden=guarded(case.hidden), rows=torch.tensor([len(case.hidden) - 1, len(case.hidden), 0]))
    assert emulator.in_child(lambda: run(case)) == 0
    with emulator.using(emulator.plant(tmp_path, "judge_score.cu", right, wrong)):
        assert emulator.in_child(lambda: run(case)) == -signal.SIGSEGV


SANITIZED = """\
import torch
from tests.cuda.test_judge_score import cases, run
for dtype in (torch.float32, torch.bfloat16):
    case = cases.make(200, 3, [5, 0, 9], [3], dtype=dtype)
    cases.check(case, run(case), dtype)
"""


def test_outputs_stay_in_bounds(emulated: None, tmp_path: Path) -> None:
    fault = ("judge_score.cu", "a.probs[m * a.K + lane] = p", "a.probs[m * a.K + lane + 1] = p")
    healthy, faulty = emulator.kernels(flags=emulator.ASAN), emulator.plant(tmp_path, *fault, emulator.ASAN)
    good, bad, report = emulator.sanitized_exits(SANITIZED, healthy, faulty)
    assert good == 0 and bad != 0 and "AddressSanitizer: heap-buffer-overflow" in report
