#include "cpu/linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/linear_tile.h"
#include "cpu/parallel.h"
#include "cpu/half_product.h"
#include "cpu/scratch.h"

#define RORO_KERNEL "cpu/linear_kernel.h"
#include "cpu/foreach_isa.h"

namespace roro::cpu {
namespace {

static_assert(kGroup * kPanel == kTileColumns);
constexpr std::int64_t kBlockBytes = 384 << 10;         // of x: stays in L2 beside a group of panels
constexpr std::int64_t kDepthBytes = 4096;              // of k per pass: a group's strip, 256 KB, stays in L2
constexpr std::int64_t kTwiceBytes = 128;               // with two passes: a strip of 8 KB stays in L1
constexpr std::int64_t kManyPasses = 8, kLargeManyPasses = 32;  // per thread: what is worth dividing by rows
constexpr std::int64_t kLeastPasses = 16, kTurns = 4;           // of a block of rows; blocks per thread
constexpr std::int64_t kWorthBytes = 64 << 10;          // of weights times passes: what is worth more threads
constexpr std::int64_t kLargeBytes = 4 << 20;           // of weights: what is worth dividing finely
constexpr std::int64_t kEven = 2;                       // panels; threads divide a group in pairs of gate and up
constexpr std::int64_t kOnTheirOwn = 2, kAhead = 16 << 10;  // rows that need no prefetch; bytes ahead for few more
constexpr std::int64_t kMaxRows = 32;                   // of any kernel

struct Kernel {
  LinearKernel tile;
  LinearFinish finish;
  std::int64_t rows, panels;
  bool amx, emulated;
};

Kernel kernel_for(DType type) {
  const Isa i = isa();
  const LinearFinish finish = pick(scalar::finish, avx2::finish, avx512::finish);
  if (type == DType::bf16) {
    const LinearFinish native = i >= Isa::avx512_bf16 && i <= Isa::amx ? linear_finish_avx512_bf16 : finish;
    if (i == Isa::amx) return {linear_tile_amx, native, 32, 4, true, false};
    if (i == Isa::amx_emulated) return {linear_tile_amx_emulated, native, 32, 4, true, true};
    if (i == Isa::avx512_bf16) return {linear_tile_avx512_bf16, native, 6, 4, false, false};
    return pick<Kernel>({scalar::linear_tile<bf16>, finish, scalar::kLinearRows, scalar::kLinearPanels, false, false},
                        {avx2::linear_tile<bf16>, finish, avx2::kLinearRows, avx2::kLinearPanels, false, false},
                        {avx512::linear_tile<bf16>, finish, avx512::kLinearRows, avx512::kLinearPanels, false, false});
  }
  return pick<Kernel>({scalar::linear_tile<float>, finish, scalar::kLinearRows, scalar::kLinearPanels, false, false},
                      {avx2::linear_tile<float>, finish, avx2::kLinearRows, avx2::kLinearPanels, false, false},
                      {avx512::linear_tile<float>, finish, avx512::kLinearRows, avx512::kLinearPanels, false, false});
}

// The i-th of n even parts of [0, total) begins here.
std::int64_t part(std::int64_t total, std::int64_t i, std::int64_t n) { return total * i / n; }

// How a product is shared out: blocks of rows, and chunks of panels for each.
struct Shares {
  std::int64_t blocks, chunks, panels, passes, rows;  // of rows: those of a pass
  int threads;

  Shares(const LinearSizes& sizes, std::int64_t all_rows, std::int64_t pass_rows, int threads)
      : blocks(1),
        chunks(1),
        panels(linear_panels(sizes)),
        passes((all_rows + pass_rows - 1) / pass_rows),
        rows(pass_rows),
        threads(threads) {
    const std::int64_t row_bytes = linear_padded_depth(sizes.type, sizes.depth) * bytes_of(sizes.type);
    const std::int64_t bytes = panels * kPanel * row_bytes;
    const std::int64_t most = std::max<std::int64_t>(1, kBlockBytes / std::max<std::int64_t>(1, row_bytes));
    blocks = (all_rows + most - 1) / most;
    if (threads > 1 && passes >= threads * (bytes > kLargeBytes / 2 ? kLargeManyPasses : kManyPasses)) {
      const std::int64_t turns = std::min(kTurns, passes / (kLeastPasses * threads));  // each reads all weights
      blocks = std::max(turns * threads, round_up(blocks, threads));
    } else if (threads > 1 && bytes * passes > kWorthBytes) {
      chunks = threads * (bytes > kLargeBytes ? 4 : passes > 1 ? 2 : 1);
    }
  }

