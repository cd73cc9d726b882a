"""A sliding window: every implementation sees the same latest tokens, and none before them."""

from __future__ import annotations

import pytest
import torch

from roro_fast.errors import ConfigError
from roro_fast.ops.paged_attention import make_groups, paged_attention
from roro_fast.ops.registry import implementations
from tests.ops.cases import paged_attention as cases

WINDOWS = [1, 2, 15, 16, 17, 64, 500]


@pytest.mark.parametrize("size", cases.SIZES[:4], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", cases.SHAPES)
def test_no_worse_than_naive(shape: str, window: int, size: tuple[int, int, int, int]) -> None:
    c = cases.make(cases.SHAPES[shape], *size, window=window)
    cases.check(c, paged_attention(*c.args, window=window), torch.float32)


def test_groups_made_for_a_window_serve_all_layers() -> None:
    c = cases.make(cases.SHAPES["ragged"], *cases.SIZES[0], window=9)
    groups = make_groups(c.page_table, c.kv_lens, c.cu_seqlens, c.k_pages, 9)
    cases.check(c, paged_attention(*c.args, groups=groups, window=9), torch.float32)


def test_a_window_is_told_from_none_and_from_one_token_more() -> None:
    c = cases.make([(3, 100), (1, 60)], *cases.SIZES[0], window=20)
    for window in (0, 19, 21):
        with pytest.raises(AssertionError):
            cases.check(c, paged_attention(*c.args, window=window), torch.float32)


def test_what_cannot_see_windows_declines_by_name() -> None:
    c = cases.make([(1, 60)], *cases.SIZES[0], window=20)
    assert "cpu" not in {i.name for i in implementations("windowed_attention")}
    with pytest.raises(ConfigError, match="windowed_attention.*'cpu'.*reference"):
        paged_attention(*c.args, window=20, impl="cpu")
