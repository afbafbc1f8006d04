// lora_gemm:  out = alpha * left right + mask * (low thin) / (1 - p) + bias,   and in the same launch
//             low = scale * left down
//
// Used for    y  = x W^T + h B^T + bias   (left x, right W, low h, thin B, down A; right operands K-major)
//             dx = dy W + mask * (dh A)   (left dy, right W, low dh, thin A, down B; right operands MN-major)
// Types       fp16 or bf16, fp32 accumulators, one rounding at each store; low is rounded before it is multiplied
// Tile        a block 128 x kBlockN, k-steps of 64 through a ring of kStages (schedule.cuh); a cluster of two blocks
//             above each other shares the right operands by multicast: 256 x kBlockN
// Roles       warpgroup 0: a thread loads (loader.cuh), warps 1-3 fetch dx's dropout mask (mask.cuh). Warpgroups 1
//             and 2 multiply and store (consumer.cuh). A fourth, where there is one, makes dA and dB in dx's launch
//             (gradients.cuh), or low of the masked left in the forward's (dropped_low.cuh); or warps 1-3 make
//             that (dropped_low_warps.cuh)
// Low rank    ceil(R / 64) more blocks from (low, thin) through the same ring; columns past R are TMA's zeros
// One launch  kRank > 0: in the tiles of column 0 the staged left tile is also multiplied by down, low published and a
//             flag raised for each 64 rows; the loader of any tile waits for its rows' flags before the low-rank
//             blocks. A block takes its next tile from a counter, and a tile depends on lower numbers only, so whoever
//             is resident makes progress, however many blocks are. Flags and counter are zeroed in the launch
//             sequence: nothing survives a launch, so graphs and streams don't meet
// Halves      low_columns 2: column 0's tile makes low over one half of K and leaves its sums; column 1's adds the
//             other half and publishes. Neither is there for the whole of a tile, and no tile takes the whole of low
// Shared      stages * (128 + kBlockN + kRank) * 128 bytes + 16 KiB on the way out + mask bits + the fourth
//             warpgroup's: GemmKind, heuristics.h
// Source      PTX ISA 9.0 (wgmma, TMA, mbarrier); Hu et al., arXiv 2106.09685
#pragma once

#include "consumer.cuh"
#include "dropped_low.cuh"
#include "dropped_low_warps.cuh"
#include "gradients.cuh"
#include "loader.cuh"
#include "mask.cuh"

namespace fused_lora::gemm {

// Warps 1-3 of the loader's warpgroup.
template <class C> PTX_FN void other_warps(Smem<C>& s, const Args<typename C::T>& args, uint32_t cta) {
  if constexpr (C::kLowByWarps) DroppedLowWarps<C>(s, args, cta).run();
  else if constexpr (C::kMasked) MaskLoader<C>(s, args).run(cta);
}

// Halves don't hang where two clusters are resident. Numbers are drawn in order, 2 r and 2 r + 1 for the tiles of row
// r. Tile 2 r + 1 waits for the first k-blocks of 2 r, which wait for nobody; 2 r waits, before its low-rank blocks,
// for 2 r + 1; any other tile waits for lower numbers. A cluster draws its next number when its tile's wait is over.
// Now take the lowest tile that is not through. It is in work, since its cluster is through with all that it drew
// before. If it waits it is some 2 r, and waits for 2 r + 1. Either another cluster has drawn that, and is through with
// all before it; or nobody has, and another cluster, which has drawn lower numbers only, is through with them and draws
// it. A cluster that is alone waits for ever: no such launch is planned. (A GPU with as many launches in halves at once
// as it has room for clusters could give one to each.)
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
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  int drawn = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      ptx::barrier_init(&s.full[i], 1);
      ptx::barrier_init(&s.empty[i], (C::kConsumers + (C::kLowByWarps ? 3 : 0)) * kCluster);
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
    const Maps maps{
        .left = &left, .right = &right, .low = &low, .thin = &thin, .down = &down, .h = &h, .dh = &dh, .x = &x};
    if (threadIdx.x == 0) Loader<C>{.s = s, .maps = maps, .args = args, .cta = cta, .drawn = drawn}.run();
    else if (threadIdx.x >= 32) other_warps<C>(s, args, cta);
    __syncwarp();
  } else if (C::kConsumers == 3 && group == 3) {
    if constexpr (C::kConsumers == 3) ptx::registers_down<C::kFourthRegisters>();
    if constexpr (C::kGradients) Gradients<C>(s, args, cta, thread).run();
    if constexpr (C::kKind.masked_left()) DroppedLow<C>(s, args, cta, thread).run();
  } else {
    ptx::registers_up<C::kConsumerRegisters>();
    Consumer<C>{.s = s, .out = &out, .args = args, .cta = cta, .group = group - 1, .thread = thread}.run();
  }
  ptx::cluster_sync();  // nobody leaves while the other block may still write here
#endif
}

}  // namespace fused_lora::gemm
