// lora_gemm's first warpgroup, warps 1-3, in the backward with dropout: the mask bits of each tile of dx, one Philox
// call for 8 columns, while the consumers multiply.
//
// Shared    128 rows of kBlockN bits, one tile at a time: consumers and gradients free them before the next
// Source    Salmon et al., SC 2011 (philox.h)
#pragma once

#include "philox.h"
#include "tiles.cuh"

namespace fused_lora::gemm {

template <class C> struct MaskDrawer {
  Smem<C>& s;
  const Args<typename C::T>& args;
  const uint32_t cta;

  PTX_FN void run() {
    const int thread = threadIdx.x - 32;
    const uint64_t seed = static_cast<uint64_t>(*args.seed);
    Tiles<C> tiles(s, args, cta);
    tiles.first();
    uint32_t phase = 0;
    while (tiles.more()) {
      const Place at = tiles.place();
      ptx::wait(&s.mask_empty, phase ^ 1);
      for (int w = thread; w < kBlockM * C::kMaskWords; w += kMaskThreads) {
        uint32_t bits = 0;
#pragma unroll 1
        for (int group = 3; group >= 0; --group) {
          const Philox draws(seed, at.row + w / C::kMaskWords, (at.col + w % C::kMaskWords * 32) / 8 + group);
#pragma unroll
          for (int j = 7; j >= 0; --j) bits = bits << 1 | (draws.draw(j) >= args.threshold);
        }
        s.mask[w] = bits;
      }
      ptx::arrive(&s.mask_full);
      phase ^= 1;
      if constexpr (C::kOneLaunch) __syncwarp();
      tiles.next(threadIdx.x % 32 == 0);
    }
  }
};

}  // namespace fused_lora::gemm
