"""The CUDA copies of KV against the shared cases, bit for bit, on emulated kernels and on a GPU."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from roro_fast.errors import RoroError
from roro_fast.ops import native_cuda
from roro_fast.ops.kv_handoff import copy_cuda, copy_pages_cuda
from tests.cuda import emulator
from tests.kernels.guard import guarded
from tests.ops.cases import kv_handoff as cases

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def token_major(x: torch.Tensor, layout: str) -> torch.Tensor:
    return x if layout == "NHD" else x.transpose(-3, -2)


def run(case: cases.Case, device: torch.device | str = "cpu") -> torch.Tensor:
    """The target after the copy."""
    source, target, spans = (x.to(device, copy=True) for x in case[:3])
    copy_cuda(token_major(source, case.source_layout), token_major(target, case.target_layout), spans)
    return target.cpu()


def check(case: cases.Case, device: torch.device | str = "cpu") -> None:
    assert torch.equal(cases.bits(run(case, device)), cases.bits(cases.expected(case)))


@pytest.mark.parametrize("layouts", cases.LAYOUTS, ids=str)
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_moves_every_bit(size, layouts, dtype, device: torch.device) -> None:
    check(cases.make(*size, layouts=layouts, dtype=dtype), device)


@pytest.mark.parametrize("layouts", [("NHD", "HND"), ("HND", "HND")], ids=str)
@pytest.mark.parametrize("dim", [8, 5])
@pytest.mark.parametrize("to", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rounds_to_another_dtype(dtype, to, dim, layouts, device: torch.device) -> None:
    check(cases.make(16, 4, 2, dim, 50, layouts, dtype, to=to), device)


@pytest.mark.parametrize("inner", [(), (3,), (2, 3, 2, 2)])
def test_inner_dimensions(inner: tuple[int, ...], device: torch.device) -> None:
    check(cases.make(16, 8, 2, 16, 40, inner=inner, dtype=torch.float16), device)


def many_slices() -> cases.Case:
    """So many that a block has a slice to itself, and several rounds to do."""
    return cases.make(16, 128, 2, 5, 300, ("NHD", "HND"), torch.uint8, inner=(40, 30))


def test_a_block_goes_on_until_all_is_moved(device: torch.device) -> None:
    check(many_slices(), device)


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_pools_that_are_views(shift: int, device: torch.device) -> None:
    """One layer's keys of a larger pool, and a last dimension that starts anywhere."""
    case = cases.make(16, 8, 2, 16, 40, inner=(2,), dtype=torch.bfloat16)
    wide = torch.zeros(*case.source.shape[:-1], 32, dtype=torch.bfloat16)
    wide[..., shift : 16 + shift] = case.source
    target = case.target.to(device, copy=True)
    copy_cuda(wide.to(device)[..., shift : 16 + shift], target, case.spans.to(device))
    assert torch.equal(cases.bits(target.cpu()), cases.bits(cases.expected(case)))
    layer = case.target.to(device, copy=True)
    copy_cuda(case.source.to(device)[:, 1], layer[:, 1], case.spans.to(device))
    want = case.target.clone()
    want[:, 1] = cases.expected(case)[:, 1]
    assert torch.equal(cases.bits(layer.cpu()), cases.bits(want))


