// wgrad:      out[C, R] = scale * drop(left[M, C])^T low[M, R],   column_sums[C] = sum over M of left
//
// Used for    dB = dy^T h with dbias, and dA = dh^T drop(x) (stored transposed, [R, K]): both in one launch, since
//             neither waits for the other
// Types       fp16 or bf16, fp32 accumulators; scale is the dropout's 1 / (1 - p); fp32 slabs, one rounding at the end
// Tile        a block takes 128 columns, up to 128 ranks and one part of M, in steps of 64 rows through 3 or 4 stages
//             of cp.async; 4 warps of 32 columns. mma.sync m16n8k16, both operands transposed by ldmatrix on their way
//             from row-major tiles. The column sums are a product with ones
// Shared      stages * 128 * (128 + ranks) bytes: 72 KiB at R = 16, 96 KiB at R = 64
// Order       each part of M writes a slab of its own; a second kernel adds the slabs in the order of M: results repeat
//             bit for bit
// Bound by    one read of left: 22 us for 67 MB at 3.0 TB/s. Blocks that differ only in their ranks are neighbours and
//             share left in L2
// Source      Hu et al., arXiv 2106.09685
#include "kernels.h"
#include "launch.h"
#include "tile.cuh"

namespace fused_lora {
namespace {

constexpr int kThreads = 128, kCols = kWgradCols, kRows = kWgradRows;

template <class T> struct Job {
  const T* left;        // [M, C], row stride ld_left
  const T* low;         // [M, R], row stride ld_low
  float* slabs;         // [splits, C, R] or [splits, R, C]
  float* sum_slabs;     // [splits, C], or null
  const int64_t* seed;  // [1]
  int64_t C, ld_left, ld_low;
  uint32_t threshold;
  bool transposed;
};

template <class T> struct Args {
  Job<T> jobs[2];
  int64_t first_blocks;  // of job 0
  int64_t M, R, rows_per_split;
  int rank_chunks;
};

template <int kRank> using LowTile = Tile<kRows, kRank ? kRank : 16>;

// acc += left^T low over the 64 rows of a stage for one warp's 32 columns; with `sums` also sum += left^T 1.
template <class T, int kRank>
PTX_FN void multiply(float (&acc)[2][kRank ? kRank / 8 : 1][4], float (&sum)[2][4], const uint8_t* stage, int warp_col,
                     bool sums, int lane) {
  using Left = Tile<kRows, kCols>;
  using Low = LowTile<kRank>;
  const int i = lane / 8, j = lane % 8;  // this lane's matrix of four, and its row there
#pragma unroll
  for (int m = 0; m < kRows; m += 16) {
    uint32_t a[2][4];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      ptx::ldmatrix<true>(a[t], stage + Left::offset(m + i / 2 * 8 + j, (warp_col + t * 16) / 8 + i % 2));
      if (sums) ptx::mma<T>(sum[t], a[t], ptx::kOnes<T>, ptx::kOnes<T>);
    }
#pragma unroll
    for (int n = 0; n < kRank; n += 16) {
      uint32_t b[4];
      ptx::ldmatrix<true>(b, stage + Left::kBytes + Low::offset(m + i % 2 * 8 + j, n / 8 + i / 2));
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        ptx::mma<T>(acc[t][n / 8], a[t], b[0], b[1]);
        ptx::mma<T>(acc[t][n / 8 + 1], a[t], b[2], b[3]);
      }
    }
  }
}

// One warp's 32 columns of a part's slabs.
template <class T, int kRank>
PTX_FN void store(const float (&acc)[2][kRank ? kRank / 8 : 1][4], const float (&sum)[2][4], const Job<T>& job,
                  int64_t R, int64_t split, int64_t col0, int64_t rank0, bool sums, int lane) {
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t col = col0 + t * 16 + i / 2 * 8 + lane / 4;
      if (col >= job.C) continue;
      if (sums && lane % 4 == 0 && i % 2 == 0) job.sum_slabs[split * job.C + col] = sum[t][i];
#pragma unroll
      for (int n = 0; n < kRank / 8; ++n) {
        const int64_t rank = rank0 + n * 8 + lane % 4 * 2 + i % 2;
        if (rank < R)
          job.slabs[job.transposed ? (split * R + rank) * job.C + col : (split * job.C + col) * R + rank] =
              acc[t][n][i];
      }
    }
  }
}

