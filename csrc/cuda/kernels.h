// The CUDA kernels' launchers: one params struct each, every pointer with its shape. The drivers (lora.cpp) put them in
// order.
//
// Matrices are row-major in `dtype` (fp16 or bf16) with 16-byte aligned rows unless said otherwise; each launcher
// checks what it is given.
#pragma once

#include <cstdint>

#include "heuristics.h"
#include "launch.h"

namespace fused_lora {

// prepare.cu     A and B in dtype with padded rows, the zeros that a one-launch GEMM starts from, and dropout's mask as
//                bits; null outputs are left out.
struct PrepareParams {
  const void* A;             // [R, K], contiguous, adapter_dtype, any alignment
  const void* B;             // [N, R], contiguous, adapter_dtype, any alignment
  void* out_A;               // [R, K]
  void* out_B;               // [N, padded_rank(R)], columns past R zero
  int* control;              // [control_ints], zeroed
  float* dA = nullptr;       // [R, K], zeroed
  float* dB = nullptr;       // [N, R], zeroed
  uint32_t* mask = nullptr;  // [M, mask_words(K)]: bit j of word i of a row is column 32 i + j
  Dropout dropout = {};      // over [M, K], read if mask
  int64_t control_ints, M, N, K, R;
  Dtype dtype, adapter_dtype;
};
Status prepare(const PrepareParams& p, Target& target);

// lora_gemm/kernel.cuh   out = alpha * left right + low thin (+ bias), in the backward the low-rank term through
//                       the dropout mask; with kind.rank_tile also low = scale * left down, in the same launch, in the
//                       forward of the masked left, by low_columns columns of tiles; with kind.gradients also dB +=
//                       left^T h and dA += drop(x)^T low, each unless null.
struct GemmParams {
  const void* left;            // [M, K], row stride ld_left
  const void* right;           // [N, K], or [K, N] in the backward: row stride ld_right
  const void* thin = nullptr;  // [N, R], or [R, N] in the backward: row stride ld_thin; null if R is 0
  const void* down = nullptr;  // [R, K], or [K, R] in the backward: row stride ld_down; read if kind.rank_tile
  const void* bias = nullptr;  // [N], or null
  void* low = nullptr;         // [M, R], row stride ld_low; written if kind.rank_tile, else read
  void* out;                   // [M, N], row stride ld_out
  const void* h = nullptr;     // [M, R], row stride ld_h; read if dB
  const void* x = nullptr;     // [M, N], row stride ld_x; read if dA
  float* dB = nullptr;         // [K, R], sums in no fixed order; only with kind.gradients
  float* dA = nullptr;         // [R, N], the same, dropout's factor included
  int* control = nullptr;      // zeros, control_bytes(config); used if kind.rank_tile
  float* low_sums = nullptr;   // low_sums_bytes(config), any contents, aligned to 16 bytes; used if low_columns is 2
  const uint32_t* mask = nullptr;  // [M, mask_words(N)], prepare's; read in the backward with dropout
  int64_t ld_left, ld_right, ld_thin = 0, ld_down = 0, ld_low = 0, ld_out, ld_h = 0, ld_x = 0;
  int64_t M, N, K, R = 0;
  float alpha, scale = 0.0f;
  Dropout dropout =
      {};  // backward: over [M, N], of the low-rank term and x; forward: over [M, K], of left for low, its
           // factor in scale
  Dtype dtype;
};
Status lora_gemm(const GemmConfig& config, const GemmParams& p, Target& target);

// lora_gemm/small.cu    y = x W^T + h B^T + bias and h = scale * x A^T in one launch, for small M.
struct SmallParams {
  const void* x;     // [M, K], row stride ldx
  const void* W;     // [N, K], row stride ldw
  const void* A;     // [R, K]
  const void* B;     // [N, padded_rank(R)], columns past R zero
  const void* bias;  // [N], or null
  void* h;           // [M, padded_rank(R)], columns past R become zero
  void* y;           // [M, N]
  int64_t M, N, K, R, ldx, ldw;
  float scale;
  Dtype dtype;
};
Status lora_gemm_small(const SmallConfig& config, const SmallParams& p, Target& target);

// shrink.cu      low = scale * drop(left) down
struct ShrinkParams {
  const void* left;  // [M, K], row stride ld_left
  const void* down;  // [R, K], or [K, R] if down_mn: row stride ld_down, a multiple of 8 columns, those past R zero
  void* low;         // [M, R], row stride padded_rank(R); columns past R hold nothing of use
  int64_t M, K, R, ld_left, ld_down;
  bool down_mn;
  float scale;
  Dropout dropout = {};  // over [M, K]
  Dtype dtype;
  int sms;  // of the device
};
Status shrink(const ShrinkParams& p, Target& target);

// wgrad.cu       out = scale * drop(left)^T low and column_sums = sum over M of left, for up to two products in one
//                launch and one more for the sums.
struct WgradJob {
  const void* left;             // [M, C], row stride ld_left
  const void* low = nullptr;    // [M, R], row stride ld_low; not read if R is 0
  float* slabs = nullptr;       // [splits, C, R], or [splits, R, C] if transposed; workspace
  float* sum_slabs = nullptr;   // [splits, C], or null: no column sums
  void* out = nullptr;          // [C, R], or [R, C] if transposed, contiguous, out_dtype; null if R is 0
  void* column_sums = nullptr;  // [C], dtype
  int64_t C, ld_left, ld_low = 0;
  bool transposed = false;
  float scale;
  Dropout dropout = {};  // over [M, C]
};
struct WgradParams {
  WgradJob jobs[2] = {};
  int count = 0;
  int64_t M, R;
  Dtype dtype, out_dtype;
};
Status wgrad(const WgradConfig& config, const WgradParams& p, Target& target);
// The second launch of wgrad alone: slabs of `splits` parts -> outputs.
Status add_slabs(int splits, const WgradParams& p, Target& target);

}  // namespace fused_lora
