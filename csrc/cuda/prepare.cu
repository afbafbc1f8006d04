// prepare:    A [R, K] and B [N, padded R] in x's dtype; zeros: a one-launch lora_gemm's control block and the sums dA
//             and dB that it adds to; and dx's dropout mask [M, K] as bits
//
// Used for    adapters in fp32 over a half-precision base (PEFT's default), and ranks that are no multiple of 8, whose
//             rows TMA cannot read
//             The mask: drawn beside dx's products, it would cost them three times what it costs here
// Types       fp32, fp16 or bf16 in, fp16 or bf16 out, rounded to nearest
// Grid        one thread for a word of the mask, four Philox calls, or 8 elements of an output: the mask's first, then
//             B's, A's, dB's, dA's and the control block's
// Source      Salmon et al., SC 2011 (philox.h)
#include "kernels.h"
#include "launch.h"
#include "philox.h"
#include "ptx.cuh"

namespace fused_lora {
namespace {

struct Args {
  const void* A;    // [R, K]
  const void* B;    // [N, R]
  uint4* out_A;     // [R, K]
  uint4* out_B;     // [N, padded]
  float4 *dA, *dB;  // [R, K], [N, R]
  int* control;
  uint32_t* mask;  // [M, words]
  const int64_t* seed;
  uint32_t threshold;
  int64_t words, groups_mask, groups_A, groups_B, groups_dA, groups_dB, control_ints, R, padded;
};

__device__ float to_float(float v) { return v; }
__device__ float to_float(__half v) { return __half2float(v); }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T> __device__ uint4 pack8(const float (&v)[8]) {
  return uint4{ptx::pack<T>(v[0], v[1]), ptx::pack<T>(v[2], v[3]), ptx::pack<T>(v[4], v[5]), ptx::pack<T>(v[6], v[7])};
}

template <class T, class From> __global__ void __launch_bounds__(256) prepare_kernel(const Args p) {
  ptx::start_next_kernel();  // this one is short: the next starts up meanwhile
  ptx::wait_for_previous_kernel();
  int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i < p.groups_mask) {
    const uint64_t seed = static_cast<uint64_t>(*p.seed);
    const uint32_t row = static_cast<uint32_t>(i / p.words), group = static_cast<uint32_t>(i % p.words) * 4;
    uint32_t bits = 0;
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) bits |= Philox(seed, row, group + j).kept(p.threshold) << 8 * j;
    p.mask[i] = bits;
    return;
  }
  i -= p.groups_mask;
  float v[8];
  if (i < p.groups_B) {
    const int64_t row = i * 8 / p.padded, col = i * 8 % p.padded;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      v[j] = col + j < p.R ? to_float(static_cast<const From*>(p.B)[row * p.R + col + j]) : 0.0f;
    p.out_B[i] = pack8<T>(v);
    return;
  }
  i -= p.groups_B;
  if (i < p.groups_A) {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = to_float(static_cast<const From*>(p.A)[i * 8 + j]);
    p.out_A[i] = pack8<T>(v);
    return;
  }
  i -= p.groups_A;
  if (i < p.groups_dB) {
    p.dB[2 * i] = p.dB[2 * i + 1] = float4{0.0f, 0.0f, 0.0f, 0.0f};
    return;
  }
  i -= p.groups_dB;
  if (i < p.groups_dA) {
    p.dA[2 * i] = p.dA[2 * i + 1] = float4{0.0f, 0.0f, 0.0f, 0.0f};
    return;
  }
  i = (i - p.groups_dA) * 8;
  for (int j = 0; j < 8; ++j)
    if (i + j < p.control_ints) p.control[i + j] = 0;
}

template <class T, class From> Status run(const PrepareParams& p, Target& target) {
  const int64_t padded = padded_rank(p.R);
  const Args args{.A = p.A,
                  .B = p.B,
                  .out_A = static_cast<uint4*>(p.out_A),
                  .out_B = static_cast<uint4*>(p.out_B),
                  .dA = reinterpret_cast<float4*>(p.dA),
                  .dB = reinterpret_cast<float4*>(p.dB),
                  .control = p.control,
                  .mask = p.mask,
                  .seed = p.dropout.seed,
                  .threshold = p.dropout.threshold,
                  .words = mask_words(p.K),
                  .groups_mask = p.mask ? p.M * mask_words(p.K) : 0,
                  .groups_A = p.out_A ? p.R * p.K / 8 : 0,
                  .groups_B = p.out_B ? p.N * padded / 8 : 0,
                  .groups_dA = p.dA ? p.R * p.K / 8 : 0,
                  .groups_dB = p.dB ? p.N * p.R / 8 : 0,
                  .control_ints = p.control ? p.control_ints : 0,
                  .R = p.R,
                  .padded = padded};
  const int64_t threads = args.groups_mask + args.groups_A + args.groups_B + args.groups_dA + args.groups_dB +
                          ceil_div(args.control_ints, 8);
  const Grid grid{.blocks = ceil_div(threads, 256), .threads = 256, .smem = 0, .cluster = 1};
  return launch<prepare_kernel<T, From>>(grid, target, args);
}

template <class T> Status choose_from(const PrepareParams& p, Target& target) {
  switch (p.adapter_dtype) {
    case Dtype::f32: return run<T, float>(p, target);
    case Dtype::f16:
    case Dtype::bf16: return p.adapter_dtype == p.dtype ? run<T, T>(p, target) : Status::bad_dtype;
    default: return Status::bad_dtype;
  }
}

}  // namespace

Status prepare(const PrepareParams& p, Target& target) {
  if (p.N < 1 || p.N % 8 || p.K < 1 || p.K % 8 || p.R < 1 || p.R > kMaxRank) return Status::bad_shape;
  if (p.mask && (p.M < 1 || !p.dropout.threshold || !p.dropout.seed)) return Status::bad_shape;
  if (!p.out_A && !p.out_B && !p.dA && !p.dB && !p.control && !p.mask) return Status::ok;
  switch (p.dtype) {
    case Dtype::f16: return choose_from<__half>(p, target);
    case Dtype::bf16: return choose_from<__nv_bfloat16>(p, target);
    default: return Status::bad_dtype;
  }
}

}  // namespace fused_lora
