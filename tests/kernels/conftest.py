"""Triton kernels without a GPU: the mended interpreter on CPU tensors. With a GPU: the same tests on `cuda`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

HAVE_TRITON = importlib.util.find_spec("triton") is not None
HAVE_GPU = torch.cuda.is_available()

if HAVE_TRITON and not HAVE_GPU:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before tests/kernels could ask for its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from tests.kernels.interpreter import mend

    mend()

collect_ignore_glob = [] if HAVE_TRITON else ["test_[!n]*.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAVE_GPU else "cpu")


@pytest.fixture(autouse=True)
def _poison_fresh_tensors() -> Iterator[None]:
    """`torch.empty` gives NaN (or the largest integer), so an element that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with np.errstate(all="ignore"):  # the interpreter computes masked lanes too
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _fresh_counters() -> Iterator[None]:
    """A planted fault may leave arrival counters behind that are not zero."""
    yield
    if counters := sys.modules.get("roro_fast.kernels.counters"):
        counters._blocks.clear()