template <class T, int kRank>
__global__ void __launch_bounds__(kThreads) wgrad_kernel(const __grid_constant__ Args<T> p) {
  using Left = Tile<kRows, kCols>;
  using Low = LowTile<kRank>;
  constexpr int kStages = wgrad_stages(kRank), kStageBytes = Left::kBytes + (kRank ? Low::kBytes : 0);
  static_assert(kStages * kStageBytes + 1024 == wgrad_smem_bytes(kRank));
  uint8_t* const smem = ptx::dynamic_smem();
  const bool second = blockIdx.x >= p.first_blocks;
  const Job<T>& job = p.jobs[second];
  const int64_t block = second ? blockIdx.x - p.first_blocks : blockIdx.x, col_tiles = (job.C + kCols - 1) / kCols;
  const int64_t rank0 = block % p.rank_chunks * kRank, col0 = block / p.rank_chunks % col_tiles * kCols,
                split = block / p.rank_chunks / col_tiles;
  const int64_t row_begin = split * p.rows_per_split, row_end = min(p.M, row_begin + p.rows_per_split),
                steps = (row_end - row_begin + kRows - 1) / kRows;
  const int thread = threadIdx.x, lane = thread % 32, warp_col = thread / 32 * 32;
  const bool sums = job.sum_slabs && rank0 == 0;
  ptx::wait_for_previous_kernel();
  const uint64_t seed = job.threshold ? static_cast<uint64_t>(*job.seed) : 0;

  const auto load = [&](int64_t step) {
    if (step < steps) {
      uint8_t* const stage = smem + step % kStages * kStageBytes;
      const int64_t row = row_begin + step * kRows;
      Left::template load<kThreads>(stage, job.left, job.ld_left, row, col0, row_end, job.C, thread);
      if constexpr (kRank > 0)
        Low::template load<kThreads>(stage + Left::kBytes, job.low, job.ld_low, row, rank0, row_end, (p.R + 7) / 8 * 8,
                                     thread);
    }
    ptx::cp_async_commit();
  };

  for (int i = 0; i < kStages - 1; ++i) load(i);
  float acc[2][kRank ? kRank / 8 : 1][4] = {}, sum[2][4] = {};
  for (int64_t step = 0; step < steps; ++step) {
    uint8_t* const stage = smem + step % kStages * kStageBytes;
    ptx::cp_async_wait<kStages - 2>();
    if (job.threshold)
      Left::template drop<kThreads>(stage, seed, job.threshold, row_begin + step * kRows, col0, thread);
    __syncthreads();
    load(step + kStages - 1);
    multiply<T, kRank>(acc, sum, stage, warp_col, sums, lane);
  }
  ptx::cp_async_wait<0>();

  store<T, kRank>(acc, sum, job, p.R, split, col0 + warp_col, rank0, sums, lane);
}

// out[size] = scale * (slabs[0] + slabs[1] + ...), size a multiple of 4.
struct Sum {
  const float* slabs;  // [splits, size]
  void* out;           // [size], dtype
  int64_t size, splits;
  float scale;
  Dtype dtype;
};
struct Sums {
  Sum part[4];
  int count;
};

__global__ void __launch_bounds__(256) add_slabs_kernel(const __grid_constant__ Sums p) {
  ptx::wait_for_previous_kernel();
  int64_t i = (int64_t{blockIdx.x} * 256 + threadIdx.x) * 4;
  int which = 0;
  while (which < p.count && i >= p.part[which].size) i -= p.part[which++].size;
  if (which == p.count) return;
  const Sum& sum = p.part[which];
  float4 total = *reinterpret_cast<const float4*>(sum.slabs + i);
  for (int64_t split = 1; split < sum.splits; ++split) {
    const float4 more = *reinterpret_cast<const float4*>(sum.slabs + split * sum.size + i);
    total = float4{total.x + more.x, total.y + more.y, total.z + more.z, total.w + more.w};
  }
  total = float4{total.x * sum.scale, total.y * sum.scale, total.z * sum.scale, total.w * sum.scale};
  switch (sum.dtype) {
    case Dtype::f32: static_cast<float4*>(sum.out)[i / 4] = total; break;
    case Dtype::f16:
      static_cast<uint2*>(sum.out)[i / 4] =
          uint2{ptx::pack<__half>(total.x, total.y), ptx::pack<__half>(total.z, total.w)};
      break;
    case Dtype::bf16:
      static_cast<uint2*>(sum.out)[i / 4] =
          uint2{ptx::pack<__nv_bfloat16>(total.x, total.y), ptx::pack<__nv_bfloat16>(total.z, total.w)};
      break;
  }
}

