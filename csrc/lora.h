// The contract between Python and the native code: dtypes, status, one params struct per entry point.
//
//   forward    h  = s * drop(x) A^T                    [M, R]
//              y  = x W^T + h B^T + bias               [M, N]
//   backward   dh = s * dy B                           [M, R]
//              dx = dy W + mask * (dh A) / (1 - p)     [M, K]
//              dA = dh^T drop(x)   dB = dy^T h   dbias = sum_M dy
//
// and on the CPU with the op's optional tensors, of which a null pointer stands for none:
//   forward    h  = s * drop(x_lora) A^T
//              y  = out_scale * (x W^T + low B^T) + bias               low = (h + s h_in) * gate
//   backward   dz = out_scale * dy
//              dh = s (gate * (dz B) + dh_ext)    dh_c the same of c * dz    dh_ext: gradient of the returned h
//              dx = dz W   dx_lora = mask * (dh A) / (1 - p)           added up where x_lora is x
//              dA = dh_c^T drop(x_lora)   dB = c * (dz^T low)
//              dh_in = s gate * (dz B)    dgate = (dz B) * (h + s h_in), summed over each gate's ranks
//
// Native code knows no framework: raw pointers, sizes, strides (in elements), a dtype code. It never allocates outputs
// and never prints.
#pragma once

#include <cstdint>

namespace fused_lora {

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };

enum class Status : int { ok = 0, bad_dtype, bad_shape, bad_alignment, bad_plan, unsupported_device, launch_failed };

inline const char* message(Status status) {
  switch (status) {
    case Status::ok: return "ok";
    case Status::bad_dtype: return "dtype code must be 0 (fp32), 1 (fp16) or 2 (bf16)";
    case Status::bad_shape: return "sizes must be M >= 0 and N, K, R >= 1";
    case Status::bad_alignment: return "pointer or row stride is not aligned as this kernel needs";
    case Status::bad_plan: return "sizes, plan and workspace must go together as csrc/cuda/plans.h has them";
    case Status::unsupported_device: return "this device cannot run this kernel";
    case Status::launch_failed: return "the kernel launch failed";
  }
  return "unknown status";
}

// LoRA dropout: the mask is a function of (seed, row, column), see philox.h. threshold 0 means no dropout.
struct Dropout {
  const int64_t* seed;  // [1], read where the kernel runs
  uint32_t threshold;   // drop an element when its 16-bit draw is below; at most 65535
  float scale() const { return 65536.0f / (65536.0f - static_cast<float>(threshold)); }
};

// CPU, the forward: writes h, and y with the base product of its own (fp32, and bf16 on AVX512-BF16 or AMX) or, without
// W, by adding h B^T to the caller's x W^T + bias, of which the bias is left to us where there is an out_scale.
struct CpuForwardParams {
  const void* x;     // [M, K], row stride ldx, dtype
  const void* W;     // [N, K] or, W_transposed, [K, N], row stride ldw, dtype; or null
  const void* A;     // [R, K], contiguous, adapter_dtype
  const void* B;     // [N, R], contiguous, adapter_dtype
  const void* bias;  // [N], dtype, read with W or out_scale only; or null
  void* h;           // [M, R], contiguous, dtype
  void* y;           // [M, N], contiguous, dtype; updated where W is null
  int64_t M, N, K, R, ldx, ldw;
  bool W_transposed;
  Dtype dtype, adapter_dtype;
  float scaling;
  Dropout dropout;
  int threads;
  const void* x_lora;      // [M, K], row stride ldx_lora, dtype; or null
  const void* h_in;        // [M, R], contiguous, dtype; or null
  const float* gate;       // [M, gates], contiguous, gates divides R; or null
  const float* out_scale;  // [N] or null
  int64_t ldx_lora, gates;
};

