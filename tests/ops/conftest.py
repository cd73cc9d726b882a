"""Every instruction set of the C++ kernels, forced one after the other."""

from __future__ import annotations

import os

os.environ.setdefault("RORO_POISON", "1")  # fresh outputs of the C++ kernels are NaN, so a gap shows

from collections.abc import Iterator

import pytest

from roro_fast.ops import native

ISAS = ["scalar", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if not native.available():
        pytest.skip(native.why_not())
    if request.param not in native.usable_isas():
        pytest.skip(f"this CPU has no {request.param}")
    native.set_isa(request.param)
    yield request.param
    native.set_isa("auto")


@pytest.fixture
def kernels() -> None:
    if not native.available():
        pytest.skip(native.why_not())
