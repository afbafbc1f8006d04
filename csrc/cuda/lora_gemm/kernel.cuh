// lora_gemm:  out = alpha * left right + mask * (low thin) / (1 - p) + bias,   and in the same launch low = scale
//             * left down
//
// Used for    y  = x W^T + h B^T + bias   (left x, right W, low h, thin B, down A; right operands K-major)
//             dx = dy W + mask * (dh A)   (left dy, right W, low dh, thin A, down B; right operands MN-major, as
//                                         they are stored)
// Types       fp16 or bf16, fp32 accumulators, one rounding at each store
// Tile        a block 128 x kBlockN, two warpgroups of 64 rows, k-steps of 64 through a ring of kStages; a cluster of
//             two blocks above each
//             other shares the right operand by multicast: 256 x kBlockN. wgmma m64 n256 (n128) k16, both operands in
//             shared memory
// Warps       one thread of warpgroup 0 loads (TMA), and its warps 1-3 draw dx's dropout mask (loader.cuh);
//             warpgroups 1 and 2 multiply and store; a fourth, where there is one, makes dA and dB in dx's launch
//             (gradients.cuh), or low of the masked left in the forward's (dropped_low.cuh)
// Low rank    ceil(R / 64) more k-blocks from (low, thin) through the same ring; columns past R are TMA's zeros.
//             kMasked: their product goes through an accumulator of its own, 64 columns at a time, and the mask
// One launch  kRank > 0: in the tiles of column 0 the staged left tile is also multiplied by `down`, low published and
//             a flag raised for each 64 rows; the loader of any tile waits for its rows' flags before the low-rank
//             block. A block takes its next tile from a counter, and a tile depends on lower numbers only, so whoever
//             is resident makes progress, however many blocks are. Flags and counter
//             are zeroed in the launch sequence: nothing survives a launch, so graphs and streams don't meet
// Shared      stages * (128 + kBlockN + kRank) * 128 bytes + 16 KiB on the way out + mask bits + the fourth
//             warpgroup's: GemmKind, heuristics.h
// Numerics    low is rounded to dtype before it is multiplied, as the reference does
// Source      PTX ISA 9.0 (wgmma, TMA, mbarrier); Hu et al., arXiv 2106.09685
#pragma once

#include "dropped_low.cuh"
#include "gradients.cuh"
#include "loader.cuh"
#include "tiles.cuh"

