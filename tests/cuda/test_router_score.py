"""The CUDA router_score against the reference's cases: every size, dtype and path, on emulated kernels and on a GPU."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from roro_fast.errors import RoroError
from roro_fast.ops import native_cuda
from roro_fast.ops.router_score import RouterScore, RouterWeights, cuda
from tests.cuda import emulator
from tests.kernels.guard import guarded
from tests.ops.cases import router_score as cases

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def to(case: cases.Case, device: torch.device) -> cases.Case:
    move = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x  # noqa: E731
    return cases.Case(*(RouterWeights(*map(move, x)) if isinstance(x, RouterWeights) else move(x) for x in case))


def run(case: cases.Case, device: torch.device | str = "cpu") -> RouterScore:
    return RouterScore(*(x.cpu() for x in cuda(*to(case, torch.device(device)))))


def same(a: RouterScore, b: RouterScore) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_every_size(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    case = cases.make(*size, dtype=dtype)
    cases.check(case, run(case, device), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size",
    [
        (8192, 8, 16, 2, 5),  # 16-byte loads of w1 too; 16 pieces
        (1024, 0, 40, 4, 256),  # the last N of one launch: four chunks of rows
        (1024, 8, 40, 4, 257),  # the first that hands the product to torch
        (64, 300, 16, 2, 20),  # too many signals for shared memory
        (0, 12, 64, 2, 300),
    ],
    ids=str,
)
def test_every_path(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    case = cases.make(*size, dtype=dtype, gather=False, seed=1)
    cases.check(case, run(case, device), dtype)


@pytest.mark.parametrize("n", [40, 300])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_temperature_and_bias(n: int, temperature: float, bias: bool, device: torch.device) -> None:
    case = cases.make(64, 12, 32, 4, n, temperature=temperature, bias=bias)
    cases.check(case, run(case, device), torch.float32)


@pytest.mark.parametrize("n", [17, 300])
@pytest.mark.parametrize("weights", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", DTYPES, ids=str)
def test_mixed_dtypes_compute_in_the_finer(
    hidden: torch.dtype, weights: torch.dtype, n: int, device: torch.device
) -> None:
    case = cases.make(200, 5, 24, 3, n, dtype=weights)
    case = case._replace(hidden=case.hidden.to(hidden))
    cases.check(case, run(case, device), torch.float32 if hidden != weights else hidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_rows_apart_and_off_alignment(shift: int, dtype: torch.dtype, device: torch.device) -> None:
    case = cases.make(96, 4, 24, 2, 30, dtype=dtype)
    wide = torch.zeros(len(case.hidden), 128, dtype=dtype)
    wide[:, shift : 96 + shift] = case.hidden
    w1 = torch.zeros(24, 128, dtype=dtype)
    w1[:, shift : 100 + shift] = case.weights.w1
    want = run(case, device)
    apart = to(case._replace(hidden=wide, weights=case.weights._replace(w1=w1)), device)
    apart = apart._replace(
        hidden=apart.hidden[:, shift : 96 + shift],
        weights=apart.weights._replace(w1=apart.weights.w1[:, shift : 100 + shift]),
    )
    assert same(want, RouterScore(*(x.cpu() for x in cuda(*apart))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone_equals_the_row_in_a_batch(dtype: torch.dtype, device: torch.device) -> None:
    case = cases.make(600, 5, 40, 3, 90, dtype=dtype, gather=False)
    whole = run(case, device)
    for i in (0, 1, 15, 16, 63, 64, 89):
        one = run(case._replace(rows=torch.tensor([i]), **{
            name: getattr(case, name)[i : i + 1] for name in ("signals", "uniforms", "bias")
        }), device)  # fmt: skip
        assert all(torch.equal(x[0], y[i]) for x, y in zip(one, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [70, 300])
def test_repeats_bit_for_bit(n: int, dtype: torch.dtype, device: torch.device) -> None:
    case = to(cases.make(1100, 5, 40, 3, n, dtype=dtype), device)
    first = cuda(*case)
    for i in range(100 if device.type == "cuda" else 8):
        if device.type == "cpu":
            emulator.set_order(i % len(emulator.ORDERS))
        assert same(cuda(*case), first)


@pytest.mark.parametrize("n", [9, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_index_out_of_range_is_not_read_through(n: int, dtype: torch.dtype, device: torch.device) -> None:
    case = cases.make(64, 3, 16, 2, n, dtype=dtype)
    rows = case.rows.clone()
    rows[1], rows[4] = -1, 10**12
    got, want = run(case._replace(rows=rows), device), run(case, device)
    bad = torch.zeros(n, dtype=torch.bool)
    bad[[1, 4]] = True
    assert got.probs[bad].isnan().all() and (got.action[bad] == 0).all()
    assert all(torch.equal(a[~bad], b[~bad]) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("n", [9, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_any_hidden_state_every_index_is_out_of_range(n: int, dtype: torch.dtype, device: torch.device) -> None:
    case = cases.make(4096, 3, 16, 2, n, dtype=dtype)
    if device.type == "cpu":
        case = case._replace(weights=RouterWeights(*map(guarded, case.weights)))
    got = run(case._replace(hidden=case.hidden[:0]), device)
    assert got.probs.isnan().all() and (got.action == 0).all()


@pytest.mark.parametrize("n", [64, 300])
def test_replays_of_cuda_graphs_on_two_streams_equal_eager(n: int, device: torch.device) -> None:
    """Graphs captured on one stream and replayed at once on two must not share the counters of their blocks."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    work = [to(cases.make(2048, 12, 256, 2, n, dtype=torch.bfloat16, seed=s), device) for s in (0, 1)]
    want = [cuda(*case) for case in work]
    graphs, outputs = [torch.cuda.CUDAGraph() for _ in work], []
    for graph, case in zip(graphs, work, strict=True):
        with torch.cuda.graph(graph):
            outputs.append(cuda(*case))
    streams = [torch.cuda.Stream() for _ in work]
    for _ in range(50):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(same(a, b) for a, b in zip(outputs, want, strict=True))


