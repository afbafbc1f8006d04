// lora_gemm: out = left right + low thin + bias in fp32, a base product with its low-rank update inside.
//
//   forward   y [M, N]  = x [M, K] W^T + h [M, R] B^T + bias      W, B [columns, depth]: by_rows = false
//   backward  dx [M, K] = dy [M, N] W  + dh [M, R] A              W, A [depth, columns]: by_rows = true
//
// Layouts: rows of every operand with a row stride, `out` contiguous.
// Tiles: the update is R more steps of the summed dimension: `thin` is packed below the last block of `right`, `low`
// beside the last block of `left`. A task owns a range of rows and columns and walks it in blocks of kWidth columns and
// kDepth steps. A block of `right` is packed once into panels of 32 columns (480 KiB in L2) and meets strips of 12 rows
// of `left` (18 KiB in L1) in register tiles of 12 x 32 (AVX-512) or 6 x 16.
// Numerics: sums start afresh in every block, so that rounding errors grow with kDepth and not with all of K.
// Source of the loop order: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3),
// 2008.
#include "simd.h"
#include "walk.h"

namespace fused_lora::cpu {
namespace {

constexpr int64_t kDepth = 384, kWidth = 320;  // 256 to 768 by 160 to 480: within noise on EPYC 9004, 2026-11-24
constexpr int64_t kColumns = 32;               // of a panel

#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC before 12
typedef int Int8 __attribute__((vector_size(32)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Int8{__VA_ARGS__})
#endif

// a[i][j] -> a[j][i].
INLINE void transpose8(Vec8* a) {
  Vec8 b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = SHUFFLE(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = SHUFFLE(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = SHUFFLE(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + 2 * j + 1] = SHUFFLE(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = SHUFFLE(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    b[i + 4] = SHUFFLE(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = b[i];
}

// panel[depth, 32] = right[cols <= 32, depth (row stride ld)]^T, columns past cols zero.
INLINE void pack_columns(const float* right, int64_t ld, float* panel, int64_t depth, int64_t cols) {
  if (cols < kColumns) std::fill_n(panel, depth * kColumns, 0.0f);
  for (int64_t k = 0; k < depth; k += 8)
    for (int64_t n = 0; n < cols; n += 8) {
      const float* from = right + n * ld + k;
      float* to = panel + k * kColumns + n;
      if (k + 8 <= depth && n + 8 <= cols) {
        Vec8 a[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          load(a[i], from + i * ld);
          __builtin_prefetch(from + i * ld + 32);  // 5 % of a product of 64 rows whose W comes from DRAM
        }
        transpose8(a);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) store(to + i * kColumns, a[i]);
      } else {
        for (int64_t i = 0; i < std::min<int64_t>(8, cols - n); ++i)
          for (int64_t j = 0; j < std::min<int64_t>(8, depth - k); ++j) to[j * kColumns + i] = from[i * ld + j];
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

INLINE void pack(bool by_rows, const float* right, int64_t ld, int64_t k, int64_t n, float* panel, int64_t depth,
                 int64_t cols) {
  if (by_rows) pack_rows(right + k * ld + n, ld, panel, depth, cols);
  else pack_columns(right + n * ld + k, ld, panel, depth, cols);
}

// out[height, 32] += strip[height, depth] panel[depth, 32].
INLINE void tiles(const float* strip, const float* panel, int64_t depth, float* out, int64_t ldo, int64_t height) {
  if (avx512()) {
    if (height > 8) tile<12, Vec16, 2>(strip, depth, 1, panel, kColumns, depth, out, ldo);
    else if (height > 4) tile<8, Vec16, 2>(strip, depth, 1, panel, kColumns, depth, out, ldo);
    else tile<4, Vec16, 2>(strip, depth, 1, panel, kColumns, depth, out, ldo);
    return;
  }
  for (int64_t m = 0; m < height; m += 6)
    for (int64_t n = 0; n < kColumns; n += 16)
      tile<6, Vec8, 2>(strip + m * depth, depth, 1, panel + n, kColumns, depth, out + m * ldo + n, ldo);
}

// out[height <= 12, cols] += strip panels: one strip of `left` against every panel of a block of `right`.
INLINE void multiply_strip(const float* strip, const float* panels, int64_t depth, float* out, int64_t ldo,
                           int64_t height, int64_t cols) {
  for (int64_t n = 0; n < cols; n += kColumns) {
    const float* panel = panels + n * depth;
    const int64_t width = std::min(kColumns, cols - n);
    const bool whole = width == kColumns && (height == kStrip || (avx512() && height % 4 == 0));
    if (whole) {
      tiles(strip, panel, depth, out + n, ldo, height);
      continue;
    }
    float edge[kStrip * kColumns] = {};
    tiles(strip, panel, depth, edge, kColumns, height);
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j) out[i * ldo + n + j] += edge[i * kColumns + j];
  }
}

// Floats of one task's strip, and of its packed block below it.
int64_t strip_size(const LoraGemm& g) { return round_up(kStrip * (std::min(kDepth, g.K) + g.R), 16); }
int64_t buffer_size(const LoraGemm& g) {
  return strip_size(g) + std::min(kWidth, round_up(g.N, kColumns)) * (std::min(kDepth, g.K) + g.R);
}

struct Range {
  int64_t begin, end;
};

// Part i of n of [0, size), cut at multiples of `grain`.
Range part(int64_t size, int64_t grain, int64_t i, int64_t n) {
  const int64_t grains = (size + grain - 1) / grain;
  return {grains * i / n * grain, std::min(size, grains * (i + 1) / n * grain)};
}

}  // namespace

void lora_gemm_task(const LoraGemm& g, int64_t row0, int64_t row1, int64_t col0, int64_t col1, float* buffer) {
  widest([=]() INLINED {
    const int64_t blocks = (g.K + kDepth - 1) / kDepth, step = round_up((g.K + blocks - 1) / blocks, 8);
    float *strip = buffer, *block = buffer + strip_size(g);
    for (int64_t n = col0; n < col1; n += kWidth) {
      const int64_t width = std::min(kWidth, col1 - n);
      for (int64_t k = 0; k < g.K; k += step) {
        const int64_t depth = std::min(step, g.K - k), ranks = k + step >= g.K ? g.R : 0, all = depth + ranks;
        for (int64_t c = 0; c < width; c += kColumns) {
          const int64_t cols = std::min(kColumns, width - c);
          pack(g.by_rows, g.right, g.ld_right, k, n + c, block + c * all, depth, cols);
          if (ranks) pack(g.by_rows, g.thin, g.ld_thin, 0, n + c, block + c * all + depth * kColumns, ranks, cols);
        }
        for (int64_t m = row0; m < row1; m += kStrip) {
          const int64_t height = std::min<int64_t>(kStrip, row1 - m);
          for (int64_t i = 0; i < height; ++i) {
            std::copy_n(g.left + (m + i) * g.ld_left + k, depth, strip + i * all);
            if (ranks) std::copy_n(g.low + (m + i) * g.ld_low, ranks, strip + i * all + depth);
            if (k > 0) continue;
            float* out = g.out + (m + i) * g.N + n;
            if (g.bias) std::copy_n(g.bias + n, width, out);
            else std::fill_n(out, width, 0.0f);
          }
          std::fill_n(strip + height * all, (kStrip - height) * all, 0.0f);
          multiply_strip(strip, block, all, g.out + m * g.N + n, g.N, height, width);
        }
      }
    }
  });
}

void lora_gemm(const LoraGemm& g, Buffers& buffers, int threads) {
  // Columns first: a task packs only its own part of `right`. Rows, too, where there are more threads than pairs of
  // panels.
  const int64_t pairs = (g.N + 2 * kColumns - 1) / (2 * kColumns), by_cols = std::min<int64_t>(threads, pairs),
                by_rows = threads / by_cols;
  std::vector<float*> buffer;
  for (int64_t t = 0; t < by_cols * by_rows; ++t) buffer.push_back(buffers.take(buffer_size(g)));
  parallel(static_cast<int>(by_cols * by_rows), [&](int t) {
    const Range cols = part(g.N, kColumns, t % by_cols, by_cols), rows = part(g.M, kStrip, t / by_cols, by_rows);
    lora_gemm_task(g, rows.begin, rows.end, cols.begin, cols.end, buffer[static_cast<size_t>(t)]);
  });
}

}  // namespace fused_lora::cpu
