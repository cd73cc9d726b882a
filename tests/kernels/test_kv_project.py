"""kv_project in Triton: the shared cases, planted faults, bounds and bad input."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_fast.errors import ConfigError
from roro_fast.kernels import kv_project as kernel
from roro_fast.ops.kv_project import LinearMaps, Rotary, kv_project
from tests.kernels.faults import plant
from tests.kernels.guard import guarded, run_guarded
from tests.ops.cases import kv_project as cases

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32)]
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="guard pages are host memory")
SMALL = (20, (2, 2, 8, 4), (3, 2, 12, 16), 2)


def moved(c: cases.Case) -> cases.Case:
    go = lambda x: x.to(HERE) if isinstance(x, torch.Tensor) else type(x)(*(t.to(HERE) for t in x))  # noqa: E731
    return cases.Case(*(go(x) for x in c))._replace(target=c.target.clone().to(HERE))


def run(c: cases.Case, module: ModuleType | None = None) -> None:
    there = moved(c)
    if module is None:
        kv_project(*there, impl="triton")
    else:
        module.kv_project(*there)
    cases.check(c, c.target, there.target.cpu())


@pytest.mark.parametrize(("dtype", "weights"), DTYPES)
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_no_worse_than_naive(size, dtype, weights):
    run(cases.make(*size, dtype, weights))


@st.composite
def shapes(draw):
    layers, heads, half, page = (draw(st.integers(1, n)) for n in (2, 3, 40, 9))
    return layers, heads, 2 * half, page


@settings(max_examples=15)
@given(st.integers(0, 20), shapes(), shapes(), st.integers(1, 2), st.sampled_from(DTYPES), st.integers(0, 10**6))
def test_any_size(tokens, source, target, chosen, dtypes, seed):
    run(cases.make(tokens, source, target, chosen, *dtypes, seed=seed))


def test_more_tokens_and_wider_heads_than_a_block():
    run(cases.make(70, (1, 1, 96, 16), (1, 1, 160, 16), 1))


def test_pages_of_another_dtype_and_layout():
    c = moved(cases.make(30, (2, 2, 16, 4), (3, 4, 16, 4), 2))
    want = c.target.bfloat16()
    kv_project(*c._replace(target=want), impl="reference")
    head_major = c.target.bfloat16().transpose(3, 4).contiguous().transpose(3, 4)
    apart = torch.stack((c.source, c.source), -1)[..., 1]
    kv_project(*c._replace(source=apart, target=head_major), impl="triton")
    torch.testing.assert_close(head_major, want, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("a = ((c2 * x + s1 * y) * scale)", "a = ((c2 * x - s1 * y) * scale)"),
        ("b = ((c1 * y - s2 * x) * scale)", "b = (c1 * y - s2 * x)"),
        ("left * c1 - right * s1", "left * c1 + right * s1"),
        ("layer * CHOSEN + source_head // HEADS", "layer * CHOSEN"),
        ("turned = found & is_key", "turned = found"),
        ("turned = writable & is_key", "turned = writable"),
        ("at_bias + T_HALF", "at_bias"),
        ("(slot % target_size) * t_token + kv * t_kv", "(slot % target_size) * t_token"),
        ("real = half[None, :] & (e < HALF)", "real = half[None, :] & (e < HALF - 1)"),
        ("w += T_HALF * WIDE", "w += T_HALF"),
        ("x = tl.load(at, mask=found", "x = tl.load(at - s_kv * kv, mask=found"),
    ],
)
def test_a_planted_fault_is_seen(tmp_path, right, wrong):
    c = cases.make(*SMALL)
    run(c)
    with pytest.raises(AssertionError):
        run(c, plant(kernel, tmp_path, right, wrong))


def under_guard(side: str) -> None:
    c = cases.make(*SMALL)
    hold = lambda x: guarded(x, side) if isinstance(x, torch.Tensor) else type(x)(*(guarded(t, side) for t in x))  # noqa: E731
    there = cases.Case(*(hold(x) for x in c))
    kv_project(*there, impl="triton")
    cases.check(c, c.target, there.target)


@interpreted
@pytest.mark.parametrize("side", ["start", "end"])
def test_stays_within_its_tensors(side):
    assert run_guarded(__name__, "under_guard", side) == 0


@pytest.mark.parametrize("field", ["source_slots", "target_slots", "positions"])
@pytest.mark.parametrize("index", [-1, 10**9])
def test_a_wrong_index_touches_nothing(field, index, monkeypatch):
    c = moved(cases.make(*SMALL))
    before = c.target.clone()
    bad = c._replace(**{field: getattr(c, field) * 0 + index})
    kv_project(*bad, impl="triton")
    assert torch.equal(c.target, before)
    monkeypatch.setattr("roro_fast.kernels.checks.DEBUG", True)
    with pytest.raises(ConfigError, match=f"{field}: index"):
        kv_project(*bad, impl="triton")


def test_a_wrong_layer_reads_nothing():
    c = moved(cases.make(*SMALL))
    bias = c.maps.bias[:, 1].view(3, 2, 12)
    kv_project(*c._replace(maps=c.maps._replace(layers=c.maps.layers * 0 + 99)), impl="triton")
    page, offset = c.target_slots // 16, c.target_slots % 16
    values = c.target[page, :, 1, offset]
    torch.testing.assert_close(values, bias.expand_as(values))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: {"source": c.source[..., :7]}, "source: torch.float32"),
        (lambda c: {"target": c.target.double()}, "target: torch.float64"),
        (lambda c: {"maps": LinearMaps(c.maps.weight[..., 1:], *c.maps[1:])}, "maps.weight: shape"),
        (lambda c: {"maps": c.maps._replace(bias=c.maps.bias.half())}, "maps.bias: dtype"),
        (lambda c: {"source_rope": Rotary(*(t.double() for t in c.source_rope))}, "source_rope: dtype"),
        (lambda c: {"target_slots": c.target_slots[1:]}, "target_slots: shape"),
    ],
)
def test_bad_input_is_one_clear_error(change, says):
    c = cases.make(*SMALL)
    with pytest.raises(ConfigError, match=says):
        kernel.kv_project(*c._replace(**change(c)))
