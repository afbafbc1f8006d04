// wgrad: out[Rp, cols] += low[rows, Rp]^T panel[rows, cols], one panel's share of dB^T = h^T dy or dA = dh^T drop(x).
// column_sums: out[cols] += sum over rows of the panel, its share of dbias.
//
// Layouts: rows of the panel with a row stride. The fp32 kernel reads `low` as it lies; the bf16 one reads it with its
// rows in pairs, [rows / 2, Rp], and pairs the panel's in registers.
// Tiles: 16 ranks by 16 columns of sums in registers (AVX-512), 6 by 16, in bf16 8 by 32. A line of the panel meets all
// of 16 ranks at once: lines a power of two apart fall into one set of L1 and would not wait there for more ranks. In
// bf16 it is read for the first 8 ranks, and its pairs are kept for the others.
// Numerics: products and sums in fp32; a block's sum starts at zero and joins `out` at its end, that of column_sums in
// four chains.
#include "bf16_dot.h"
#include "kernels.h"
#include "simd.h"

namespace fused_lora::cpu {

namespace {

constexpr int64_t kPages = 48;  // rows at a time: each lies in a page of its own, and L1 remembers 64 to 96 of them

// out[Rp, 16] += low[rows, Rp]^T panel[rows, 16].
INLINE void gather(const float* panel, int64_t ld, const float* low, float* out, int64_t ldo, int64_t rows,
                   int64_t Rp) {
  int64_t r = 0;
  if (avx512()) {
    for (; r + 16 <= Rp; r += 16) tile<16, Vec16, 1>(low + r, 1, Rp, panel, ld, rows, out + r * ldo, ldo);
    if (r < Rp) tile<8, Vec16, 1>(low + r, 1, Rp, panel, ld, rows, out + r * ldo, ldo);
    return;
  }
  for (; Rp - r >= 6 && Rp - r != 8; r += 6) tile<6, Vec8, 2>(low + r, 1, Rp, panel, ld, rows, out + r * ldo, ldo);
  for (; r < Rp; r += 4) tile<4, Vec8, 2>(low + r, 1, Rp, panel, ld, rows, out + r * ldo, ldo);
}

// out[two vectors] += sum over rows of panel[rows, two vectors], in four chains.
template <class V> INLINE void column_sums_of(const float* panel, int64_t ld, float* out, int64_t rows) {
  constexpr int kChains = 4, kLane = sizeof(V) / sizeof(float);
  V sums[kChains][2] = {}, row, total;
  int64_t m = 0;
  for (; m + kChains <= rows; m += kChains)
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) load(row, panel + (m + i) * ld + kLane * j), sums[i][j] += row;
  for (; m < rows; ++m)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) load(row, panel + m * ld + kLane * j), sums[0][j] += row;
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    load(total, out + kLane * j);
    total += (sums[0][j] + sums[1][j]) + (sums[2][j] + sums[3][j]);
    store(out + kLane * j, total);
  }
}

}  // namespace

void wgrad(const float* panel, int64_t ld, const float* low, float* out, int64_t ldo, int64_t rows, int64_t cols,
           int64_t Rp) {
  widest([=]() INLINED {
    for (int64_t m = 0; m < rows; m += kPages)
      for (int64_t n = 0; n < cols; n += kLanes)
        gather(panel + m * ld + n, ld, low + m * Rp, out + n, ldo, rows - m < kPages ? rows - m : kPages, Rp);
  });
}

void column_sums(const float* panel, int64_t ld, float* out, int64_t rows, int64_t cols) {
  widest_vector([=](auto lanes) INLINED {
    using V = typename decltype(lanes)::Vector;
    constexpr int64_t kWide = 2 * sizeof(V) / sizeof(float);
    int64_t n = 0;
    for (; n + kWide <= cols; n += kWide) column_sums_of<V>(panel + n, ld, out + n, rows);
    for (; n < cols; ++n) {
      float sums[4] = {};
      for (int64_t m = 0; m < rows; ++m) sums[m % 4] += panel[m * ld + n];
      out[n] += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
  });
}

#ifdef FUSED_LORA_BF16_DOT
namespace {

constexpr int kRanks = 8;  // of a tile

// out[8, 32] += low[pairs, 8 (row stride Rp)]^T paired(p), two vectors of pairs: columns 0 to 15 and 16 to 31.
template <class Paired>
BF16_DOT_INLINE void gather_pairs(const uint32_t* low, int64_t Rp, float* out, int64_t ldo, int64_t pairs,
                                  const Paired& paired) {
  __m512 acc[kRanks][2] = {};
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh lo, hi;
    paired(p, lo, hi);
#pragma GCC unroll 8
    for (int i = 0; i < kRanks; ++i) {
      const __m512bh a = broadcast_pair(low + p * Rp + i);
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], a, lo);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], a, hi);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRanks; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      float* o = out + i * ldo + kLanes * j;
      _mm512_storeu_ps(o, _mm512_add_ps(_mm512_loadu_ps(o), acc[i][j]));
    }
}

}  // namespace

BF16_DOT void wgrad_bf16(const uint16_t* panel, int64_t ld, const uint32_t* low, float* out, int64_t ldo, int64_t pairs,
                         int64_t cols, int64_t Rp) {
  const PairOrder order;
  alignas(64) uint32_t kept[kRows / 2 * 2 * kLanes];  // 32 columns in pairs
  for (int64_t n = 0; n < cols; n += 2 * kLanes) {
    gather_pairs(low, Rp, out + n, ldo, pairs, [&](int64_t p, __m512bh& lo, __m512bh& hi) BF16_DOT_INLINED {
      const uint16_t* row = panel + 2 * p * ld + n;
      const __m512i even = _mm512_loadu_si512(row), odd = _mm512_loadu_si512(row + ld);
      _mm_prefetch(row + kPanel, _MM_HINT_T1), _mm_prefetch(row + ld + kPanel, _MM_HINT_T1);
      lo = (__m512bh)order.first_half(even, odd), hi = (__m512bh)order.second_half(even, odd);
      _mm512_store_si512(kept + p * 2 * kLanes, (__m512i)lo);
      _mm512_store_si512(kept + p * 2 * kLanes + kLanes, (__m512i)hi);
    });
    for (int64_t r = kRanks; r < Rp; r += kRanks)
      gather_pairs(low + r, Rp, out + r * ldo + n, ldo, pairs,
                   [&](int64_t p, __m512bh& lo, __m512bh& hi) BF16_DOT_INLINED {
                     lo = load_pairs(kept + p * 2 * kLanes), hi = load_pairs(kept + p * 2 * kLanes + kLanes);
                   });
  }
}

BF16_DOT void column_sums_bf16(const uint16_t* panel, int64_t ld, float* out, int64_t rows, int64_t cols) {
  for (int64_t n = 0; n < cols; n += kLanes) {
    __m512 acc = _mm512_loadu_ps(out + n);
    for (int64_t m = 0; m < rows; ++m)
      acc = _mm512_add_ps(acc, to_fp32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + m * ld + n))));
    _mm512_storeu_ps(out + n, acc);
  }
}
#endif

}  // namespace fused_lora::cpu
