#include "cpu/linear_tile.h"
#include "cpu/software_tile.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace roro::cpu {

#define TILE_TARGET __attribute__((target("amx-tile,amx-bf16")))
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, bytes) _tile_loadd(t, p, bytes)
#define TILE_STORE(t, p, bytes) _tile_stored(t, p, bytes)
#define TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
#define LINEAR_TILE linear_tile_amx
#include "cpu/linear_amx.h"
#undef TILE_TARGET
#undef TILE_ZERO
#undef TILE_LOAD
#undef TILE_STORE
#undef TILE_DOT
#undef LINEAR_TILE

}  // namespace roro::cpu
#else
namespace roro::cpu {
void linear_tile_amx(const LinearTile&, std::int64_t, std::int64_t) {}
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
#define LINEAR_TILE linear_tile_amx_emulated
#include "cpu/linear_amx.h"

}  // namespace roro::cpu
