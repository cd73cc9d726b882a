#include "cpu/router_score.h"

#include <algorithm>
#include <cmath>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/half_product.h"
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
using Finish = void (*)(const RouterArgs&, const PackedRouter&, std::int64_t, std::int64_t, const float*, float*);
using Squares = float (*)(const RouterArgs&, std::int64_t, std::int64_t, std::int64_t, bf16*);

constexpr std::int64_t kLine = 64;

// bf16 rows are multiplied where they lie, where the instruction takes pairs and H has no odd end; else they are copied
// as bf16, zero-padded to whole tiles.
void block_half(const RouterArgs& a, const PackedRouter& w, std::int64_t begin, std::int64_t end, float* acc,
                bf16* copy, Squares take, Finish finish) {
  const std::int64_t H = a.sizes.hidden, width = w.layout.padded_width, panel = w.layout.panel, n = end - begin;
  const bool in_place = a.hidden_type == DType::bf16 && H % 2 == 0 && !half_product_has_tiles();
  const auto product = half_product();
  const TileScope tiles;
  float squares[kRouterRows] = {};
  const bf16* x[kRouterRows];
  if (!in_place) {
    for (std::int64_t i = 0; i < n; ++i) x[i] = copy + i * kRouterDepth;
    std::fill(copy + n * kRouterDepth, copy + round_up(n, kTileRows) * kRouterDepth, bf16{0});
  }
  for (std::int64_t k0 = 0; k0 < H; k0 += kRouterDepth) {
    const std::int64_t real = std::min(H - k0, kRouterDepth), depth = in_place ? real : round_up(real, 32);
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t at = (a.rows ? a.rows[begin + i] : begin + i) * a.hidden_stride + k0;
      if (in_place) {
        x[i] = static_cast<const bf16*>(a.hidden) + at;
        const char* next = reinterpret_cast<const char*>(x[i] + real);
        const std::int64_t ahead = std::min(H - k0 - real, kRouterDepth) * 2;
        for (std::int64_t b = 0; b < ahead; b += kLine) __builtin_prefetch(next + b, 0, 2);
        squares[i] += half_squares(x[i], real);
      } else {
        squares[i] += take(a, at, real, depth, copy + i * kRouterDepth);
      }
    }
    for (std::int64_t p = 0; p < width; p += panel) {
      product({x, kRouterDepth, w.hidden_half() + p * w.layout.padded_hidden + k0 * panel, panel, n, depth,
               acc + p, width, k0 == 0});
    }
  }
  finish(a, w, begin, end, squares, acc);
}

}  // namespace

void router_score(const RouterArgs& a, std::int64_t n, int threads) {
  const auto* header = static_cast<const RouterHeader*>(a.packed);
  const PackedRouter w{router_layout(a.sizes, header->panel, header->half), static_cast<const char*>(a.packed)};
  const Block block = pick(scalar::block, avx2::block, avx512::block);
  const Squares take = pick(scalar::take_half, avx2::take_half, avx512::take_half);
  const Finish finish = pick(scalar::finish, avx2::finish, avx512::finish);
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
