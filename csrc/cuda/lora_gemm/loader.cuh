// lora_gemm's first warpgroup: one thread keeps the ring full through TMA; in the backward with dropout three warps
// draw the mask.
//
// Order of a tile's loads: its k-blocks; where low comes out of this launch the wait for its rows' flags; the low-rank
// blocks; for dA the tile's
// own columns of x. All roles go through the ring in this order. Source: PTX ISA 9.0 (cp.async.bulk.tensor, mbarrier)
#pragma once

#include "philox.h"
#include "tiles.cuh"

namespace fused_lora::gemm {

struct Maps {
  const CUtensorMap *left, *right, *low, *thin, *down, *h, *dh, *x;
};

// 128 rows of h or dh for the gradients.
template <class C> PTX_FN void load_side(Smem<C>& s, const CUtensorMap* map, int row, uint32_t& phase) {
  ptx::wait(&s.side_empty, phase ^ 1);
  ptx::arrive_expect(&s.side_full, sizeof s.side);
  ptx::tma_load(s.side, map, &s.side_full, row, 0);
  phase ^= 1;
}

// One k-block of a left and a right operand; this block's half of the right one goes to both blocks.
template <class C>
PTX_FN void load_block(Smem<C>& s, int slot, const CUtensorMap* left, const CUtensorMap* right, int row, int col, int k,
                       uint32_t cta) {
  constexpr uint16_t kBoth = (1 << kCluster) - 1;
  ptx::tma_load(s.left[slot], left, &s.full[slot], row, k);
  if constexpr (C::kRightMN) {
    for (int i = 0; i < C::kLoadRows / 64; ++i) {  // 64 columns, 64 k
      const int chunk = cta * (C::kLoadRows / 64) + i;
      ptx::tma_load_multicast(&s.right[slot][chunk * 64 * kBlockK], right, &s.full[slot], k, col + chunk * 64, kBoth);
    }
  } else {
    const int first = cta * C::kLoadRows;
    ptx::tma_load_multicast(&s.right[slot][first * kBlockK], right, &s.full[slot], col + first, k, kBoth);
  }
}

// Warpgroup 0, thread 0: keeps the ring full.
template <class C>
PTX_FN void load_tiles(Smem<C>& s, const Maps& maps, const Args<typename C::T>& args, uint32_t cta, int drawn) {
  constexpr uint32_t kBytes = (kBlockM + C::kBlockN) * kBlockK * 2;
  const int k_blocks = (args.K + kBlockK - 1) / kBlockK, low_blocks = (args.R + kBlockK - 1) / kBlockK;
  Ring<C::kStages> ring;
  Tiles<C> tiles(s, args.M, args.N);
  uint32_t side_phase = 0;
  ptx::prefetch(maps.left);
  ptx::prefetch(maps.right);
  if constexpr (C::kOneLaunch) tiles.hand_out(cta, drawn);
  while (tiles.number < tiles.count()) {
    const TileIndex tile = tiles.index();
    const int row = (tile.row * kCluster + cta) * kBlockM, col = tile.col * C::kBlockN;
    const bool first = C::kOneLaunch && tile.col == 0;
    for (int k = 0; k < k_blocks; ++k) {
      ptx::wait(&s.empty[ring.slot], ring.phase ^ 1);
      ptx::arrive_expect(&s.full[ring.slot], kBytes + (first ? C::kRank * kBlockK * 2 : 0));
      load_block<C>(s, ring.slot, maps.left, maps.right, row, col, k * kBlockK, cta);
      if (first)
        ptx::tma_load(s.down[ring.slot], maps.down, &s.full[ring.slot], C::kRightMN ? k * kBlockK : 0,
                      C::kRightMN ? 0 : k * kBlockK);
      ring.next();
      if (C::kGradients && args.dB && k == min(C::kStages, k_blocks) - 1)
        load_side<C>(s, maps.h, row, side_phase);  // may wait: the ring is full first
    }
    if constexpr (C::kOneLaunch) {
      if (cta == 0) drawn = atomicAdd(args.control, 1);
      for (int r = row; r < min(row + kBlockM, args.M); r += 64) {
        while (ptx::load_acquire(args.control + kControlFlags + r / 64) == 0) {}
      }
      ptx::fence_proxy();  // low was written by ordinary stores, TMA reads it
    }
    for (int b = 0; b < low_blocks; ++b) {
      ptx::wait(&s.empty[ring.slot], ring.phase ^ 1);
      ptx::arrive_expect(&s.full[ring.slot], kBytes);
      load_block<C>(s, ring.slot, maps.low, maps.thin, row, col, b * kBlockK, cta);
      ring.next();
    }
    if (C::kGradients && args.dA) {
      load_side<C>(s, maps.dh, row, side_phase);
      for (int c = 0; c < C::kBlockN; c += 64, ring.next()) {
        ptx::wait(&s.empty[ring.slot], ring.phase ^ 1);
        ptx::arrive_expect(&s.full[ring.slot], kBlockM * kBlockK * 2);
        ptx::tma_load(s.left[ring.slot], maps.x, &s.full[ring.slot], row, col + c);
      }
    }
    if constexpr (C::kOneLaunch) tiles.hand_out(cta, drawn);
    else tiles.step();
  }
}

// Warpgroup 0, warps 1-3: the mask bits of each tile, one Philox call for 8 columns, while the consumers multiply.
template <class C> PTX_FN void draw_masks(Smem<C>& s, const Args<typename C::T>& args, uint32_t cta) {
  const int thread = threadIdx.x - 32;
  const uint64_t seed = static_cast<uint64_t>(*args.seed);
  Tiles<C> tiles(s, args.M, args.N);
  if constexpr (C::kOneLaunch) tiles.read();
  uint32_t phase = 0;
  while (tiles.number < tiles.count()) {
    const TileIndex tile = tiles.index();
    const int row = (tile.row * kCluster + cta) * kBlockM, col = tile.col * C::kBlockN;
    ptx::wait(&s.mask_empty, phase ^ 1);
    for (int w = thread; w < kBlockM * C::kMaskWords; w += kMaskThreads) {
      uint32_t bits = 0;
#pragma unroll 1
      for (int group = 3; group >= 0; --group) {
        const Philox draws(seed, row + w / C::kMaskWords, (col + w % C::kMaskWords * 32) / 8 + group);
#pragma unroll
        for (int j = 7; j >= 0; --j) bits = bits << 1 | (draws.draw(j) >= args.threshold);
      }
      s.mask[w] = bits;
    }
    ptx::arrive(&s.mask_full);
    phase ^= 1;
    if constexpr (C::kOneLaunch) {
      __syncwarp();
      tiles.release(threadIdx.x % 32 == 0);
      tiles.read();
    } else {
      tiles.step();
    }
  }
}

}  // namespace fused_lora::gemm
