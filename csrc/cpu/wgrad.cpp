// wgrad: out[kPanel, Rp] += panel[rows, kPanel]^T H[rows, Rp], one panel's share of dB = dy^T h or dA^T = drop(x)^T dh.
//
// The register tile of shrink with its left operand read down the columns, summed over the block's rows.
#include "kernels.h"
#include "simd.h"

namespace fused_lora::cpu {

CLONES void wgrad(const float* panel, int64_t ld, const float* H, float* out, int64_t rows, int64_t cols, int64_t Rp) {
  product(panel, 1, ld, H, Rp, rows, out, Rp, round_up(cols, kStrip), Rp);
}

CLONES void column_sums(const float* panel, int64_t ld, float* out, int64_t rows, int64_t cols) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < cols; ++n) out[n] += panel[m * ld + n];
}

}  // namespace fused_lora::cpu
