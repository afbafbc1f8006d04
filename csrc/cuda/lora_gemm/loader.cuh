// lora_gemm's first warpgroup, thread 0: keeps the ring full through TMA. Where low comes out of this launch it waits,
// before a tile's low-rank blocks, for the flags of its rows.
//
// Source    PTX ISA 9.0 (cp.async.bulk.tensor, mbarrier)
#pragma once

#include "schedule.cuh"

namespace fused_lora::gemm {

struct Maps {
  const CUtensorMap *left, *right, *low, *thin, *down, *h, *dh, *x;
};

template <class C> struct Loader {
  static constexpr uint32_t kBytes = (kBlockM + C::kBlockN) * kBlockK * 2;
  Smem<C>& s;
  const Maps& maps;
  const Args<typename C::T>& args;
  const uint32_t cta;
  int drawn;  // block 0's number of the next tile
  uint32_t side_phase = 0;

  PTX_FN void run() {
    const Schedule<C> schedule{args};
    Ring<C::kStages> ring;
    Tiles<C> tiles(s, args, cta);
    ptx::prefetch(maps.left);
    ptx::prefetch(maps.right);
    if constexpr (C::kOneLaunch) tiles.hand_out(drawn);
    while (tiles.more()) {
      schedule.walk(*this, ring, tiles.place());
      if constexpr (C::kOneLaunch) tiles.hand_out(drawn);
      else tiles.step();
    }
  }

  PTX_FN void k_blocks(const KBlocks<C>& blocks, const Place& at) {
    const Ring<C::kStages>& ring = blocks.ring;
    for (const int i : blocks.all()) {
      const int k = blocks.k(i) * kBlockK;
      const bool makes_low = C::kOneLaunch && blocks.makes_low(i);
      ptx::wait(&s.empty[ring.slot], ring.phase ^ 1);
      ptx::arrive_expect(&s.full[ring.slot], kBytes + (makes_low ? C::kRank * kBlockK * 2 : 0));
      load_block(ring.slot, maps.left, maps.right, at, k);
      if (makes_low)
        ptx::tma_load(s.down[ring.slot], maps.down, &s.full[ring.slot], C::kRightMN ? k : 0, C::kRightMN ? 0 : k);
      if (C::kGradients && args.dB && i == min(C::kStages, blocks.count) - 1)
        load_side(maps.h, at.row);  // may wait: the ring is full first
    }
  }

  PTX_FN void low_blocks(const Blocks<C>& blocks, const Place& at) {
    const Ring<C::kStages>& ring = blocks.ring;
    if constexpr (C::kOneLaunch) {
      for (int r = at.row; r < min(at.row + kBlockM, args.M); r += 64)
        ptx::wait_flag(flag_of(args, r), args.low_columns);
      ptx::fence_proxy();  // low was written by ordinary stores, TMA reads it
      // Not before the wait, which in halves may be for the tile with the next number.
      if (cta == 0) drawn = atomicAdd(args.control, 1);
    }
    for (const int b : blocks) {
      ptx::wait(&s.empty[ring.slot], ring.phase ^ 1);
      ptx::arrive_expect(&s.full[ring.slot], kBytes);
      load_block(ring.slot, maps.low, maps.thin, at, b * kBlockK);
    }
  }

  PTX_FN void x_blocks(const XBlocks<C>& blocks, const Place& at) {
    if (!blocks.any) return;
    const Ring<C::kStages>& ring = blocks.ring;
    load_side(maps.dh, at.row);
    for (const int chunk : blocks) {
      ptx::wait(&s.empty[ring.slot], ring.phase ^ 1);
      ptx::arrive_expect(&s.full[ring.slot], kBlockM * kBlockK * 2);
      ptx::tma_load(s.left[ring.slot], maps.x, &s.full[ring.slot], at.row, at.col + chunk * 64);
    }
  }

 private:
  // One k-block of a left and a right operand; this block's half of the right one goes to both blocks.
  PTX_FN void load_block(int slot, const CUtensorMap* left, const CUtensorMap* right, const Place& at, int k) {
    constexpr uint16_t kBoth = (1 << kCluster) - 1;
    ptx::tma_load(s.left[slot], left, &s.full[slot], at.row, k);
    if constexpr (C::kRightMN) {
      for (int i = 0; i < C::kLoadRows / 64; ++i) {  // 64 columns, 64 k
        const int chunk = cta * (C::kLoadRows / 64) + i;
        ptx::tma_load_multicast(&s.right[slot][chunk * 64 * kBlockK], right, &s.full[slot], k, at.col + chunk * 64,
                                kBoth);
      }
    } else {
      const int first = cta * C::kLoadRows;
      ptx::tma_load_multicast(&s.right[slot][first * kBlockK], right, &s.full[slot], at.col + first, k, kBoth);
    }
  }

  // 128 rows of h or dh for the gradients.
  PTX_FN void load_side(const CUtensorMap* map, int row) {
    ptx::wait(&s.side_empty, side_phase ^ 1);
    ptx::arrive_expect(&s.side_full, sizeof s.side);
    ptx::tma_load(s.side, map, &s.side_full, row, 0);
    side_phase ^= 1;
  }
};

}  // namespace fused_lora::gemm
