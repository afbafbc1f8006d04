// lora_gemm's fourth warpgroup: dB += dy^T h and dA += (mask * x)^T dh / (1 - p) in the launch that makes dx = dy W +
// mask * (dh A)
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

#include "tiles.cuh"

namespace fused_lora::gemm {

// d[64, kRank] = left^T side over the 128 rows of a staged tile.
template <class C> PTX_FN void multiply_rows(float (&d)[C::kRank / 2], Smem<C>& s, int slot) {
  constexpr int kSideBytes = C::kRank * 2, kStep = 16;  // bytes of a row of side; rows of a product
  const uint64_t left = ptx::descriptor(s.left[slot], 64 * 128, 1024, 128),
                 side = ptx::descriptor(s.side, 16, 8 * kSideBytes, kSideBytes);
  ptx::wgmma_fence();
#pragma unroll
  for (int q = 0; q < kBlockM / kStep; ++q)
    ptx::wgmma<typename C::T, C::kRank, true, true>(d, left + q * (kStep * 128 / 16),
                                                    side + q * (kStep * kSideBytes / 16), q > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait();
}

// sums[row, rank] += scale * d for 64 rows from `row` on.
template <class C>
PTX_FN void add_to(float* sums, int64_t row_stride, int64_t rank_stride, int row, int rows, int R, float scale,
                   const float (&d)[C::kRank / 2], int thread) {
  const int r0 = row + thread / 32 * 16 + thread % 32 / 4, c0 = thread % 4 * 2;
#pragma unroll
  for (int i = 0; i < C::kRank / 2; ++i) {
    const int r = r0 + i / 2 % 2 * 8, c = c0 + i / 4 * 8 + i % 2;
    if (r < rows && c < R) ptx::add(sums + r * row_stride + c * rank_stride, d[i] * scale);
  }
}

// Zeroes what the mask drops in 128 staged rows of 64 columns of x, one row a thread; `chunk`: which 64 columns of the
// tile.
template <class C> PTX_FN void mask_rows(Smem<C>& s, int slot, int chunk, int thread) {
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
  ptx::named_barrier(kFourthBarrier, 128);
}

// Warpgroup 3.
template <class C> PTX_FN void add_gradients(Smem<C>& s, const Args<typename C::T>& args, uint32_t cta, int thread) {
  const int k_blocks = (args.K + kBlockK - 1) / kBlockK;
  Ring<C::kStages> ring;
  Tiles<C> tiles(s, args.M, args.N);
  uint32_t mask_phase = 0, side_phase = 0;
  float d[C::kRank / 2];
  tiles.read();
  while (tiles.number < tiles.count()) {
    const TileIndex tile = tiles.index();
    const int col = tile.col * C::kBlockN;
    const bool rows = (tile.row * kCluster + cta) * kBlockM < args.M;  // else all there is is zeros
    for (int k = 0, mine = args.dB ? tile.col : k_blocks; k < k_blocks + 1;
         ++k, ring.next()) {  // the last one is the low-rank block
      ptx::wait(&s.full[ring.slot], ring.phase);
      if (k == mine && k < k_blocks) {
        ptx::wait(&s.side_full, side_phase);
        multiply_rows<C>(d, s, ring.slot);
        free_slot<C>(s, ring.slot, thread);
        add_to<C>(args.dB, args.R, 1, k * kBlockK, rows ? args.K : 0, args.R, 1.0f, d, thread);
        mine += tiles.col_tiles;
      } else {
        ptx::named_barrier(kFourthBarrier, 128);
        free_slot<C>(s, ring.slot, thread);
      }
    }
    if (args.dB) {
      ptx::wait(&s.side_full, side_phase);  // a tile without a step of its own
      ptx::named_barrier(kFourthBarrier, 128);
      if (thread == 0) ptx::arrive(&s.side_empty);
      side_phase ^= 1;
    }
    if (C::kMasked) ptx::wait(&s.mask_full, mask_phase);
    if (args.dA) {
      ptx::wait(&s.side_full, side_phase);
      for (int chunk = 0; chunk < C::kBlockN / 64; ++chunk, ring.next()) {
        ptx::wait(&s.full[ring.slot], ring.phase);
        if constexpr (C::kMasked) mask_rows<C>(s, ring.slot, chunk, thread);
        multiply_rows<C>(d, s, ring.slot);
        free_slot<C>(s, ring.slot, thread);
        add_to<C>(args.dA, 1, args.N, col + chunk * 64, rows ? args.N : 0, args.R, C::kMasked ? args.drop_scale : 1.0f,
                  d, thread);
      }
      ptx::named_barrier(kFourthBarrier, 128);
      if (thread == 0) ptx::arrive(&s.side_empty);
      side_phase ^= 1;
    }
    ptx::named_barrier(kFourthBarrier, 128);  // the whole warpgroup has read the mask and the tile's number
    if (C::kMasked && thread == 0) ptx::arrive(&s.mask_empty);
    mask_phase ^= 1;
    tiles.release(thread == 0);
    tiles.read();
  }
}

}  // namespace fused_lora::gemm
