// lora_gemm's first warpgroup, warps 1-3, in the backward with dropout: the mask bits of each tile of dx, out of the
// mask that prepare has drawn, while the consumers multiply.
//
// Why not drawn here: an instruction beside wgmma delays it by two or three cycles, since both want the registers.
// Drawn here the mask took 45 us of a dx of 8192 x 4096 x 4096, drawn before it 20 (H100, 2026-11-26)
// Shared    128 rows of kBlockN bits, one tile at a time: consumers and gradients free them before the next
#pragma once

#include "tiles.cuh"

namespace fused_lora::gemm {

template <class C> struct MaskLoader {
  static constexpr int kRounds = (kBlockM * C::kMaskWords + kMaskThreads - 1) / kMaskThreads;  // a word a thread each
  Smem<C>& s;
  const Args<typename C::T>& args;
  uint32_t phase = 0;

  PTX_FN MaskLoader(Smem<C>& s, const Args<typename C::T>& args) : s(s), args(args) {}

  PTX_FN void run(uint32_t cta) {
    Tiles<C> tiles(s, args, cta);
    tiles.first();
    while (tiles.more()) {
      load(tiles.place());
      phase ^= 1;
      if constexpr (C::kOneLaunch) __syncwarp();
      tiles.next(threadIdx.x % 32 == 0);
    }
  }

 private:
  PTX_FN void load(const Place& at) {
    ptx::wait(&s.mask_empty, phase ^ 1);
#pragma unroll 4
    for (int round = 0; round < kRounds; ++round) {
      const int w = round * kMaskThreads + threadIdx.x - 32;
      if (w < kBlockM * C::kMaskWords) s.mask[w] = word(at, w);
    }
    ptx::arrive(&s.mask_full);
  }

  PTX_FN uint32_t word(const Place& at, int w) const {
    const int row = at.row + w / C::kMaskWords, col = at.col / 32 + w % C::kMaskWords;
    const int words = static_cast<int>(mask_words(args.N));
    return row < args.M && col < words ? args.mask[static_cast<int64_t>(row) * words + col] : 0;
  }
};

}  // namespace fused_lora::gemm
