// lora_gemm's first warpgroup, warps 1-3, in the forward with dropout: h = scale * drop(x) A^T in the launch that makes
// y = x W^T + h B^T
//
// Used for    the forward with dropout and 256 columns up to 32 ranks (kLowByWarps): without dropped_low.cuh's fourth
//             warpgroup the products are of 256 columns, and without its masked tile there is a fourth stage
// Work        of the k-blocks of which a tile makes low, 48, 48 or 32 of 128 rows a warp: the mask is drawn while a
//             block is on its way, a word a lane for 16 rows, and spread by shuffles to where ldmatrix puts x. All
//             others they only let pass. No second read of x, no masked copy
// Product     low[rows, R], mma.sync m16n8k16: both operands by ldmatrix from TMA's tiles, x masked in registers
// Cost        12 Philox calls a thread and k-step: 1.5 times dropped_low.cuh's, on three schedulers of four
// Source      Salmon et al., SC 2011 (philox.h); PTX ISA 9.0 (ldmatrix, mma)
#pragma once

#include "cuda/tile.cuh"
#include "schedule.cuh"

namespace fused_lora::gemm {

template <class C> struct DroppedLowWarps {
  using Left = Tile<kBlockM, kBlockK>;  // TMA's swizzles are Tile's
  using Down = Tile<C::kRank, kBlockK>;
  static constexpr int kStrips = 3;  // of 16 rows, at most: 8 strips for 3 warps

  Smem<C>& s;
  const Args<typename C::T>& args;
  const uint32_t cta;
  const int warp, lane;  // warp: 0 to 2
  const uint64_t seed;
  float low[kStrips][C::kRank / 8][4];
  uint32_t keep[kStrips];  // row lane / 2 of each strip, 32 columns from 32 (lane % 2) on

  PTX_FN DroppedLowWarps(Smem<C>& s, const Args<typename C::T>& args, uint32_t cta)
      : s(s),
        args(args),
        cta(cta),
        warp(threadIdx.x / 32 - 1),
        lane(threadIdx.x % 32),
        seed(static_cast<uint64_t>(*args.seed)) {}

  PTX_FN void run() {
    const Schedule<C> schedule{args};
    Ring<C::kStages> ring;
    Tiles<C> tiles(s, args, cta);
    tiles.first();
    while (tiles.more()) {
      schedule.walk(*this, ring, tiles.place());
      __syncwarp();  // all have read the tile's number
      tiles.next(lane == 0);
    }
  }

  PTX_FN void k_blocks(const KBlocks<C>& blocks, const Place& at) {
    const Ring<C::kStages>& ring = blocks.ring;
    if (!blocks.any_low() || at.row >= args.M) return low_blocks(blocks.all(), at);
    low_blocks(blocks.before_low(), at);
#pragma unroll
    for (auto& strip : low)
      for (auto& ranks : strip)
        for (float& d : ranks) d = 0.0f;
    for (const int i : blocks.low()) {
      draw(at.row, blocks.k(i) * kBlockK);
      warp_wait(&s.full[ring.slot], ring.phase);
      multiply(ring.slot);
      warp_free_slot<C>(s, ring.slot, lane);
    }
    publish_strips(at);
    low_blocks(blocks.after_low(), at);
  }

  PTX_FN void low_blocks(const Blocks<C>& blocks, const Place&) { warp_pass_blocks<C>(s, blocks, lane); }
  PTX_FN void x_blocks(const XBlocks<C>&, const Place&) {}  // none in the forward

 private:
  PTX_FN int first_strip() const { return warp * kStrips; }
  PTX_FN bool has(int strip) const { return strip < 2 || warp < 2; }

  // The mask of this warp's rows of the tile whose first row and column these are.
  PTX_FN void draw(int row, int col) {
#pragma unroll
    for (int t = 0; t < kStrips; ++t)
      if (has(t)) {
        uint32_t bits = 0;
#pragma unroll 2
        for (int group = 3; group >= 0; --group) {
          const Philox draws(seed, row + (first_strip() + t) * 16 + lane / 2, col / 8 + lane % 2 * 4 + group);
          bits = bits << 8 | draws.kept(args.threshold);
        }
        keep[t] = bits;
      }
  }

  // low += dropped down^T for this warp's rows.
  PTX_FN void multiply(int slot) {
    const uint8_t* const left = reinterpret_cast<const uint8_t*>(s.left[slot]);
    const uint8_t* const down = reinterpret_cast<const uint8_t*>(s.down[slot]);
    const int i = lane / 8, j = lane % 8;  // this lane's matrix of four, and its row there
#pragma unroll 1
    for (int half = 0; half < 2; ++half)  // 32 columns, a word of the mask
#pragma unroll
      for (int k = 0; k < 4; k += 2) {  // 16 of them: two chunks of 8
        const int chunk = half * 4 + k;
        uint32_t rows[kStrips][4];
#pragma unroll
        for (int t = 0; t < kStrips; ++t)
          if (has(t)) {
            ptx::ldmatrix<false>(rows[t], left + Left::offset((first_strip() + t) * 16 + i % 2 * 8 + j, chunk + i / 2));
#pragma unroll
            for (int lower = 0; lower < 2; ++lower) {  // rows 8 apart
              const uint32_t bits = ptx::shuffle(keep[t], lane / 4 * 2 + lower * 16 + half) >> (k * 8 + lane % 4 * 2);
              rows[t][lower] &= kept(bits);
              rows[t][lower + 2] &= kept(bits >> 8);
            }
          }
#pragma unroll
        for (int n = 0; n < C::kRank / 16; ++n) {
          uint32_t ranks[4];
          ptx::ldmatrix<false>(ranks, down + Down::offset(n * 16 + i / 2 * 8 + j, chunk + i % 2));
#pragma unroll
          for (int t = 0; t < kStrips; ++t)
            if (has(t)) {
              ptx::mma<typename C::T>(low[t][2 * n], rows[t], ranks[0], ranks[1]);
              ptx::mma<typename C::T>(low[t][2 * n + 1], rows[t], ranks[2], ranks[3]);
            }
        }
      }
  }
  // Two elements' bits as what they are and-ed with.
  static PTX_FN uint32_t kept(uint32_t bits) { return (bits & 1) * 0xffffu | (bits >> 1 & 1) * 0xffff0000u; }

  // As publish(), for the 128 rows of all three warps.
  PTX_FN void publish_strips(const Place& at) {
    if (at.col_tile > 0) wait_for_parts(args, at.col_tile, at.row, kBlockM);
#pragma unroll
    for (int t = 0; t < kStrips; ++t)
      if (has(t))
        hand_on<C>(reinterpret_cast<float (&)[C::kRank / 2]>(low[t]), args, at.col_tile,
                   at.row + (first_strip() + t) * 16);
    __threadfence();
    ptx::fence_proxy();
    ptx::named_barrier(1 + kFourth, kMaskThreads);
    if (warp == 0 && lane == 0)
      for (int r = at.row; r < min(at.row + kBlockM, args.M); r += 64)
        ptx::store_release(flag_of(args, r), at.col_tile + 1);
  }
};

}  // namespace fused_lora::gemm
