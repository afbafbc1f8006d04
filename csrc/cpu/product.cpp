// product: out = left right + bias, the base product alone, by lora_gemm or bf16_gemm without a rank.
//
// Used where the update is no plain LoRA's: a batch of several adapters (grouped.cpp) adds theirs to it.
#include <type_traits>

#include "cpu_features.h"
#include "walk.h"

namespace fused_lora {
using namespace cpu;
namespace {

// Of LoraGemm or Bf16Gemm.
template <class Gemm> Gemm gemm_of(const CpuProductParams& p) {
  Gemm g{};
  using Element = std::remove_pointer_t<decltype(g.out)>;
  g.left = static_cast<const Element*>(p.left), g.ld_left = p.ld_left;
  g.right = static_cast<const Element*>(p.right), g.ld_right = p.ld_right;
  g.bias = static_cast<const Element*>(p.bias), g.out = static_cast<Element*>(p.out);
  g.M = p.M, g.N = p.N, g.K = p.K, g.by_rows = p.by_rows;
  return g;
}

}  // namespace

Status cpu_product(const CpuProductParams& p) {
  if (p.M < 0 || p.N < 1 || p.K < 1) return Status::bad_shape;
  Buffers buffers;
  const int64_t multiplications = p.M * p.N * p.K;
  if (p.dtype == Dtype::f32)
    return lora_gemm(gemm_of<LoraGemm>(p), buffers, threads_worth(multiplications, p.threads)), Status::ok;
#ifdef FUSED_LORA_BF16_DOT
  if (p.dtype == Dtype::bf16 && features.bf16_dot)
    return bf16_gemm(gemm_of<Bf16Gemm>(p), buffers, threads_worth(multiplications / 4, p.threads)), Status::ok;
#endif
  return Status::bad_dtype;
}

}  // namespace fused_lora
