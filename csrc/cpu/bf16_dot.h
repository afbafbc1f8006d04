// bf16 arithmetic on CPUs with AVX512-BF16: vdpbf16ps adds the products of two pairs of bf16 to each of 16 fp32 sums.
//
// A pair is two bf16 in 32 bits, neighbours along the summed dimension, the lower index in the lower half. The register
// tiles are those of simd.h; the operand that varies by row is broadcast from memory, 32 bits at a time. Against a
// conversion to fp32 it is four times the arithmetic on AMD (EPYC 9004, 2026-11-24); Intel runs it at half that rate.
// Numerics: these instructions, the tiles' and the conversions to bf16 take subnormals for zero, whatever the thread's
// mode is; elsewhere subnormals are kept.
#pragma once

#include <cstdint>

#include "cpu_features.h"

#ifdef FUSED_LORA_BF16_DOT
#include "intrinsics.h"

// Not a whole-file option: an inline function of a header compiled for AVX-512 could serve the other files too.
#define BF16_DOT __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define BF16_DOT_INLINED BF16_DOT __attribute__((always_inline))
#define BF16_DOT_INLINE inline BF16_DOT_INLINED

namespace fused_lora::cpu {

BF16_DOT_INLINE __m512bh broadcast_pair(const void* p) {
  int pair;
  __builtin_memcpy(&pair, p, 4);
  __m512i pairs = _mm512_set1_epi32(pair);
#if __clang_major__ >= 16 && __clang_major__ < 19
  asm("" : "+v"(pairs));  // clang 16 crashes where it folds a broadcast into vdpbf16ps; 14, 15 and 19 do not
#endif
  return (__m512bh)pairs;
}
BF16_DOT_INLINE __m512bh load_pairs(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
BF16_DOT_INLINE __m512 to_fp32(__m256i bf16) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16); }
// The first n of 32, none for n <= 0.
BF16_DOT_INLINE __mmask32 first32(int64_t n) { return n >= 32 ? ~0u : n > 0 ? (1u << n) - 1 : 0; }

// Columns 0 to 15, and 16 to 31, of two rows in pairs.
class PairOrder {
 public:
  BF16_DOT_INLINE PairOrder() {
    alignas(64) uint16_t order[2][32];
    for (uint16_t i = 0; i < 32; ++i) {
      order[0][i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
      order[1][i] = static_cast<uint16_t>(order[0][i] + 16);
    }
    first_ = _mm512_load_si512(order[0]), second_ = _mm512_load_si512(order[1]);
  }
  BF16_DOT_INLINE __m512i first_half(__m512i even, __m512i odd) const {
    return _mm512_permutex2var_epi16(even, first_, odd);
  }
  BF16_DOT_INLINE __m512i second_half(__m512i even, __m512i odd) const {
    return _mm512_permutex2var_epi16(even, second_, odd);
  }

 private:
  __m512i first_, second_;
};

}  // namespace fused_lora::cpu

#endif
