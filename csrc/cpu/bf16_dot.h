// bf16 arithmetic on CPUs with AVX512-BF16: vdpbf16ps adds the products of two pairs of bf16 to each of 16 fp32 sums.
//
// A pair is two bf16 in 32 bits, neighbours along the summed dimension, the lower index in the lower half. The register
// tiles are those of simd.h; the operand that varies by row is broadcast from memory, 32 bits at a time. Against a
// conversion to fp32 it is four times the arithmetic on AMD (EPYC 9004, 2026-11-24); Intel runs it at half that rate.
#pragma once

#include <cstdint>

#include "cpu_features.h"

#ifdef FUSED_LORA_BF16_DOT
#include <immintrin.h>

// Not a whole-file option: an inline function of a header compiled for AVX-512 could serve the other files too.
#define BF16_DOT __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define BF16_DOT_INLINE BF16_DOT inline __attribute__((always_inline))

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

}  // namespace fused_lora::cpu

#endif