// CPU, the backward: dx with the base product of its own (fp32, and bf16 on AVX512-BF16 or AMX) or, without W, added to
// the caller's dy W. A null output is not computed. Where there is a dx_lora it gets the update, and dx is dy W alone.
struct CpuBackwardParams {
  const void* dy;  // [M, N], row stride lddy, dtype
  const void* x;   // [M, K], row stride ldx, dtype, the low-rank path's input; read for dA only
  const void* W;   // [N, K] or, W_transposed, [K, N], row stride ldw, dtype, read for dx only; or null
  const void* A;   // [R, K], contiguous, adapter_dtype
  const void* B;   // [N, R], contiguous, adapter_dtype
  const void* h;   // [M, R], contiguous, dtype; read for dB and dgate only
  void* dx;        // [M, K], contiguous, dtype; updated by mask * (dh A) / (1 - p) where W is null
  void* dA;        // [R, K], contiguous, adapter_dtype
  void* dB;        // [N, R], contiguous, adapter_dtype
  void* dbias;     // [N], contiguous, dtype
  int64_t M, N, K, R, ldx, lddy, ldw;
  bool W_transposed;
  bool add;  // dx with the base product to what it holds; in fp32 only
  Dtype dtype, adapter_dtype;
  float scaling;
  Dropout dropout;
  int threads;
  const void* h_in;        // [M, R], contiguous, dtype; or null
  const float* gate;       // [M, gates], contiguous, gates divides R; or null
  const float* row_scale;  // [N], c; or null
  const void* dh;          // [M, R], contiguous, dtype: dh_ext; or null
  void* dx_lora;           // [M, K], contiguous, dtype; updated
  void* dh_in;             // [M, R], contiguous, dtype
  float* dgate;            // [M, gates], contiguous
  // What the walk itself makes of out_scale, where the base product is its own: dz of dy, and its gradient. Else null,
  // and dy is dz already (cpu_scale).
  const float* out_scale;  // [N]
  const void* y;           // [M, N], row stride ldy, dtype; read for dout_scale only
  const void* bias;        // [N], dtype; or null
  float* dout_scale;       // [N], sum_M dy * (y - bias) / out_scale
  int64_t* lost;           // [1], of how many columns y tells too little for it, which are NaN; with dout_scale only
  int64_t gates, ldy;
};

// CPU, what comes before the backward where there is an out_scale and the base product is somebody else's: dz =
// out_scale * dy in one pass over dy, with the gradients that read the same rows. A null output is not computed.
struct CpuScaleParams {
  const void* dy;          // [M, N], row stride lddy, dtype
  const void* y;           // [M, N], row stride ldy, dtype; read for dout_scale only
  const void* bias;        // [N], dtype; or null
  const float* out_scale;  // [N]
  void* dz;                // [M, N], contiguous, dtype
  float* dout_scale;       // [N], sum_M dy * (y - bias) / out_scale
  int64_t* lost;           // [1], of how many columns y tells too little for it, which are NaN; with dout_scale only
  void* dbias;             // [N], dtype, sum_M dy
  int64_t M, N, lddy, ldy;
  Dtype dtype;
  int threads;
};

// CPU, the base product alone: y = x W^T + bias, in fp32, and in bf16 on AVX512-BF16.
struct CpuProductParams {
  const void* x;     // [M, K], row stride ldx, dtype
  const void* W;     // [N, K] or, W_transposed, [K, N], row stride ldw, dtype
  const void* bias;  // [N], dtype; or null
  void* y;           // [M, N], contiguous, dtype
  int64_t M, N, K, ldx, ldw;
  bool W_transposed;
  Dtype dtype;
  int threads;
};

// CPU, the lengths of the rows of W + s B A, for DoRA, or of s B A alone, for ALLoRA.
struct CpuRowNormParams {
  const void* W;   // [N, K], row stride ldw, dtype; or null
  const float* A;  // [R, K], contiguous
  const float* B;  // [N, R], contiguous
  float* norm;     // [N]
  int64_t* empty;  // [1], of how many rows that is 0; or null
  int64_t N, K, R, ldw;
  Dtype dtype;
  float scaling;
  int threads;
};

Status cpu_forward(const CpuForwardParams& p);
Status cpu_backward(const CpuBackwardParams& p);
Status cpu_scale(const CpuScaleParams& p);
Status cpu_product(const CpuProductParams& p);
Status cpu_row_norm(const CpuRowNormParams& p);

// CPU, updates by an adapter of its own for each group of rows: position m of group g, from offsets[g] to
// offsets[g + 1], is row rows[m] of x and y, or row m without `rows`.
struct CpuGroups {
  const void* const* A;       // [G] of [R_g, K], contiguous, adapter_dtype
  const void* const* B;       // [G] of [N, R_g], contiguous, adapter_dtype
  const int64_t* ranks;       // [G], R_g
  const int64_t* offsets;     // [G + 1], ascending from 0 to M'
  const int64_t* rows;        // [M'], each once; or null
  const float* scaling;       // [G]
  const int64_t* thresholds;  // [G], of Dropout; or null
  const int64_t* seed;        // [1], of Dropout
  int64_t G, N, K, R;         // R: the largest rank
  Dtype dtype, adapter_dtype;
  int threads;
};

// y[rows] += h B^T with h = s * drop(x[rows]) A^T.
struct CpuGroupedForwardParams : CpuGroups {
  const void* x;  // [M, K], row stride ldx, dtype
  void* h;        // [M', R], contiguous, dtype; zero past a group's own rank
  void* y;        // [M, N], contiguous, dtype; updated
  int64_t ldx;
};

