"""The emulator itself: collectives and matrix fragments give what CUDA documents, and misuse of them is reported."""

from __future__ import annotations

import ctypes
import re
import signal

import numpy as np
import pytest

from roro_fast.ops import build_cuda
from tests.cuda import emulator

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not() or "runs")

SOURCE = """
#include "cuda/device.cuh"
using namespace roro;
__global__ void kernel(float* out, const float* in, int which) {
  const int t = threadIdx.x, lane = t % 32;
  RORO_DYNAMIC_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  switch (which) {
CASES
  }
}
extern "C" int run(float* out, const float* in, int which, unsigned order, int blocks, int threads, int bytes) {
  emu::seed = order;
  return launch(kernel, dim3(blocks), threads, bytes, nullptr, out, in, which);
}
extern "C" const char* text() { return emu::message.c_str(); }
"""

KERNELS = {
    "reverse": "shared[t] = in[blockIdx.x * 100 + t]; __syncthreads(); out[blockIdx.x * 100 + t] = shared[99 - t];",
    "reverse without a barrier": "shared[t] = in[t]; out[t] = shared[99 - t];",
    "warp sum": "out[t] = warp_sum(in[t]);",
    "last block": "if (last_block(reinterpret_cast<unsigned*>(out), gridDim.x) && t == 0) out[1] += 1.0f;",
    "overrun": "shared[t + 1] = 1.0f;",
    "left before a barrier": "if (t == 3) return; __syncthreads(); out[t] = 0;",
    "half a warp shuffles": "if (lane < 16) out[t] = __shfl_xor_sync(kAllLanes, 1.0f, 1);",
    "two collectives": "if (lane < 16) __syncwarp(); else warp_sum(1.0f);",
    "partial mask": "out[t] = __shfl_xor_sync(0xffffu, 1.0f, 1);",
    "no such lane": "out[t] = __shfl_sync(kAllLanes, 1.0f, 20);",
    # A [16, 16] at 0, B [16, 8] at 256; D [16, 8]. Indices as in the PTX manual, mma.m16n8k16.
    "mma 16-bit": """
    const int g = lane / 4, q = lane % 4;
    const auto pack = [](float low, float high) {
      const bf16 x = __float2bfloat16(low), y = __float2bfloat16(high);
      return uint32_t(x.bits) | uint32_t(y.bits) << 16;
    };
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i % 2), k = 2 * q + 8 * (i / 2);
      a[i] = pack(in[row * 16 + k], in[row * 16 + k + 1]);
    }
    for (int i = 0; i < 2; ++i) b[i] = pack(in[256 + (2 * q + 8 * i) * 8 + g], in[256 + (2 * q + 8 * i + 1) * 8 + g]);
    float d[4] = {0, 0, 0, 0};
    mma_m16n8k16<bf16>(d, a, b);
    for (int i = 0; i < 4; ++i) out[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2] = d[i];
    """,
    # A [16, 8] at 0, B [8, 8] at 128; D [16, 8] from the large parts, then with the small ones. mma.m16n8k8.
    "mma tf32": """
    const int g = lane / 4, q = lane % 4;
    uint32_t a[4], ra[4], b[2], rb[2];
    for (int i = 0; i < 4; ++i) split_tf32(in[(g + 8 * (i % 2)) * 8 + q + 4 * (i / 2)], a[i], ra[i]);
    for (int i = 0; i < 2; ++i) split_tf32(in[128 + (q + 4 * i) * 8 + g], b[i], rb[i]);
    float d[4] = {0, 0, 0, 0};
    mma_m16n8k8_tf32(d, a, b);
    for (int i = 0; i < 4; ++i) out[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2] = d[i];
    mma_m16n8k8_tf32(d, ra, b);
    mma_m16n8k8_tf32(d, a, rb);
    for (int i = 0; i < 4; ++i) out[128 + (g + 8 * (i / 2)) * 8 + 2 * q + i % 2] = d[i];
    """,
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All of KERNELS, one of them per launch."""
    folder = tmp_path_factory.mktemp("emulator")
    path, out = folder / "kernels.cpp", folder / "kernels.so"
    cases = "\n".join(f"  case {i}: {{ {body} break; }}" for i, body in enumerate(KERNELS.values()))
    path.write_text(SOURCE.replace("CASES", cases))
    command = [emulator.CXX, *emulator.FLAGS, f"-I{build_cuda.CSRC}", f"-I{emulator.HERE}", "-shared", str(path)]
    build_cuda.run([*command, "-o", str(out)])
    loaded = ctypes.CDLL(str(out))
    loaded.text.restype = ctypes.c_char_p
    return loaded


def run(
    library: ctypes.CDLL, name: str, out: np.ndarray, x: np.ndarray, order=0, blocks=1, threads=32, shared=0
) -> int:
    pointers = (a.ctypes.data_as(ctypes.c_void_p) for a in (out, x))
    return int(library.run(*pointers, list(KERNELS).index(name), order, blocks, threads, shared))


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_a_block_reverses_through_shared_memory(order: int, library: ctypes.CDLL) -> None:
    x, out = np.arange(300, dtype=np.float32), np.full(300, np.nan, np.float32)
    assert run(library, "reverse", out, x, order, 3, 100, 400) == 0
    np.testing.assert_array_equal(out, x.reshape(3, 100)[:, ::-1].ravel())


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_without_the_barrier_every_order_reads_what_was_never_written(order: int, library: ctypes.CDLL) -> None:
    out = np.zeros(100, np.float32)
    run(library, "reverse without a barrier", out, np.arange(100, dtype=np.float32), order, 1, 100, 400)
    assert np.isnan(out).any()


def test_sums_over_a_warp(library: ctypes.CDLL) -> None:
    x, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    assert run(library, "warp sum", out, x, threads=64) == 0
    np.testing.assert_array_equal(out, np.repeat(x.reshape(2, 32).sum(1), 32))


def test_the_16_bit_matrix_product_has_the_documented_fragments(library: ctypes.CDLL) -> None:
    x = np.random.default_rng(0).standard_normal(384).astype(np.float32)
    x = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)  # bf16 numbers
    out = np.full(128, np.nan, np.float32)
    assert run(library, "mma 16-bit", out, x) == 0
    want = x[:256].reshape(16, 16) @ x[256:].reshape(16, 8)
    np.testing.assert_allclose(out.reshape(16, 8), want, rtol=1e-5, atol=1e-5)


def test_the_tf32_product_has_the_documented_fragments_and_split_keeps_21_bits(library: ctypes.CDLL) -> None:
    x = np.random.default_rng(0).standard_normal(192).astype(np.float32)
    out = np.full(256, np.nan, np.float32)
    assert run(library, "mma tf32", out, x) == 0
    want = x[:128].reshape(16, 8).astype(np.float64) @ x[128:].reshape(8, 8).astype(np.float64)
    coarse, fine = np.abs(out.reshape(2, 16, 8) - want).max((1, 2))
    assert 1e-5 < coarse < 1e-2 and fine < 3e-6


@pytest.mark.parametrize(
    ("name", "threads", "message"),
    [
        ("left before a barrier", 64, b"barrier divergence: 1 threads left, 63 wait"),
        ("half a warp shuffles", 32, b"16 threads left, 0 wait.* 16 in a warp"),
        ("two collectives", 32, b"lanes of one warp are in different collectives"),
        ("partial mask", 32, b"partial mask"),
        ("no such lane", 10, b"a lane that does not exist"),
        ("warp sum", 2048, b"invalid configuration"),
    ],
)
def test_misuse_is_reported(name: str, threads: int, message: bytes, library: ctypes.CDLL) -> None:
    assert run(library, name, np.zeros(2048, np.float32), np.zeros(2048, np.float32), threads=threads) == 999
    assert re.search(message, library.text()), library.text()


def test_an_overrun_of_shared_memory_kills(library: ctypes.CDLL) -> None:
    none = np.zeros(1, np.float32)
    assert emulator.in_child(lambda: run(library, "overrun", none, none, shared=144)) == 0
    assert emulator.in_child(lambda: run(library, "overrun", none, none, shared=128)) == -signal.SIGSEGV


def test_the_last_block_comes_once_and_leaves_the_ticket_zero(library: ctypes.CDLL) -> None:
    out = np.zeros(2, np.float32)
    for i, order in enumerate(emulator.ORDERS):
        assert run(library, "last block", out, out, order, 5, 40) == 0
        assert out.tolist() == [0.0, i + 1.0]
