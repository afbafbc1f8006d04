// lora_gemm's first warpgroup, warps 1-3: dB += dy^T h and dA += (mask * x)^T dh / (1 - p) in the launch that makes
// dx = dy W + mask * (dh A), and with dropout dx's mask, too
//
// Used for    the backward with 256 columns (kSideWarps), with dropout up to 16 ranks: beside a fourth warpgroup there
//             are no registers for products of 256 columns
// Work        as gradients.cuh: of T column tiles, tile j makes dB of the k-steps k with k mod T = j; after a tile's
//             low-rank block its columns of x come through the ring for dA. Each warp takes 24, 24 or 16 of 64 columns
//             and waits for nobody but the ring. With dropout they fetch a few words of the mask after each k-block
// Product     sum[R, columns] = side^T left over 128 rows, mma.sync m16n8k16: ranks are m, columns n; both operands
//             transposed by ldmatrix on their way from TMA's tiles. x is masked in registers
// Sums        fp32, by atomics: in no fixed order. Deterministic mode takes wgrad.cu
// Shared      128 rows of h or dh; the ring is lora_gemm's
// Source      PTX ISA 9.0 (ldmatrix, mma)
#pragma once

#include "cuda/tile.cuh"
#include "mask.cuh"
#include "schedule.cuh"

