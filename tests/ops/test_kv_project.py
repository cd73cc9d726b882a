"""The reference of kv_project, and what it is for: an exact map gives the receiver's exact keys and values."""

from __future__ import annotations

import re

import pytest
import torch

from roro_fast.errors import RoroError
from roro_fast.ops import kv_project as op
from roro_fast.ops.kv_project import LinearMaps, kv_project
from tests.ops.cases import kv_project as cases
from tests.ops.transformers_layer import rotate as decoder_rotate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_no_worse_than_naive(size: tuple, dtype: torch.dtype) -> None:
    c = cases.make(*size, dtype)
    before = c.target.clone()
    kv_project(*c, impl="reference")
    cases.check(c, before, c.target)


def test_turning_is_the_decoders_and_turning_back_undoes_it() -> None:
    x = torch.randn(50, 3, 16, dtype=torch.float64)
    cos, sin = (t[torch.arange(50) * 5, None].double() for t in cases.rope(16, 10000.0, 1.3))
    turned = decoder_rotate(x, cos, sin)
    assert torch.equal(op.rotate(x, cos, sin), turned)
    torch.testing.assert_close(op.unrotate(turned, cos, sin), x, rtol=0, atol=1e-14)


def test_the_identity_moves_keys_from_one_rotary_to_another() -> None:
    """Same content under another base and scale: exact handoff between two models that differ in nothing else."""
    c = cases.make(30, (2, 2, 16, 4), (2, 2, 16, 8), 1)
    maps = LinearMaps(torch.eye(32).expand(2, 2, 32, 32), torch.zeros(2, 2, 32), torch.arange(2)[:, None])
    content = torch.randn(30, 2, 2, 2, 16)
    for pool, slots, rope, impl in (
        (c.source, c.source_slots, c.source_rope, None),
        (c.target.clone(), c.target_slots, c.target_rope, "reference"),
    ):
        page, offset = slots // pool.shape[3], slots % pool.shape[3]
        cos, sin = (t[c.positions][:, None, None] for t in rope)
        turned = torch.stack((decoder_rotate(content[:, :, 0], cos, sin), content[:, :, 1]), 2)
        pool[page, :, :, offset] = turned
        if impl:
            kv_project(*c._replace(maps=maps), impl=impl)
            torch.testing.assert_close(c.target[page, :, :, offset], turned, rtol=0, atol=1e-6)


BAD = {
    "source: shape [6, 2, 2, 16, 16] but": lambda c: c._replace(source=c.source[..., 0, :]),
    "target: shape [4, 4, 2, 32, 3, 31] but": lambda c: c._replace(target=c.target[..., :31]),
    "source_rope: [300, 16], [300, 8] but float32 [positions, 16]": lambda c: c._replace(
        source_rope=c.source_rope._replace(sin=c.source_rope.sin[:, :8])
    ),
    "target_slots: torch.int64 [62] but int64 [63]": lambda c: c._replace(target_slots=c.target_slots[1:]),
    "source_slots: torch.int32 [63]": lambda c: c._replace(source_slots=c.source_slots.int()),
    "maps.layers: torch.int64 [3, 2] but int64 [4, n]": lambda c: c._replace(
        maps=c.maps._replace(layers=c.maps.layers[1:])
    ),
    "maps.weight: torch.float32 [4, 2, 96, 31] but float [4, 2, 96, 32]": lambda c: c._replace(
        maps=c.maps._replace(weight=c.maps.weight[..., 1:])
    ),
    "maps.bias: torch.float64": lambda c: c._replace(maps=c.maps._replace(bias=c.maps.bias.double())),
    "another argument is not; move all to one device": lambda c: c._replace(positions=c.positions.to("meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message: str) -> None:
    c = cases.make(*cases.SIZES[1])
    before = c.target.clone()
    with pytest.raises(RoroError, match=re.escape(message)):
        kv_project(*BAD[message](c))
    assert torch.equal(c.target, before)
