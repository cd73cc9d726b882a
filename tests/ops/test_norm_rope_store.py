"""The references are what the decoder does, to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from roro_fast.ops.norm_rope_store import add_rms_norm, norm_rope_store, silu_mul
from tests.ops.cases import norm_rope_store as cases
from tests.ops.transformers_layer import RMSNorm, rotate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_the_decoders_layer(dtype: torch.dtype, qk_norm: bool) -> None:
    c = cases.make(20, 6, 2, 16, 4, dtype, norm=qk_norm)
    got = norm_rope_store(*c, impl="reference")
    q, k, v = (x.view(20, -1, 16) for x in c.qkv.split([96, 32, 32], -1))
    if c.q_norm is not None and c.k_norm is not None:
        for x, weight, name in ((q, c.q_norm, "q"), (k, c.k_norm, "k")):
            module = RMSNorm(16, c.eps)
            module.weight.data = weight
            q, k = (module(x).detach(), k) if name == "q" else (q, module(x).detach())
    cos, sin = (t[c.positions].unsqueeze(1).to(dtype) for t in (c.cos, c.sin))
    page, offset = c.slots // 4, c.slots % 4
    assert torch.equal(got, rotate(q, cos, sin))
    assert torch.equal(c.k_pages[page, offset], rotate(k, cos, sin)) and torch.equal(c.v_pages[page, offset], v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_other_two_are_what_the_decoder_writes_out(dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(*s).to(dtype) for s in ((9, 40), (9, 40), (40,)))
    module = RMSNorm(40, 1e-5)
    module.weight.data = weight
    out = add_rms_norm(x, residual, weight, 1e-5, impl="reference")
    assert torch.equal(out.total, residual + x) and torch.equal(out.normed, module(residual + x))
    gate, up = x.chunk(2, -1)
    assert torch.equal(silu_mul(x, impl="reference"), F.silu(gate) * up)
