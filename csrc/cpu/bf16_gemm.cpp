// bf16_gemm: out = left right + keep * scale * (low thin) + bias in bf16, a base product with its low-rank update
// inside, on CPUs that multiply bf16 (bf16_dot.h).
//
//   forward   y [M, N]  = x [M, K] W^T + h [M, R] B^T + bias      W [columns, depth]: by_rows = false
//   backward  dx [M, K] = dy [M, N] W  + mask * (dh [M, R] A)     W [depth, columns]: by_rows = true
//   of a W that is given as its transpose by_rows is the other one
//
// Layouts: rows of every operand with a row stride, `out` contiguous, `thin` in pairs of ranks. A step is a pair of
// neighbours along the summed dimension, 32 bits.
// Tiles: as in lora_gemm.cpp, 12 rows by 32 columns, with the same strips of `left` at a constant pitch against panels
// of `right` in L2. The update comes first, so that dropout's mask falls on it in registers and not on the base
// product. Of a summed dimension longer than kDepth steps the sums wait in fp32, a tile in one piece: at a row stride
// of 2 KiB they would meet in the same lines of L1. Rows are walked in runs of kRowsAtOnce for that.
// Numerics: products and sums in fp32, which start afresh in every block; rounded to nearest even once, at the end.
// Source of the loop order: as lora_gemm.cpp.
#include "bf16_dot.h"
#include "strips.h"
#include "transpose_avx512.h"
#include "walk.h"

#ifdef FUSED_LORA_BF16_DOT

namespace fused_lora::cpu {
namespace {

constexpr int64_t kDepth = 512, kWidth = 384;  // steps and columns of a block: 768 KiB of L2
constexpr int64_t kPitch = kDepth + 16;        // steps between the rows of a strip; not a power of two
constexpr int64_t kColumns = 2 * kLanes;       // of a panel
constexpr int64_t kRowsAtOnce = 128 * kStrip;

// A block: steps [k, k + depth) of the columns [n, n + width), for the rows [m, m_end).
struct Block {
  int64_t n, width, k, depth, m, m_end;
  bool first, last;
};

// One strip of rows against every panel of a block.
struct Strip {
  const uint32_t* rows;    // [height, depth (row stride kPitch)]
  const uint32_t* panels;  // [width / 32, depth, 32]
  int64_t depth, width;
  const uint16_t* low;         // [height, 2 * ranks (row stride Rp)]
  const uint32_t* thin;        // [ranks, width (row stride ld_thin)]
  int64_t ranks, Rp, ld_thin;  // pairs of ranks, of the first block
  const uint32_t* keep;        // [height, width / 32 (row stride ld_keep)] or null
  int64_t ld_keep;
  float scale;  // of what is kept
  float* sums;  // [width / 32, kStrip, 32]
  bool first, last;
  const float* out_scale;  // [width] or null
  const uint16_t* bias;    // [width] or null
  uint16_t* out;           // [height, width (row stride ldo)]
  int64_t ldo;
  const uint16_t* next;  // the rows of `left` that the next strip is copied from, row stride ld_next
  int64_t ld_next;
};

// Fetches into L2 what the next strip is copied from, the share of the panel at column n.
template <int H> INLINE void fetch_ahead(const Strip& s, int64_t n) {
  const int64_t end = s.depth * std::min(n + kColumns, s.width) / s.width;
  for (int64_t k = s.depth * n / s.width / 16 * 16; k < end; k += 16)
#pragma GCC unroll 12
    for (int i = 0; i < H; ++i) __builtin_prefetch(s.next + i * s.ld_next + 2 * k, 0, 2);
}

// acc += left[H, steps (row stride kLd, or ld where that is 0)] right[steps, 32 (row stride ldr)]. At a constant stride
// one pointer reaches all rows; at any other GCC reloads their pointers in the loop.
template <int H, int64_t kLd>
BF16_DOT_INLINE void multiply_add(__m512 (&acc)[H][2], const void* left, int64_t ld, const uint32_t* right, int64_t ldr,
                                  int64_t steps) {
  const auto* rows = static_cast<const char*>(left);
  const int64_t pitch = 4 * (kLd ? kLd : ld);
  for (int64_t k = 0; k < steps; ++k, rows += 4, right += ldr) {
    const __m512bh lo = load_pairs(right), hi = load_pairs(right + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < H; ++i) {
      const __m512bh a = broadcast_pair(rows + i * pitch);
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], a, lo);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], a, hi);
    }
  }
}