def test_moves_within_one_pool(device: torch.device) -> None:
    pool = cases.any_bits((9, 2, 16, 2, 8), torch.bfloat16, torch.Generator().manual_seed(0))
    there = pool.to(device, copy=True)
    copy_cuda(there, there, torch.tensor([[3, 100, 20], [70, 40, 9]], device=device))
    want = pool.movedim(-3, 1).flatten(0, 1).clone()
    for read, write, n in ((3, 100, 20), (70, 40, 9)):
        want[write : write + n] = want[read : read + n].clone()
    assert torch.equal(cases.bits(there.cpu().movedim(-3, 1).flatten(0, 1)), cases.bits(want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("page", [(3, 2, 4, 2, 16), (5,), (1000, 33)], ids=str)
def test_copies_pages(page: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    pool = cases.any_bits((10, *page), dtype, torch.Generator().manual_seed(0))
    source, target = torch.tensor([1, 7, 3]), torch.tensor([9, 0, 4])
    there = pool.to(device, copy=True)
    copy_pages_cuda(there, source.to(device), target.to(device))
    want = cases.bits(pool).reshape(10, -1).clone()
    want[target] = want[source]
    assert torch.equal(cases.bits(there.cpu()).reshape(10, -1), want)
    copy_pages_cuda(there, source[:0].to(device), target[:0].to(device))
    assert torch.equal(cases.bits(there.cpu()).reshape(10, -1), want)


def test_a_span_outside_a_pool_is_skipped(device: torch.device) -> None:
    case = cases.make(16, 8, 2, 16, 40, inner=(2,))
    wild = [[-1, 0, 2], [0, -1, 2], [0, 10**12, 1], [10**12, 0, 1], [0, 0, -5], [0, 0, 10**9], [0, 0, 2**62]]
    spans = torch.cat((torch.tensor(wild), case.spans))
    assert torch.equal(cases.bits(run(case._replace(spans=spans), device)), cases.bits(cases.expected(case)))


def test_debug_names_what_is_wrong_with_spans(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roro_fast.kernels.checks.DEBUG", True)
    case = cases.make(16, 8, 2, 16, 40)
    with pytest.raises(RoroError, match="spans: source slots outside the pool"):
        run(case._replace(spans=torch.tensor([[-1, 0, 2]])), device)
    with pytest.raises(RoroError, match="a slot of the target is in two spans"):
        run(case._replace(spans=torch.tensor([[0, 0, 2], [4, 1, 2]])), device)
    with pytest.raises(RoroError, match=r"source: index 12 is outside 0\.\.9"):
        copy_pages_cuda(torch.zeros(10, 2, device=device), *torch.tensor([[12], [1]], device=device))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"target": c.target[:, :1]}, "target: shape .* does not fit source"),
        (lambda c: {"target": c.target[..., :-1]}, "target: shape .* does not fit source"),
        (lambda c: {"source": c.source[:, 0, 0, 0], "target": c.target[:, 0, 0, 0]}, "source: 3 dimensions"),
        (lambda c: {"spans": c.spans.int()}, "spans: int32 but int64"),
        (lambda c: {"spans": c.spans[:, :2]}, "spans: shape"),
        (lambda c: {"target": c.target.to(torch.float64)}, "target: float64 but float32, float16 or bfloat16"),
        (lambda c: {"source": c.source.mT.contiguous().mT}, "source: elements of the last dimension are apart"),
    ],
)
def test_bad_input_is_one_clear_error(change, message: str, device: torch.device) -> None:
    case = cases.make(16, 8, 8, 16, 40)
    change = {k: v if k == "spans" else v.to(device) for k, v in change(case).items()}
    args = {"source": case.source.to(device), "target": case.target.to(device), "spans": case.spans, **change}
    with pytest.raises(RoroError, match=message):
        copy_cuda(args["source"], args["target"], args["spans"].to(device))


def test_pages_that_are_not_contiguous_are_refused(device: torch.device) -> None:
    pool = torch.zeros(4, 2, 3, device=device).transpose(1, 2)
    with pytest.raises(RoroError, match="pool: pages are not contiguous"):
        copy_pages_cuda(pool, *torch.tensor([[0], [1]], device=device))


def test_the_ops_are_registered_properly(device: torch.device) -> None:
    case = cases.make(16, 8, 2, 16, 40, inner=(2,))
    args = tuple(x.to(device) for x in case[:3])
    torch.library.opcheck(native_cuda.op("kv_copy"), args)
    torch.library.opcheck(native_cuda.op("kv_copy_pages"), (args[0], *torch.tensor([[0, 2], [1, 3]], device=device)))


FAULTS = {
    "another page size": ("(slot - p * page.divisor)", "(slot - p * (page.divisor - 1))"),
    "one vector in four lost": ("base += kInFlight * step", "base += (kInFlight + 1) * step"),
    "one head for all": ("row - token * plan.heads.divisor,", "0,"),
    "a wild span runs": ("first < 0 || to < 0)", "to < 0)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, emulated: None, tmp_path: Path) -> None:
    case = many_slices()
    want = cases.expected(case)
    case = case._replace(spans=torch.cat((case.spans, torch.tensor([[-5, 0, 5]]))))

    def body() -> None:
        assert torch.equal(cases.bits(run(case)), cases.bits(want))

    assert emulator.in_child(body) == 0
    with emulator.using(emulator.plant(tmp_path, "kv_handoff.cu", *FAULTS[fault])):
        assert emulator.in_child(body) != 0


@pytest.mark.parametrize("side", ["start", "end"])
def test_nothing_beyond_the_pools_is_touched(side: str, emulated: None) -> None:
    def body() -> None:
        for size in cases.SIZES:
            for layouts in cases.LAYOUTS:
                case = cases.make(*size, layouts=layouts, dtype=torch.float16)
                source, target = guarded(case.source, side), guarded(case.target, side)
                copy_cuda(token_major(source, layouts[0]), token_major(target, layouts[1]), guarded(case.spans, side))

    assert emulator.in_child(body) == 0


@pytest.mark.parametrize("pool", ["source", "target"])
def test_a_move_beyond_a_pool_kills(pool: str, emulated: None, tmp_path: Path) -> None:
    case = cases.make(16, 16, 2, 64, 100)
    pools = [guarded(x) for x in case[:2]]
    last = [x.shape[0] * 16 - 1 for x in pools]
    spans = torch.tensor([[last[0], 0, 40] if pool == "source" else [0, last[1], 40]])

    def body() -> None:
        copy_cuda(*pools, spans)

    assert emulator.in_child(body) == 0
    bound = {"source": "first > plan.source.slots - tokens", "target": "to > plan.target.slots - tokens"}[pool]
    with emulator.using(emulator.plant(tmp_path, "kv_handoff.cu", bound, bound.removesuffix(" - tokens"))):
        assert emulator.in_child(body) == -signal.SIGSEGV
