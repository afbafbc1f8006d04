// Copies between tensors in fp32, fp16 or bf16 and the panels, rows and matrices that the kernels read or write.
//
// Used by the blocks (block_fp32.h, block_bf16.h) around every product whose operand is not fp32, is masked, is ragged
// or must lie transposed. Layouts are given with each function in kernels.h.
// Numerics: loads are exact; every store rounds to nearest even, once. Conversions are integer arithmetic on whole
// loops, so that they vectorise on every instruction set (no F16C or AVX512-BF16 needed).
#include "bf16_dot.h"
#include "elements.h"
#include "kernels.h"
#include "simd.h"
#include "transpose_avx512.h"

namespace fused_lora::cpu {
namespace {

template <class T>
INLINE void load_panel_as(const void* src, int64_t ld, const float* mask, float* out, int64_t rows, int64_t cols) {
  for (int64_t m = 0; m < rows; ++m) {
    const auto* s = static_cast<const typename T::type*>(src) + m * ld;
    float* o = out + m * kPanel;
    if (mask)
      for (int64_t n = 0; n < cols; ++n) o[n] = T::load(s[n]) * mask[m * kPanel + n];
    else
      for (int64_t n = 0; n < cols; ++n) o[n] = T::load(s[n]);
    for (int64_t n = cols; n < round_up(cols, kLanes); ++n) o[n] = 0.0f;
  }
  for (int64_t i = rows * kPanel; i < round_up(rows, kStrip) * kPanel; ++i) out[i] = 0.0f;
}

template <class T> INLINE void store_row_as(const float* src, void* dst, int64_t n) {
  auto* d = static_cast<typename T::type*>(dst);
  for (int64_t i = 0; i < n; ++i) d[i] = T::store(src[i]);
}

template <class T> INLINE void add_row_as(const float* src, const float* mask, void* dst, int64_t n) {
  auto* d = static_cast<typename T::type*>(dst);
  if (mask)
    for (int64_t i = 0; i < n; ++i) d[i] = T::store(T::load(d[i]) + src[i] * mask[i]);
  else
    for (int64_t i = 0; i < n; ++i) d[i] = T::store(T::load(d[i]) + src[i]);
}

template <class T> INLINE void load_matrix_as(const void* src, float* out, int64_t rows, int64_t cols, int64_t ldo) {
  const auto* s = static_cast<const typename T::type*>(src);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < cols; ++n) out[m * ldo + n] = T::load(s[m * cols + n]);
    for (int64_t n = cols; n < ldo; ++n) out[m * ldo + n] = 0.0f;
  }
}

// Tiles of 8 x 8: eight source lines at a time fit the ways of an L1 set even where the row stride is a power of two.
template <class T>
INLINE void load_transposed_as(const void* src, float* out, int64_t rows, int64_t cols, int64_t ldo) {
  const auto* s = static_cast<const typename T::type*>(src);
  for (int64_t m0 = 0; m0 < ldo; m0 += 8)
    for (int64_t n0 = 0; n0 < cols; n0 += 8) {
      const int64_t filled = rows - m0 < 8 ? (rows > m0 ? rows - m0 : 0) : 8, width = ldo - m0 < 8 ? ldo - m0 : 8,
                    height = cols - n0 < 8 ? cols - n0 : 8;
      float tile[8][8] = {};
      if (filled == 8 && height == 8) {
        for (int m = 0; m < 8; ++m)
          for (int n = 0; n < 8; ++n) tile[m][n] = T::load(s[(m0 + m) * cols + n0 + n]);
      } else {
        for (int64_t m = 0; m < filled; ++m)
          for (int64_t n = 0; n < height; ++n) tile[m][n] = T::load(s[(m0 + m) * cols + n0 + n]);
      }
      if (width == 8 && height == 8) {
        for (int n = 0; n < 8; ++n)
          for (int m = 0; m < 8; ++m) out[(n0 + n) * ldo + m0 + m] = tile[m][n];
      } else {
        for (int64_t n = 0; n < height; ++n)
          for (int64_t m = 0; m < width; ++m) out[(n0 + n) * ldo + m0 + m] = tile[m][n];
      }
    }
}

#ifdef FUSED_LORA_TRANSPOSE_AVX512
// The same of fp32, 16 x 16 at a time.
TRANSPOSE void load_transposed_avx512(const float* src, float* out, int64_t rows, int64_t cols, int64_t ldo) {
  const auto first = [](int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1 << n) - 1); };
  for (int64_t m = 0; m < ldo; m += 16)
    for (int64_t n = 0; n < cols; n += 16) {
      const __mmask16 from = first(cols - n), to = first(ldo - m);
      __m512i tile[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        tile[i] = m + i < rows ? _mm512_maskz_loadu_epi32(from, src + (m + i) * cols + n) : _mm512_setzero_si512();
      transpose16(tile);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (n + i < cols) _mm512_mask_storeu_epi32(out + (n + i) * ldo + m, to, tile[i]);
    }
}
#endif

}  // namespace

