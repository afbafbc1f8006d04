// shrink:     low[M, R] = scale * drop(left[M, K]) down
//
// Used for    h = s * drop(x) A^T (down = A [R, K]: reduction along its rows) and dh = s * dy B (down = B [N, R]:
//             reduction down its rows), where lora_gemm does not compute them on the way: with dropout above 64
//             ranks or for few rows (plans.h), for dA without dx, and where the plan says so
// Types       fp16 or bf16, fp32 accumulators, rounded once; scale holds the dropout's 1 / (1 - p)
// Tile        a cluster takes 32 rows and up to 64 ranks, each of its blocks a part of K: as many as keep every SM
//             busy. Steps of 128 through 4 stages of cp.async; 4 warps: 2 row halves x 2 halves of each step, summed
//             at the end, then over the cluster, in a fixed order. mma.sync m16n8k16
// Shared      4 * (32 + ranks) * 256 bytes: 48 KiB at R = 16, 96 KiB at R = 64
// Bound by    one read of left: 22 us for 67 MB at 3.0 TB/s. Above 64 ranks the blocks of the same rows read left
//             again, from L2
// Source      Hu et al., arXiv 2106.09685
#include "kernels.h"
#include "launch.h"
#include "tile.cuh"

namespace fused_lora {
namespace {

constexpr int kThreads = 128, kRows = kShrinkRows, kBlockK = kShrinkBlockK, kStages = kShrinkStages;

template <class T> struct Args {
  const T* left;  // [M, K], row stride ld_left
  const T* down;  // [R, K] or [K, R], row stride ld_down
  T* low;         // [M, R], row stride ld_low
  const int64_t* seed;
  int64_t M, K, R, ld_left, ld_down, ld_low;
  int splits;  // of K: blocks of a cluster
  uint32_t threshold;
  float scale;
};

// low[32, kRank] = scale * (acc of the warps of the first half of each step + acc of those of the second), then over
// the blocks of the cluster. `sums` holds a float4 for each lane and 8 ranks: two neighbours of row lane / 4, two of
// the row 8 further.
template <class T, int kRank>
PTX_FN void add_and_store(const float (&acc)[kRank / 8][4], float4* sums, const Args<T>& p, int64_t row0, int64_t rank0,
                          int thread) {
  constexpr int kHalf = kRank / 8 * 32;  // float4 of 16 rows
  const int lane = thread % 32, row_half = thread / 32 % 2, k_half = thread / 64;
#pragma unroll
  for (int n = 0; n < kRank / 8; ++n)
    if (k_half == 1) sums[row_half * kHalf + n * 32 + lane] = float4{acc[n][0], acc[n][1], acc[n][2], acc[n][3]};
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kRank / 8; ++n)
    if (k_half == 0) {
      float4& v = sums[row_half * kHalf + n * 32 + lane];
      v = float4{acc[n][0] + v.x, acc[n][1] + v.y, acc[n][2] + v.z, acc[n][3] + v.w};
    }
  ptx::cluster_sync();
  const int share = 2 * kHalf / p.splits, first = static_cast<int>(ptx::cta_in_cluster()) * share;
  for (int i = first + thread; i < first + share; i += kThreads) {
    float4 v{0.0f, 0.0f, 0.0f, 0.0f};
    for (int block = 0; block < p.splits; ++block) {
      const float4 part = ptx::load_remote(sums + i, block);
      v = float4{v.x + part.x, v.y + part.y, v.z + part.z, v.w + part.w};
    }
    const int64_t row = row0 + i / kHalf * 16 + i % 32 / 4, col = rank0 + i % kHalf / 32 * 8 + i % 4 * 2;
    if (col >= (p.R + 7) / 8 * 8) continue;
    if (row < p.M)
      *reinterpret_cast<uint32_t*>(p.low + row * p.ld_low + col) = ptx::pack<T>(v.x * p.scale, v.y * p.scale);
    if (row + 8 < p.M)
      *reinterpret_cast<uint32_t*>(p.low + (row + 8) * p.ld_low + col) = ptx::pack<T>(v.z * p.scale, v.w * p.scale);
  }
  ptx::cluster_sync();  // nobody leaves while the others may still read here
}

template <class T, int kRank, bool kDownMN> __global__ void __launch_bounds__(kThreads) shrink_kernel(const Args<T> p) {
#ifdef FUSED_LORA_SM90A
  using Left = Tile<kRows, kBlockK>;
  using Down = std::conditional_t<kDownMN, Tile<kBlockK, kRank>, Tile<kRank, kBlockK>>;
  constexpr int kStageBytes = Left::kBytes + Down::kBytes;
  static_assert(kStages * kStageBytes + 1024 == shrink_smem_bytes(kRank) && kRows * kRank * 4 <= kStages * kStageBytes);
  uint8_t* const smem = ptx::dynamic_smem();
  const int thread = threadIdx.x, lane = thread % 32, row_half = thread / 32 % 2, k_half = thread / 64;
  const int64_t chunks = (p.R + kRank - 1) / kRank, cluster = blockIdx.x / p.splits, row0 = cluster / chunks * kRows,
                rank0 = cluster % chunks * kRank, padded = (p.R + 7) / 8 * 8;
  const int64_t all_steps = (p.K + kBlockK - 1) / kBlockK, part = ptx::cta_in_cluster(),
                first = part * all_steps / p.splits, steps = (part + 1) * all_steps / p.splits - first;
  ptx::wait_for_previous_kernel();
  const uint64_t seed = p.threshold ? static_cast<uint64_t>(*p.seed) : 0;

  const auto load = [&](int64_t step) {
    if (step < steps) {
      uint8_t* const stage = smem + step % kStages * kStageBytes;
      const int64_t k = (first + step) * kBlockK;
      Left::template load<kThreads>(stage, p.left, p.ld_left, row0, k, p.M, p.K, thread);
      if constexpr (kDownMN)
        Down::template load<kThreads>(stage + Left::kBytes, p.down, p.ld_down, k, rank0, p.K, padded, thread);
      else Down::template load<kThreads>(stage + Left::kBytes, p.down, p.ld_down, rank0, k, p.R, p.K, thread);
    }
    ptx::cp_async_commit();
  };

  for (int i = 0; i < kStages - 1; ++i) load(i);
  float acc[kRank / 8][4] = {};
  for (int64_t step = 0; step < steps; ++step) {
    uint8_t* const stage = smem + step % kStages * kStageBytes;
    ptx::cp_async_wait<kStages - 2>();
    if (p.threshold) Left::template drop<kThreads>(stage, seed, p.threshold, row0, (first + step) * kBlockK, thread);
    __syncthreads();
    load(step + kStages - 1);
    const int i = lane / 8, j = lane % 8;  // this lane's matrix of four, and its row there
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int k = k_half * 64 + q * 16;
      uint32_t a[4];
      ptx::ldmatrix<false>(a, stage + Left::offset(row_half * 16 + i % 2 * 8 + j, k / 8 + i / 2));
#pragma unroll
      for (int n = 0; n < kRank; n += 16) {
        uint32_t b[4];
        if constexpr (kDownMN)
          ptx::ldmatrix<true>(b, stage + Left::kBytes + Down::offset(k + i % 2 * 8 + j, n / 8 + i / 2));
        else ptx::ldmatrix<false>(b, stage + Left::kBytes + Down::offset(n + i / 2 * 8 + j, k / 8 + i % 2));
        ptx::mma<T>(acc[n / 8], a, b[0], b[1]);
        ptx::mma<T>(acc[n / 8 + 1], a, b[2], b[3]);
      }
    }
  }