namespace fused_lora::gemm {

// Descriptors of a staged tile's operands. Left and K-major right: rows of 128 bytes, 8 of them 1024 bytes; k16 is 32
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

// acc += left right over all k-blocks; with kFirst also low_acc += left down.
template <class C, bool kFirst, int kLow>
PTX_FN void multiply(float (&acc)[C::kBlockN / 2], float (&low_acc)[kLow], Smem<C>& s, Ring<C::kStages>& ring,
                     int k_blocks, int group, int thread) {
  using Op = Operands<C>;
  for (int k = 0; k < k_blocks; ++k) {
    ptx::wait(&s.full[ring.slot], ring.phase);
    ptx::wgmma_fence();
    const Op op(s, ring.slot, group);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      product<C, C::kBlockN>(acc, op.left + q * Op::kLeftStep, op.right + q * Op::kRightStep, q > 0 || k > 0);
      if constexpr (kFirst)
        ptx::wgmma<typename C::T, C::kRank, C::kRightMN>(low_acc, op.left + q * Op::kLeftStep,
                                                         Op::down(s, ring.slot) + q * Op::kDownStep, q > 0 || k > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait();
    free_slot<C>(s, ring.slot, thread);
    ring.next();
  }
}

// d (+)= left right over the first kSteps times 16 of a staged k-block. From fence to wait without a branch: else ptxas
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

// The same for what is left of R from column r of low on.
template <class C, int kN>
PTX_FN void multiply_low(float (&d)[kN / 2], uint64_t left, uint64_t right, int rest, bool accumulate) {
  if (rest > 48) multiply_steps<C, kN, 4>(d, left, right, accumulate);
  else if (rest > 32) multiply_steps<C, kN, 3>(d, left, right, accumulate);
  else if (rest > 16) multiply_steps<C, kN, 2>(d, left, right, accumulate);
  else multiply_steps<C, kN, 1>(d, left, right, accumulate);
}

// acc += low thin, straight into the accumulators.
template <class C>
PTX_FN void add_low(float (&acc)[C::kBlockN / 2], Smem<C>& s, Ring<C::kStages>& ring, int R, int group, int thread) {
#pragma unroll 1
  for (int r = 0; r < R; r += kBlockK) {
    ptx::wait(&s.full[ring.slot], ring.phase);
    const Operands<C> op(s, ring.slot, group);
    multiply_low<C, C::kBlockN>(acc, op.left, op.right, R - r, true);
    free_slot<C>(s, ring.slot, thread);
    ring.next();
  }
}

// 64 columns of acc += mask * (low thin) / (1 - p). All low-rank blocks of the tile wait in the ring together.
template <class C>
PTX_FN void add_masked_low(float (&acc)[C::kBlockN / 2], float (&low)[32], int chunk, Smem<C>& s, Ring<C::kStages> ring,
                           const Args<typename C::T>& args, int group, int thread) {
#pragma unroll 1
  for (int r = 0; r < args.R; r += kBlockK, ring.next()) {
    const Operands<C> op(s, ring.slot, group);
    multiply_low<C, 64>(low, op.left, op.right + chunk * (64 * kBlockK * 2 / 16), args.R - r, r > 0);
  }
  const uint32_t* words = &s.mask[(group * 64 + thread / 32 * 16 + thread % 32 / 4) * C::kMaskWords + chunk * 2];
#pragma unroll
  for (int part = 0; part < 4;
       ++part) {  // rows 8 apart, then halves of 32 columns; this thread's columns are 8 j + 2 (thread % 4) + {0, 1}
    const int lower = part % 2, right = part / 2;
    const uint32_t keep = words[lower * 8 * C::kMaskWords + right] >> (thread % 4 * 2);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int i = (right * 4 + j / 2) * 4 + lower * 2 + j % 2;
      ptx::fma_if(acc[chunk * 32 + i], low[i], args.drop_scale, keep & 1u << (j / 2 * 8 + j % 2));
    }
  }
}

// out = alpha * acc + bias in dtype, 64 columns at a time through shared memory and TMA; `before(chunk)` has the last
// word on a chunk of acc.
template <class C, class Before>
PTX_FN void store_tile(const float (&acc)[C::kBlockN / 2], Smem<C>& s, const CUtensorMap* out,
                       const Args<typename C::T>& args, int row, int col, int group, int thread, const Before& before) {
  using T = typename C::T;
  const int lane = thread % 32, r = thread / 32 * 16 + lane % 16;  // the row whose address this lane gives to stmatrix
  uint8_t* const line = reinterpret_cast<uint8_t*>(s.out[group]) + r * 128;
#pragma unroll
  for (int chunk = 0; chunk < C::kBlockN / 64; ++chunk) {
    before(chunk);
    if (thread == 0) ptx::tma_store_wait_read();
    ptx::named_barrier(1 + group, 128);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {  // 16 columns, rows r and r + 8
      uint32_t packed[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* d = &acc[(chunk * 8 + j + half) * 4];
        const int c = col + chunk * 64 + (j + half) * 8 + lane % 4 * 2;
        const float2 bias = args.bias && c < args.N ? ptx::unpack<T>(*reinterpret_cast<const uint32_t*>(args.bias + c))
                                                    : float2{0.0f, 0.0f};
        packed[2 * half] = ptx::pack<T>(fmaf(args.alpha, d[0], bias.x), fmaf(args.alpha, d[1], bias.y));
        packed[2 * half + 1] = ptx::pack<T>(fmaf(args.alpha, d[2], bias.x), fmaf(args.alpha, d[3], bias.y));
      }
      ptx::stmatrix(line + ((j + lane / 16) ^ (r & 7)) * 16, packed[0], packed[1], packed[2], packed[3]);
    }
    ptx::fence_proxy_shared();
    ptx::named_barrier(1 + group, 128);
    if (thread == 0) {
      if (row < args.M && col + chunk * 64 < args.N) ptx::tma_store(out, s.out[group], row, col + chunk * 64);
      ptx::tma_store_commit();
    }
  }
}

// Blocks that this warpgroup does not use: x's columns for dA, and all of a tile whose rows lie past M.
template <class C> PTX_FN void pass(Smem<C>& s, Ring<C::kStages>& ring, int blocks, int group, int thread) {
#pragma unroll 1
  for (int i = 0; i < blocks; ++i) {
    ptx::wait(&s.full[ring.slot], ring.phase);
    ptx::named_barrier(1 + group, 128);
    free_slot<C>(s, ring.slot, thread);
    ring.next();
  }
}

// One tile from its first k-block to its stores.
template <class C>
PTX_FN void compute_tile(Smem<C>& s, Ring<C::kStages>& ring, const CUtensorMap* out, const Args<typename C::T>& args,
                         uint32_t mask_phase, int k_blocks, int row, int col, int group, int thread) {
  constexpr bool kMakesLow = C::kOneLaunch && !C::kDropsLeft;
  float acc[C::kBlockN / 2], low_acc[kMakesLow ? C::kRank / 2 : 1];
  if (kMakesLow && col == 0) {
    multiply<C, kMakesLow>(acc, low_acc, s, ring, k_blocks, group, thread);
    if constexpr (kMakesLow) publish<C>(low_acc, args, row, group, thread);
  } else {
    multiply<C, false>(acc, low_acc, s, ring, k_blocks, group, thread);
  }
  const int x_blocks = C::kGradients && args.dA ? C::kBlockN / 64
                                                : 0;  // as many as chunks; each passes a chunk late, when it has landed
  if constexpr (C::kMasked) {
    Ring<C::kStages> at = ring;
    for (int r = 0; r < args.R; r += kBlockK, ring.next()) ptx::wait(&s.full[ring.slot], ring.phase);
    ptx::wait(&s.mask_full, mask_phase);
    float low[32];
    store_tile<C>(acc, s, out, args, row, col, group, thread, [&](int chunk) {
      add_masked_low<C>(acc, low, chunk, s, at, args, group, thread);
      pass<C>(s, ring, chunk > 0 && x_blocks, group, thread);
    });
    for (int r = 0; r < args.R; r += kBlockK, at.next()) free_slot<C>(s, at.slot, thread);
  } else {
    add_low<C>(acc, s, ring, args.R, group, thread);
    store_tile<C>(acc, s, out, args, row, col, group, thread,
                  [&](int chunk) { pass<C>(s, ring, chunk > 0 && x_blocks, group, thread); });
  }
  pass<C>(s, ring, x_blocks > 0, group, thread);
}

// Warpgroups 1 and 2: group 0 the upper 64 rows of a tile, group 1 the lower.
template <class C>
PTX_FN void consume_tiles(Smem<C>& s, const CUtensorMap* out, const Args<typename C::T>& args, uint32_t cta, int group,
                          int thread) {
  const int k_blocks = (args.K + kBlockK - 1) / kBlockK, low_blocks = (args.R + kBlockK - 1) / kBlockK;
  Ring<C::kStages> ring;
  Tiles<C> tiles(s, args.M, args.N);
  uint32_t mask_phase = 0;
  if constexpr (C::kOneLaunch) tiles.read();
  while (tiles.number < tiles.count()) {
    const TileIndex tile = tiles.index();
    const int row = (tile.row * kCluster + cta) * kBlockM + group * 64, col = tile.col * C::kBlockN;
    if (row < args.M) {
      compute_tile<C>(s, ring, out, args, mask_phase, k_blocks, row, col, group, thread);
    } else {
      pass<C>(s, ring, k_blocks + low_blocks + (C::kGradients && args.dA ? C::kBlockN / 64 : 0), group, thread);
      if (C::kMasked) ptx::wait(&s.mask_full, mask_phase);
    }
    if (C::kMasked || C::kOneLaunch)
      ptx::named_barrier(1 + group, 128);  // the whole warpgroup has read the mask and the tile's number
    if (C::kMasked && thread == 0) ptx::arrive(&s.mask_empty);
    mask_phase ^= 1;
    if constexpr (C::kOneLaunch) {
      tiles.release(thread == 0);
      tiles.read();
    } else {
      tiles.step();
    }
  }
  if (thread == 0) ptx::tma_store_wait();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    lora_gemm_kernel(const __grid_constant__ CUtensorMap left, const __grid_constant__ CUtensorMap right,
                     const __grid_constant__ CUtensorMap low, const __grid_constant__ CUtensorMap thin,
                     const __grid_constant__ CUtensorMap down, const __grid_constant__ CUtensorMap out,
                     const __grid_constant__ CUtensorMap h, const __grid_constant__ CUtensorMap dh,
                     const __grid_constant__ CUtensorMap x, const __grid_constant__ Args<typename C::T> args) {
#ifdef FUSED_LORA_SM90A
  static_assert(sizeof(Smem<C>) + 1024 <= C::kKind.smem_bytes());
  Smem<C>& s = *reinterpret_cast<Smem<C>*>(ptx::dynamic_smem());
  const uint32_t cta = ptx::cta_in_cluster();
  const int group = threadIdx.x / 128;
  int drawn = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      ptx::barrier_init(&s.full[i], 1);
      ptx::barrier_init(&s.empty[i], C::kConsumers * kCluster);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::barrier_init(&s.tile_full[i], 1);
      ptx::barrier_init(&s.tile_empty[i], Tiles<C>::kReaders);
    }
    ptx::barrier_init(&s.mask_full, kMaskThreads);
    ptx::barrier_init(&s.mask_empty, C::kConsumers);
    ptx::barrier_init(&s.side_full, 1);
    ptx::barrier_init(&s.side_empty, 1);
    ptx::barrier_init_fence();
  }
  ptx::wait_for_previous_kernel();
  if (C::kOneLaunch && threadIdx.x == 0 && cta == 0) drawn = atomicAdd(args.control, 1);
  ptx::cluster_sync();
  if (group == 0) {
    ptx::registers_down<C::kLoaderRegisters>();
    if (threadIdx.x == 0) load_tiles<C>(s, Maps{&left, &right, &low, &thin, &down, &h, &dh, &x}, args, cta, drawn);
    else if (C::kMasked && threadIdx.x >= 32) draw_masks<C>(s, args, cta);
    __syncwarp();
  } else if (C::kConsumers == 3 && group == 3) {
    if constexpr (C::kConsumers == 3) ptx::registers_down<C::kFourthRegisters>();
    if constexpr (C::kGradients) add_gradients<C>(s, args, cta, threadIdx.x % 128);
    if constexpr (C::kDropsLeft) make_dropped_low<C>(s, args, cta, threadIdx.x % 128);
  } else {
    ptx::registers_up<C::kConsumerRegisters>();
    consume_tiles<C>(s, &out, args, cta, group - 1, threadIdx.x % 128);
  }
  ptx::cluster_sync();  // nobody leaves while the other block may still write here
#endif
}

}  // namespace fused_lora::gemm
