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

// panel[depth, 32] = right[cols <= 32, depth (row stride ld)]^T, columns past cols zero.
template <class V> INLINE void pack_columns(const float* right, int64_t ld, float* panel, int64_t depth, int64_t cols) {
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
        transpose(a);
#pragma GCC unroll 16
        for (int i = 0; i < kSide; ++i) store(to + i * kColumns, a[i]);
      } else {
        for (int64_t i = 0; i < std::min<int64_t>(kSide, cols - n); ++i)
          for (int64_t j = 0; j < std::min<int64_t>(kSide, depth - k); ++j) to[j * kColumns + i] = from[i * ld + j];
      }
    }
}

// panel[depth, 32] = right[depth, cols <= 32 (row stride ld)], columns past cols zero.
INLINE void pack_rows(const float* right, int64_t ld, float* panel, int64_t depth, int64_t cols) {
  for (int64_t k = 0; k < depth; ++k) {
    if (cols == kColumns) {
      std::copy_n(right + k * ld, kColumns, panel + k * kColumns);
    } else {
      for (int64_t n = 0; n < kColumns; ++n) panel[k * kColumns + n] = n < cols ? right[k * ld + n] : 0.0f;
    }
  }
}

// panel[depth, 32] = the block of `right` at step k and column n: of right[depth, columns] by_rows, else of
// right[columns, depth].
template <class V>
INLINE void pack(bool by_rows, const float* right, int64_t ld, int64_t k, int64_t n, float* panel, int64_t depth,
                 int64_t cols) {
  if (by_rows) pack_rows(right + k * ld + n, ld, panel, depth, cols);
  else pack_columns<V>(right + n * ld + k, ld, panel, depth, cols);
}

}  // namespace fused_lora::cpu