// acc += low thin.
template <int H> BF16_DOT_INLINE void add_update(__m512 (&acc)[H][2], const Strip& s, int64_t n) {
  const uint32_t* thin = s.thin + n;
  switch (s.Rp) {
    case 16: return multiply_add<H, 8>(acc, s.low, 0, thin, s.ld_thin, s.ranks);
    case 32: return multiply_add<H, 16>(acc, s.low, 0, thin, s.ld_thin, s.ranks);
    case 64: return multiply_add<H, 32>(acc, s.low, 0, thin, s.ld_thin, s.ranks);
    default: return multiply_add<H, 0>(acc, s.low, s.Rp / 2, thin, s.ld_thin, s.ranks);
  }
}

// out[H, columns] = acc * out_scale + bias, rounded.
template <int H> BF16_DOT_INLINE void store_rounded(__m512 (&acc)[H][2], const Strip& s, int64_t n) {
  const __mmask32 columns = first32(s.width - n);
  __m512 scale[2] = {_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f)};
  if (s.out_scale) {
    scale[0] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(columns), s.out_scale + n);
    scale[1] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(columns >> 16), s.out_scale + n + kLanes);
  }
  const __m512i row = s.bias ? _mm512_maskz_loadu_epi16(columns, s.bias + n) : _mm512_setzero_si512();
  const __m512 bias[2] = {to_fp32(_mm512_castsi512_si256(row)), to_fp32(_mm512_extracti64x4_epi64(row, 1))};
  uint16_t* out = s.out + n;
#pragma GCC unroll 12
  for (int i = 0; i < H; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) acc[i][j] = _mm512_fmadd_ps(acc[i][j], scale[j], bias[j]);
  if (columns == ~__mmask32{0}) {  // as in expand.cpp
#pragma GCC unroll 12
    for (int i = 0; i < H; ++i)
      _mm512_storeu_si512(out + i * s.ldo, (__m512i)_mm512_cvtne2ps_pbh(acc[i][1], acc[i][0]));
  } else {
#pragma GCC unroll 12
    for (int i = 0; i < H; ++i)
      _mm512_mask_storeu_epi16(out + i * s.ldo, columns, (__m512i)_mm512_cvtne2ps_pbh(acc[i][1], acc[i][0]));
  }
}

// The tile of H rows at column n of a strip.
template <int H> BF16_DOT_INLINE void tile(const Strip& s, int64_t n) {
  __m512 acc[H][2];
#pragma GCC unroll 12
  for (int i = 0; i < H; ++i) {
    acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    if (s.last) __builtin_prefetch(s.out + i * s.ldo + n, 1);
  }
  if (s.first && s.ranks) {
    add_update<H>(acc, s, n);
    if (s.keep) {
      const __m512 scale = _mm512_set1_ps(s.scale);
#pragma GCC unroll 12
      for (int i = 0; i < H; ++i) {
        const uint32_t keep = s.keep[i * s.ld_keep + n / kColumns];
        acc[i][0] = _mm512_maskz_mul_ps(static_cast<__mmask16>(keep), acc[i][0], scale);
        acc[i][1] = _mm512_maskz_mul_ps(static_cast<__mmask16>(keep >> 16), acc[i][1], scale);
      }
    }
  }
  multiply_add<H, kPitch>(acc, s.rows, 0, s.panels + n * s.depth, kColumns, s.depth);
  float* sums = s.sums + n * kStrip;
  if (!s.first)
#pragma GCC unroll 12
    for (int i = 0; i < H; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j)
        acc[i][j] = _mm512_add_ps(acc[i][j], _mm512_loadu_ps(sums + i * kColumns + j * kLanes));
  if (s.last) return store_rounded<H>(acc, s, n);
#pragma GCC unroll 12
  for (int i = 0; i < H; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) _mm512_storeu_ps(sums + i * kColumns + j * kLanes, acc[i][j]);
}

