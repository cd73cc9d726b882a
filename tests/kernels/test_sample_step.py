"""sample_step in Triton: the shared cases, odd rows, planted faults, memory bounds and bad input."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_fast.errors import ConfigError
from roro_fast.kernels import sample_step as kernel
from roro_fast.ops.sample_step import SampledStep, reference, sample_step
from tests.kernels.faults import plant
from tests.kernels.guard import guarded, run_guarded
from tests.ops.cases import sample_step as cases

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="guard pages are host memory")


def to(c: cases.Case, device: torch.device) -> cases.Case:
    return cases.Case(*(None if x is None else x.to(device) for x in c))


def run(c: cases.Case, device: torch.device, module: ModuleType | None = None) -> SampledStep:
    got = sample_step(*to(c, device), impl="triton") if module is None else module.sample_step(*to(c, device))
    return SampledStep(*(x.cpu() for x in got))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(("n", "vocab"), [(5, 17), (6, 257)])
def test_same_tokens_and_no_worse_than_naive(device, n, vocab, mode, dtype):
    c = cases.make(n, vocab, mode, dtype)
    cases.check(c, run(c, device), dtype)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(("n", "vocab"), [(0, 10), (1, 1), (3, 9001)])
def test_empty_tiny_and_several_chunks(device, n, vocab, mode):
    c = cases.make(n, vocab, mode)
    cases.check(c, run(c, device), torch.float32)


@pytest.mark.parametrize(("n", "vocab"), [(63, 100), (2, 49152), (1, 152064), (1, 262144)])
@pytest.mark.parametrize("mode", ["greedy", "plain"])
def test_large_vocabularies_and_many_rows(device, n, vocab, mode):
    c = cases.make(n, vocab, mode, torch.bfloat16)
    cases.check(c, run(c, device), torch.bfloat16)


@settings(max_examples=15)
@given(
    st.integers(1, 4), st.integers(1, 300), st.sampled_from(cases.MODES), st.sampled_from(DTYPES), st.integers(0, 10**6)
)
def test_any_size(n, vocab, mode, dtype, seed):
    c = cases.make(n, vocab, mode, dtype, seed=seed)
    cases.check(c, run(c, torch.device("cuda" if torch.cuda.is_available() else "cpu")), dtype)


def test_tied_logits_are_cut_in_the_order_of_ids(device):
    """Nine equal logits above the rest: top-k keeps the lowest ids of them, and top-p likewise."""
    logits = torch.full((12, 5000), -1.0)
    logits[:, [7, 100, 101, 2000, 4095, 4096, 4097, 4500, 4999]] = 5.0
    u = torch.linspace(0.02, 0.97, 12)
    k = torch.tensor([4, 7, 0, 0, 12, 4] * 2)
    p = torch.tensor([1.0, 1.0, 0.35, 0.6, 0.9, 0.3] * 2)
    c = cases.Case(logits, u, torch.ones(12), k, p)
    got = run(c, device)
    assert torch.equal(got.token, reference(*c).token)
    assert set(got.token.tolist()) > {7, 100}


def odd_rows(dtype: torch.dtype) -> tuple[cases.Case, torch.Tensor]:
    """Rows with NaN, infinities, masked ids and ties, greedy and then sampled; and which of them are finite."""
    inf = math.inf
    rows = torch.zeros(7, 300)
    rows[0, 299] = math.nan
    rows[1] = -inf
    rows[2, 5] = inf
    rows[3] = -inf
    rows[3, 7] = -4.0
    rows[4, :150] = -inf
    rows[5, [3, 250]] = 9.0
    rows[6, 299] = -inf
    finite = torch.tensor([False, False, False, True, True, True, True] * 2)
    temperature = torch.tensor([0.0, 1.0]).repeat_interleave(7)
    return cases.Case(rows.repeat(2, 1).to(dtype), torch.full((14,), 1 - 2**-24), temperature, None, None), finite


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_rows(device, dtype, truncate):
    c, finite = odd_rows(dtype)
    if truncate:
        c = c._replace(top_k=torch.full((14,), 299), top_p=torch.full((14,), 0.9999))
    got = run(c, device)
    assert torch.equal(got.finite, finite)
    assert got.token[~finite].tolist() == [0] * 6
    log = math.log(300)
    for x, want in zip(got[1:4], (-log, log, 1 / 300), strict=True):  # as if every logit were 0
        torch.testing.assert_close(x[~finite], torch.full((6,), want))
    chosen = c.logits.gather(1, got.token[:, None]).squeeze(1)
    assert chosen[finite].isfinite().all(), "an id of probability zero"
    greedy = finite & (c.temperature == 0)
    assert got.token[greedy].tolist() == [7, 150, 3, 0], "the lowest id wins a tie"
    want = reference(*c)
    for x, y in zip(got[2:4], want[2:4], strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=0)
    logp = c.logits.float().log_softmax(-1).gather(1, got.token[:, None]).squeeze(1)
    torch.testing.assert_close(got.logprob[finite], logp[finite], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('mask=i < v, other=float("-inf")).to(tl.float32)\n    hot', "mask=i < v, other=0.0).to(tl.float32)\n    hot"),
        ("tl.where(x == m, i, v)", "tl.where(x >= m - 1.0, i, v)"),
        ("(wsum + (m - top) * sum_e)", "wsum"),
        ("(before > target) & (mass > 0)", "before > 0"),
        ("ties = k - count", "ties = k - count + 1"),
        ("rank = seen + tl.cumsum", "rank = tl.cumsum"),
        ("low = tl.where(enough, middle + 1, low)", "low = tl.where(enough, middle + 2, low)"),
        ("below += tl.sum(w, 0)", "below += 0.5 * tl.sum(w, 0)"),
        ("tl.where(good, moment / total, 0.0)", "tl.where(good, moment, 0.0)"),
        ("tl.store(arrived + n, 0)", "tl.store(arrived + n, 7)"),
    ],
)
def test_a_planted_fault_is_seen(tmp_path, device, right, wrong):
    ties = cases.Case(torch.ones(2, 9001), torch.tensor([0.99, 0.7]), torch.ones(2), torch.tensor([5010, 2]), None)
    ties.logits[0, -10:] = 3.0  # 5000 ties of weight exp(-2) come first: 0.99 * 686.7 falls to the fourth of these

    def all_checks(module: ModuleType | None) -> None:
        for c in (cases.make(6, 9001, "greedy"), cases.make(3, 9001, "plain"), cases.make(3, 9001, "both", seed=1)):
            cases.check(c, run(c, device, module), torch.float32)
        assert run(ties, device, module).token.tolist() == [8994, 1]

    all_checks(None)
    with pytest.raises(AssertionError):
        all_checks(plant(kernel, tmp_path, right, wrong))


def under_guard(side: str) -> None:
    for mode in ("plain", "both"):
        c = cases.make(3, 5003, mode)
        c = cases.Case(*(None if x is None else guarded(x, side) for x in c))
        cases.check(c, SampledStep(*kernel.sample_step(*c)), torch.float32)


@interpreted
@pytest.mark.parametrize("side", ["start", "end"])
def test_stays_within_its_tensors(side):
    assert run_guarded(__name__, "under_guard", side) == 0


@pytest.mark.parametrize("mode", ["greedy", "plain", "both"])
def test_a_row_alone_equals_the_row_in_a_batch(device, mode):
    c = to(cases.make(5, 5003, mode), device)
    whole = sample_step(*c, impl="triton")
    alone = sample_step(*(None if x is None else x[3:4] for x in c), impl="triton")
    assert all(torch.equal(a[0], b[3]) for a, b in zip(alone, whole, strict=True))


def test_rows_may_lie_apart(device):
    c = to(cases.make(4, 300, "plain"), device)
    wide = torch.full((8, 320), float("nan"), device=device)
    wide[::2, :300] = c.logits
    got = sample_step(*c._replace(logits=wide[::2, :300]), impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, sample_step(*c, impl="triton"), strict=True))


@pytest.mark.parametrize(
    ("field", "change", "says"),
    [
        ("logits", lambda c: c.logits.double(), "cannot serve .*/torch.float64"),
        ("logits", lambda c: c.logits[:, :0], "logits: torch.float32"),
        ("uniforms", lambda c: c.uniforms[:-1], "uniforms: shape"),
        ("temperature", lambda c: c.temperature.double(), "temperature: dtype"),
        ("top_k", lambda c: c.top_k.int(), "top_k: dtype torch.int32"),
        ("top_p", lambda c: c.top_p[None], "top_p: shape"),
    ],
)
def test_bad_input_is_one_clear_error(device, field, change, says):
    c = to(cases.make(3, 37, "both"), device)
    with pytest.raises(ConfigError, match=says):
        sample_step(*c._replace(**{field: change(c)}), impl="triton")
