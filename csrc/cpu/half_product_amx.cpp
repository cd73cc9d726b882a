#include <cstring>

#include "cpu/half_product.h"
#include "cpu/software_tile.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace roro::cpu {

#define TILE_TARGET __attribute__((target("amx-tile,amx-bf16")))
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, bytes) _tile_loadd(t, p, bytes)
#define TILE_STORE(t, p, bytes) _tile_stored(t, p, bytes)
#define TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
#define PRODUCT half_product_amx
#include "cpu/amx_product.h"
#undef TILE_ZERO
#undef TILE_LOAD
#undef TILE_STORE
#undef TILE_DOT
#undef PRODUCT

TILE_TARGET void amx_begin() {
  struct alignas(64) Config {
    std::uint8_t palette, start, reserved[14];
    std::uint16_t bytes_per_row[16];
    std::uint8_t rows[16];
  } config{};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = 16;
    config.bytes_per_row[i] = 64;
  }
  __asm__ volatile("" ::"r"(&config) : "memory");  // gcc 12 drops the stores above without it
  _tile_loadconfig(&config);
}

TILE_TARGET void amx_end() { _tile_release(); }

#undef TILE_TARGET

}  // namespace roro::cpu
#else
namespace roro::cpu {
void half_product_amx(const HalfProduct&) {}
void amx_begin() {}
void amx_end() {}
}  // namespace roro::cpu
#endif

namespace roro::cpu {
namespace {

thread_local SoftwareTile tiles[8];

}  // namespace

#define TILE_TARGET
#define TILE_ZERO(t) tiles[t].zero()
#define TILE_LOAD(t, p, bytes) tiles[t].load(p, bytes)
#define TILE_STORE(t, p, bytes) tiles[t].save(p, bytes)
#define TILE_DOT(c, a, b) tiles[c].add_product(tiles[a], tiles[b])
#define PRODUCT half_product_amx_emulated
#include "cpu/amx_product.h"

}  // namespace roro::cpu
