// half_product on tiles of 16 rows x 16 columns, 32 deep: the same text runs on the CPU's tiles and on software ones.
// The includer defines TILE_ZERO, TILE_LOAD, TILE_STORE, TILE_DOT, TILE_TARGET and PRODUCT. No include guard.

TILE_TARGET void PRODUCT(const HalfProduct& p) {
  const std::int64_t acc_bytes = p.acc_stride * 4, x_bytes = p.x_stride * 2, w_bytes = p.w_step() * 2;
  for (std::int64_t row = 0; row < p.rows; row += kTileRows) {
    const bool two = p.rows - row > 16;
    for (std::int64_t column = 0; column < p.panel; column += 32) {
      float* acc = p.acc + row * p.acc_stride + column;
      float* below = acc + 16 * p.acc_stride;
      if (p.first) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
      } else {
        TILE_LOAD(0, acc, acc_bytes);
        TILE_LOAD(1, acc + 16, acc_bytes);
        if (two) {
          TILE_LOAD(2, below, acc_bytes);
          TILE_LOAD(3, below + 16, acc_bytes);
        }
      }
      for (std::int64_t k = 0; k < p.depth; k += 32) {
        const bf16* x = p.x[0] + row * p.x_stride + k;
        const bf16* w = p.w + k / 2 * p.w_step() + column * 2;
        TILE_LOAD(4, x, x_bytes);
        TILE_LOAD(6, w, w_bytes);
        TILE_LOAD(7, w + 32, w_bytes);
        TILE_DOT(0, 4, 6);
        TILE_DOT(1, 4, 7);
        if (two) {
          TILE_LOAD(5, x + 16 * p.x_stride, x_bytes);
          TILE_DOT(2, 5, 6);
          TILE_DOT(3, 5, 7);
        }
      }
      TILE_STORE(0, acc, acc_bytes);
      TILE_STORE(1, acc + 16, acc_bytes);
      if (two) {
        TILE_STORE(2, below, acc_bytes);
        TILE_STORE(3, below + 16, acc_bytes);
      }
    }
  }
}