// panels[cols / 32, pairs, 32] = right[cols, depth (row stride ld)]^T, zero past both.
BF16_DOT void pack_columns(const uint16_t* right, int64_t ld, uint32_t* panels, int64_t depth, int64_t cols) {
  const int64_t pairs = (depth + 1) / 2;
  for (int64_t c = 0; c < cols; c += kColumns, panels += pairs * kColumns)
    for (int64_t k = 0; k < pairs; k += kLanes)
      for (int64_t n = 0; n < kColumns; n += kLanes) {
        __m512i a[kLanes];
        const uint16_t* from = right + (c + n) * ld + 2 * k;
        if (c + n + kLanes <= cols && 2 * k + kColumns <= depth) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) {
            a[i] = _mm512_loadu_si512(from + i * ld);
            _mm_prefetch(from + i * ld + 4 * kColumns, _MM_HINT_T0);
          }
        } else {
          const __mmask32 there = first32(depth - 2 * k);
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i)
            a[i] = c + n + i < cols ? _mm512_maskz_loadu_epi16(there, from + i * ld) : _mm512_setzero_si512();
        }
        transpose16(a);
        uint32_t* to = panels + k * kColumns + n;
        if (k + kLanes <= pairs) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) _mm512_store_si512(to + i * kColumns, a[i]);
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i)
            if (k + i < pairs) _mm512_store_si512(to + i * kColumns, a[i]);
        }
      }
}

// The same of right[depth, cols (row stride ld)], whole rows at a time.
BF16_DOT void pack_rows(const uint16_t* right, int64_t ld, uint32_t* panels, int64_t depth, int64_t cols) {
  const int64_t pairs = (depth + 1) / 2, whole = cols / kColumns * kColumns, panel = pairs * kColumns;
  const PairOrder order;
  const auto store = [&](uint32_t* to, __m512i even, __m512i odd) BF16_DOT_INLINED {
    _mm512_store_si512(to, order.first_half(even, odd));
    _mm512_store_si512(to + kLanes, order.second_half(even, odd));
  };
  for (int64_t k = 0; k < pairs; ++k, right += 2 * ld, panels += kColumns) {
    const bool both = 2 * k + 1 < depth;
    uint32_t* to = panels;
    for (int64_t c = 0; both && c < whole; c += kColumns, to += panel) {
      _mm_prefetch(right + 4 * ld + c, _MM_HINT_T0), _mm_prefetch(right + 5 * ld + c, _MM_HINT_T0);
      store(to, _mm512_loadu_si512(right + c), _mm512_loadu_si512(right + ld + c));
    }
    for (int64_t c = both ? whole : 0; c < cols; c += kColumns, to += panel) {
      const __mmask32 there = first32(cols - c);
      store(to, _mm512_maskz_loadu_epi16(there, right + c), _mm512_maskz_loadu_epi16(both ? there : 0, right + ld + c));
    }
  }
}

// strip[height, depth steps (row stride kPitch)] = rows m.. of `left` (* left_scale), zero past its columns.
BF16_DOT void copy_strip(const Bf16Gemm& g, const Block& b, uint32_t* strip, int64_t m, int64_t height) {
  const int64_t cols = std::min(2 * b.depth, g.K - 2 * b.k);
  for (int64_t i = 0; i < height; ++i) {
    auto* to = reinterpret_cast<uint16_t*>(strip + i * kPitch);
    const uint16_t* from = g.left + (m + i) * g.ld_left + 2 * b.k;
    if (g.left_scale) scale_row_bf16(from, g.left_scale + 2 * b.k, to, cols);
    else std::copy_n(from, cols, to);
    if (cols < 2 * b.depth) to[cols] = 0;
  }
}

constexpr int64_t kStripSize = kStrip * kPitch;
// Steps of a task's strip, packed block and sums, for at most so many rows.
int64_t buffer_size(const Bf16Gemm& g, int64_t rows) {
  const int64_t steps = (g.K + 1) / 2, width = std::min(kWidth, round_up(g.N, kColumns));
  const int64_t sums = steps > kDepth ? round_up(std::min(kRowsAtOnce, rows), kStrip) * kWidth : 0;
  return kStripSize + width * std::min(kDepth, steps) + sums;
}

