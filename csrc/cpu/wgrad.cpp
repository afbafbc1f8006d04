// wgrad: out[kPanel, Rp] += panel[rows, kPanel]^T H[rows, Rp], one panel's share of dB = dy^T h or dA^T = drop(x)^T dh.
//
// The register tile of shrink with its left operand read down the columns: 6 columns x 16 ranks, summed over the block's rows.
#include "kernels.h"
#include "simd.h"

namespace fused_lora::cpu {

CLONES void wgrad(const float* panel, const float* H, float* out, int64_t rows, int64_t cols, int64_t Rp) {
  for (int64_t n = 0; n < cols; n += kStrip) {
    const float* x = panel + n;
    float* o = out + n * Rp;
    int64_t r = 0;
    for (; r + 16 <= Rp; r += 16) tile<kStrip, 2>(x, 1, kPanel, H + r, Rp, rows, o + r, Rp);
    for (; r < Rp; r += 8) tile<kStrip, 1>(x, 1, kPanel, H + r, Rp, rows, o + r, Rp);
  }
}

CLONES void column_sums(const float* panel, float* out, int64_t rows, int64_t cols) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < cols; ++n) out[n] += panel[m * kPanel + n];
}

}  // namespace fused_lora::cpu
