// few_rows: out = scale * (left right^T + low thin^T) + bias for few rows of left, as a generated token's.
#pragma once

#include "walk.h"

namespace fused_lora::cpu {

struct FewRows {
  const void* left;   // [M, K], row stride ld_left, dtype
  const void* right;  // [N, K], row stride ld_right, dtype
  void* out;          // [M, N], contiguous, dtype
  int64_t M, N, K, ld_left, ld_right;
  Dtype dtype;
  const void* bias = nullptr;    // [N], dtype; or null
  const float* scale = nullptr;  // [N] or null
  const float* low = nullptr;    // [M, R padded to kLanes], zero past R; or null
  const void* thin = nullptr;    // [N, R], thin_dtype; with low only
  int64_t R = 0;
  Dtype thin_dtype = Dtype::f32;
};

// M up to kFewRows; dtype fp32, or bf16 where features.bf16_dot.
void few_rows(const FewRows& f, Buffers& buffers, int threads);

// How many rows are few: where this and the products that pack W were equally fast from memory (bench/NOTES.md).
constexpr int64_t kFewRows = 16;

}  // namespace fused_lora::cpu