// A task's memory.
struct Scratch {
  uint32_t *strip, *panels;
  float* sums;
};

// Strip number `strip` of a block, the rows [m, m + H).
template <int H>
BF16_DOT void multiply(const Bf16Gemm& g, const Block& b, const Scratch& scratch, int64_t strip, int64_t m) {
  copy_strip(g, b, scratch.strip, m, H);
  const Strip s{.rows = scratch.strip,
                .panels = scratch.panels,
                .depth = b.depth,
                .width = b.width,
                .low = g.R ? g.low + m * g.Rp : nullptr,
                .thin = g.R ? g.thin + b.n : nullptr,
                .ranks = (g.R + 1) / 2,
                .Rp = g.Rp,
                .ld_thin = g.ld_thin,
                .keep = g.keep ? g.keep + m * g.ld_keep + b.n / kColumns : nullptr,
                .ld_keep = g.ld_keep,
                .scale = g.scale,
                .sums = scratch.sums + strip * kStrip * kWidth,
                .first = b.first,
                .last = b.last,
                .out_scale = g.out_scale ? g.out_scale + b.n : nullptr,
                .bias = g.bias ? g.bias + b.n : nullptr,
                .out = g.out + m * g.N + b.n,
                .ldo = g.N,
                .next = g.left + (m + H) * g.ld_left + 2 * b.k,
                .ld_next = g.ld_left};
  for (int64_t n = 0; n < b.width; n += kColumns) {
    fetch_ahead<H>(s, n);
    tile<H>(s, n);
  }
}

void multiply_block(const Bf16Gemm& g, const Block& b, const Scratch& scratch) {
  const int64_t deep = std::min(2 * b.depth, g.K - 2 * b.k);
  if (g.by_rows) pack_rows(g.right + 2 * b.k * g.ld_right + b.n, g.ld_right, scratch.panels, deep, b.width);
  else pack_columns(g.right + b.n * g.ld_right + 2 * b.k, g.ld_right, scratch.panels, deep, b.width);
  for_strips(b.m, b.m_end, [&](int64_t strip, int64_t m, auto height) INLINED {
    multiply<decltype(height)::value>(g, b, scratch, strip, m);
  });
}

void task(const Bf16Gemm& g, Range rows, Range cols, uint32_t* buffer) {
  const int64_t steps = (g.K + 1) / 2, blocks = (steps + kDepth - 1) / kDepth,
                step = round_up((steps + blocks - 1) / blocks, kLanes);
  const int64_t packed = std::min(kWidth, round_up(g.N, kColumns)) * std::min(kDepth, steps);
  const Scratch scratch{
      .strip = buffer, .panels = buffer + kStripSize, .sums = reinterpret_cast<float*>(buffer + kStripSize + packed)};
  const int64_t columns = cols.end - cols.begin, groups = (columns + kWidth - 1) / kWidth,
                width = round_up((columns + groups - 1) / groups, kColumns);
  const int64_t at_once = steps > kDepth ? kRowsAtOnce : rows.end - rows.begin;
  for (int64_t m = rows.begin; m < rows.end; m += at_once)
    for (int64_t n = cols.begin; n < cols.end; n += width)
      for (int64_t k = 0; k < steps; k += step) {
        const Block b{.n = n,
                      .width = std::min(width, cols.end - n),
                      .k = k,
                      .depth = std::min(step, steps - k),
                      .m = m,
                      .m_end = std::min(rows.end, m + at_once),
                      .first = k == 0,
                      .last = k + step >= steps};
        multiply_block(g, b, scratch);
      }
}

}  // namespace

void bf16_gemm(const Bf16Gemm& g, Buffers& buffers, int threads) {
  const Split split = split_of(g.M, g.N, threads);
  const int64_t size = round_up(buffer_size(g, (g.M + split.by_rows - 1) / split.by_rows + kStrip), kLanes);
  auto* buffer = buffers.take<uint32_t>(split.tasks() * size);
  parallel(split.tasks(),
           [&](int t) { task(g, split.rows(t, g.M, kStrip), split.cols(t, g.N, kColumns), buffer + t * size); });
}

}  // namespace fused_lora::cpu

#endif
