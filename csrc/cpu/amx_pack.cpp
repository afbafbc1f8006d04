// Copies of bf16 and fp32 matrices into blocks and pairs, as the products on AMX tiles read them (amx.h).
//
// Layouts and padding as in amx.h. A row of the source is read from end to end wherever it comes from memory: the
// hardware fetches ahead within a row, and not where it sees 32 rows at once.
// Numerics: fp32 is rounded to nearest even.
#include <algorithm>

#include "amx.h"
#include "draw_avx512.h"

#ifdef FUSED_LORA_AMX

namespace fused_lora::cpu {
namespace {

// n of 32 elements as bf16, the others zero.
BF16_DOT_INLINE __m512i load32(const uint16_t* p, int64_t n) {
  return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(first32(n), p);
}
BF16_DOT_INLINE __m512i load32(const float* p, int64_t n) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(first16(n - 16), p + 16),
                                      _mm512_maskz_loadu_ps(first16(n), p));
}

template <class T>
BF16_DOT void pair_panels_of(const T* src, int64_t ld, uint16_t* pairs, int64_t panel, int64_t depth, int64_t cols) {
  for (int64_t k = 0; k < depth; k += kSide)
    for (int64_t n = 0; n < cols; n += kSide) {
      uint16_t* to = pairs + n / kSide * panel + k * kSide;
      for (int64_t row = k; row < k + kSide; row += 2, to += kSide) {
        const T *even = src + row * ld + n, *odd = even + ld;
        _mm_prefetch(reinterpret_cast<const char*>(even + kSide * ld), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(odd + kSide * ld), _MM_HINT_T0);
        store_pair(to, load32(even, row < depth ? cols - n : 0), load32(odd, row + 1 < depth ? cols - n : 0));
      }
    }
}

template <class T>
BF16_DOT void pair_panels_transposed_of(const T* src, int64_t ld, uint16_t* pairs, int64_t panel, int64_t depth,
                                        int64_t cols) {
  for (int64_t n = 0; n < cols; n += 16) {
    uint16_t* to = pairs + n / kSide * panel + n % kSide / 16 * kTile;
    for (int64_t k = 0; k < depth; k += kSide, to += kBlock) {
      __m512i a[16];
      const T* from = src + n * ld + k;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        a[i] = load32(from + i * ld, n + i < cols ? depth - k : 0);
        _mm_prefetch(reinterpret_cast<const char*>(from + i * ld) + 512, _MM_HINT_T0);
      }
      transpose16(a);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + kSide * i, a[i]);
    }
  }
  if (cols % kSide > 0 && cols % kSide <= 16) {  // the last panel's second tile
    uint16_t* to = pairs + cols / kSide * panel + kTile;
    for (int64_t k = 0; k < depth; k += kSide, to += kBlock) std::fill_n(to, kTile, uint16_t{0});
  }
}

}  // namespace

BF16_DOT void to_blocks(const uint16_t* src, int64_t ld, uint16_t* blocks, int64_t rows, int64_t cols,
                        const int64_t* at) {
  const int64_t steps = sides(cols), whole = cols / kSide;
  for (int64_t m = 0; m < sides(rows) * kSide; ++m) {
    const uint16_t* row = src + (at && m < rows ? at[m] : m) * ld;
    uint16_t* to = blocks + m / kSide * steps * kBlock + m % kSide * kSide;
    const int64_t filled = m < rows ? whole : 0;
    for (int64_t k = 0; k < filled; ++k) {
      _mm_prefetch(row + k * kSide + 1024, _MM_HINT_T0);
      _mm512_store_si512(to + k * kBlock, _mm512_loadu_si512(row + k * kSide));
    }
    for (int64_t k = filled; k < steps; ++k)
      _mm512_store_si512(to + k * kBlock, load32(row + k * kSide, m < rows ? cols - k * kSide : 0));
  }
}

