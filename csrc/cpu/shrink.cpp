// shrink: out[rows, Rp] += panel[rows, cols] P[cols, Rp], one panel's share of h = drop(x) A^T or dh = dy B.
//
// Register tiles of 16 ranks; P's panel (24 KiB at R = 16) stays in L1 over all rows. fp32 throughout.
#include "kernels.h"
#include "simd.h"

namespace fused_lora::cpu {

CLONES void shrink(const float* panel, int64_t ld, const float* P, float* out, int64_t rows, int64_t cols, int64_t Rp) {
  product(panel, ld, 1, P, Rp, cols, out, Rp, rows, Rp);
}

}  // namespace fused_lora::cpu