  std::int64_t row_at(std::int64_t block) const { return part(passes, block, blocks) * rows; }

  std::int64_t panel_at(std::int64_t chunk) const {
    const std::int64_t evens = panels / kEven;
    return chunk == chunks ? panels : (evens / chunks * chunk + std::min(chunk, evens % chunks)) * kEven;
  }

  // The i-th chunk to be taken: threads that take turns go on where they were.
  std::int64_t chunk_at(std::int64_t i) const {
    return chunks == 1 ? 0 : i % threads * (chunks / threads) + i / threads;
  }

  // Where the thread begins that ends before `chunk`; -1: it goes on with `chunk`.
  std::int64_t follower(std::int64_t chunk) const {
    const std::int64_t each = chunks == 1 ? 1 : chunks / threads;
    return chunk % each ? -1 : chunk / each - 1;
  }
};

class Block {
 public:
  Block(const LinearArgs& a, const Kernel& kernel)
      : a_(a),
        kernel_(kernel),
        bytes_(bytes_of(a.sizes.type)),
        depth_(linear_padded_depth(a.sizes.type, a.sizes.depth)),
        panels_(linear_panels(a.sizes)) {
    const auto* w = static_cast<const char*>(a.packed);
    w_ = w;
    bias_ = a.bias ? reinterpret_cast<const float*>(w + panels_ * kPanel * depth_ * bytes_) : nullptr;
    copy_ = a.sizes.depth != depth_;
  }

  std::int64_t depth() const { return depth_; }
  std::int64_t row_bytes() const { return depth_ * bytes_; }

  // Where a panel's columns begin at depth k; a row of a group holds 4 bytes per column.
  const char* strip(std::int64_t panel, std::int64_t k) const {
    const std::int64_t in_group = panel % kGroup;
    return w_ + ((panel - in_group) * depth_ + width_of(panel) * k) * kPanel * bytes_ + in_group * kPanel * 4;
  }

  // Rows [row, row + rows), panels [begin, end); `after`: weights that are read next.
  void run(std::int64_t row, std::int64_t rows, std::int64_t begin, std::int64_t end, const char* after) const {
    const std::int64_t passes = (rows + kernel_.rows - 1) / kernel_.rows;
    const std::int64_t step = std::min(depth_, (passes == 2 ? kTwiceBytes : kDepthBytes) / bytes_);
    const bool whole = step == depth_;
    const std::int64_t sum_rows = whole ? kMaxRows : round_up(rows, kMaxRows);
    const std::int64_t copied = copy_ ? rows : kernel_.amx ? rows % kernel_.rows : 0;
    char* memory = scratch(sum_rows * kTileColumns * 4 + round_up(copied, 16) * row_bytes());
    auto* sums = reinterpret_cast<float*>(memory);
    const Rows x = take(row, rows, copied, memory + sum_rows * kTileColumns * 4);
    if (kernel_.amx && !kernel_.emulated) amx_begin();
    for (std::int64_t first = begin, last; first < end; first = last) {
      last = std::min(end, round_up(first + 1, kGroup));
      for (std::int64_t k = 0; k < depth_; k += step) {
        const std::int64_t deep = std::min(step, depth_ - k), quads = deep * bytes_ / 16;
        const char* next = passes > 2 ? k + deep < depth_ ? strip(first, k + deep) : last < end ? strip(last, 0) : after
                           : rows > kOnTheirOwn ? strip(first, k) + kAhead
                                                : nullptr;
        const std::int64_t lines = (4 * kGroup + passes - 1) / passes, covered = quads * lines * 64;
        for (std::int64_t i = 0; i < passes; ++i) {
          const std::int64_t r = begin_of(rows, passes, i), n = begin_of(rows, passes, i + 1) - r;
          float* s = sums + (whole ? 0 : r * kTileColumns);
          for (std::int64_t p = first; p < last; p += kernel_.panels) {
            const bool ahead = next && p == first && i * covered < deep * kTileColumns * bytes_;
            kernel_.tile({x.at(r, k), strip(p, k), x.stride_of(r), width_of(p) * kPanel * 4 / bytes_, deep,
                          s + (p - first) * kPanel, k == 0, ahead ? next + i * covered : nullptr, lines},
                         n, std::min(kernel_.panels, last - p));
          }
          if (k + deep == depth_) kernel_.finish(a_, bias_, row + r, n, first, last - first, s);
        }
      }
    }
    if (kernel_.amx && !kernel_.emulated) amx_end();
  }

