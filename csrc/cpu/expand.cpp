// expand: out[rows, cols] += (or =) low[rows, Rp] thin[R, cols].
//
// The update of a panel of y, where thin = B^T, or of dx, where thin = A.
//
// Layouts: `out` and `thin` with row strides, `low` contiguous. In bf16, pairs of neighbouring ranks lie side by side
// in `low` already, those of `thin` in [R / 2, cols].
// Tiles: up to 12 rows by 16 columns of sums in registers, in bf16 6 by 32.
// Numerics: products and sums in fp32, added to `out` in fp32 and rounded once. fp32 sums go to `out` itself, or to a
// strip in L1 that add_row masks and converts; the bf16 kernel does this in registers.
#include "bf16_dot.h"
#include "kernels.h"
#include "strips.h"

namespace fused_lora::cpu {

namespace {

// A tile's share of what is fetched meanwhile.
INLINE void fetch(Fetch* ahead) {
  for (int i = 0; ahead && i < kFetches; ++i) {
    auto& [next, end, share] = ahead[i];
    const char* last = end - next < share ? end : next + share;
    for (; next < last; next += 64) __builtin_prefetch(next, 0, 2);
  }
}

}  // namespace

void expand(const float* low, const float* thin, float* out, int64_t ldo, int64_t rows, int64_t cols, int64_t R,
            int64_t Rp, int64_t ldt, Fetch* ahead) {
  widest([=]() INLINED {
    for_strips(0, rows, [&](int64_t, int64_t m, auto height) INLINED {
      for (int64_t n = 0; n < cols; n += 16) {
        fetch(ahead);
        strip_tile<decltype(height)::value, 16>(low + m * Rp, Rp, thin + n, ldt, R, out + m * ldo + n, ldo);
      }
    });
  });
}

void expand_strip(const float* low, const float* thin, float* out, int64_t rows, int64_t cols, int64_t R, int64_t Rp,
                  int64_t ldt) {
  widest([=]() INLINED {
    with_height(rows, [&](auto height) INLINED {
      for (int64_t n = 0; n < cols; n += 16)
        strip_tile<decltype(height)::value, 16, false>(low, Rp, thin + n, ldt, R, out + n, kPanel);
    });
  });
}

#ifdef FUSED_LORA_BF16_DOT
namespace {

// out[cols <= 32] += lo, hi in fp32, rounded once to nearest even.
BF16_DOT_INLINE void add_to_bf16(uint16_t* out, __m512 lo, __m512 hi, __mmask32 columns) {
  const __m512i y = _mm512_maskz_loadu_epi16(columns, out);
  lo = _mm512_add_ps(lo, to_fp32(_mm512_castsi512_si256(y)));
  hi = _mm512_add_ps(hi, to_fp32(_mm512_extracti64x4_epi64(y, 1)));
  _mm512_mask_storeu_epi16(out, columns, (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
}

}  // namespace

BF16_DOT void expand_bf16(const uint16_t* low, int64_t Rp, const uint32_t* thin, int64_t ldt, const uint32_t* bits,
                          int64_t ld_bits, float scale, uint16_t* out, int64_t ldo, int64_t rows, int64_t cols,
                          int64_t pairs, Fetch* ahead) {
  constexpr int kHeight = kStrip / 2;
  for (int64_t m = 0; m < rows; m += kHeight)
    for (int64_t n = 0; n < cols; n += 2 * kLanes) {
      fetch(ahead);
      __m512 acc[kHeight][2] = {};
      for (int64_t q = 0; q < pairs; ++q) {
        const __m512bh lo = load_pairs(thin + q * ldt + n), hi = load_pairs(thin + q * ldt + n + kLanes);
#pragma GCC unroll 6
        for (int i = 0; i < kHeight; ++i) {
          const __m512bh a = broadcast_pair(low + (m + i) * Rp + 2 * q);
          acc[i][0] = _mm512_dpbf16_ps(acc[i][0], a, lo);
          acc[i][1] = _mm512_dpbf16_ps(acc[i][1], a, hi);
        }
      }
      if (!bits && m + kHeight <= rows && n + 2 * kLanes <= cols) {  // a whole tile: 5 to 20 % on EPYC 9004, 2026-11-24
#pragma GCC unroll 6
        for (int i = 0; i < kHeight; ++i) {
          auto* y = reinterpret_cast<__m256i*>(out + (m + i) * ldo + n);
          _mm_prefetch(out + (m + i) * ldo + n + kPanel, _MM_HINT_T1);
          const __m512 lo = _mm512_add_ps(acc[i][0], to_fp32(_mm256_loadu_si256(y))),
                       hi = _mm512_add_ps(acc[i][1], to_fp32(_mm256_loadu_si256(y + 1)));
          _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
        }
        continue;
      }
      const __mmask32 columns = first32(cols - n);
      for (int i = 0; i < kHeight && m + i < rows; ++i) {
        _mm_prefetch(out + (m + i) * ldo + n + kPanel, _MM_HINT_T1);
        if (bits) {
          const uint32_t keep = bits[(m + i) * ld_bits + n / 32];
          acc[i][0] = _mm512_maskz_mul_ps(static_cast<__mmask16>(keep), acc[i][0], _mm512_set1_ps(scale));
          acc[i][1] = _mm512_maskz_mul_ps(static_cast<__mmask16>(keep >> 16), acc[i][1], _mm512_set1_ps(scale));
        }
        add_to_bf16(out + (m + i) * ldo + n, acc[i][0], acc[i][1], columns);
      }
    }
}
#endif

}  // namespace fused_lora::cpu