template <class T, int kRank> Status run(const WgradConfig& c, const WgradParams& p, Target& target) {
  Args<T> args{};
  int64_t blocks = 0;
  for (int i = 0; i < p.count; ++i) {
    const WgradJob& job = p.jobs[i];
    args.jobs[i] = {.left = static_cast<const T*>(job.left),
                    .low = static_cast<const T*>(job.low),
                    .slabs = job.slabs,
                    .sum_slabs = job.sum_slabs,
                    .seed = job.dropout.seed,
                    .C = job.C,
                    .ld_left = job.ld_left,
                    .ld_low = job.ld_low,
                    .threshold = job.dropout.threshold,
                    .transposed = job.transposed};
    blocks += ceil_div(job.C, kCols) * c.rank_chunks * c.splits;
    if (i == 0) args.first_blocks = blocks;
  }
  args.M = p.M;
  args.R = p.R;
  args.rows_per_split = c.rows_per_split;
  args.rank_chunks = c.rank_chunks;
  const Grid grid{.blocks = blocks, .threads = kThreads, .smem = wgrad_smem_bytes(kRank), .cluster = 1};
  return launch<wgrad_kernel<T, kRank>>(grid, target, args);
}

template <class T> Status choose_rank(const WgradConfig& c, const WgradParams& p, Target& target) {
  switch (c.rank_tile) {
    case 0: return run<T, 0>(c, p, target);
    case 16: return run<T, 16>(c, p, target);
    case 32: return run<T, 32>(c, p, target);
    case 64: return run<T, 64>(c, p, target);
    case 128: return run<T, 128>(c, p, target);
    default: return Status::bad_shape;
  }
}

Status check(const WgradConfig& c, const WgradParams& p) {
  if (p.M < 1 || p.M > INT32_MAX || p.R < 0 || p.R > kMaxRank || p.count < 1 || p.count > 2 || c.splits < 1 ||
      c.rows_per_split % kRows)
    return Status::bad_shape;
  if ((p.R > 0) != (c.rank_tile > 0) || int64_t{c.rank_tile} * c.rank_chunks < p.R || c.rows_per_split * c.splits < p.M)
    return Status::bad_shape;
  for (int i = 0; i < p.count; ++i) {
    const WgradJob& job = p.jobs[i];
    const bool product = p.R > 0 && job.out && job.slabs && job.low,
               sums = job.sum_slabs && job.column_sums && !job.dropout.threshold;
    if (job.C < 8 || job.C % 8 || (p.R > 0 ? !product : !sums) || (job.sum_slabs && !sums) ||
        (job.dropout.threshold && !job.dropout.seed))
      return Status::bad_shape;
    if (job.ld_left % 8 || reinterpret_cast<uintptr_t>(job.left) % 16 ||
        (product && (job.ld_low % 8 || reinterpret_cast<uintptr_t>(job.low) % 16 || job.ld_low < padded_rank(p.R))))
      return Status::bad_alignment;
    if ((reinterpret_cast<uintptr_t>(job.slabs) | reinterpret_cast<uintptr_t>(job.sum_slabs) |
         reinterpret_cast<uintptr_t>(job.out) | reinterpret_cast<uintptr_t>(job.column_sums)) %
        16)
      return Status::bad_alignment;
  }
  return Status::ok;
}

}  // namespace

Status add_slabs(int splits, const WgradParams& p, Target& target) {
  if (p.out_dtype != Dtype::f32 && p.out_dtype != p.dtype) return Status::bad_dtype;
  Sums sums{};
  int64_t quads = 0;
  const auto add = [&](const Sum& sum) {
    sums.part[sums.count++] = sum;
    quads += sum.size / 4;
  };
  for (int i = 0; i < p.count; ++i) {
    const WgradJob& job = p.jobs[i];
    if (job.out)
      add({.slabs = job.slabs,
           .out = job.out,
           .size = job.C * p.R,
           .splits = splits,
           .scale = job.scale * job.dropout.scale(),
           .dtype = p.out_dtype});
    if (job.sum_slabs)
      add({.slabs = job.sum_slabs,
           .out = job.column_sums,
           .size = job.C,
           .splits = splits,
           .scale = 1.0f,
           .dtype = p.dtype});
  }
  const Grid grid{.blocks = ceil_div(quads, 256), .threads = 256, .smem = 0, .cluster = 1};
  return launch<add_slabs_kernel>(grid, target, sums);
}

Status wgrad(const WgradConfig& c, const WgradParams& p, Target& target) {
  Status status = check(c, p);
  if (status != Status::ok) return status;
  switch (p.dtype) {
    case Dtype::f16: status = choose_rank<__half>(c, p, target); break;
    case Dtype::bf16: status = choose_rank<__nv_bfloat16>(c, p, target); break;
    default: return Status::bad_dtype;
  }
  return status == Status::ok ? add_slabs(c.splits, p, target) : status;
}

}  // namespace fused_lora
