"""The mended interpreter computes bfloat16 as torch does, and its traps can be sprung."""

from __future__ import annotations

import signal

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.guard import guarded, run_guarded

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is used only where no GPU is")


@triton.jit
def arithmetic_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i, mask=i < n, other=1.0), tl.load(y + i, mask=i < n, other=1.0)
    tl.store(out + i, tl.where(a > b, a * b, a + b), mask=i < n)
    tl.store(out + n + i, (a.to(tl.float32) / 3.0).to(tl.bfloat16), mask=i < n)
    tl.store(out + 2 * n + i, tl.abs(a - b), mask=i < n)


@triton.jit
def dot_kernel(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@triton.jit
def loop_kernel(out, n):
    total = 0
    for i in range(tl.cdiv(n, 4)):
        if i % 2 == 1:
            total += i
    tl.store(out, total)


@triton.jit
def copy_kernel(x, out, n, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n) if MASKED else tl.load(x + i)
    tl.store(out + i, v, mask=i < n)


def test_bf16_arithmetic_rounds_as_torch_does(device):
    x, y = torch.randn(2, 1000).to(device, torch.bfloat16)
    out = torch.empty(3, 1000, dtype=torch.bfloat16, device=device)
    arithmetic_kernel[(1,)](x, y, out, 1000, BLOCK=1024)
    assert torch.equal(out[0], torch.where(x > y, x * y, x + y))
    assert torch.equal(out[1], (x.float() / 3).bfloat16())
    assert torch.equal(out[2], (x - y).abs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_accumulates_in_fp32(device, dtype):
    x, y = torch.randn(2, 32, 32).to(device, dtype)
    out = torch.empty(32, 32, device=device)
    dot_kernel[(1,)](x, y, out, BLOCK=32)
    truth = x.double() @ y.double()
    assert (out - truth).abs().max() < (2e-2 if dtype == torch.float32 and device.type == "cuda" else 1e-4)


def test_run_time_scalars_drive_loops(device):
    out = torch.empty(1, dtype=torch.int32, device=device)
    loop_kernel[(1,)](out, 30)
    assert out.item() == 1 + 3 + 5 + 7


def test_fresh_tensors_are_poisoned(device):
    assert torch.empty(100, device=device).isnan().all()


def copy_at_the_edge(masked: str) -> None:
    x, out = guarded(torch.randn(100)), guarded(torch.zeros(100))
    copy_kernel[(2,)](x, out, 100, MASKED=masked == "masked", BLOCK=64)
    assert torch.equal(x, out)


@interpreted
def test_a_wild_load_dies_and_a_masked_one_lives():
    assert run_guarded(__name__, "copy_at_the_edge", "masked") == 0
    assert run_guarded(__name__, "copy_at_the_edge", "unmasked") == -signal.SIGSEGV
