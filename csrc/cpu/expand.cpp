// expand: out[6, cols] += H[6, Rp] Q[R, cols], the low-rank update of six rows of y (Q = B^T) or dx (Q = A).
//
// Tile 6 rows x 16 columns in registers. fp32 rows without a mask are updated where they lie, others in a strip of L1 that add_row converts,
// masks and adds.
#include "kernels.h"
#include "simd.h"

namespace fused_lora::cpu {

CLONES void expand(const float* H, const float* Q, float* out, int64_t ldo, int64_t cols, int64_t R, int64_t Rp, int64_t ldq) {
  for (int64_t n = 0; n < cols; n += 16) {
    Vec acc[kStrip][2];
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i) {
      acc[i][0] = vec(out + i * ldo + n);
      acc[i][1] = vec(out + i * ldo + n + 8);
    }
    for (int64_t r = 0; r < R; ++r) {
      const Vec b0 = vec(Q + r * ldq + n), b1 = vec(Q + r * ldq + n + 8);
#pragma GCC unroll 8
      for (int i = 0; i < kStrip; ++i) {
        acc[i][0] += H[i * Rp + r] * b0;
        acc[i][1] += H[i * Rp + r] * b1;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i) {
      vec(out + i * ldo + n) = acc[i][0];
      vec(out + i * ldo + n + 8) = acc[i][1];
    }
  }
}

}  // namespace fused_lora::cpu
