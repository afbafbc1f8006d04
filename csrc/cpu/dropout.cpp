// dropout: the LoRA dropout mask of one panel or of whole rows.
//
//   dropout_mask   mask[rows, kPanel]: Dropout::scale() or 0 for each element
//   dropout_bits   bits[rows, words]: a bit for each element that is kept, 32 columns a word
//
// Used for drop(x) in the forward and in dA, and for dx. Drawn anew each time from (seed, row, column) as in philox.h.
// The draws of a row's groups are independent, so the compiler runs 4 or 8 Philox calls side by side; AVX-512 is
// written by hand.
#include "draw_avx512.h"
#include "kernels.h"
#include "philox.h"
#include "simd.h"

namespace fused_lora::cpu {

#ifdef FUSED_LORA_DRAW_AVX512
namespace {

DRAW void mask_avx512(const Dropout& dropout, float* mask, int64_t row0, int64_t col0, int64_t rows, int64_t cols) {
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  const __m512i threshold = _mm512_set1_epi16(static_cast<int16_t>(dropout.threshold));
  const __m512 scale = _mm512_set1_ps(dropout.scale());
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < cols; n += 64) {
      __mmask32 keep[2];
      draw64(seed, threshold, row0 + m, col0 + n, keep);
      float* out = mask + m * kPanel + n;
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        _mm512_storeu_ps(out + 32 * i, _mm512_maskz_mov_ps(static_cast<__mmask16>(keep[i]), scale));
        _mm512_storeu_ps(out + 32 * i + 16, _mm512_maskz_mov_ps(static_cast<__mmask16>(keep[i] >> 16), scale));
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

#ifdef FUSED_LORA_DRAW_AVX512
DRAW void dropout_bits(const Dropout& dropout, uint32_t* bits, int64_t ld, int64_t row0, int64_t col0, int64_t rows,
                       int64_t cols) {
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  const __m512i threshold = _mm512_set1_epi16(static_cast<int16_t>(dropout.threshold));
  const int64_t words = (cols + 31) / 32;
  for (int64_t m = 0; m < rows; ++m, bits += ld)
    for (int64_t k = 0; k < words; k += 2) {
      __mmask32 keep[2];
      draw64(seed, threshold, row0 + m, col0 + 32 * k, keep);
      bits[k] = keep[0];
      if (k + 1 < words) bits[k + 1] = keep[1];
    }
}
#endif

}  // namespace fused_lora::cpu
