"""The comparison rule that all implementations of an op share."""

from __future__ import annotations

import torch

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def assert_no_worse(got: torch.Tensor, naive: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """Error against the fp64 truth <= error of the naive implementation in the same dtype + tolerance of the dtype."""
    assert got.shape == truth.shape
    if not truth.numel():
        return
    assert not got.isnan().any(), "NaN where the truth has none: an element was never written"
    error, allowed = ((x.double() - truth).abs().max().item() for x in (got, naive))
    assert error <= allowed + TOLERANCE[dtype], f"error {error:.3g}, naive {allowed:.3g} + {TOLERANCE[dtype]:g}"
