// AMX tiles as the kernels use them: the permission, a thread's state, and the seven instructions.
//
// Eight registers tmm0 to tmm7 of 16 rows by 64 bytes, and a product of two of them:
//   dot   c[16, 16] += a[16, 32] b[32, 16]       c fp32, a bf16 as it lies, b bf16 in pairs of rows
// Assembly rather than the compiler's intrinsics: GCC 12's _tile_loadd does not say that it reads memory, nor its
// _tile_loadconfig that it reads more than 8 bytes of it. Nothing else of the kernels is AMX: a CPU without it runs
// them over tests/native/amx_emulator/tiles.h.
#pragma once

#include <cstdint>

#include "simd.h"

#ifdef FUSED_LORA_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace fused_lora::cpu {

// AMX-BF16 and AMX-TILE of CPUID, and the permission that the kernel gives a process on request. It refuses where a
// thread has a signal stack too small for the tiles' state, and where it is too old.
inline bool tiles_permitted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// A thread's tile state, set on entering a task and released on leaving: other libraries (oneDNN) set their own.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) Config {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Config config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Rows of a tile lie `stride` bytes apart.
template <int t> INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
// The same past L1, for what comes from L2 once: L1 is left to what is read again (26 instead of 30 ns a step of four
// products with 16 steps of `left` in L1; Intel Xeon with AMX, 2026-11-26).
template <int t> INLINE void tile_stream(const void* p, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t> INLINE void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t> INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(t)); }
template <int c, int a, int b> INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

}  // namespace fused_lora::cpu

#endif
