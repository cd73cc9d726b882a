"""router_score in Triton: the shared cases, planted faults, memory bounds, determinism and bad input."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_fast.errors import ConfigError
from roro_fast.kernels import router_score as kernel
from roro_fast.ops.router_score import RouterScore, RouterWeights, router_score
from tests.kernels.faults import plant
from tests.kernels.guard import guarded, run_guarded
from tests.ops.cases import router_score as cases

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="guard pages are host memory")


def to(c: cases.Case, device: torch.device) -> cases.Case:
    moved = (x.to(device) if isinstance(x, torch.Tensor) else x for x in c)
    return cases.Case(*moved)._replace(weights=RouterWeights(*(w.to(device) for w in c.weights)))


def run(c: cases.Case, device: torch.device, module: ModuleType = kernel) -> RouterScore:
    if module is kernel:
        return RouterScore(*(x.cpu() for x in router_score(*to(c, device), impl="triton")))
    return RouterScore(*(x.cpu() for x in module.router_score(*to(c, device))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_no_worse_than_naive_and_same_actions(device, size, dtype):
    c = cases.make(*size, dtype)
    cases.check(c, run(c, device), dtype)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_all_arguments(device, temperature, bias, gather):
    c = cases.make(40, 7, 33, 4, 50, temperature=temperature, bias=bias, gather=gather)
    cases.check(c, run(c, device), torch.float32)


@settings(max_examples=25)
@given(
    st.integers(0, 700), st.integers(0, 9), st.integers(1, 70), st.integers(1, 9), st.integers(0, 70),
    st.sampled_from(DTYPES), st.integers(0, 10**6),
)  # fmt: skip
def test_any_size(h, s, d, k, n, dtype, seed):
    if h + s:
        c = cases.make(h, s, d, k, n, dtype, seed=seed)
        cases.check(c, run(c, torch.device("cuda" if torch.cuda.is_available() else "cpu")), dtype)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("known = s < n_signals", "known = s < n_signals - 1"),
        ("for s in range(SPLITS):", "for s in range(SPLITS - 1):"),
        ("for t in range(TILES):", "for t in range(1, TILES):"),
        ("tl.store(arrived + key, 0)", "tl.store(arrived + key, 7)"),
        ("sampled += (below <= u)", "sampled += (below + 0.2 <= u)"),
        ("source = i if rows is None else", "source = i if rows is not None else"),
        ("other=0.0)[None, :]\n    x = x * tl.sigmoid", "other=0.0)[None, :]\n    x = tl.abs(x) * tl.sigmoid"),
        ("mask=(unit < n_units)[None, :] & inside[:, None]", "mask=(unit < n_units - 1)[None, :] & inside[:, None]"),
    ],
)
def test_a_planted_fault_is_seen(tmp_path, device, right, wrong):
    c = cases.make(600, 5, 65, 3, 33)
    assert kernel.plan(33, 600, 65, torch.float32)[3:5] == (3, 2), "the case must use tiles and splits"
    cases.check(c, run(c, device), torch.float32)
    faulty = plant(kernel, tmp_path, right, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        for _ in range(2):  # a counter left over shows in the next launch
            cases.check(c, run(c, device, faulty), torch.float32)


@pytest.mark.parametrize("row", [-1, 10**12])
def test_a_wrong_row_reads_nothing(device, row):
    c = to(cases.make(40, 7, 33, 4, 50), device)
    got = router_score(*c._replace(rows=c.rows.index_fill(0, torch.tensor([3], device=device), row)), impl="triton")
    want = router_score(*c, impl="triton")
    assert torch.equal(got.action[4:], want.action[4:]) and got.probs[3].isfinite().all()


def under_guard(side: str, unmasked: str = "") -> None:
    c = cases.make(100, 5, 33, 3, 21)
    moved = [guarded(x, side) if isinstance(x, torch.Tensor) else x for x in c._replace(weights=None)]
    c = cases.Case(*moved)._replace(weights=RouterWeights(*(guarded(w, side) for w in c.weights)))
    kernel.pack = lambda w, h, dtype, pack=kernel.pack: kernel.Packed(*(guarded(x, side) for x in pack(w, h, dtype)))
    if unmasked:
        import tempfile
        from pathlib import Path

        module = plant(kernel, Path(tempfile.mkdtemp()), "rows + i, mask=live, other=0", "rows + 256 + i")
        module.router_score(*c)
    else:
        cases.check(c, RouterScore(*kernel.router_score(*c)), torch.float32)


@interpreted
@pytest.mark.parametrize("side", ["start", "end"])
def test_stays_within_its_tensors(side):
    assert run_guarded(__name__, "under_guard", side) == 0


@interpreted
def test_leaving_them_would_be_seen():
    assert run_guarded(__name__, "under_guard", "end", "unmasked") != 0


def test_packed_weights_follow_the_weights(device):
    c = to(cases.make(40, 7, 33, 4, 50), device)
    before = run(c, device)
    c.weights.norm.mul_(2)
    after = run(c, device)
    assert not torch.equal(before.logits, after.logits)
    cases.check(cases.Case(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in c))._replace(
        weights=RouterWeights(*(w.cpu() for w in c.weights))), after, torch.float32)  # fmt: skip


def test_repeats_are_bit_equal(device):
    c = to(cases.make(576, 12, 64, 3, 64, torch.bfloat16), device)
    first = router_score(*c, impl="triton")
    for _ in range(100 if device.type == "cuda" else 2):
        assert all(torch.equal(a, b) for a, b in zip(first, router_score(*c, impl="triton"), strict=True))


@pytest.mark.parametrize(
    ("field", "change", "says"),
    [
        ("signals", lambda c: c.signals[:, :3], "weights.w1: shape"),
        ("uniforms", lambda c: c.uniforms[:-1], r"uniforms: shape \[49\], expected \[50\]"),
        ("uniforms", lambda c: c.uniforms.double(), "uniforms: dtype torch.float64"),
        ("rows", lambda c: c.rows.int(), "rows: dtype torch.int32, expected torch.int64"),
        ("rows", lambda c: None, "rows: None means all rows"),
        ("temperature", lambda c: -1.0, "temperature: -1.0"),
        ("bias", lambda c: c.bias[:, :2], "bias: shape"),
        ("hidden", lambda c: c.hidden.long(), "hidden: torch.int64"),
        ("weights", lambda c: c.weights._replace(b2=c.weights.b2[:2]), "weights.b2: shape"),
    ],
)
def test_bad_input_is_one_clear_error(device, field, change, says):
    c = to(cases.make(40, 7, 33, 4, 50), device)
    with pytest.raises(ConfigError, match=says):
        router_score(*c._replace(**{field: change(c)}), impl="triton")


def test_row_range_is_checked_on_request(device, monkeypatch):
    c = to(cases.make(40, 7, 33, 4, 50), device)
    monkeypatch.setattr("roro_fast.kernels.checks.DEBUG", True)
    with pytest.raises(ConfigError, match=r"rows: index 55 is outside 0\.\.54"):
        router_score(*c._replace(rows=torch.full_like(c.rows, 55)), impl="triton")
