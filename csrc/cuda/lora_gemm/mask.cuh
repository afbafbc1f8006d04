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
  static constexpr int kRounds = (kBlockM * C::kMaskWords + kMaskThreads - 1) / kMaskThreads;  // a word a thread each
  Smem<C>& s;
  const Args<typename C::T>& args;
  uint64_t seed = 0;
  int round = 0;
  uint32_t phase = 0;

  PTX_FN MaskDrawer(Smem<C>& s, const Args<typename C::T>& args) : s(s), args(args) {
    if constexpr (C::kMasked) seed = static_cast<uint64_t>(*args.seed);
  }

  // Nothing but masks, tile by tile.
  PTX_FN void run(uint32_t cta) {
    Tiles<C> tiles(s, args, cta);
    tiles.first();
    while (tiles.more()) {
      draw(tiles.place(), 1, 1);
      next();
      if constexpr (C::kOneLaunch) __syncwarp();
      tiles.next(threadIdx.x % 32 == 0);
    }
  }

  // The part of this tile's mask that is due after `done` of `steps` steps.
  PTX_FN void draw(const Place& at, int done, int steps) {
    if (round == kRounds) return;
    if (round == 0) ptx::wait(&s.mask_empty, phase ^ 1);
#pragma unroll 1
    for (; round < kRounds && (round < done || round * steps < done * kRounds); ++round) {
      const int w = round * kMaskThreads + threadIdx.x - 32;
      if (w < kBlockM * C::kMaskWords) draw_word(at, w);
    }
    if (round == kRounds) ptx::arrive(&s.mask_full);
  }
  PTX_FN void next() {
    round = 0;
    phase ^= 1;
  }

 private:
  PTX_FN void draw_word(const Place& at, int w) {
    uint32_t bits = 0;
#pragma unroll 1
    for (int group = 3; group >= 0; --group) {
      const Philox draws(seed, at.row + w / C::kMaskWords, (at.col + w % C::kMaskWords * 32) / 8 + group);
#pragma unroll
      for (int j = 7; j >= 0; --j) bits = bits << 1 | (draws.draw(j) >= args.threshold);
    }
    s.mask[w] = bits;
  }
};

}  // namespace fused_lora::gemm
