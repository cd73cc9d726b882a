// router_score: gathered rows -> RMS-norm -> [row, signals] -> MLP -> budget bias -> softmax -> action.
//
// One launch for N <= 256. Block (i, j) keeps a 16 x 512 piece of w1 in registers, with the norm's weight folded in,
// and streams all rows past it; hidden stays in its own dtype, and 1/rms is applied to the sums. The last block of
// column group i adds the pieces in order and applies the second layer to its 16 units; the last of those decides.
// No float atomics: every sum has one order, which depends on neither N nor the order in which blocks finish.
// Nobody waits for anybody, so it does not matter how many blocks the device holds at once.
#include "cuda/router_score.cuh"

namespace roro {
namespace {

constexpr int kThreads = 256;
constexpr int kUnits = 16;    // hidden units (rows of w1) per block
constexpr int kInputs = 512;  // inputs (columns of w1) per block
constexpr int kPieces = 8;    // warps, each with its share of the inputs
constexpr int kPitch = 20;    // floats between rows of a partial product in shared memory

struct Shared {
  float* partial;  // [kPieces][rows][kPitch]
  float* squares;  // [kPieces][rows]
  float* signal;   // [S][kUnits]
  float* bias;     // [kUnits]
  float* w2;       // [K][kUnits]

  __device__ Shared(unsigned char* memory, int rows, int S) {
    partial = reinterpret_cast<float*>(memory);
    squares = partial + kPieces * rows * kPitch;
    signal = squares + kPieces * rows;
    bias = signal + S * kUnits;
    w2 = bias + kUnits;
  }
};

size_t shared_bytes(int rows, int S, int K) {
  return sizeof(float) * (kPieces * rows * (kPitch + 1) + (S + 1 + K) * kUnits);
}

int blocks_of(int n, int size) { return n > size ? (n + size - 1) / size : 1; }

/// x[k .. k + N) in loads of at most GRAIN elements; from `end` on, whatever else lies before `end`. Unconditional: a
/// predicated load would hold up the next one.
template <int N, int GRAIN, class T>
__device__ __forceinline__ Vec<T, N> load_near(const T* x, int k, int end) {
  constexpr int G = GRAIN >= N ? N : GRAIN >= N / 2 ? N / 2 : 1;
  Vec<T, N> out;
#pragma unroll
  for (int i = 0; i < N; i += G) {
    const Vec<T, G> part = *reinterpret_cast<const Vec<T, G>*>(x + max(min(k + i, end - G), 0));
#pragma unroll
    for (int j = 0; j < G; ++j) out.v[i + j] = part.v[j];
  }
  return out;
}

// What only the finishing block needs, fetched early by all: w1's signal columns, b1 and w2 of these 16 units.
template <class T>
__device__ __forceinline__ void stage_tail(const RoroRouterScore& a, const Shared& s, int first) {
  for (int i = threadIdx.x; i < (a.S + 1 + a.K) * kUnits; i += kThreads) {
    const int d = first + i % kUnits, what = i / kUnits;
    float x = 0.0f;
    if (d < a.D) {
      if (what < a.S) x = to_float(static_cast<const T*>(a.w1)[d * a.w1_stride + a.H + what]);
      else if (what == a.S) x = to_float(static_cast<const T*>(a.b1)[d]);
      else x = to_float(static_cast<const T*>(a.w2)[(what - a.S - 1) * int64_t(a.D) + d]);
    }
    s.signal[i] = x;
  }
}

// Adds the warps' partial products of ROWS rows in order and puts them where the finishing block looks.
template <int ROWS>
__device__ __forceinline__ void flush(const RoroRouterScore& a, const Shared& s, int64_t first) {
  const int row = threadIdx.x / 4, quad = threadIdx.x % 4;
  const int64_t n = first + row;
  if (row >= ROWS || n >= a.N) return;
  float4 sum = make_float4(0, 0, 0, 0);
  float squares = 0.0f;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const float4 x = *reinterpret_cast<const float4*>(s.partial + (p * ROWS + row) * kPitch + 4 * quad);
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    squares += s.squares[p * ROWS + row];
  }
  const int64_t slot = (int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * a.N + n;
  reinterpret_cast<float4*>(a.workspace)[slot * 4 + quad] = sum;
  const int64_t slots = int64_t(gridDim.x) * gridDim.y * a.N;
  if (quad == 0) a.workspace[slots * kUnits + slot] = squares;
}

// The second layer on 16 units, by the last block of a column group; the decision, by the last of those.
template <class T>
__device__ __forceinline__ void finish(const RoroRouterScore& a, const Shared& s) {
  if (!last_block(a.tickets + 1 + blockIdx.x, gridDim.y)) return;
  const int64_t slots = int64_t(gridDim.x) * gridDim.y * a.N;
  const float4* products = reinterpret_cast<const float4*>(a.workspace);
  const float* squares = a.workspace + slots * kUnits;
  float* logits = a.workspace + slots * (kUnits + 1);  // [gridDim.x][N][K]
  const int quad = threadIdx.x % 4;
  for (int64_t first = 0; first < a.N; first += kThreads / 4) {
    const int64_t n = first + threadIdx.x / 4;
    float z[4] = {0, 0, 0, 0}, square = 0.0f;
    if (n < a.N) {
      for (int p = 0; p < int(gridDim.y); ++p) {
        const int64_t slot = (int64_t(blockIdx.x) * gridDim.y + p) * a.N + n;
        const float4 x = __ldcg(products + slot * 4 + quad);
        z[0] += x.x, z[1] += x.y, z[2] += x.z, z[3] += x.w;
        square += __ldcg(squares + slot);
      }
      const float scale = rsqrtf(square / a.H + a.eps);
#pragma unroll
      for (int j = 0; j < 4; ++j) z[j] = (a.H ? z[j] * scale : 0.0f) + s.bias[4 * quad + j];
      for (int i = 0; i < a.S; ++i) {
        const float signal = a.signals[n * a.S + i];
#pragma unroll
        for (int j = 0; j < 4; ++j) z[j] += signal * s.signal[i * kUnits + 4 * quad + j];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) z[j] = silu(z[j]);
    }
#pragma unroll
    for (int k = 0; k < kActions; ++k) {
      if (k >= a.K) break;
      float x = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) x += z[j] * s.w2[k * kUnits + 4 * quad + j];
      x += __shfl_xor_sync(kAllLanes, x, 1);
      x += __shfl_xor_sync(kAllLanes, x, 2);
      if (quad == 0 && n < a.N) logits[(blockIdx.x * a.N + n) * a.K + k] = x;
    }
  }
  if (!last_block(a.tickets, gridDim.x)) return;
  const int64_t n = threadIdx.x;  // N <= kThreads
  if (n >= a.N) return;
  float sum[kActions];
#pragma unroll
  for (int k = 0; k < kActions; ++k) sum[k] = 0.0f;
  for (int i = 0; i < int(gridDim.x); ++i) {
#pragma unroll
    for (int k = 0; k < kActions; ++k) {
      if (k < a.K) sum[k] += __ldcg(logits + (i * a.N + n) * a.K + k);
    }
  }
  decide<T>(a, n, sum);
}

/// One lane's share of 16 x 64 numbers of w1: for V inputs out of 4 V, COUNT times, of units `unit` and `unit` + 8.
template <class W, int V, int COUNT>
struct Share {
  Vec<W, V> w[COUNT][2], norm[COUNT];