namespace fused_lora::gemm {

template <class C> struct GradientWarps {
  using Left = Tile<kBlockM, kBlockK>;  // TMA's swizzles are Tile's
  using Side = Tile<kBlockM, C::kRank>;
  static constexpr int kOctets = 3;  // of columns, at most: 8 octets for 3 warps

  Smem<C>& s;
  const Args<typename C::T>& args;
  const uint32_t cta;
  const int warp, lane;  // warp: 0 to 2
  MaskLoader<C> mask;
  uint32_t side_phase = 0;
  float sum[kOctets][C::kRank / 16][4];  // this warp's columns for kRank ranks

  PTX_FN GradientWarps(Smem<C>& s, const Args<typename C::T>& args, uint32_t cta)
      : s(s),
        args(args),
        cta(cta),
        warp(threadIdx.x / 32 - 1),
        lane(threadIdx.x % 32),
        mask(s, args) {}

  PTX_FN void run() {
    const Schedule<C> schedule{args};
    Ring<C::kStages> ring;
    Tiles<C> tiles(s, args, cta);
    tiles.first();
    while (tiles.more()) {
      schedule.walk(*this, ring, tiles.place());
      __syncwarp();  // all have read the mask and the tile's number
      if (C::kMasked && lane == 0) ptx::arrive(&s.mask_empty);
      mask.next();
      tiles.next(lane == 0);
    }
  }

  // dB, in the steps of this tile's column. Rows past M are zeros: nothing to add.
  PTX_FN void k_blocks(const KBlocks<C>& blocks, const Place& at) {
    const Ring<C::kStages>& ring = blocks.ring;
    const int col_tiles = (args.N + C::kBlockN - 1) / C::kBlockN;
    for (const int i : blocks.all()) {
      const int k = blocks.k(i);
      warp_wait(&s.full[ring.slot], ring.phase);
      if (args.dB && k % col_tiles == at.col_tile) {
        warp_wait(&s.side_full, side_phase);
        multiply_rows<false>(ring.slot, 0);
        warp_free_slot<C>(s, ring.slot, lane);
        add_to<false>(args.dB, k * kBlockK, at.row < args.M ? args.K : 0, 1.0f);
      } else {
        warp_free_slot<C>(s, ring.slot, lane);
      }
      if constexpr (C::kMasked) mask.load(at, i + 1, blocks.count);
    }
    if (args.dB) {
      warp_wait(&s.side_full, side_phase);  // a tile without a step of its own
      free_side();
    }
  }

  PTX_FN void low_blocks(const Blocks<C>& blocks, const Place&) { warp_pass_blocks<C>(s, blocks, lane); }

  // dA.
  PTX_FN void x_blocks(const XBlocks<C>& blocks, const Place& at) {
    if (C::kMasked) warp_wait(&s.mask_full, mask.phase);
    if (!blocks.any) return;
    const Ring<C::kStages>& ring = blocks.ring;
    warp_wait(&s.side_full, side_phase);
    for (const int chunk : blocks) {
      warp_wait(&s.full[ring.slot], ring.phase);
      multiply_rows<C::kMasked>(ring.slot, chunk);
      warp_free_slot<C>(s, ring.slot, lane);
      add_to<true>(args.dA, at.col + chunk * 64, at.row < args.M ? args.N : 0, C::kMasked ? args.drop_scale : 1.0f);
    }
    free_side();
  }

 private:
  PTX_FN int first_octet() const { return warp * kOctets; }
  PTX_FN bool has(int octet) const { return octet < 2 || warp < 2; }

  PTX_FN void free_side() {
    __syncwarp();
    if (lane == 0) ptx::arrive(&s.side_empty);
    side_phase ^= 1;
  }

  // sum = side^T left over the 128 rows of a staged tile.
  template <bool kMaskedLeft> PTX_FN void multiply_rows(int slot, int chunk) {
    const uint8_t* const left = reinterpret_cast<const uint8_t*>(s.left[slot]);
    const uint8_t* const side = reinterpret_cast<const uint8_t*>(s.side);
    const int i = lane / 8, j = lane % 8;  // this lane's matrix of four, and its row there
#pragma unroll
    for (auto& octet : sum)
      for (auto& ranks : octet)
        for (float& d : ranks) d = 0.0f;
#pragma unroll 1
    for (int row = 0; row < kBlockM; row += 32) {
      uint32_t columns[kOctets][4];
#pragma unroll
      for (int n = 0; n < kOctets; ++n)
        if (has(n)) {
          ptx::ldmatrix<true>(columns[n], left + Left::offset(row + lane, first_octet() + n));
          if constexpr (kMaskedLeft) drop(columns[n], row, chunk * 64 + (first_octet() + n) * 8);
        }
#pragma unroll
      for (int k = 0; k < 2; ++k)  // 16 rows
#pragma unroll
        for (int m = 0; m < C::kRank / 16; ++m) {
          uint32_t ranks[4];
          ptx::ldmatrix<true>(ranks, side + Side::offset(row + k * 16 + i / 2 * 8 + j, m * 2 + i % 2));
#pragma unroll
          for (int n = 0; n < kOctets; ++n)
            if (has(n)) ptx::mma<typename C::T>(sum[n][m], ranks, columns[n][2 * k], columns[n][2 * k + 1]);
        }
    }
  }

  // Zeroes what the mask drops in 32 rows from `row` on and 8 of the tile's columns from `col` on, as ldmatrix has
  // spread them: rows 8 i + 2 (lane % 4) and one more in v[i], column lane / 4.
  PTX_FN void drop(uint32_t (&v)[4], int row, int col) {
    const int mine = col + lane / 4;
    const uint32_t* words = &s.mask[(row + lane % 4 * 2) * C::kMaskWords + mine / 32];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t lower = words[i * 8 * C::kMaskWords] >> mine % 32 & 1,
                     upper = words[(i * 8 + 1) * C::kMaskWords] >> mine % 32 & 1;
      v[i] &= lower * 0xffffu | upper * 0xffff0000u;
    }
  }

  // sums[i, r] += scale * sum for this warp's of 64 rows of sums from `row` on, up to `rows`, and all ranks r; dA lies
  // transposed.
  template <bool kTransposed> PTX_FN void add_to(float* sums, int row, int rows, float scale) {
    const int r0 = row + first_octet() * 8 + lane % 4 * 2, c0 = lane / 4;
    const int64_t row_stride = kTransposed ? 1 : args.R, rank_stride = kTransposed ? args.N : 1;
#pragma unroll
    for (int m = 0; m < C::kRank / 16; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = c0 + m * 16 + half * 8;
        float* const to = sums + r0 * row_stride + c * rank_stride;
#pragma unroll
        for (int n = 0; n < kOctets; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (has(n) && r0 + n * 8 + e < rows && c < args.R)
              ptx::add(to + (n * 8 + e) * row_stride, sum[n][m][half * 2 + e] * scale);
      }
  }
};

}  // namespace fused_lora::gemm