void load_panel(const void* src, Dtype dtype, int64_t ld, const float* mask, float* out, int64_t rows, int64_t cols) {
  widest([=]() INLINED {
    with_elements(dtype,
                  [=](auto element) INLINED { load_panel_as<decltype(element)>(src, ld, mask, out, rows, cols); });
  });
}

void store_row(const float* src, void* dst, Dtype dtype, int64_t n) {
  widest([=]() INLINED {
    with_elements(dtype, [=](auto element) INLINED { store_row_as<decltype(element)>(src, dst, n); });
  });
}

void add_row(const float* src, const float* mask, void* dst, Dtype dtype, int64_t n) {
  widest([=]() INLINED {
    with_elements(dtype, [=](auto element) INLINED { add_row_as<decltype(element)>(src, mask, dst, n); });
  });
}

void scale_panel(void* out, int64_t ldo, Dtype dtype, const float* scale, const void* bias, int64_t rows,
                 int64_t cols) {
  widest([=]() INLINED {
    with_elements(dtype, [=](auto element) INLINED {
      using T = decltype(element);
      const auto* add = static_cast<const typename T::type*>(bias);
      for (int64_t m = 0; m < rows; ++m) {
        auto* o = static_cast<typename T::type*>(out) + m * ldo;
        if (bias)
          for (int64_t n = 0; n < cols; ++n) o[n] = T::store(scale[n] * T::load(o[n]) + T::load(add[n]));
        else
          for (int64_t n = 0; n < cols; ++n) o[n] = T::store(scale[n] * T::load(o[n]));
      }
    });
  });
}

void add_matrix(const void* src, Dtype dtype, float factor, float* out, int64_t rows, int64_t cols, int64_t ldo) {
  widest([=]() INLINED {
    with_elements(dtype, [=](auto element) INLINED {
      using T = decltype(element);
      const auto* s = static_cast<const typename T::type*>(src);
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < cols; ++n) out[m * ldo + n] += factor * T::load(s[m * cols + n]);
    });
  });
}

void load_matrix(const void* src, Dtype dtype, float* out, int64_t rows, int64_t cols, int64_t ldo) {
  widest([=]() INLINED {
    with_elements(dtype, [=](auto element) INLINED { load_matrix_as<decltype(element)>(src, out, rows, cols, ldo); });
  });
}

void load_transposed(const void* src, Dtype dtype, float* out, int64_t rows, int64_t cols, int64_t ldo) {
#ifdef FUSED_LORA_TRANSPOSE_AVX512
  if (dtype == Dtype::f32 && avx512())
    return load_transposed_avx512(static_cast<const float*>(src), out, rows, cols, ldo);
#endif
  widest([=]() INLINED {
    with_elements(dtype,
                  [=](auto element) INLINED { load_transposed_as<decltype(element)>(src, out, rows, cols, ldo); });
  });
}

#ifdef FUSED_LORA_BF16_DOT
BF16_DOT void copy_panel(const uint16_t* src, int64_t ld, const uint32_t* bits, int64_t ld_bits, uint16_t* out,
                         int64_t rows, int64_t cols) {
  for (int64_t m = 0; m < round_up(rows, kStrip); ++m)
    for (int64_t n = 0; n < cols; n += 2 * kLanes) {
      const uint16_t* from = src + m * ld + n;
      const __mmask32 there = m < rows ? first32(cols - n) : 0;
      __m512i row;
      if (there == ~__mmask32{0}) row = _mm512_loadu_si512(from), _mm_prefetch(from + kPanel, _MM_HINT_T1);
      else row = _mm512_maskz_loadu_epi16(there, from);
      if (bits && there) row = _mm512_maskz_mov_epi16(bits[m * ld_bits + n / 32], row);
      _mm512_storeu_si512(out + m * kPanel + n, row);
    }
}

BF16_DOT void scale_row_bf16(const uint16_t* src, const float* scale, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    const __mmask32 there = first32(n - i);
    const __m512i row = _mm512_maskz_loadu_epi16(there, src + i);
    const __m512 lo = _mm512_mul_ps(to_fp32(_mm512_castsi512_si256(row)),
                                    _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), scale + i)),
                 hi = _mm512_mul_ps(to_fp32(_mm512_extracti64x4_epi64(row, 1)),
                                    _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), scale + i + kLanes));
    _mm512_mask_storeu_epi16(to + i, there, (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
  }
}

BF16_DOT void pair_rows(const uint16_t* src, uint32_t* out, int64_t pairs, int64_t cols) {
  for (int64_t p = 0; p < pairs; ++p)
    for (int64_t n = 0; n < cols; n += kLanes) {
      const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + 2 * p * cols + n)),
                    odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + (2 * p + 1) * cols + n));
      _mm512_storeu_si512(out + p * cols + n, _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                                              _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)));
    }
}
#endif

}  // namespace fused_lora::cpu
