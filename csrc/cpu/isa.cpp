#include "cpu/isa.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace roro::cpu {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"};

#if defined(__x86_64__)
std::uint64_t xgetbv() {
  std::uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

bool bit(unsigned value, int i) { return (value >> i) & 1; }

// Linux hands out the 8 KB of tile state only on request.
bool request_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Isa detect() {
  unsigned a, b, c, d, a1 = 0, b1, c1, d1;
  if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !bit(c, 27) || !bit(c, 12) || !bit(c, 29)) return Isa::scalar;
  const std::uint64_t os = xgetbv();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !bit(b, 5) || (os & 0x6) != 0x6) return Isa::scalar;
  const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && (os & 0xe6) == 0xe6;
  if (!avx512) return Isa::avx2;
  if (a < 1 || !__get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) || !bit(a1, 5)) return Isa::avx512;
  const bool amx = bit(d, 22) && bit(d, 24) && (os & 0x60000) == 0x60000;
  return amx && request_amx() ? Isa::amx : Isa::avx512_bf16;
}
#else
Isa detect() { return Isa::scalar; }
#endif

Isa best() {
  static const Isa found = detect();
  return found;
}

bool usable(Isa i) { return i <= best() || i == Isa::amx_emulated; }

Isa by_name(const std::string& name, const std::string& field) {
  if (name == "auto" || name.empty()) return best();
  for (int i = 0; i <= static_cast<int>(Isa::amx_emulated); ++i) {
    if (name != kNames[i]) continue;
    if (usable(static_cast<Isa>(i))) return static_cast<Isa>(i);
    throw std::runtime_error(field + ": this CPU has no " + name + "; use auto or one of " + usable_isas());
  }
  throw std::runtime_error(field + ": '" + name + "' is no instruction set; use auto or one of " + usable_isas());
}

std::atomic<int> chosen{-1};

}  // namespace

Isa isa() {
  const int now = chosen.load(std::memory_order_relaxed);
  if (now >= 0) return static_cast<Isa>(now);
  const char* asked = std::getenv("RORO_ISA");
  const Isa i = by_name(asked ? asked : "auto", "RORO_ISA");
  chosen.store(static_cast<int>(i), std::memory_order_relaxed);
  return i;
}

void set_isa(const std::string& name) { chosen.store(static_cast<int>(by_name(name, "isa"))); }

std::string isa_name(Isa i) { return kNames[static_cast<int>(i)]; }

std::string usable_isas() {
  std::string names;
  for (int i = 0; i <= static_cast<int>(Isa::amx_emulated); ++i) {
    if (usable(static_cast<Isa>(i))) names += (names.empty() ? "" : ",") + std::string(kNames[i]);
  }
  return names;
}

}  // namespace roro::cpu