  template <int GRAIN>
  __device__ __forceinline__ void load(const RoroRouterScore& a, int unit, int input) {
    const void* none = a.workspace;  // stands for tensors without elements
    const W *w1 = static_cast<const W*>(a.H ? a.w1 : none), *g = static_cast<const W*>(a.H ? a.norm : none);
    const int64_t stride = a.H ? a.w1_stride : 0;
#pragma unroll
    for (int b = 0; b < COUNT; ++b) {
      norm[b] = load_near<V, GRAIN>(g, input + 4 * V * b, a.H);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        w[b][j] = load_near<V, GRAIN>(w1 + min(unit + 8 * j, a.D - 1) * stride, input + 4 * V * b, a.H);
      }
    }
  }

  /// Reads w1, all of it before anything is used, then folds the norm's weight in. Zero beyond D and H.
  __device__ __forceinline__ void load(const RoroRouterScore& a, int unit, int input, int grain) {
    constexpr int kMost = 16 / sizeof(W);
    if (grain >= kMost) load<kMost>(a, unit, input);
    else if (grain >= kMost / 2) load<kMost / 2>(a, unit, input);
    else load<1>(a, unit, input);
#pragma unroll
    for (int b = 0; b < COUNT; ++b) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const bool there = unit + 8 * j < a.D && input + 4 * V * b + i < a.H;
          w[b][j].v[i] = from_float<W>(there ? to_float(w[b][j].v[i]) * to_float(norm[b].v[i]) : 0.0f);
        }
      }
    }
  }
};