  ptx::cp_async_wait<0>();
  __syncthreads();
  add_and_store<T, kRank>(acc, reinterpret_cast<float4*>(smem), p, row0, rank0, thread);
#endif
}

template <class T, int kRank, bool kDownMN> Status run(const ShrinkParams& p, Target& target) {
  const int splits = shrink_splits(p.M, p.K, p.R, p.sms);
  const Args<T> args{.left = static_cast<const T*>(p.left),
                     .down = static_cast<const T*>(p.down),
                     .low = static_cast<T*>(p.low),
                     .seed = p.dropout.seed,
                     .M = p.M,
                     .K = p.K,
                     .R = p.R,
                     .ld_left = p.ld_left,
                     .ld_down = p.ld_down,
                     .ld_low = padded_rank(p.R),
                     .splits = splits,
                     .threshold = p.dropout.threshold,
                     .scale = p.scale * p.dropout.scale()};
  const Grid grid{.blocks = ceil_div(p.M, kRows) * ceil_div(p.R, kRank) * splits,
                  .threads = kThreads,
                  .smem = shrink_smem_bytes(kRank),
                  .cluster = splits};
  return launch<shrink_kernel<T, kRank, kDownMN>>(grid, target, args);
}

template <class T, bool kDownMN> Status choose_rank(const ShrinkParams& p, Target& target) {
  switch (rank_tile_for(p.R)) {
    case 16: return run<T, 16, kDownMN>(p, target);
    case 32: return run<T, 32, kDownMN>(p, target);
    case 64: return run<T, 64, kDownMN>(p, target);
    default: return Status::bad_shape;
  }
}

template <class T> Status choose_layout(const ShrinkParams& p, Target& target) {
  return p.down_mn ? choose_rank<T, true>(p, target) : choose_rank<T, false>(p, target);
}

}  // namespace

Status shrink(const ShrinkParams& p, Target& target) {
  if (p.M < 1 || p.M > INT32_MAX || p.K < 1 || p.K % 8 || p.R < 1 || p.R > kMaxRank ||
      (p.dropout.threshold && !p.dropout.seed))
    return Status::bad_shape;
  if (p.ld_left % 8 || p.ld_down % 8 ||
      (reinterpret_cast<uintptr_t>(p.left) | reinterpret_cast<uintptr_t>(p.down) | reinterpret_cast<uintptr_t>(p.low)) %
          16)
    return Status::bad_alignment;
  if (p.down_mn && p.ld_down < padded_rank(p.R)) return Status::bad_shape;
  switch (p.dtype) {
    case Dtype::f16: return choose_layout<__half>(p, target);
    case Dtype::bf16: return choose_layout<__nv_bfloat16>(p, target);
    default: return Status::bad_dtype;
  }
}

}  // namespace fused_lora
