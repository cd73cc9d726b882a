"""Says why the kernel tests did not run, where Triton is absent."""

from __future__ import annotations

import importlib.util

import pytest


def test_triton_is_here() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install 'roro-fast[gpu]'); no kernel test was collected")
