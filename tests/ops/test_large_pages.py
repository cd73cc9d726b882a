from __future__ import annotations

from pathlib import Path

import pytest
import torch

from roro_fast.errors import RoroError
from roro_fast.ops import native

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def advised(memory: torch.Tensor) -> bool:
    """Whether the mapping that holds the middle of `memory` carries the advice ("hg" among its flags)."""
    middle, inside = memory.data_ptr() + memory.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(x, 16) for x in first.split("-"))
            inside = begin <= middle < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    return False


@pytest.mark.skipif(not native.available(), reason=native.why_not())
@pytest.mark.skipif(not SETTING.exists(), reason="this system has no transparent large pages")
def test_memory_is_advised_and_keeps_what_it_holds() -> None:
    memory = torch.full((32 << 20,), 7, dtype=torch.uint8)
    assert not advised(memory)
    assert native.prefer_large_pages(memory) is memory
    assert advised(memory) and bool((memory == 7).all())


@pytest.mark.skipif(not native.available(), reason=native.why_not())
def test_small_and_strided_memory() -> None:
    native.prefer_large_pages(torch.zeros(16))
    with pytest.raises(RoroError, match="memory: not contiguous"):
        native.prefer_large_pages(torch.zeros(64, 64).t())
