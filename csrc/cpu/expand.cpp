// expand: out[kStrip, cols] += H[kStrip, Rp] Q[R, cols], the low-rank update of a strip of y (Q = B^T) or dx (Q = A).
//
// Register tiles of 16 columns. fp32 rows without a mask are updated where they lie, others in a strip of L1 that
// add_row converts, masks and adds.
#include "kernels.h"
#include "simd.h"

namespace fused_lora::cpu {

CLONES void expand(const float* H, const float* Q, float* out, int64_t ldo, int64_t cols, int64_t R, int64_t Rp,
                   int64_t ldq) {
  product(H, Rp, 1, Q, ldq, R, out, ldo, kStrip, round_up(cols, 2 * kVec));
}

}  // namespace fused_lora::cpu
