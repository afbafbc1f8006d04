// shrink: out[rows, Rp] += panel[rows, cols] P[cols, Rp], one panel's share of h = drop(x) A^T or dh = dy B.
//
// Tile 6 rows x 16 ranks in registers; P's panel (15 KiB at R = 16) stays in L1 over all rows. fp32 throughout.
#include "kernels.h"
#include "simd.h"

namespace fused_lora::cpu {

CLONES void shrink(const float* panel, const float* P, float* out, int64_t rows, int64_t cols, int64_t Rp) {
  for (int64_t m = 0; m < rows; m += kStrip) {
    const float* x = panel + m * kPanel;
    float* o = out + m * Rp;
    int64_t r = 0;
    for (; r + 16 <= Rp; r += 16) tile<kStrip, 2>(x, kPanel, 1, P + r, Rp, cols, o + r, Rp);
    for (; r < Rp; r += 8) tile<kStrip, 1>(x, kPanel, 1, P + r, Rp, cols, o + r, Rp);
  }
}

}  // namespace fused_lora::cpu
