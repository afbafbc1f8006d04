// lora_gemm's fourth warpgroup: dB += dy^T h and dA += (mask * x)^T dh / (1 - p) in the launch that makes
// dx = dy W + mask * (dh A)
//
// Used for    the backward, where dh comes out of the same launch (kGradients); runs beside the two warpgroups that
//             multiply for dx
// dB [N, R]   all tiles of a row block stream the same dy. Of T column tiles, tile j does the k-steps k with k mod T =
//             j: the staged left tile is read with its 64 columns as wgmma's m (MN-major), the right operand is 128
//             rows of h. No second read of dy
// dA [R, K]   after a tile's low-rank block its own columns of x come through the ring, 64 at a time: x^T dh alike, x
//             masked by the bits of dx's tile, which has the same rows and columns
// Sums        fp32, by atomics: in no fixed order. Deterministic mode takes wgrad.cu
// Shared      128 rows of h or dh; the ring is lora_gemm's
// Source      PTX ISA 9.0 (wgmma with an MN-major left operand)
#pragma once

#include "schedule.cuh"

namespace fused_lora::gemm {

template <class C> struct Gradients {
  Smem<C>& s;
  const Args<typename C::T>& args;
  const uint32_t cta;
  const int thread;
  uint32_t mask_phase = 0, side_phase = 0;
  float sum[C::kRank / 2];  // of 64 columns of left or x, for kRank ranks

  PTX_FN Gradients(Smem<C>& s, const Args<typename C::T>& args, uint32_t cta, int thread)
      : s(s),
        args(args),
        cta(cta),
        thread(thread) {}

  PTX_FN void run() {
    const Schedule<C> schedule{args};
    Ring<C::kStages> ring;
    Tiles<C> tiles(s, args, cta);
    tiles.first();
    while (tiles.more()) {
      schedule.walk(*this, ring, tiles.place());
      sync_group(kFourth);  // all have read the mask and the tile's number
      if (C::kMasked && thread == 0) ptx::arrive(&s.mask_empty);
      mask_phase ^= 1;
      tiles.next(thread == 0);
    }
  }

  // dB, in the steps of this tile's column. Rows past M are zeros: nothing to add.
  PTX_FN void k_blocks(const KBlocks<C>& blocks, const Place& at) {
    const Ring<C::kStages>& ring = blocks.ring;
    const int col_tiles = (args.N + C::kBlockN - 1) / C::kBlockN;
    for (const int i : blocks.all()) {
      const int k = blocks.k(i);
      ptx::wait(&s.full[ring.slot], ring.phase);
      if (args.dB && k % col_tiles == at.col_tile) {
        ptx::wait(&s.side_full, side_phase);
        multiply_rows(ring.slot);
        free_slot<C>(s, ring.slot, thread);
        add_to(args.dB, args.R, 1, k * kBlockK, at.row < args.M ? args.K : 0, 1.0f);
      } else {
        sync_group(kFourth);
        free_slot<C>(s, ring.slot, thread);
      }
    }
    if (args.dB) {
      ptx::wait(&s.side_full, side_phase);  // a tile without a step of its own
      free_side();
    }
  }

  PTX_FN void low_blocks(const Blocks<C>& blocks, const Place&) { pass_blocks<C>(s, blocks, kFourth, thread); }

  // dA.
  PTX_FN void x_blocks(const XBlocks<C>& blocks, const Place& at) {
    if (C::kMasked) ptx::wait(&s.mask_full, mask_phase);
    if (!blocks.any) return;
    const Ring<C::kStages>& ring = blocks.ring;
    ptx::wait(&s.side_full, side_phase);
    for (const int chunk : blocks) {
      ptx::wait(&s.full[ring.slot], ring.phase);
      if constexpr (C::kMasked) mask_rows(ring.slot, chunk);
      multiply_rows(ring.slot);
      free_slot<C>(s, ring.slot, thread);
      add_to(args.dA, 1, args.N, at.col + chunk * 64, at.row < args.M ? args.N : 0,
             C::kMasked ? args.drop_scale : 1.0f);
    }
    free_side();
  }

 private:
  PTX_FN void free_side() {
    sync_group(kFourth);
    if (thread == 0) ptx::arrive(&s.side_empty);
    side_phase ^= 1;
  }

  // sum[64, kRank] = left^T side over the 128 rows of a staged tile.
  PTX_FN void multiply_rows(int slot) {
    constexpr int kSideBytes = C::kRank * 2, kStep = 16;  // bytes of a row of side; rows of a product
    const uint64_t left = ptx::descriptor(s.left[slot], 64 * 128, 1024, 128),
                   side = ptx::descriptor(s.side, 16, 8 * kSideBytes, kSideBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int q = 0; q < kBlockM / kStep; ++q)
      ptx::wgmma<typename C::T, C::kRank, true, true>(sum, left + q * (kStep * 128 / 16),
                                                      side + q * (kStep * kSideBytes / 16), q > 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait();
  }

  // sums[i, r] += scale * sum for 64 rows of sums from `row` on, up to `rows`, and all ranks r.
  PTX_FN void add_to(float* sums, int64_t row_stride, int64_t rank_stride, int row, int rows, float scale) {
    const int r0 = row + thread / 32 * 16 + thread % 32 / 4, c0 = thread % 4 * 2;
#pragma unroll
    for (int i = 0; i < C::kRank / 2; ++i) {
      const int r = r0 + i / 2 % 2 * 8, c = c0 + i / 4 * 8 + i % 2;
      if (r < rows && c < args.R) ptx::add(sums + r * row_stride + c * rank_stride, sum[i] * scale);
    }
  }

  // Zeroes what the mask drops in 128 staged rows of x, one row a thread; `chunk`: which 64 columns of the tile.
  PTX_FN void mask_rows(int slot, int chunk) {
    uint8_t* const line = reinterpret_cast<uint8_t*>(s.left[slot]) + thread * 128;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t keep = s.mask[thread * C::kMaskWords + chunk * 2 + i / 4] >> (i % 4 * 8);
      uint4& v = *reinterpret_cast<uint4*>(line + (i ^ (thread & 7)) * 16);
      uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int w = 0; w < 4; ++w)
        words[w] &= (keep >> (2 * w) & 1 ? 0xffffu : 0u) | (keep >> (2 * w + 1) & 1 ? 0xffff0000u : 0u);
      v = uint4{words[0], words[1], words[2], words[3]};
    }
    ptx::fence_proxy_shared();
    sync_group(kFourth);
  }
};

}  // namespace fused_lora::gemm
