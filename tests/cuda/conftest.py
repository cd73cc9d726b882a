"""Where the CUDA tests run: on emulated kernels always, on a GPU too when there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from roro_fast.ops import native_cuda
from tests.cuda import emulator


@pytest.fixture(scope="module", params=["emulated", "device"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Tensors on this device reach the CUDA kernels."""
    if request.param == "device":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        if native_cuda.why_not():
            pytest.fail(native_cuda.why_not())
        yield torch.device("cuda")
        return
    if emulator.why_not():
        pytest.skip(emulator.why_not())
    with emulator.serving(emulator.kernels()):
        yield torch.device("cpu")


@pytest.fixture(scope="module")
def emulated() -> Iterator[None]:
    """Only where kernels are emulated: planted faults, thread orders."""
    if emulator.why_not():
        pytest.skip(emulator.why_not())
    with emulator.serving(emulator.kernels()):
        yield