// A warp's 16 x 64 piece of w1 and its product with 16 rows of hidden. Within 32 (or 16) inputs, lane 4 g + t takes
// consecutive ones of row g, in 16 bytes, from hidden and from w1 alike; the tensor core then sums over them in another
// order than memory's, which no sum minds.
template <class T, class W>
struct Piece {
  static_assert(std::is_same<T, W>::value && sizeof(T) == 2, "weights and hidden of one 16-bit type");
  static constexpr int kRows = 64, kBlocks = 2, kWide = 8;
  Share<T, 8, kBlocks> share;

  __device__ __forceinline__ void load(const RoroRouterScore& a, int unit, int input, int grain) {
    share.load(a, unit, input, grain);
  }

  __device__ __forceinline__ void multiply(float (&sum)[2][4], const Vec<T, 8>& low, const Vec<T, 8>& high,
                                           int b) const {
    const uint32_t *x = reinterpret_cast<const uint32_t*>(&low), *y = reinterpret_cast<const uint32_t*>(&high);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t rows[4] = {x[i], y[i], x[i + 1], y[i + 1]};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t* column = reinterpret_cast<const uint32_t*>(&share.w[b][j]);
        const uint32_t columns[2] = {column[i], column[i + 1]};
        mma_m16n8k16<T>(sum[j], rows, columns);
      }
    }
  }
};

// float32 weights: each factor is split into two TF32 numbers, whose products keep 21 bits. 16-bit hidden is TF32.
template <class T>
struct Piece<T, float> {
  static constexpr int kWide = 16 / sizeof(T), kRows = sizeof(T) == 4 ? 32 : 64, kBlocks = 16 / kWide;
  uint32_t big[kBlocks][2][kWide], small[kBlocks][2][kWide];

  __device__ __forceinline__ void load(const RoroRouterScore& a, int unit, int input, int grain) {
    Share<float, kWide, kBlocks> share;
    share.load(a, unit, input, grain);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < kWide; ++i) split_tf32(share.w[b][j].v[i], big[b][j][i], small[b][j][i]);
      }
    }
  }

  __device__ __forceinline__ void multiply(float (&sum)[2][4], const Vec<T, kWide>& low, const Vec<T, kWide>& high,
                                           int b) const {
#pragma unroll
    for (int i = 0; i < kWide; i += 2) {
      uint32_t rows[4], rest[4];
      split_tf32(to_float(low.v[i]), rows[0], rest[0]);
      split_tf32(to_float(high.v[i]), rows[1], rest[1]);
      split_tf32(to_float(low.v[i + 1]), rows[2], rest[2]);
      split_tf32(to_float(high.v[i + 1]), rows[3], rest[3]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t columns[2] = {big[b][j][i], big[b][j][i + 1]}, fine[2] = {small[b][j][i], small[b][j][i + 1]};
        mma_m16n8k8_tf32(sum[j], rows, fine);
        if (sizeof(T) == 4) mma_m16n8k8_tf32(sum[j], rest, columns);
        mma_m16n8k8_tf32(sum[j], rows, columns);
      }
    }
  }
};

/// Rows in flight. Element by element, few: each takes an address.
template <class T, class W, bool WIDE>
constexpr int kRowsInFlight = WIDE ? Piece<T, W>::kRows : 16;

