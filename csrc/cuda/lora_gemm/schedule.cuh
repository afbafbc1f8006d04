// The ring of staged blocks: what goes through it for one tile, and in which order. Every role walks this schedule.
//
//   k_blocks     left and right, 64 deep; where a tile makes low the same part of down, too
//   low_blocks   64 ranks of low and thin
//   x_blocks     64 of the tile's columns of x, where dA is made in dx's launch
//
// A role has a method for each of the three and takes every block that it is given, in order. It may hold as many
// blocks at once as the ring has slots: what waits for a block behind those, waits for ever.
#pragma once

#include "tiles.cuh"

namespace fused_lora::gemm {

// Blocks that come next in the ring; `for (const int i : blocks)` walks their numbers and leaves the ring behind them.
template <class C> struct Blocks {
  Ring<C::kStages>& ring;
  int from, to;

  struct Iterator {
    Ring<C::kStages>& ring;
    int i;
    PTX_FN int operator*() const { return i; }
    PTX_FN bool operator!=(int end) const { return i < end; }
    PTX_FN void operator++() {
      ++i;
      ring.next();
    }
  };
  PTX_FN Iterator begin() const { return {ring, from}; }
  PTX_FN int end() const { return to; }
};

// A tile's k-blocks in the order in which they come, k(i) the i-th of `count`. before_low() is all where it makes none.
template <class C> struct KBlocks {
  Ring<C::kStages>& ring;
  int count;
  KWalk walk;

  PTX_FN int k(int i) const { return i + walk.first < count ? i + walk.first : i + walk.first - count; }
  PTX_FN bool makes_low(int i) const { return i >= walk.low_begin && i < walk.low_end; }
  PTX_FN bool any_low() const { return walk.low_begin < count; }
  PTX_FN Blocks<C> all() const { return {ring, 0, count}; }
  PTX_FN Blocks<C> before_low() const { return {ring, 0, walk.low_begin}; }
  PTX_FN Blocks<C> low() const { return {ring, walk.low_begin, walk.low_end}; }
  PTX_FN Blocks<C> after_low() const { return {ring, walk.low_end, count}; }
};

// The same of x, whose number is known: all of a tile's, if `any`.
template <class C> struct XBlocks {
  Ring<C::kStages>& ring;
  bool any;

  PTX_FN typename Blocks<C>::Iterator begin() const { return {ring, 0}; }
  PTX_FN constexpr int end() const { return C::kChunks; }
};

template <class C> struct Schedule {
  const Args<typename C::T>& args;

  PTX_FN int k_blocks() const { return (args.K + kBlockK - 1) / kBlockK; }
  PTX_FN int low_blocks() const { return (args.R + kBlockK - 1) / kBlockK; }
  PTX_FN bool any_x() const { return C::kGradients && args.dA; }

  template <class Role> PTX_FN void walk(Role& role, Ring<C::kStages>& ring, const Place& at) const {
    const KWalk& walk = args.walks[C::kOneLaunch ? min(at.col_tile, kMaxLowColumns) : kMaxLowColumns];
    role.k_blocks(KBlocks<C>{ring, k_blocks(), walk}, at);
    role.low_blocks(Blocks<C>{ring, 0, low_blocks()}, at);
    role.x_blocks(XBlocks<C>{ring, any_x()}, at);
  }
  PTX_FN Blocks<C> all(Ring<C::kStages>& ring) const {
    return {ring, 0, k_blocks() + low_blocks() + (any_x() ? C::kChunks : 0)};
  }
};

// A warpgroup is through with a slot, to which the loaders of both blocks write. All its warps must have seen the slot
// full, by a product or a barrier: one that looks when the slot is full again sees the other parity, and waits for
// ever.
template <class C> PTX_FN void free_slot(Smem<C>& s, int slot, int thread) {
  if (thread < kCluster) ptx::arrive_remote(&s.empty[slot], thread);
}

// A block that a warpgroup does not use.
template <class C> PTX_FN void pass_block(Smem<C>& s, const Ring<C::kStages>& ring, int group, int thread) {
  ptx::wait(&s.full[ring.slot], ring.phase);
  sync_group(group);
  free_slot<C>(s, ring.slot, thread);
}

template <class C> PTX_FN void pass_blocks(Smem<C>& s, const Blocks<C>& blocks, int group, int thread) {
#pragma unroll 1
  for ([[maybe_unused]] const int i : blocks) pass_block<C>(s, blocks.ring, group, thread);
}

// The same for a warp by itself. All its lanes leave a wait together, as ldmatrix, mma and the next arrival want.
PTX_FN void warp_wait(uint64_t* bar, uint32_t parity) {
  ptx::wait(bar, parity);
  __syncwarp();
}

template <class C> PTX_FN void warp_free_slot(Smem<C>& s, int slot, int lane) {
  __syncwarp();  // all are through with it
  free_slot<C>(s, slot, lane);
}

template <class C> PTX_FN void warp_pass_blocks(Smem<C>& s, const Blocks<C>& blocks, int lane) {
#pragma unroll 1
  for ([[maybe_unused]] const int i : blocks) {
    warp_wait(&s.full[blocks.ring.slot], blocks.ring.phase);
    warp_free_slot<C>(s, blocks.ring.slot, lane);
  }
}

}  // namespace fused_lora::gemm