BF16_DOT void to_scaled_blocks(const uint16_t* src, int64_t ld, const float* scale, uint16_t* blocks, int64_t rows,
                               int64_t cols) {
  const int64_t steps = sides(cols);
  for (int64_t m = 0; m < sides(rows) * kSide; ++m) {
    const uint16_t* row = src + m * ld;
    uint16_t* to = blocks + m / kSide * steps * kBlock + m % kSide * kSide;
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t n = k * kSide, there = m < rows ? cols - n : 0;
      const __m512i line = load32(row + n, there);
      const __m512 lo = _mm512_maskz_mul_ps(first16(there), to_fp32(_mm512_castsi512_si256(line)),
                                            _mm512_maskz_loadu_ps(first16(cols - n), scale + n)),
                   hi = _mm512_maskz_mul_ps(first16(there - 16), to_fp32(_mm512_extracti64x4_epi64(line, 1)),
                                            _mm512_maskz_loadu_ps(first16(cols - n - 16), scale + n + 16));
      _mm512_store_si512(to + k * kBlock, (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
    }
  }
}

BF16_DOT void to_dropped_blocks(const uint16_t* src, int64_t ld, const Dropout& dropout, int64_t row0, uint16_t* whole,
                                uint16_t* dropped, uint32_t* bits, int64_t rows, int64_t cols, int64_t col0,
                                const int64_t* at) {
  const int64_t steps = sides(cols);
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  const __m512i threshold = _mm512_set1_epi16(static_cast<int16_t>(dropout.threshold));
  for (int64_t m = 0; m < sides(rows) * kSide; ++m) {
    const int64_t from = at && m < rows ? at[m] : m;
    const uint16_t* row = src + from * ld;
    const int64_t place = m / kSide * steps * kBlock + m % kSide * kSide, there = m < rows ? cols : 0;
    for (int64_t k = 0; k < steps; k += 2) {
      __mmask32 keep[2];
      draw64(seed, threshold, row0 + from, col0 + k * kSide, keep);
      for (int64_t j = k; j < std::min(k + 2, steps); ++j) {
        _mm_prefetch(row + j * kSide + 1024, _MM_HINT_T0);
        const __m512i line = load32(row + j * kSide, there - j * kSide);
        if (whole) _mm512_store_si512(whole + place + j * kBlock, line);
        _mm512_store_si512(dropped + place + j * kBlock, _mm512_maskz_mov_epi16(keep[j - k], line));
        if (bits && m < rows) bits[m * steps + j] = keep[j - k];
      }
    }
  }
}

void pair_panels(const void* src, Dtype dtype, int64_t ld, uint16_t* pairs, int64_t panel, int64_t depth,
                 int64_t cols) {
  if (dtype == Dtype::f32) pair_panels_of(static_cast<const float*>(src), ld, pairs, panel, depth, cols);
  else pair_panels_of(static_cast<const uint16_t*>(src), ld, pairs, panel, depth, cols);
}

void pair_panels_transposed(const void* src, Dtype dtype, int64_t ld, uint16_t* pairs, int64_t panel, int64_t depth,
                            int64_t cols) {
  if (dtype == Dtype::f32) pair_panels_transposed_of(static_cast<const float*>(src), ld, pairs, panel, depth, cols);
  else pair_panels_transposed_of(static_cast<const uint16_t*>(src), ld, pairs, panel, depth, cols);
}

void unpad_low(const uint16_t* low, int64_t Rp, uint16_t* h, int64_t ld, int64_t rows, int64_t R) {
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(low + i * Rp, R, h + i * ld);
    std::fill_n(h + i * ld + R, ld - R, uint16_t{0});
  }
}

void pad_low(const uint16_t* h, int64_t ld, uint16_t* low, int64_t Rp, int64_t rows, int64_t R) {
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(h + i * ld, R, low + i * Rp);
    std::fill_n(low + i * Rp + R, Rp - R, uint16_t{0});
  }
  std::fill_n(low + rows * Rp, (round_up(rows, kSide) - rows) * Rp, uint16_t{0});
}

BF16_DOT void transpose_low(const uint16_t* low, int64_t Rp, uint16_t* tiles, int64_t rows) {
  for (int64_t r = 0; r < Rp; r += 16)
    for (int64_t m = 0; m < rows; m += kSide, tiles += kTile) {
      __m512i a[2][16];
      for (int j = 0; j < 2; ++j) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          a[j][i] =
              (__m512i)to_fp32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + (m + 16 * j + i) * Rp + r)));
        transpose16(a[j]);
      }
      for (int i = 0; i < 16; ++i)
        _mm512_store_si512(tiles + kSide * i, (__m512i)_mm512_cvtne2ps_pbh((__m512)a[1][i], (__m512)a[0][i]));
    }
}

}  // namespace fused_lora::cpu

#endif
