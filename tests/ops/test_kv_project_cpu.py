"""kv_project in C++ on every instruction set."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roro_fast.errors import RoroError
from roro_fast.ops import kv_project as op
from roro_fast.ops import native
from roro_fast.ops.kv_project import kv_project
from tests.ops import concurrency
from tests.ops.cases import kv_project as cases

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


def run(c: cases.Case) -> None:
    before = c.target.clone()
    kv_project(*c, impl="cpu")
    cases.check(c, before, c.target)


@pytest.mark.parametrize(("dtype", "weights"), DTYPES)
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_no_worse_than_naive(isa: str, size: tuple[Any, ...], dtype: torch.dtype, weights: torch.dtype) -> None:
    run(cases.make(*size, dtype, weights))


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    layers, heads, half, page = (draw(st.integers(1, n)) for n in (3, 4, 40, 9))
    return layers, heads, 2 * half, page


@settings(max_examples=50)
@given(st.integers(0, 20), shapes(), shapes(), st.integers(1, 3), st.sampled_from(DTYPES), st.integers(0, 10**6))
def test_any_size(tokens: int, source: Any, target: Any, chosen: int, dtypes: Any, seed: int) -> None:
    if native.available():
        run(cases.make(tokens, source, target, chosen, *dtypes, seed=seed))


@pytest.mark.usefixtures("kernels")
def test_rounds_give_the_same_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    c = cases.make(*cases.SIZES[1])
    monkeypatch.setattr(op, "SCRATCH", 1)
    run(c)


@pytest.mark.usefixtures("kernels")
def test_pages_of_other_dtypes_and_layouts_and_in_one_arena() -> None:
    """Head-major pages, a float32 source and a bfloat16 receiver in the same memory, as the engine's arena has them."""
    c = cases.make(30, (2, 2, 16, 4), (3, 4, 16, 4), 2)
    want = c.target.bfloat16()
    kv_project(*c._replace(target=want), impl="reference")
    arena = torch.zeros(c.source.numel() * 4 + c.target.numel() * 2 + 64, dtype=torch.uint8)
    cut = -(-c.source.numel() * 4 // 64) * 64
    source = arena[: c.source.numel() * 4].view(torch.float32)
    source = source.view(len(c.source), 2, 2, 2, 4, 16).transpose(3, 4)  # head-major
    target = arena[cut : cut + c.target.numel() * 2].view(torch.bfloat16).view(c.target.shape)
    source.copy_(c.source)
    target.copy_(c.target)
    kv_project(*c._replace(source=source, target=target), impl="cpu")
    torch.testing.assert_close(target, want, rtol=1e-2, atol=1e-3)
    assert torch.equal(source, c.source)


BAD = {
    "source_slots: 999 at 0, but the pages hold 96": lambda c: c._replace(source_slots=c.source_slots * 0 + 999),
    "target_slots: -1 at 0": lambda c: c._replace(target_slots=c.target_slots * 0 - 1),
    "positions: 300 at 0, but cos and sin have 300": lambda c: c._replace(positions=c.positions * 0 + 300),
    "layers: 2, but the source has 2": lambda c: c._replace(maps=c.maps._replace(layers=c.maps.layers * 0 + 2)),
    "elements of the last dimension are apart": lambda c: c._replace(
        source=torch.stack((c.source, c.source), -1)[..., 0]
    ),
    "source: float16 but float32 or bfloat16": lambda c: c._replace(source=c.source.half()),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    c = cases.make(*cases.SIZES[1])
    before = c.target.clone()
    with pytest.raises(RoroError, match=re.escape(message)):
        op.kv_project_cpu(*BAD[message](c))
    assert torch.equal(c.target, before)


@pytest.mark.usefixtures("kernels")
def test_registered_ops_pass_opcheck() -> None:
    c = cases.make(5, (2, 2, 16, 4), (3, 4, 16, 4), 2)
    x = (c.source, c.source_slots, c.positions, *c.source_rope, c.maps.layers)
    torch.library.opcheck(native.op("kv_unrotate"), (*x, False))
    torch.library.opcheck(native.op("kv_unrotate"), (*x, True))
    mapped = torch.randn(3, 2, 5, 64)
    places = (c.target_slots, c.positions, *c.target_rope)
    torch.library.opcheck(native.op("kv_rotate_store"), (mapped, c.maps.bias, c.target, *places))


@pytest.mark.usefixtures("kernels")
def test_threads_fork_and_repeats() -> None:
    """The ends only: torch's own product, like whatever it does with many elements, would hang in a forked child."""
    c = cases.make(200, (2, 3, 64, 16), (4, 3, 32, 16), 2)
    mapped, target = torch.randn(4, 2, 200, 96), torch.zeros_like(c.target)

    def ends() -> list[torch.Tensor]:
        native.call("kv_rotate_store", mapped, c.maps.bias, target, c.target_slots, c.positions, *c.target_rope)
        again = native.call("kv_unrotate", c.source, c.source_slots, c.positions, *c.source_rope, c.maps.layers, False)
        return [y.flatten()[::37] for y in (again, target)]

    concurrency.check(ends)
