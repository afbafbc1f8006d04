// dropout: the LoRA dropout mask of one panel or of whole rows.
//
//   dropout_mask   mask[rows, kPanel]: Dropout::scale() or 0 for each element
//   dropout_bits   bits[rows, words]: a bit for each element that is kept, 32 columns a word
//
// Used for drop(x) in the forward and in dA, and for dx. Drawn anew each time from (seed, row, column) as in philox.h.
// The draws of a row's groups are independent, so the compiler runs 4 or 8 Philox calls side by side; AVX-512 is written
// by hand.
#include "kernels.h"
#include "philox.h"
#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FUSED_LORA_DRAW_AVX512
#include <immintrin.h>
#endif

namespace fused_lora::cpu {

#ifdef FUSED_LORA_DRAW_AVX512
namespace {

// As below, by hand: the compiler multiplies 64 bits by 64 (three operations) and packs and unpacks words in each
// round. Here a word stays in the lower half of a lane of 64 bits, all that vpmuludq reads; the upper half is rubbish.
__attribute__((target("avx512f,avx512bw"))) void mask_avx512(const Dropout& dropout, float* mask, int64_t row0,
                                                             int64_t col0, int64_t rows, int64_t cols) {
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57),
                order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7),  // unpacklo then has groups 0 to 3, unpackhi 4 to 7
      threshold = _mm512_set1_epi16(static_cast<int16_t>(dropout.threshold));
  const __m512 scale = _mm512_set1_ps(dropout.scale());
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < cols; n += 64) {
      uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
      __m512i w0 = _mm512_add_epi64(_mm512_set1_epi64((col0 + n) / 8), order), w1 = _mm512_set1_epi64(row0 + m), w2{},
              w3{};
#pragma GCC unroll 10
      for (int round = 0; round < 10; ++round) {
        const __m512i p0 = _mm512_mul_epu32(w0, m0), p1 = _mm512_mul_epu32(w2, m1);
        w0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), w1, _mm512_set1_epi64(k0), 0x96);  // a ^ b ^ c
        w2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), w3, _mm512_set1_epi64(k1), 0x96);
        w1 = p1;
        w3 = p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
      const __m512i w01 = _mm512_mask_blend_epi32(0xaaaa, w0, _mm512_slli_epi64(w1, 32)),
                    w23 = _mm512_mask_blend_epi32(0xaaaa, w2, _mm512_slli_epi64(w3, 32));
      const __m512i draws[2] = {_mm512_unpacklo_epi64(w01, w23), _mm512_unpackhi_epi64(w01, w23)};
      float* out = mask + m * kPanel + n;
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __mmask32 keep = _mm512_cmpge_epu16_mask(draws[i], threshold);
        _mm512_storeu_ps(out + 32 * i, _mm512_maskz_mov_ps(static_cast<__mmask16>(keep), scale));
        _mm512_storeu_ps(out + 32 * i + 16, _mm512_maskz_mov_ps(static_cast<__mmask16>(keep >> 16), scale));
      }
    }
}

}  // namespace
#endif

void dropout_mask(const Dropout& dropout, float* mask, int64_t row0, int64_t col0, int64_t rows, int64_t cols) {
#ifdef FUSED_LORA_DRAW_AVX512
  if (avx512()) return mask_avx512(dropout, mask, row0, col0, rows, cols);
#endif
  widest([=]() INLINED {
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
    const uint32_t threshold = dropout.threshold, groups = static_cast<uint32_t>((cols + 7) / 8),
                   group0 = static_cast<uint32_t>(col0 / 8);
    const float scale = dropout.scale();
    uint32_t words[4][kPanel / 8];
    for (int64_t m = 0; m < rows; ++m) {
      const uint32_t row = static_cast<uint32_t>(row0 + m);
      for (uint32_t g = 0; g < groups; ++g) {
        const Philox philox(seed, row, group0 + g);
        for (int j = 0; j < 4; ++j) words[j][g] = philox.w[j];
      }
      float* out = mask + m * kPanel;
      for (uint32_t g = 0; g < groups; ++g)
        for (int j = 0; j < 8; ++j)
          out[8 * g + j] = (words[j / 2][g] >> (16 * (j % 2)) & 0xffffu) >= threshold ? scale : 0.0f;
    }
  });
}

void dropout_bits(const Dropout& dropout, uint32_t* bits, int64_t row0, int64_t rows, int64_t cols) {
  widest([=]() INLINED {
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
    const uint32_t threshold = dropout.threshold;
    const int64_t words = (cols + 31) / 32;
    auto* bytes = reinterpret_cast<uint8_t*>(bits);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t g = 0; g < 4 * words; ++g) {
        const Philox philox(seed, static_cast<uint32_t>(row0 + m), static_cast<uint32_t>(g));
        uint32_t byte = 0;
        for (int j = 0; j < 8; ++j) byte |= static_cast<uint32_t>(philox.draw(j) >= threshold) << j;
        bytes[m * 4 * words + g] = static_cast<uint8_t>(byte);
      }
  });
}

}  // namespace fused_lora::cpu
