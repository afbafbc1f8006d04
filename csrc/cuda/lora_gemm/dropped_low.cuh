// lora_gemm's fourth warpgroup in the forward with dropout: h = scale * drop(x) A^T in the launch that makes y = x W^T
// + h B^T
//
// Used for    the forward with dropout up to 64 ranks (kDropsLeft), beside the two warpgroups that multiply x by W,
//             which must not see the mask
// Work        of column 0's tiles alone: a copy of each staged tile of x, masked, then its product with the tile of A;
//             128 rows, one a thread. Of the other tiles it only lets the k-blocks pass. No second read of x, and h as
//             everybody else publishes it
// Cost        8 Philox calls a thread and k-step, about 800 of the 1024 cycles that the k-step's products take
// Shared      one masked tile, 16 KiB
// Source      Salmon et al., SC 2011 (philox.h); PTX ISA 9.0
#pragma once

#include "cuda/tile.cuh"
#include "tiles.cuh"

namespace fused_lora::gemm {

// The staged left tile with what the mask drops zeroed, one row a thread; `first`: its first column.
template <class C>
PTX_FN void drop_tile(Smem<C>& s, int slot, uint64_t seed, uint32_t threshold, int row, int first, int thread) {
  const uint8_t* const from = reinterpret_cast<const uint8_t*>(s.left[slot]) + thread * 128;
  uint8_t* const to = reinterpret_cast<uint8_t*>(s.side) + thread * 128;
#pragma unroll 2
  for (int i = 0; i < 8; ++i) {
    const int at = (i ^ (thread & 7)) * 16;
    *reinterpret_cast<uint4*>(to + at) =
        drop(*reinterpret_cast<const uint4*>(from + at), Philox(seed, row + thread, first / 8 + i), threshold);
  }
  ptx::fence_proxy_shared();
  ptx::named_barrier(kFourthBarrier, 128);
}

// low (+)= dropped down^T for the upper and the lower 64 rows.
template <class C>
PTX_FN void multiply_dropped(float (&upper)[C::kRank / 2], float (&lower)[C::kRank / 2], Smem<C>& s, int slot,
                             bool accumulate) {
  const uint64_t left = ptx::descriptor(s.side, 16, 1024, 128), down = ptx::descriptor(s.down[slot], 16, 1024, 128);
  ptx::wgmma_fence();
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    ptx::wgmma<typename C::T, C::kRank, false>(upper, left + q * 2, down + q * 2, accumulate || q > 0);
    ptx::wgmma<typename C::T, C::kRank, false>(lower, left + 64 * 128 / 16 + q * 2, down + q * 2, accumulate || q > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait();
}

// Warpgroup 3.
template <class C> PTX_FN void make_dropped_low(Smem<C>& s, const Args<typename C::T>& args, uint32_t cta, int thread) {
  const int k_blocks = (args.K + kBlockK - 1) / kBlockK, low_blocks = (args.R + kBlockK - 1) / kBlockK;
  const uint64_t seed = static_cast<uint64_t>(*args.seed);
  Ring<C::kStages> ring;
  Tiles<C> tiles(s, args.M, args.N);
  float upper[C::kRank / 2], lower[C::kRank / 2];
  tiles.read();
  while (tiles.number < tiles.count()) {
    const TileIndex tile = tiles.index();
    const int row = (tile.row * kCluster + cta) * kBlockM, makes = tile.col == 0 && row < args.M ? k_blocks : 0;
    for (int k = 0; k < k_blocks + low_blocks; ++k, ring.next()) {
      ptx::wait(&s.full[ring.slot], ring.phase);
      ptx::named_barrier(kFourthBarrier,
                         128);  // all have seen the slot full, and are through with the last masked tile
      if (k < makes) {
        drop_tile<C>(s, ring.slot, seed, args.threshold, row, k * kBlockK, thread);
        multiply_dropped<C>(upper, lower, s, ring.slot, k > 0);
      }
      free_slot<C>(s, ring.slot, thread);
      if (makes && k == makes - 1) {
        publish<C>(upper, args, row, 2, thread);
        if (row + 64 < args.M) publish<C>(lower, args, row + 64, 2, thread);
      }
    }
    ptx::named_barrier(kFourthBarrier, 128);  // the whole warpgroup has read the tile's number
    tiles.release(thread == 0);
    tiles.read();
  }
}

}  // namespace fused_lora::gemm
