#include "cpu/kv_project.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

#define RORO_KERNEL "cpu/kv_project_kernel.h"
#include "cpu/foreach_isa.h"

namespace roro::cpu {
namespace {

template <typename Args>
void run(void (*kernel)(const Args&, std::int64_t, std::int64_t), const Args& a, std::int64_t elements, int threads) {
  constexpr std::int64_t kChunkElements = 32768;
  const std::int64_t grain = std::max<std::int64_t>(1, kChunkElements / std::max<std::int64_t>(1, elements));
  parallel_for(a.tokens, grain, threads, [&](std::int64_t begin, std::int64_t end) { kernel(a, begin, end); });
}

}  // namespace

void kv_unrotate(const UnrotateArgs& a, int threads) {
  run(pick(scalar::unrotate, avx2::unrotate, avx512::unrotate), a,
      2 * a.receivers * a.chosen * a.source.heads * a.source.dim, threads);
}

void kv_rotate_store(const RotateStoreArgs& a, int threads) {
  run(pick(scalar::rotate_store, avx2::rotate_store, avx512::rotate_store), a,
      2 * a.target.layers * a.target.heads * a.target.dim, threads);
}

}  // namespace roro::cpu