template <class T, class W, bool WIDE>
__global__ void __launch_bounds__(kThreads, 1) router_score_kernel(const RoroRouterScore a, const int grain) {
  RORO_DYNAMIC_SHARED(memory);
  using P = Piece<T, W>;
  constexpr int kRows = kRowsInFlight<T, W, WIDE>, kTiles = kRows / 16, kBlocks = P::kBlocks, V = P::kWide;
  const Shared s(memory, kRows, a.S);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
  const int units = blockIdx.x * kUnits, input = blockIdx.y * kInputs + warp * (kInputs / kPieces) + quad * V;

  P piece;
  Vec<T, V> h[kTiles][2][kBlocks];  // [16 rows][upper 8]
  uint32_t poisoned = 0;            // bit 2 m + u: this row's index was out of range
  const auto fetch = [&](int64_t first) {
    int64_t r[kTiles][2];  // all indices before the first row: one latency, not eight
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) r[i / 2][i % 2] = first + 8 * i + group;
    if (a.rows) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const int64_t n = r[i / 2][i % 2];
        r[i / 2][i % 2] = a.rows[n < a.N ? n : a.N - 1];
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const bool wanted = first + 16 * m + 8 * u + group < a.N, inside = wanted && r[m][u] >= 0 && r[m][u] < a.T;
        if (wanted && !inside) poisoned |= 1u << (2 * m + u);
        const T* row = static_cast<const T*>(a.hidden) + (inside ? r[m][u] : 0) * a.hidden_stride;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) h[m][u][b] = load_near<V, WIDE ? V : 1>(row, input + 4 * V * b, a.H);
      }
    }
  };
  fetch(0);
  piece.load(a, units + group, input, grain);
  stage_tail<W>(a, s, units);

  for (int64_t first = 0; first < a.N; first += kRows) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      if (first + 16 * m < a.N) {
        float sum[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) piece.multiply(sum, h[m][0][b], h[m][1][b], b);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          float squares = (poisoned >> (2 * m + u)) & 1 ? NAN : 0.0f;
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
            for (int i = 0; i < V; ++i) {
              const float x = to_float(h[m][u][b].v[i]);
              if (input + 4 * V * b + (WIDE ? 0 : i) < a.H) squares += x * x;
            }
          }
          squares += __shfl_xor_sync(kAllLanes, squares, 1);
          squares += __shfl_xor_sync(kAllLanes, squares, 2);
          const int row = warp * kRows + 16 * m + 8 * u + group;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float* to = s.partial + row * kPitch + 8 * j + 2 * quad;
            *reinterpret_cast<float2*>(to) = make_float2(sum[j][2 * u], sum[j][2 * u + 1]);
          }
          if (quad == 0) s.squares[row] = squares;
        }
      }
    }
    poisoned = 0;
    if (first + kRows < a.N) fetch(first + kRows);
    __syncthreads();
    flush<kRows>(a, s, first);
    __syncthreads();
  }
  finish<W>(a, s);
}

template <class T, class W>
int launch_small(RoroRouterScore a, void* stream) {
  // Reads are unconditional: of hidden states that do not exist something else is read, and not used.
  if (!a.H) a.hidden = a.workspace, a.hidden_stride = 0;
  else if (!a.T) a.hidden = a.w1, a.hidden_stride = 0;
  const dim3 grid(blocks_of(a.D, kUnits), blocks_of(a.H, kInputs));
  const int grain_w1 = grain_of<W>(a.w1, a.w1_stride, a.H), grain_norm = grain_of<W>(a.norm, 0, a.H);
  const int grain = grain_w1 < grain_norm ? grain_w1 : grain_norm;
  const auto run = [&](auto wide) {
    constexpr bool kWide = decltype(wide)::value;
    const size_t bytes = shared_bytes(kRowsInFlight<T, W, kWide>, a.S, a.K);
    return launch(router_score_kernel<T, W, kWide>, grid, kThreads, bytes, stream, a, grain);
  };
  return wide<T>(a.hidden, a.hidden_stride, a.H) ? run(std::true_type()) : run(std::false_type());
}

}  // namespace
}  // namespace roro

using namespace roro;

extern "C" {

int64_t roro_router_score_workspace(int64_t N, int H, int D, int K) {
  const int64_t groups = blocks_of(D, kUnits), slots = groups * blocks_of(H, kInputs) * N;
  return slots * (kUnits + 1) + groups * N * K;
}

int64_t roro_router_score_tickets(int D) { return blocks_of(D, kUnits) + 1; }

int roro_router_score(const RoroRouterScore* args, void* stream) {
  return by_dtypes(*args, [&](auto t, auto w) { return launch_small<decltype(t), decltype(w)>(*args, stream); });
}

}
