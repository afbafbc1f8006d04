// lora_gemm_small:  y[M, N] = x W^T + h B^T + bias,   h[M, R] = scale * x A^T,   in one launch for M <= 128 and R <= 64
//
// Used for    the forward of decoding and other small M without dropout, where reading W once is all the time there is
// Types       fp16 or bf16, fp32 accumulators; h is rounded to dtype before it is multiplied, as the reference does
// Tile        a cluster of 1 to 8 blocks takes 128 rows of W, each block one part of K. The product is y^T = W x^T: a
//             warpgroup has 64 rows of W (wgmma's m), x's rows are its n: 16, 32, 64 or 128. A third warpgroup
//             multiplies A's rows alike: h for one more read of A from L2
// Warps       warpgroups 0 and 1: W, 2: A; warp 12 loads (TMA) through a ring of k-steps of 64
// Sum         the parts' sums lie in each block's shared memory. Each block adds up h and its share of the columns of y
//             from the whole cluster's, in the order of K: results repeat bit for bit, and no flag, workspace or second
//             launch is needed
// Shared      stages * (192 + rows) * 128 bytes, two blocks an SM up to 64 rows; sums and h lie over the stages when
//             these are through
// Bound by    one read of W: 11 us for 33.5 MB at 3.0 TB/s
// Source      PTX ISA 9.0 (wgmma, TMA, mapa); Hu et al., arXiv 2106.09685
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "tiles.cuh"

