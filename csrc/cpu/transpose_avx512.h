// 16 x 16 elements of 32 bits turned in registers on AVX-512.
#pragma once

#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FUSED_LORA_TRANSPOSE_AVX512
#include "intrinsics.h"

namespace fused_lora::cpu {

#define TRANSPOSE __attribute__((target("avx512f")))

// a[i][j] -> a[j][i] of 32 bits each.
TRANSPOSE INLINE void transpose16(__m512i* a) {
  __m512i b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88), odd = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xdd),
                  even8 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x88),
                  odd8 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xdd);
    b[j] = _mm512_shuffle_i32x4(even, even8, 0x88);
    b[j + 8] = _mm512_shuffle_i32x4(even, even8, 0xdd);
    b[j + 4] = _mm512_shuffle_i32x4(odd, odd8, 0x88);
    b[j + 12] = _mm512_shuffle_i32x4(odd, odd8, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = b[i];
}

}  // namespace fused_lora::cpu

#endif
