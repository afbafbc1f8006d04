// lora_gemm's fourth warpgroup in the forward with dropout: h = scale * drop(x) A^T in the launch that makes
// y = x W^T + h B^T
//
// Used for    the forward with dropout up to 64 ranks (kDropsLeft), beside the two warpgroups that multiply x by W,
//             which must not see the mask
// Work        of the k-blocks of which a tile makes low: a copy of each staged tile of x, masked, then its product with
//             the tile of A; 128 rows, one a thread. All others it only lets pass. No second read of x, and h as
//             everybody else publishes it
// Cost        8 Philox calls a thread and k-step, about 800 of the 1024 cycles that the k-step's products take
// Shared      one masked tile, 16 KiB
// Source      Salmon et al., SC 2011 (philox.h); PTX ISA 9.0
#pragma once

#include "cuda/tile.cuh"
#include "schedule.cuh"

namespace fused_lora::gemm {

template <class C> struct DroppedLow {
  Smem<C>& s;
  const Args<typename C::T>& args;
  const uint32_t cta;
  const int thread;
  const uint64_t seed;
  float upper[C::kRank / 2], lower[C::kRank / 2];  // 64 rows of low each

  PTX_FN DroppedLow(Smem<C>& s, const Args<typename C::T>& args, uint32_t cta, int thread)
      : s(s),
        args(args),
        cta(cta),
        thread(thread),
        seed(static_cast<uint64_t>(*args.seed)) {}

  PTX_FN void run() {
    const Schedule<C> schedule{args};
    Ring<C::kStages> ring;
    Tiles<C> tiles(s, args, cta);
    tiles.first();
    while (tiles.more()) {
      schedule.walk(*this, ring, tiles.place());
      sync_group(kFourth);  // all have read the tile's number
      tiles.next(thread == 0);
    }
  }

  PTX_FN void k_blocks(const KBlocks<C>& blocks, const Place& at) {
    const Ring<C::kStages>& ring = blocks.ring;
    if (!blocks.any_low() || at.row >= args.M) return low_blocks(blocks.all(), at);
    low_blocks(blocks.before_low(), at);
    for (const int i : blocks.low()) {
      ptx::wait(&s.full[ring.slot], ring.phase);
      sync_group(kFourth);  // all have seen the slot full, and are through with the last masked tile
      drop_tile(ring.slot, at.row, blocks.k(i) * kBlockK);
      multiply(ring.slot, i > blocks.walk.low_begin);
      free_slot<C>(s, ring.slot, thread);
    }
    publish<C>(upper, args, at.col_tile, at.row, kFourth, thread);
    if (at.row + 64 < args.M) publish<C>(lower, args, at.col_tile, at.row + 64, kFourth, thread);
    low_blocks(blocks.after_low(), at);
  }

  PTX_FN void low_blocks(const Blocks<C>& blocks, const Place&) { pass_blocks<C>(s, blocks, kFourth, thread); }
  PTX_FN void x_blocks(const XBlocks<C>&, const Place&) {}  // none in the forward

 private:
  // A copy of the staged left tile with what the mask drops zeroed, one row a thread; row and col are the tile's first.
  PTX_FN void drop_tile(int slot, int row, int col) {
    const uint8_t* const from = reinterpret_cast<const uint8_t*>(s.left[slot]) + thread * 128;
    uint8_t* const to = reinterpret_cast<uint8_t*>(s.side) + thread * 128;
    constexpr int kAtOnce = C::kRank == 64 ? 2 : 4;  // chains of products beside each other
#pragma unroll kAtOnce
    for (int i = 0; i < 8; ++i) {
      const int at = (i ^ (thread & 7)) * 16;
      *reinterpret_cast<uint4*>(to + at) =
          drop(*reinterpret_cast<const uint4*>(from + at), Philox(seed, row + thread, col / 8 + i), args.threshold);
    }
    ptx::fence_proxy_shared();
    sync_group(kFourth);
  }

  // low (+)= dropped down^T for the upper and the lower 64 rows.
  PTX_FN void multiply(int slot, bool accumulate) {
    const uint64_t left = ptx::descriptor(s.side, 16, 1024, 128), down = ptx::descriptor(s.down[slot], 16, 1024, 128);
    ptx::wgmma_fence();
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      ptx::wgmma<typename C::T, C::kRank, false>(upper, left + q * 2, down + q * 2, accumulate || q > 0);
      ptx::wgmma<typename C::T, C::kRank, false>(lower, left + 64 * 128 / 16 + q * 2, down + q * 2,
                                                 accumulate || q > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait();
  }
};

}  // namespace fused_lora::gemm
