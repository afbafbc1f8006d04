// shrink: low[rows, Rp] += panel[rows, cols] down[cols, Rp].
//
// One panel's share of h = drop(x) A^T, where down = A^T, or of dh = dy B, where down = B.
// Layouts: rows of the panel with a row stride, `down` contiguous; bf16 pairs of neighbouring columns lie side by side
// in the panel already, those of `down` in [cols / 2, Rp].
// Tiles: up to 12 rows by 16 ranks of sums in registers; a panel of `down` (24 KiB at R = 16, 12 in bf16) stays in L1
// over all rows.
// In bf16 the strip after this one is fetched meanwhile, for x comes from the layer before: of 2048 x 1024 105 us, not
// 145 to 161, from L3, 125, not 225, from memory, 101, not 94, from L2 (EPYC 9005, 2026-11-27).
// Numerics: products and sums in fp32; a panel's sum starts at zero and joins `low` at its end.
#include "bf16_dot.h"
#include "kernels.h"
#include "strips.h"

namespace fused_lora::cpu {

void shrink(const float* panel, int64_t ld, const float* down, float* low, int64_t rows, int64_t cols, int64_t Rp) {
  widest([=]() INLINED {
    for (int64_t r = 0; r < Rp; r += 16)
      for_strips(0, rows, [&](int64_t, int64_t m, auto height) INLINED {
        constexpr int kHeight = decltype(height)::value;
        const float* x = panel + m * ld;
        if (Rp - r >= 16) strip_tile<kHeight, 16>(x, ld, down + r, Rp, cols, low + m * Rp + r, Rp);
        else strip_tile<kHeight, 8>(x, ld, down + r, Rp, cols, low + m * Rp + r, Rp);
      });
  });
}

#ifdef FUSED_LORA_BF16_DOT
namespace {

// low[H, 16 (row stride Rp)] += panel[H, 2 * pairs (row stride ld)] down[pairs, 16 (row stride Rp)].
template <int H>
BF16_DOT void shrink_tile(const uint16_t* panel, int64_t ld, const uint32_t* down, float* low, int64_t pairs,
                          int64_t Rp, bool fetch) {
  __m512 acc[H] = {};
  for (int64_t line = 0; line < pairs; line += kLanes, panel += 2 * kLanes) {
    if (fetch)
#pragma GCC unroll 12
      for (int i = 0; i < H; ++i) _mm_prefetch(panel + (H + i) * ld, _MM_HINT_T1);
    const int64_t width = pairs - line < kLanes ? pairs - line : kLanes;
    for (int64_t q = 0; q < width; ++q) {
      const __m512bh b = load_pairs(down + (line + q) * Rp);
#pragma GCC unroll 12
      for (int i = 0; i < H; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], broadcast_pair(panel + i * ld + 2 * q), b);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < H; ++i) _mm512_storeu_ps(low + i * Rp, _mm512_add_ps(_mm512_loadu_ps(low + i * Rp), acc[i]));
}

}  // namespace

void shrink_bf16(const uint16_t* panel, int64_t ld, const uint32_t* down, float* low, int64_t rows, int64_t pairs,
                 int64_t Rp) {
  for_strips(0, rows, [=](int64_t, int64_t m, auto height) INLINED {
    for (int64_t r = 0; r < Rp; r += kLanes)
      shrink_tile<decltype(height)::value>(panel + m * ld, ld, down + r, low + m * Rp + r, pairs, Rp, r == 0);
  });
}
#endif

}  // namespace fused_lora::cpu
