// lora_gemm's warpgroups 1 and 2: out = alpha * left right + low thin + bias, 64 rows of each tile by each of them.
//
// Used for    every instance; kMakesLow: in column 0 also low = scale * left down, from the same staged tiles, or half
//             of it in columns 0 and 1
// Tile        64 x kBlockN: kBlockN / 2 accumulators a thread, while it makes low kRank / 2 more. wgmma m64 n256 (n128)
//             k16, both operands in shared memory
// Low rank    straight into the accumulators; kMasked: 64 columns at a time through 32 accumulators of its own and the
//             mask, so that all low-rank blocks of a tile wait in the ring until it is stored
// Out         64 columns at a time through 64 x 64 elements of shared memory and TMA
// Numerics    fp32 sums over the whole of K, one rounding at the store
// Source      PTX ISA 9.0 (wgmma, stmatrix)
#pragma once

#include "schedule.cuh"

namespace fused_lora::gemm {

// Descriptors of a staged block's operands. Left and K-major right: rows of 128 bytes, 8 of them 1024 bytes; k16 is 32
// bytes further. MN-major right: chunks of 64 columns, 64 k-rows of 128 bytes each; k16 is 16 rows further.
template <class C> struct Operands {
  static constexpr int kLeftStep = 32 / 16, kRightStep = (C::kRightMN ? 16 * 128 : 32) / 16;
  static constexpr int kDownBytes = C::kRightMN ? C::kRank * 2 : 128;  // of a row of the tile of down, and its swizzle
  static constexpr int kDownStep = (C::kRightMN ? 16 * kDownBytes : 32) / 16;
  uint64_t left, right;

  PTX_FN Operands(Smem<C>& s, int slot, int group)
      : left(ptx::descriptor(&s.left[slot][group * 64 * kBlockK], 16, 1024, 128)),
        right(ptx::descriptor(s.right[slot], C::kRightMN ? 64 * kBlockK * 2 : 16, 1024, 128)) {}
  static PTX_FN uint64_t down(Smem<C>& s, int slot) {
    return ptx::descriptor(s.down[slot], 16, 8 * kDownBytes, kDownBytes);
  }
};

// d (+)= left right, 16 deep. ptxas refuses 256 columns at once to kernels of 512 threads, whose registers at entry are
// 128 a thread (its C7602).
template <class C, int kN> PTX_FN void product(float (&d)[kN / 2], uint64_t left, uint64_t right, int accumulate) {
  if constexpr (kN == 256 && C::kThreads == 512) {
    ptx::wgmma<typename C::T, 128, C::kRightMN>(reinterpret_cast<float (&)[64]>(d), left, right, accumulate);
    ptx::wgmma<typename C::T, 128, C::kRightMN>(reinterpret_cast<float (&)[64]>(d[64]), left,
                                                right + 128 * kBlockK * 2 / 16, accumulate);
  } else {
    ptx::wgmma<typename C::T, kN, C::kRightMN>(d, left, right, accumulate);
  }
}

// d (+)= left right over the first kSteps times 16 of a staged block. From fence to wait without a branch: else ptxas
// serialises every wgmma of the kernel (its note C7514).
template <class C, int kN, int kSteps>
PTX_FN void multiply_steps(float (&d)[kN / 2], uint64_t left, uint64_t right, bool accumulate) {
  ptx::wgmma_fence();
#pragma unroll
  for (int q = 0; q < kSteps; ++q)
    product<C, kN>(d, left + q * Operands<C>::kLeftStep, right + q * Operands<C>::kRightStep, accumulate || q > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait();
}

// The same over `rest` ranks of a low-rank block, at most all 64.
template <class C, int kN>
PTX_FN void multiply_low(float (&d)[kN / 2], uint64_t left, uint64_t right, int rest, bool accumulate) {
  if (rest > 48) multiply_steps<C, kN, 4>(d, left, right, accumulate);
  else if (rest > 32) multiply_steps<C, kN, 3>(d, left, right, accumulate);
  else if (rest > 16) multiply_steps<C, kN, 2>(d, left, right, accumulate);
  else multiply_steps<C, kN, 1>(d, left, right, accumulate);
}

// One tile in one warpgroup, from its first k-block to its stores.
template <class C> struct TileConsumer {
  using T = typename C::T;
  Smem<C>& s;
  const CUtensorMap* out;
  const Args<T>& args;
  const int group, thread;
  const uint32_t mask_phase;
  float acc[C::kBlockN / 2];
  uint32_t bias[8];           // this thread's columns of the chunk that is stored next, two a word
  Ring<C::kStages> low_ring;  // kMasked: where the low-rank blocks start

  PTX_FN TileConsumer(Smem<C>& s, const CUtensorMap* out, const Args<T>& args, int group, int thread,
                      uint32_t mask_phase)
      : s(s),
        out(out),
        args(args),
        group(group),
        thread(thread),
        mask_phase(mask_phase) {}

  PTX_FN void k_blocks(const KBlocks<C>& blocks, const Place& at) {
    float none[1];
    if constexpr (C::kMakesLow) {
      multiply<false>(none, blocks.before_low());
      if (!blocks.any_low()) return;
      float low_acc[C::kRank / 2];
      multiply<true>(low_acc, blocks.low());
      publish<C>(low_acc, args, at.col_tile, at.row, group, thread);
      multiply<false>(none, blocks.after_low());
    } else {
      multiply<false>(none, blocks.all());
    }
  }

  PTX_FN void low_blocks(const Blocks<C>& blocks, const Place& at) {
    load_bias(0, at);
    const Ring<C::kStages>& ring = blocks.ring;
    if constexpr (C::kMasked) {
      low_ring = ring;
      for ([[maybe_unused]] const int b : blocks) ptx::wait(&s.full[ring.slot], ring.phase);
      ptx::wait(&s.mask_full, mask_phase);
    } else {
#pragma unroll 1
      for (const int b : blocks) {
        ptx::wait(&s.full[ring.slot], ring.phase);
        const Operands<C> op(s, ring.slot, group);
        multiply_low<C, C::kBlockN>(acc, op.left, op.right, args.R - b * kBlockK, true);
        free_slot<C>(s, ring.slot, thread);
      }
    }
  }

  // Stores the tile. Each block of x, of which there are as many as chunks, passes a chunk late, when it has landed.
  PTX_FN void x_blocks(const XBlocks<C>& blocks, const Place& at) {
    [[maybe_unused]] float low[32];
#pragma unroll
    for (int chunk = 0; chunk < C::kChunks; ++chunk) {
      if constexpr (C::kMasked) add_masked_low(low, chunk);
      if (chunk > 0) pass_x(blocks);
      store_chunk(chunk, at);
    }
    if constexpr (C::kMasked)
      for (int r = 0; r < args.R; r += kBlockK, low_ring.next()) free_slot<C>(s, low_ring.slot, thread);
    pass_x(blocks);
  }

 private:
  PTX_FN void pass_x(const XBlocks<C>& blocks) {
    if (!blocks.any) return;
    pass_block<C>(s, blocks.ring, group, thread);
    blocks.ring.next();
  }

  // acc (+)= left right over these k-blocks; with kLowToo also low_acc = left down.
  template <bool kLowToo, int kLow> PTX_FN void multiply(float (&low_acc)[kLow], const Blocks<C>& blocks) {
    using Op = Operands<C>;
    const Ring<C::kStages>& ring = blocks.ring;
    for (const int i : blocks) {
      ptx::wait(&s.full[ring.slot], ring.phase);
      ptx::wgmma_fence();
      const Op op(s, ring.slot, group);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        product<C, C::kBlockN>(acc, op.left + q * Op::kLeftStep, op.right + q * Op::kRightStep, q > 0 || i > 0);
        if constexpr (kLowToo)
          ptx::wgmma<T, C::kRank, C::kRightMN>(low_acc, op.left + q * Op::kLeftStep,
                                               Op::down(s, ring.slot) + q * Op::kDownStep, q > 0 || i > blocks.from);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait();
      free_slot<C>(s, ring.slot, thread);
    }
  }

  // 64 columns of acc += mask * (low thin) / (1 - p).
  PTX_FN void add_masked_low(float (&low)[32], int chunk) {
    Ring<C::kStages> ring = low_ring;
#pragma unroll 1
    for (int r = 0; r < args.R; r += kBlockK, ring.next()) {
      const Operands<C> op(s, ring.slot, group);
      multiply_low<C, 64>(low, op.left, op.right + chunk * (64 * kBlockK * 2 / 16), args.R - r, r > 0);
    }
    const uint32_t* words = &s.mask[(group * 64 + thread / 32 * 16 + thread % 32 / 4) * C::kMaskWords + chunk * 2];
#pragma unroll
    for (int part = 0; part < 4; ++part) {  // rows 8 apart, then halves of 32 columns
      const int lower = part % 2, right = part / 2;
      const uint32_t keep = words[lower * 8 * C::kMaskWords + right] >> (thread % 4 * 2);
#pragma unroll
      for (int j = 0; j < 8; ++j) {  // this thread's columns are 8 (j / 2) + 2 (thread % 4) + j % 2
        const int i = (right * 4 + j / 2) * 4 + lower * 2 + j % 2;
        ptx::fma_if(acc[chunk * 32 + i], low[i], args.drop_scale, keep & 1u << (j / 2 * 8 + j % 2));
      }
    }
  }

  // Ahead of its use: a load takes as long as storing a chunk.
  PTX_FN void load_bias(int chunk, const Place& at) {
    if constexpr (!C::kRightMN) {  // dx has none
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int c = at.col + chunk * 64 + j * 8 + thread % 4 * 2;
        bias[j] = args.bias && c < args.N ? *reinterpret_cast<const uint32_t*>(args.bias + c) : 0u;
      }
    }
  }

  // 64 columns of out = alpha * acc + bias in dtype.
  PTX_FN void store_chunk(int chunk, const Place& at) {
    const int lane = thread % 32,
              r = thread / 32 * 16 + lane % 16;  // the row whose address this lane gives to stmatrix
    uint8_t* const line = reinterpret_cast<uint8_t*>(s.out[group]) + r * 128;
    if (thread == 0) ptx::tma_store_wait_read();
    sync_group(group);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {  // 16 columns, rows r and r + 8
      uint32_t packed[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* d = &acc[(chunk * 8 + j + half) * 4];
        const float2 add = C::kRightMN ? float2{0.0f, 0.0f} : ptx::unpack<T>(bias[j + half]);
        packed[2 * half] = ptx::pack<T>(fmaf(args.alpha, d[0], add.x), fmaf(args.alpha, d[1], add.y));
        packed[2 * half + 1] = ptx::pack<T>(fmaf(args.alpha, d[2], add.x), fmaf(args.alpha, d[3], add.y));
      }
      ptx::stmatrix(line + ((j + lane / 16) ^ (r & 7)) * 16, packed[0], packed[1], packed[2], packed[3]);
    }
    ptx::fence_proxy_shared();
    sync_group(group);
    if (chunk + 1 < C::kChunks) load_bias(chunk + 1, at);
    if (thread == 0) {
      if (at.row < args.M && at.col + chunk * 64 < args.N)
        ptx::tma_store(out, s.out[group], at.row, at.col + chunk * 64);
      ptx::tma_store_commit();
    }
  }
};

// Group 0 takes the upper 64 rows of a tile, group 1 the lower.
template <class C> struct Consumer {
  Smem<C>& s;
  const CUtensorMap* out;
  const Args<typename C::T>& args;
  const uint32_t cta;
  const int group, thread;
  uint32_t mask_phase = 0;

  PTX_FN void run() {
    const Schedule<C> schedule{args};
    Ring<C::kStages> ring;
    Tiles<C> tiles(s, args, cta);
    tiles.first();
    while (tiles.more()) {
      Place at = tiles.place();
      at.row += group * 64;
      if (at.row < args.M) {
        TileConsumer<C> tile(s, out, args, group, thread, mask_phase);
        schedule.walk(tile, ring, at);
      } else {
        pass_blocks<C>(s, schedule.all(ring), group, thread);
        if (C::kMasked) ptx::wait(&s.mask_full, mask_phase);
      }
      if (C::kMasked || C::kOneLaunch) sync_group(group);  // all have read the mask and the tile's number
      if (C::kMasked && thread == 0) ptx::arrive(&s.mask_empty);
      mask_phase ^= 1;
      tiles.next(thread == 0);
    }
    if (thread == 0) ptx::tma_store_wait();
  }
};

}  // namespace fused_lora::gemm
