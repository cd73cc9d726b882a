// linear_tile on tiles of 16 rows x 16 columns, 32 deep: the same text runs on the CPU's tiles and on software ones.
// The includer defines TILE_ZERO, TILE_LOAD, TILE_STORE, TILE_DOT, TILE_TARGET and LINEAR_TILE. No include guard.

TILE_TARGET void LINEAR_TILE(const LinearTile& t, std::int64_t rows, std::int64_t panels) {
  const bool below = rows > 16;
  const std::int64_t x_bytes = t.x_stride * 2, w_bytes = t.w_stride * 2, sums_bytes = kTileColumns * 4;
  const auto* x = static_cast<const bf16*>(t.x);
  for (std::int64_t j = 0; j < panels; j += 2) {
    const bf16* w = static_cast<const bf16*>(t.w) + j * 32;
    const bool beside = j + 1 < panels;
    float *up = t.sums + j * 16, *down = up + 16 * kTileColumns;
    if (t.first) {
      TILE_ZERO(0);
      TILE_ZERO(1);
      TILE_ZERO(2);
      TILE_ZERO(3);
    } else {
      TILE_LOAD(0, up, sums_bytes);
      if (beside) TILE_LOAD(1, up + 16, sums_bytes);
      if (below) TILE_LOAD(2, down, sums_bytes);
      if (beside && below) TILE_LOAD(3, down + 16, sums_bytes);
    }
    const char* ahead = t.ahead;
    for (std::int64_t k = 0; k < t.depth; k += 32, w += 16 * t.w_stride) {
      if (ahead && j == 0) ahead = prefetch(ahead, 4 * t.ahead_lines);
      TILE_LOAD(4, x + k, x_bytes);
      TILE_LOAD(6, w, w_bytes);
      TILE_DOT(0, 4, 6);
      if (beside) {
        TILE_LOAD(7, w + 32, w_bytes);
        TILE_DOT(1, 4, 7);
      }
      if (below) {
        TILE_LOAD(5, x + 16 * t.x_stride + k, x_bytes);
        TILE_DOT(2, 5, 6);
        if (beside) TILE_DOT(3, 5, 7);
      }
    }
    TILE_STORE(0, up, sums_bytes);
    if (beside) TILE_STORE(1, up + 16, sums_bytes);
    if (below) TILE_STORE(2, down, sums_bytes);
    if (beside && below) TILE_STORE(3, down + 16, sums_bytes);
  }
}
