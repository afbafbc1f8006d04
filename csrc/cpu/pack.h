// The packing of lora_gemm: blocks of `right` into panels of kColumns columns, each [depth, kColumns] in one piece, so
// that a register tile reads them on one pointer.
#pragma once

#include <algorithm>

#include "simd.h"

namespace fused_lora::cpu {

constexpr int64_t kColumns = 32;  // of a panel: two AVX-512 vectors

#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE8(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SHUFFLE16(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC before 12
typedef int Int8 __attribute__((vector_size(32)));
typedef int Int16 __attribute__((vector_size(64)));
#define SHUFFLE8(a, b, ...) __builtin_shuffle(a, b, Int8{__VA_ARGS__})
#define SHUFFLE16(a, b, ...) __builtin_shuffle(a, b, Int16{__VA_ARGS__})
#endif

// a[i][j] -> a[j][i]: single floats and pairs change places within quarters of a vector, then the quarters do.
INLINE void transpose(Vec8* a) {
  Vec8 b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = SHUFFLE8(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = SHUFFLE8(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = SHUFFLE8(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + 2 * j + 1] = SHUFFLE8(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = SHUFFLE8(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    b[i + 4] = SHUFFLE8(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = b[i];
}

INLINE void transpose(Vec16* a) {
  Vec16 b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = SHUFFLE16(a[i], a[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    b[i + 1] = SHUFFLE16(a[i], a[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = SHUFFLE16(b[i + j], b[i + j + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      a[i + 2 * j + 1] = SHUFFLE16(b[i + j], b[i + j + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
#pragma GCC unroll 2
  for (int i = 0; i < 16; i += 8)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {  // even quarters of two rows, and odd ones
      b[i + j] = SHUFFLE16(a[i + j], a[i + j + 4], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
      b[i + j + 4] = SHUFFLE16(a[i + j], a[i + j + 4], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[i] = SHUFFLE16(b[i], b[i + 8], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    a[i + 8] = SHUFFLE16(b[i], b[i + 8], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
}

// panel[depth, 32] = right[cols <= 32, depth (row stride ld)]^T (* scale[cols]), columns past cols zero.
template <class V>
INLINE void pack_panel(const float* right, int64_t ld, const float* scale, float* panel, int64_t depth, int64_t cols) {
  constexpr int64_t kSide = sizeof(V) / sizeof(float);
  if (cols < kColumns) std::fill_n(panel, depth * kColumns, 0.0f);
  for (int64_t k = 0; k < depth; k += kSide)
    for (int64_t n = 0; n < cols; n += kSide) {
      const float* from = right + n * ld + k;
      float* to = panel + k * kColumns + n;
      if (k + kSide <= depth && n + kSide <= cols) {
        V a[kSide];
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i) {
          load(a[i], from + i * ld);
          __builtin_prefetch(from + i * ld + 4 * kSide);  // 5 % of a product of 64 rows whose W comes from DRAM
        }
        if (scale)
#pragma GCC unroll 16
          for (int i = 0; i < kSide; ++i) a[i] *= scale[n + i];
        transpose(a);
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i) store(to + i * kColumns, a[i]);
      } else {
        for (int64_t i = 0; i < std::min<int64_t>(kSide, cols - n); ++i)
          for (int64_t j = 0; j < std::min<int64_t>(kSide, depth - k); ++j)
            to[j * kColumns + i] = from[i * ld + j] * (scale ? scale[n + i] : 1.0f);
      }
    }
}

// panels[c / 32, k, 32] = right[k, c] (* scale[c]), for k < depth and c < width; `stride` floats from panel to panel,
// columns past width zero. Whole rows at a time: 32 columns of each row would be a page a step.
INLINE void pack_rows(const float* right, int64_t ld, const float* scale, float* panels, int64_t stride, int64_t depth,
                      int64_t width) {
  const int64_t whole = width / kColumns * kColumns;
  for (int64_t k = 0; k < depth; ++k, right += ld, panels += kColumns) {
    float* to = panels;
    for (int64_t c = 0; c < whole; c += kColumns, to += stride) {
      __builtin_prefetch(right + 4 * ld + c), __builtin_prefetch(right + 4 * ld + c + 16);
      if (scale)
        for (int64_t j = 0; j < kColumns; ++j) to[j] = right[c + j] * scale[c + j];
      else std::copy_n(right + c, kColumns, to);
    }
    for (int64_t c = whole; whole < width && c < whole + kColumns; ++c)
      to[c - whole] = c < width ? right[c] * (scale ? scale[c] : 1.0f) : 0.0f;
  }
}

// The same from the transpose, right[c, k (row stride ld)] (* scale[c]).
template <class V>
INLINE void pack_columns(const float* right, int64_t ld, const float* scale, float* panels, int64_t stride,
                         int64_t depth, int64_t width) {
  for (int64_t c = 0; c < width; c += kColumns, panels += stride)
    pack_panel<V>(right + c * ld, ld, scale ? scale + c : nullptr, panels, depth, std::min(kColumns, width - c));
}

}  // namespace fused_lora::cpu