// dx[rows] += mask * (dh A) / (1 - p) with dh = s * dy[rows] B; dA and dB of each group, zero where it has no rows. A
// null output is not computed.
struct CpuGroupedBackwardParams : CpuGroups {
  const void* dy;   // [M, N], row stride lddy, dtype
  const void* x;    // [M, K], row stride ldx, dtype; read for dA only
  const void* h;    // [M', R], contiguous, dtype; read for dB only
  void* dx;         // [M, K], contiguous, dtype; updated
  void* const* dA;  // [G] of [R_g, K], contiguous, adapter_dtype, or null; where groups share an A, the first alone
  void* const* dB;  // [G] of [N, R_g], likewise
  int64_t lddy, ldx;
  bool shared_A, shared_B;  // dA[0], dB[0] is the sum over all groups, which have one rank
};

Status cpu_grouped_forward(const CpuGroupedForwardParams& p);
Status cpu_grouped_backward(const CpuGroupedBackwardParams& p);

// CUDA, how a call is computed where there is more than one right way; 0, any, leaves a field to the heuristics.
// cuda/plans.h has the words for it and says what excludes what.
struct CudaPlan {
  enum class Product : int { any, small, n128, n256 } y;        // by lora_gemm_small, or by tiles of so many columns
  enum class Low : int { any, inside, shrink, gemm, warps } h;  // in y's launch, or by a kernel of its own; warps:
                                                                // there, with dropout by the loader's idle warps
  Product dx;                                                   // never small
  Low dh;                                                       // in dx's launch, or by a kernel of its own
  enum class Weights : int { any, apart, warpgroup } wgrad;     // dA, dB: after dx, or in its launch by a fourth
                                                                // warpgroup
  enum class Launches : int { any, overlap, serial } launches;  // whether a kernel may start while the last one ends
  enum class Share : int { any, single, halves } h_share,       // in whose launch h or dh is: by one column of its
      dh_share;                                                 // tiles, or by two, half of K (of dy's N) each
};

// CUDA, the whole forward on one stream: y = x W^T + h B^T + bias and h. Pointers and row strides aligned to 16 bytes
// unless said otherwise.
struct CudaForwardParams {
  const void* x;     // [M, K], row stride ldx, dtype
  const void* W;     // [N, K], row stride ldw, dtype
  const void* A;     // [R, K], contiguous, adapter_dtype
  const void* B;     // [N, R], contiguous, adapter_dtype
  const void* bias;  // [N], dtype, or null
  void* h;           // [M, R], row stride R rounded up to 8, dtype
  void* y;           // [M, N], contiguous, dtype
  void* workspace;   // forward_plan(...).bytes of cuda/plans.h, aligned to 16 bytes, any contents; nobody else's until
                     // the stream is through
  int64_t workspace_bytes;
  int64_t M, N, K, R, ldx, ldw;
  Dtype dtype, adapter_dtype;
  float scaling;
  Dropout dropout;  // seed on the device
  CudaPlan plan;
  int device;    // the caller's current device
  void* stream;  // cudaStream_t
};

// CUDA, the whole backward on one stream. A null output is not computed. Each sum over K or N has a fixed order, and so
// has dbias.
struct CudaBackwardParams {
  const void* dy;   // [M, N], row stride lddy, dtype
  const void* x;    // [M, K], row stride ldx, dtype; read for dA only
  const void* W;    // [N, K], row stride ldw, dtype; read for dx only
  const void* A;    // [R, K], contiguous, adapter_dtype; read for dx only
  const void* B;    // [N, R], contiguous, adapter_dtype
  const void* h;    // [M, R], row stride ldh, dtype; read for dB only
  void* dx;         // [M, K], contiguous, dtype
  void* dA;         // [R, K], contiguous, adapter_dtype
  void* dB;         // [N, R], contiguous, adapter_dtype
  void* dbias;      // [N], contiguous, dtype
  void* workspace;  // backward_plan(...).bytes of cuda/plans.h, as above
  int64_t workspace_bytes;
  int64_t M, N, K, R, lddy, ldx, ldw, ldh;
  Dtype dtype, adapter_dtype;
  float scaling;
  Dropout dropout;     // seed on the device
  bool deterministic;  // dA and dB in a fixed order of summation, too: apart, whatever the plan says
  CudaPlan plan;
  int device;    // the caller's current device
  void* stream;  // cudaStream_t
};

Status cuda_forward(const CudaForwardParams& p);
Status cuda_backward(const CudaBackwardParams& p);
const char* cuda_failure();  // what CUDA said to this thread's last Status::launch_failed

}  // namespace fused_lora
