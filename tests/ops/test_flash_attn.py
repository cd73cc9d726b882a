"""flash-attn by name: where it serves, and what it says where it does not."""

from __future__ import annotations

import pytest
import torch

from roro_fast.errors import ConfigError, RoroError
from roro_fast.ops import flash_attn_impl
from roro_fast.ops.paged_attention import paged_attention
from roro_fast.ops.registry import implementations
from tests.ops.cases import paged_attention as cases

CUDA = torch.device("cuda")


def test_it_never_serves_unasked() -> None:
    (record,) = [i for i in implementations("paged_attention") if i.name == "flash_attn"]
    assert record.auto_on == ()


def test_an_order_that_cannot_be_met_is_an_error() -> None:
    c = cases.make([(1, 9)], 4, 2, 16, 16)
    with pytest.raises(ConfigError, match="paged_attention:flash_attn cannot serve cpu.*CUDA tensors"):
        paged_attention(*c.args, impl="flash_attn")


def test_pages_and_dtypes_are_named() -> None:
    flash_attn_impl.check_pages(512)
    with pytest.raises(RoroError, match="engine.page_size: .* multiple of 256 tokens, got 16"):
        flash_attn_impl.check_pages(16)
    assert "float32 is not one of float16, bfloat16" in flash_attn_impl.usable(CUDA, torch.float32)[1]


@pytest.mark.skipif(
    not torch.cuda.is_available() or not flash_attn_impl.usable(CUDA, torch.bfloat16)[0],
    reason="needs a CUDA device and flash-attn",
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_no_worse_than_naive(dtype: torch.dtype) -> None:
    c = cases.make([(1, 700), (30, 300), (5, 5)], 8, 2, 64, 256, dtype)
    out = paged_attention(*(x.cuda() for x in c.args), impl="flash_attn")
    cases.check(c, out.cpu(), dtype)
