// Philox by hand on AVX-512: 64 draws at a time, eight calls side by side.
//
// Of the loop in dropout.cpp the compiler multiplies 64 bits by 64 (three operations) and packs and unpacks words in
// each round. Here a word stays in the lower half of a lane of 64 bits, all that vpmuludq reads; the upper half is
// rubbish. The multiplications have one port of the CPU's, so upper halves come down by a shuffle, which has another,
// and not by a shift.
#pragma once

#include <cstdint>

#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FUSED_LORA_DRAW_AVX512
#include "intrinsics.h"

namespace fused_lora::cpu {

#define DRAW __attribute__((target("avx512f,avx512bw")))

// keep[2]: which of 64 elements from column `col` of a row are kept.
DRAW INLINE void draw64(uint64_t seed, __m512i threshold, int64_t row, int64_t col, __mmask32* keep) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57),
                order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // unpacklo then has groups 0 to 3, unpackhi 4 to 7
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  __m512i w0 = _mm512_add_epi64(_mm512_set1_epi64(col / 8), order), w1 = _mm512_set1_epi64(row), w2{}, w3{};
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m512i p0 = _mm512_mul_epu32(w0, m0), p1 = _mm512_mul_epu32(w2, m1);
    const __m512i high0 = _mm512_shuffle_epi32(p0, _MM_PERM_DDBB), high1 = _mm512_shuffle_epi32(p1, _MM_PERM_DDBB);
    w0 = _mm512_ternarylogic_epi64(high1, w1, _mm512_set1_epi64(k0), 0x96);  // a ^ b ^ c
    w2 = _mm512_ternarylogic_epi64(high0, w3, _mm512_set1_epi64(k1), 0x96);
    w1 = p1;
    w3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const __m512i w01 = _mm512_mask_blend_epi32(0xaaaa, w0, _mm512_slli_epi64(w1, 32)),
                w23 = _mm512_mask_blend_epi32(0xaaaa, w2, _mm512_slli_epi64(w3, 32));
  keep[0] = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(w01, w23), threshold);
  keep[1] = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(w01, w23), threshold);
}

}  // namespace fused_lora::cpu

#endif
