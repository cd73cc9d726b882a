#include "cpu/norm_rope_store.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

#define RORO_WITH_BF16
#define RORO_KERNEL "cpu/norm_rope_store_kernel.h"
#include "cpu/foreach_isa.h"

namespace roro::cpu {
namespace {

std::int64_t tokens_per_chunk(std::int64_t elements) {
  constexpr std::int64_t kChunkElements = 4096;
  return std::max<std::int64_t>(1, kChunkElements / std::max<std::int64_t>(1, elements));
}

template <typename Args>
void run(void (*kernel)(const Args&, std::int64_t, std::int64_t), const Args& a, std::int64_t tokens,
         std::int64_t elements, int threads) {
  parallel_for(tokens, tokens_per_chunk(elements), threads,
               [&](std::int64_t begin, std::int64_t end) { kernel(a, begin, end); });
}

}  // namespace

void norm_rope_store_some(const NormRopeArgs& a, std::int64_t begin, std::int64_t end) {
  pick(scalar::norm_rope, avx2::norm_rope, avx512::norm_rope, avx512_bf16::norm_rope)(a, begin, end);
}

void norm_rope_store(const NormRopeArgs& a, std::int64_t tokens, int threads) {
  run(norm_rope_store_some, a, tokens, (a.heads + 2 * a.kv_heads) * a.dim, threads);
}

void add_rms_norm(const AddNormArgs& a, std::int64_t tokens, int threads) {
  run(pick(scalar::add_norm, avx2::add_norm, avx512::add_norm, avx512_bf16::add_norm), a, tokens, a.width, threads);
}

void silu_mul(const SiluMulArgs& a, std::int64_t tokens, int threads) {
  run(pick(scalar::gated, avx2::gated, avx512::gated, avx512_bf16::gated), a, tokens, a.width, threads);
}

}  // namespace roro::cpu