def test_debug_names_the_index_out_of_range(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roro_fast.kernels.checks.DEBUG", True)
    case = cases.make(64, 3, 16, 2, 9)
    with pytest.raises(RoroError, match=r"rows: index 99 is outside 0\.\.13"):
        run(case._replace(rows=case.rows.clone().fill_(99)), device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"hidden": c.hidden.double()}, "hidden: float64"),
        (lambda c: {"hidden": c.hidden[:, :-1]}, "weights.w1: shape"),
        (lambda c: {"hidden": c.hidden.T.contiguous().T}, "hidden: elements of the last dimension are apart"),
        (lambda c: {"rows": c.rows.int()}, "rows: int32 but int64"),
        (lambda c: {"rows": c.rows[:-1]}, "rows: shape"),
        (lambda c: {"rows": None}, "hidden: 14 rows for 9 rows of signals"),
        (lambda c: {"signals": c.signals.half()}, "signals: float16 but float32"),
        (lambda c: {"uniforms": c.uniforms[:-1]}, "uniforms: shape"),
        (lambda c: {"uniforms": torch.stack((c.uniforms,) * 2, 1)[:, 0]}, "uniforms: elements of the last dim"),
        (lambda c: {"bias": c.bias[:, :1]}, "bias: shape"),
        (lambda c: {"bias": c.bias.T.contiguous().T}, "bias: elements of the last dimension are apart"),
        (lambda c: {"weights": c.weights._replace(b1=c.weights.b1[:-1])}, "weights.b1: shape"),
        (lambda c: {"weights": c.weights._replace(norm=c.weights.norm.half())}, "weights.norm: float16 but float32"),
        (lambda c: {"weights": c.weights._replace(w2=torch.zeros(9, 16), b2=torch.zeros(9))}, "weights.w2: 9 actions"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(change, message: str, device: torch.device) -> None:
    case = to(cases.make(64, 3, 16, 2, 9), device)
    with pytest.raises(RoroError, match=message):
        cuda(*case._replace(**change(case)))


def test_tensors_of_another_device_are_refused(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs two devices")
    case = to(cases.make(64, 3, 16, 2, 9), device)
    with pytest.raises(RoroError, match="uniforms: not on the same device"):
        cuda(*case._replace(uniforms=case.uniforms.cpu()))


def test_the_op_is_registered_properly(device: torch.device) -> None:
    case = to(cases.make(64, 3, 16, 2, 9), device)
    args = (*case[:3], *case.weights, *case[4:])
    torch.library.opcheck(native_cuda.op("router_score"), args)


BARRIER = "fetch(first + kRows);\n    __syncthreads();"
FAULTS = {
    "missing barrier": ("router_score.cu", BARRIER, BARRIER.replace("__syncthreads();", "")),
    "early exit": ("router_score.cu", "float z[4] = {0, 0, 0, 0}", "if (n >= a.N) return; float z[4] = {0, 0, 0, 0}"),
    "wrong index": ("router_score.cu", "{column[i], column[i + 1]}", "{column[i], column[i]}"),
    "a piece forgotten": ("router_score.cu", "p < int(gridDim.y)", "p < int(gridDim.y) - 1"),
    "ticket not reset": ("device.cuh", "atomicInc(ticket, count - 1)", "atomicInc(ticket, count)"),
    "nobody waits for the ticket": (
        "device.cuh",
        "  }\n  __syncthreads();\n  return arrived",
        "  }\n  return arrived",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, emulated: None, tmp_path: Path) -> None:
    case = cases.make(1100, 5, 40, 3, 70, dtype=torch.bfloat16)

    def run_in_every_order() -> None:
        for order in emulator.ORDERS:
            emulator.set_order(order)
            cases.check(case, run(case), torch.bfloat16)

    assert emulator.in_child(run_in_every_order) == 0
    with emulator.using(emulator.plant(tmp_path, *FAULTS[fault])):
        assert emulator.in_child(run_in_every_order) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [9, 300])
def test_nothing_is_read_beyond_the_inputs(n: int, dtype: torch.dtype, emulated: None) -> None:
    for size in ((600, 5, 40, 3, n), (96, 4, 17, 2, n), (1, 1, 1, 1, n)):
        case = cases.make(*size, dtype=dtype)
        for side in ("start", "end"):
            wall = lambda x: guarded(x, side) if isinstance(x, torch.Tensor) else x  # noqa: B023, E731
            walled = cases.Case(
                *(RouterWeights(*map(wall, x)) if isinstance(x, RouterWeights) else wall(x) for x in case)
            )
            assert emulator.in_child(lambda: run(walled)) == 0  # noqa: B023


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(row, input + 4 * V * b, a.H)", "(row, input + 4 * V * b, a.H + 8)"),
        ("(inside ? r[m][u] : 0)", "r[m][u]"),
    ],
)
def test_a_read_beyond_the_inputs_kills(right: str, wrong: str, emulated: None, tmp_path: Path) -> None:
    case = cases.make(600, 5, 40, 3, 9, dtype=torch.bfloat16, gather=False)
    case = case._replace(hidden=guarded(case.hidden), rows=torch.tensor([8, len(case.hidden), *range(7)]))
    assert emulator.in_child(lambda: run(case)) == 0
    with emulator.using(emulator.plant(tmp_path, "router_score.cu", right, wrong)):
        assert emulator.in_child(lambda: run(case)) == -signal.SIGSEGV


SANITIZED = """\
import torch
from tests.cuda.test_router_score import cases, run
for n in (9, 70, 300):
    for dtype in (torch.float32, torch.bfloat16):
        case = cases.make(600, 5, 40, 3, n, dtype=dtype)
        cases.check(case, run(case), dtype)
"""


def test_outputs_stay_in_bounds(emulated: None, tmp_path: Path) -> None:
    fault = ("router_score.cuh", "a.action[n] = action;", "a.action[n + 1] = action;")
    healthy, faulty = emulator.kernels(flags=emulator.ASAN), emulator.plant(tmp_path, *fault, emulator.ASAN)
    good, bad, report = emulator.sanitized_exits(SANITIZED, healthy, faulty)
    assert good == 0 and bad != 0 and "AddressSanitizer: heap-buffer-overflow" in report