 private:
  // Where rows of x lie: the first `direct` in place, the rest in a padded copy.
  struct Rows {
    const char *data, *copy;
    std::int64_t direct, stride, copy_stride, bytes;
    const void* at(std::int64_t row, std::int64_t k) const {
      return row < direct ? data + (row * stride + k) * bytes : copy + ((row - direct) * copy_stride + k) * bytes;
    }
    std::int64_t stride_of(std::int64_t row) const { return row < direct ? stride : copy_stride; }
  };

  Rows take(std::int64_t row, std::int64_t rows, std::int64_t copied, char* to) const {
    const char* from = static_cast<const char*>(a_.x) + row * a_.x_stride * bytes_;
    const Rows x{from, to, rows - copied, a_.x_stride, depth_, bytes_};
    const std::int64_t size = a_.sizes.depth * bytes_;
    for (std::int64_t i = 0; i < copied; ++i) {
      std::memcpy(to + i * row_bytes(), from + (x.direct + i) * a_.x_stride * bytes_, size);
      std::memset(to + i * row_bytes() + size, 0, row_bytes() - size);
    }
    if (kernel_.amx) std::memset(to + copied * row_bytes(), 0, (round_up(copied, 16) - copied) * row_bytes());
    return x;
  }

  // Tiles take whole rows of 16; the others share the rows evenly, so that none works with few.
  std::int64_t begin_of(std::int64_t rows, std::int64_t passes, std::int64_t i) const {
    return kernel_.amx ? std::min(rows, i * kernel_.rows) : part(rows, i, passes);
  }

  std::int64_t width_of(std::int64_t panel) const { return std::min(kGroup, panels_ - panel / kGroup * kGroup); }

  const LinearArgs& a_;
  const Kernel& kernel_;
  std::int64_t bytes_, depth_, panels_;
  const char* w_;
  const float* bias_;
  bool copy_;
};

}  // namespace

void linear(const LinearArgs& a, int threads) {
  if (!a.rows) return;
  const Kernel kernel = kernel_for(a.sizes.type);
  const Block block(a, kernel);
  const Shares shares(a.sizes, a.rows, kernel.rows, threads);
  LinearArgs next = a;
  next.sizes = a.next ? a.next_sizes : a.sizes;
  next.packed = a.next;
  const Block next_block(next, kernel);
  const Shares next_shares(next.sizes, a.rows, kernel.rows, threads);
  const auto after = [&](std::int64_t chunk) -> const char* {
    const std::int64_t thread = shares.follower(chunk + 1);
    if (thread < 0) return block.strip(shares.panel_at(chunk + 1), 0);
    if (!a.next || shares.blocks > 1) return nullptr;
    return next_block.strip(next_shares.panel_at(next_shares.chunks == 1 ? 0 : next_shares.chunk_at(thread)), 0);
  };
  const auto row_at = [&](std::int64_t b) { return std::min(a.rows, shares.row_at(b)); };
  parallel_for(shares.blocks * shares.chunks, 1, threads, [&](std::int64_t i, std::int64_t) {
    const std::int64_t b = i / shares.chunks, c = shares.chunk_at(i % shares.chunks), row = row_at(b);
    block.run(row, row_at(b + 1) - row, shares.panel_at(c), shares.panel_at(c + 1), after(c));
  });
}

}  // namespace roro::cpu
