#include "cpu/router_score.h"

#include <algorithm>
#include <cmath>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/router_half.h"
#include "cpu/router_pack.h"
#include "cpu/scratch.h"

namespace roro::cpu {
namespace {

constexpr std::int64_t kRouterRows = 64;    // rows of a block: a multiple of the AMX tile pair
constexpr std::int64_t kRouterDepth = 256;  // columns of hidden per pass: rows and weights stay in L2

}  // namespace
}  // namespace roro::cpu

#define RORO_KERNEL "cpu/router_score_kernel.h"
#include "cpu/foreach_isa.h"

namespace roro::cpu {
namespace {

using Block = void (*)(const RouterArgs&, const PackedRouter&, std::int64_t, std::int64_t, float*, float*);
using FinishRow = void (*)(const RouterArgs&, const PackedRouter&, std::int64_t, float, float*);
using Squares = float (*)(const RouterArgs&, std::int64_t, std::int64_t, std::int64_t, bf16*);

// Rows as bf16, zero-padded to whole tiles, and their sums of squares.
void block_half(const RouterArgs& a, const PackedRouter& w, std::int64_t begin, std::int64_t end, float* acc,
                bf16* copy, Squares take, FinishRow finish) {
  const std::int64_t H = a.sizes.hidden, width = w.layout.padded_width, panel = w.layout.panel, n = end - begin;
  const bool amx = isa() == Isa::amx;
  const auto product = amx ? half_product_amx
                           : isa() == Isa::amx_emulated ? half_product_amx_emulated : half_product_avx512;
  float squares[kRouterRows] = {};
  const std::int64_t padded = round_up(n, 32);
  if (amx) amx_begin();
  for (std::int64_t k0 = 0; k0 < H; k0 += kRouterDepth) {
    const std::int64_t real = std::min(H - k0, kRouterDepth), depth = round_up(real, 32);
    for (std::int64_t i = 0; i < n; ++i) {
      bf16* to = copy + i * kRouterDepth;
      squares[i] += take(a, (a.rows ? a.rows[begin + i] : begin + i) * a.hidden_stride + k0, real, depth, to);
    }
    if (k0 == 0) std::fill(copy + n * kRouterDepth, copy + padded * kRouterDepth, bf16{0});
    for (std::int64_t p = 0; p < width; p += panel) {
      product({copy, kRouterDepth, w.hidden_half() + p * w.layout.padded_hidden + k0 * panel, panel, n, depth,
               acc + p, width, k0 == 0});
    }
  }
  if (amx) amx_end();
  for (std::int64_t i = 0; i < n; ++i) {
    finish(a, w, begin + i, 1.0f / std::sqrt(squares[i] / H + a.eps), acc + i * width);
  }
}

}  // namespace

void router_score(const RouterArgs& a, std::int64_t n, int threads) {
  const auto* header = static_cast<const RouterHeader*>(a.packed);
  const PackedRouter w{router_layout(a.sizes, header->panel, header->half), static_cast<const char*>(a.packed)};
  const Block block = pick(scalar::block, avx2::block, avx512::block);
  const Squares take = pick(scalar::take_half, avx2::take_half, avx512::take_half);
  const FinishRow finish = pick(scalar::finish_row, avx2::finish_row, avx512::finish_row);
  const std::int64_t acc_bytes = kRouterRows * w.layout.padded_width * 4;
  std::int64_t grain = kRouterRows;
  if (threads > 1) grain = std::max<std::int64_t>(1, std::min(grain, (n + threads - 1) / threads));
  parallel_for(n, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    char* memory = scratch(acc_bytes + kRouterRows * kRouterDepth * 4);
    auto* acc = reinterpret_cast<float*>(memory);
    if (w.layout.half && a.sizes.hidden) {
      block_half(a, w, begin, end, acc, reinterpret_cast<bf16*>(memory + acc_bytes), take, finish);
    } else {
      block(a, w, begin, end, acc, reinterpret_cast<float*>(memory + acc_bytes));
    }
  });
}

}  // namespace roro::cpu