namespace fused_lora {
namespace {

constexpr int kThreads = 3 * 128 + 32, kCols = kSmallCols, kLeft = kSmallCols + kSmallRank, kBlockK = kGemmBlockK;
constexpr int kLd = kLeft + 4;  // row length of the sums: the 4 keep a fragment's columns in different banks

template <class T, int kRows> struct __align__(1024) Smem {
  static constexpr int kStages = small_stages(kRows);
  T left[kStages][kLeft * kBlockK];  // of W, then of A
  T x[kStages][kRows * kBlockK];
  uint64_t full[kStages], empty[kStages];

  PTX_FN float* sums() { return reinterpret_cast<float*>(this); }       // [kRows, kLd]: 128 columns of y, 64 of h
  PTX_FN T* h() { return reinterpret_cast<T*>(sums() + kRows * kLd); }  // [kRows, 64]
  static_assert(kRows * (kLd * 4 + kSmallRank * 2) <= kStages * small_stage_bytes(kRows));
};

template <class T> struct Args {
  const T* B;     // [N, padded_rank(R)]
  const T* bias;  // [N], or null
  T* h;           // [M, padded_rank(R)]
  T* y;           // [M, N]
  int M, N, K, R, padded, splits;
  float scale;
};

template <class T, int kRows>
PTX_FN void load(Smem<T, kRows>& s, const CUtensorMap* x, const CUtensorMap* W, const CUtensorMap* A, int col,
                 int begin, int end) {
  gemm::Ring<small_stages(kRows)> ring;
  for (int k = begin; k < end; ++k, ring.next()) {
    uint64_t* const full = &s.full[ring.slot];
    ptx::wait(&s.empty[ring.slot], ring.phase ^ 1);
    ptx::arrive_expect(full, small_stage_bytes(kRows));
    ptx::tma_load(s.left[ring.slot], W, full, col, k * kBlockK);
    ptx::tma_load(&s.left[ring.slot][kCols * kBlockK], A, full, 0, k * kBlockK);
    ptx::tma_load(s.x[ring.slot], x, full, 0, k * kBlockK);
  }
}

// acc = 64 rows of [W; A] times x^T over this block's part of K.
template <class T, int kRows>
PTX_FN void multiply(float (&acc)[kRows / 2], Smem<T, kRows>& s, int group, int thread, int steps) {
  gemm::Ring<small_stages(kRows)> ring;
  for (int k = 0; k < steps; ++k, ring.next()) {
    ptx::wait(&s.full[ring.slot], ring.phase);
    ptx::wgmma_fence();
    const uint64_t left = ptx::descriptor(&s.left[ring.slot][group * 64 * kBlockK], 16, 1024, 128),
                   right = ptx::descriptor(s.x[ring.slot], 16, 1024, 128);
#pragma unroll
    for (int q = 0; q < 4; ++q) ptx::wgmma<T, kRows, false>(acc, left + q * 2, right + q * 2, q > 0 || k > 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait();
    if (thread == 0) ptx::arrive(&s.empty[ring.slot]);
  }
}

// Four neighbouring sums of the whole cluster, block 0's first.
[[maybe_unused]] PTX_FN float4 cluster_sum(const float* at, int splits) {
  float4 part[8], total{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    part[i] = i < splits ? ptx::load_remote(reinterpret_cast<const float4*>(at), i) : float4{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    total = float4{total.x + part[i].x, total.y + part[i].y, total.z + part[i].z, total.w + part[i].w};
  return total;
}

template <class T> PTX_FN uint2 pack4(float4 v) { return uint2{ptx::pack<T>(v.x, v.y), ptx::pack<T>(v.z, v.w)}; }

template <class T> PTX_FN float dot8(const uint4& a, const uint4& b) {
  const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = ptx::unpack<T>(left[i]), v = ptx::unpack<T>(right[i]);
    sum = fmaf(u.y, v.y, fmaf(u.x, v.x, sum));
  }
  return sum;
}

// h whole, to this block's shared memory and (writes_h) to args.h; then this block's columns of y, first .. first +
// share of the strip at `col`.
template <class T, int kRows>
PTX_FN void finish(Smem<T, kRows>& s, const Args<T>& p, int col, int first, int share, bool writes_h) {
  for (int i = threadIdx.x; i < p.M * (p.padded / 4); i += kThreads) {
    const int m = i / (p.padded / 4), r = i % (p.padded / 4) * 4;
    const float4 sum = cluster_sum(s.sums() + m * kLd + kCols + r, p.splits);
    // An infinity in x times A's padding is no number: padding ranks are set to zero.
    const uint2 packed = pack4<T>(float4{r < p.R ? sum.x * p.scale : 0.0f, r + 1 < p.R ? sum.y * p.scale : 0.0f,
                                         r + 2 < p.R ? sum.z * p.scale : 0.0f, r + 3 < p.R ? sum.w * p.scale : 0.0f});
    *reinterpret_cast<uint2*>(s.h() + m * kSmallRank + r) = packed;
    if (writes_h) *reinterpret_cast<uint2*>(p.h + m * p.padded + r) = packed;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.M * (share / 4); i += kThreads) {
    const int m = i / (share / 4), n = first + i % (share / 4) * 4;
    if (col + n >= p.N) continue;
    const float4 sum = cluster_sum(s.sums() + m * kLd + n, p.splits);
    const uint2 bias = p.bias ? *reinterpret_cast<const uint2*>(p.bias + col + n) : uint2{0, 0};
    const float2 low = ptx::unpack<T>(bias.x), high = ptx::unpack<T>(bias.y);
    float y[4] = {sum.x + low.x, sum.y + low.y, sum.z + high.x, sum.w + high.y};
    for (int r = 0; r < p.padded; r += 8) {
      const uint4 h = *reinterpret_cast<const uint4*>(s.h() + m * kSmallRank + r);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        y[j] += dot8<T>(h, *reinterpret_cast<const uint4*>(p.B + int64_t{col + n + j} * p.padded + r));
    }
    *reinterpret_cast<uint2*>(p.y + int64_t{m} * p.N + col + n) = pack4<T>(float4{y[0], y[1], y[2], y[3]});
  }
}

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, kRows > 64 ? 1 : 2)
    lora_gemm_small_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap W,
                           const __grid_constant__ CUtensorMap A, const __grid_constant__ Args<T> p) {
#ifdef FUSED_LORA_SM90A
  static_assert(sizeof(Smem<T, kRows>) + 1024 <= small_smem_bytes(kRows));
  Smem<T, kRows>& s = *reinterpret_cast<Smem<T, kRows>*>(ptx::dynamic_smem());
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, cta = static_cast<int>(ptx::cta_in_cluster());
  const int col = blockIdx.x / p.splits * kCols, k_blocks = (p.K + kBlockK - 1) / kBlockK,
            begin = cta * k_blocks / p.splits, end = (cta + 1) * k_blocks / p.splits;
  if (threadIdx.x == 0) {
    for (int i = 0; i < s.kStages; ++i) {
      ptx::barrier_init(&s.full[i], 1);
      ptx::barrier_init(&s.empty[i], 3);
    }
    ptx::barrier_init_fence();
  }
  ptx::wait_for_previous_kernel();
  __syncthreads();
  float acc[kRows / 2];
  if (group == 3) {
    if (thread == 0) load(s, &x, &W, &A, col, begin, end);
    __syncwarp();
  } else {
    multiply(acc, s, group, thread, end - begin);
  }
  __syncthreads();  // the ring is through: the sums take its place
  if (group < 3) {
    float* const at = s.sums() + thread % 4 * 2 * kLd + group * 64 + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) at[(i / 4 * 8 + i % 2) * kLd + i / 2 % 2 * 8] = acc[i];
  }
  ptx::cluster_sync();
  const int share = kCols / p.splits;
  finish(s, p, col, cta * share, share, col == 0 && cta == 0);
  ptx::cluster_sync();  // nobody leaves while the others may still read here
#endif
}

template <class T, int kRows> Status run(const SmallConfig& c, const SmallParams& p, Target& target) {
  Status status = Status::ok;
  const auto make = [&](CUtensorMap* map, const void* data, int64_t rows, int64_t ld, int box_rows) {
    const MatrixView view{
        .data = data, .rows = rows, .cols = p.K, .ld = ld, .box_rows = box_rows, .box_cols = kBlockK, .dtype = p.dtype};
    if (status == Status::ok) status = tensor_map(view, map);
  };
  CUtensorMap x, W, A;
  make(&x, p.x, p.M, p.ldx, kRows);
  make(&W, p.W, p.N, p.ldw, kCols);
  make(&A, p.A, p.R, p.K, kSmallRank);
  if (status != Status::ok) return status;
  const Args<T> args{.B = static_cast<const T*>(p.B),
                     .bias = static_cast<const T*>(p.bias),
                     .h = static_cast<T*>(p.h),
                     .y = static_cast<T*>(p.y),
                     .M = static_cast<int>(p.M),
                     .N = static_cast<int>(p.N),
                     .K = static_cast<int>(p.K),
                     .R = static_cast<int>(p.R),
                     .padded = static_cast<int>(padded_rank(p.R)),
                     .splits = c.splits,
                     .scale = p.scale};
  const Grid grid{.blocks = c.strips * c.splits, .threads = kThreads, .smem = c.smem, .cluster = c.splits};
  return launch<lora_gemm_small_kernel<T, kRows>>(grid, target, x, W, A, args);
}

template <class T> Status choose_rows(const SmallConfig& c, const SmallParams& p, Target& target) {
  switch (c.rows) {
    case 16: return run<T, 16>(c, p, target);
    case 32: return run<T, 32>(c, p, target);
    case 64: return run<T, 64>(c, p, target);
    case 128: return run<T, 128>(c, p, target);
    default: return Status::bad_shape;
  }
}

}  // namespace

Status lora_gemm_small(const SmallConfig& c, const SmallParams& p, Target& target) {
  if (!c.valid || p.M < 1 || p.M > c.rows || p.N < 1 || p.N % 8 || p.K < 1 || p.K > INT32_MAX - 512 || p.R < 1 ||
      p.R > kSmallRank)
    return Status::bad_shape;
  switch (p.dtype) {
    case Dtype::f16: return choose_rows<__half>(c, p, target);
    case Dtype::bf16: return choose_rows<__nv_bfloat16>(c, p, target);
    default: return Status::bad_dtype;
  }
}

}  // namespace fused_lora
