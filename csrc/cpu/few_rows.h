// few_rows: out = scale * (left right^T + low thin^T) + bias for few rows of left, as a generated token's.
#pragma once

#include "walk.h"

namespace fused_lora::cpu {

struct FewRows {
  const void* left;    // [M, K], row stride ld_left, dtype
  const void* right;   // [N, K], row stride ld_right, dtype
  const float* low;    // [M, R padded to kLanes], zero past R; or null
  const void* thin;    // [N, R], thin_dtype; with low only
  const void* bias;    // [N], dtype; or null
  const float* scale;  // [N] or null
  void* out;           // [M, N], contiguous, dtype
  int64_t M, N, K, R, ld_left, ld_right;
  Dtype dtype, thin_dtype;
};

// M up to kFewRows; dtype fp32, or bf16 where features.bf16_dot.
void few_rows(const FewRows& f, Buffers& buffers, int threads);

// How many rows are few: where this and the products that pack W were equally fast from memory (bench/NOTES.md).
constexpr int64_t kFewRows = 16;

}  // namespace fused_lora::cpu
