// product: out = left right + bias, the base product alone, by lora_gemm or bf16_gemm without a rank.
//
// Used where the update is no plain LoRA's: a batch of several adapters (grouped.cpp) adds theirs to it.
#include "cpu_features.h"
#include "walk.h"

namespace fused_lora {
using namespace cpu;

Status cpu_product(const CpuProductParams& p) {
  if (p.M < 0 || p.N < 1 || p.K < 1) return Status::bad_shape;
  Buffers buffers;
  if (p.dtype == Dtype::f32) {
    LoraGemm g{};
    g.left = static_cast<const float*>(p.left), g.ld_left = p.ld_left;
    g.right = static_cast<const float*>(p.right), g.ld_right = p.ld_right;
    g.bias = static_cast<const float*>(p.bias), g.out = static_cast<float*>(p.out);
    g.M = p.M, g.N = p.N, g.K = p.K, g.by_rows = p.by_rows;
    lora_gemm(g, buffers, threads_worth(p.M * p.N * p.K, p.threads));
    return Status::ok;
  }
#ifdef FUSED_LORA_BF16_DOT
  if (p.dtype == Dtype::bf16 && features.bf16_dot) {
    Bf16Gemm g{};
    g.left = static_cast<const uint16_t*>(p.left), g.ld_left = p.ld_left;
    g.right = static_cast<const uint16_t*>(p.right), g.ld_right = p.ld_right;
    g.bias = static_cast<const uint16_t*>(p.bias), g.out = static_cast<uint16_t*>(p.out);
    g.M = p.M, g.N = p.N, g.K = p.K, g.by_rows = p.by_rows;
    bf16_gemm(g, buffers, threads_worth(p.M * p.N * p.K / 4, p.threads));
    return Status::ok;
  }
#endif
  return Status::bad_dtype;
}

}  // namespace fused_lora
