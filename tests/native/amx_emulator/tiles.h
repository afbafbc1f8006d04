// AMX tiles without AMX, in place of csrc/cpu/tiles.h: eight registers of each thread in memory, their instructions in
// C++, by Intel's description of them (Software Developer's Manual, volume 2).
//
// An instruction of a thread whose state is not set ends the process, as it does on a CPU; so does a state that is set
// twice, or left to a thread's end. Registers are garbage when a state is set: NaN.
// Numerics: TDPBF16PS takes and leaves denormals as zero, rounds to nearest even, sums even and odd pairs apart.
#pragma once

#include "intrinsics.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "simd.h"

namespace fused_lora::cpu {

inline bool tiles_permitted() { return true; }

namespace emulator {

struct Registers {
  alignas(64) uint8_t tile[8][16][64];
  bool set = false;
  ~Registers() { check(!set, "a thread ends with its tile state set"); }

  static void check(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "emulated AMX: %s\n", what);
    std::abort();
  }
};

inline thread_local Registers registers;

inline Registers& state() {
  Registers::check(registers.set, "an instruction without a tile state");
  return registers;
}

__attribute__((noinline, target("avx512f"))) inline void sums_of_pairs(uint8_t (*c)[64], const uint8_t (*a)[64],
                                                                       const uint8_t (*b)[64]) {
  uint32_t left[16][16], right[16][16];
  std::memcpy(left, a, sizeof left), std::memcpy(right, b, sizeof right);
  for (int m = 0; m < 16; ++m) {
    float even[16] = {}, odd[16] = {}, out[16];
    for (int k = 0; k < 16; ++k) {
      const float first = __builtin_bit_cast(float, left[m][k] << 16);
      const float second = __builtin_bit_cast(float, left[m][k] & 0xffff0000u);
      for (int n = 0; n < 16; ++n) {
        even[n] = __builtin_fmaf(first, __builtin_bit_cast(float, right[k][n] << 16), even[n]);
        odd[n] = __builtin_fmaf(second, __builtin_bit_cast(float, right[k][n] & 0xffff0000u), odd[n]);
      }
    }
    std::memcpy(out, c[m], sizeof out);
    for (int n = 0; n < 16; ++n) out[n] += even[n] + odd[n];
    std::memcpy(c[m], out, sizeof out);
  }
}

inline void dot(int c, int a, int b) {
  Registers& r = state();
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x1f80 | 0x8040);  // nearest even, no exceptions; flush to zero, denormals are zero
  sums_of_pairs(r.tile[c], r.tile[a], r.tile[b]);
  _mm_setcsr(before);
}

}  // namespace emulator

class Tiles {
 public:
  Tiles() {
    emulator::Registers::check(!emulator::registers.set, "a tile state is set twice");
    emulator::registers.set = true;
    std::memset(emulator::registers.tile, 0xff, sizeof emulator::registers.tile);
  }
  ~Tiles() { emulator::registers.set = false; }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int t> void tile_load(const void* p, int64_t stride) {
  auto& tile = emulator::state().tile[t];
  for (int i = 0; i < 16; ++i) std::memcpy(tile[i], static_cast<const uint8_t*>(p) + i * stride, 64);
}
template <int t> void tile_stream(const void* p, int64_t stride) { tile_load<t>(p, stride); }
template <int t> void tile_store(void* p, int64_t stride) {
  auto& tile = emulator::state().tile[t];
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<uint8_t*>(p) + i * stride, tile[i], 64);
}
template <int t> void tile_zero() { std::memset(emulator::state().tile[t], 0, sizeof(uint8_t[16][64])); }
template <int c, int a, int b> void tile_dot() { emulator::dot(c, a, b); }

}  // namespace fused_lora::cpu
