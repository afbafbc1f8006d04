// product: y = x W^T + bias, the base product alone, by few_rows, or lora_gemm or bf16_gemm without a rank.
//
// Used where the update comes apart from it: of several adapters (grouped.cpp), of each of a mixture's experts.
#include <type_traits>

#include "cpu_features.h"
#include "few_rows.h"

namespace fused_lora {
using namespace cpu;
namespace {

// Of LoraGemm or Bf16Gemm.
template <class Gemm> Gemm gemm_of(const CpuProductParams& p) {
  Gemm g{};
  using Element = std::remove_pointer_t<decltype(g.out)>;
  g.left = static_cast<const Element*>(p.x), g.ld_left = p.ldx;
  g.right = static_cast<const Element*>(p.W), g.ld_right = p.ldw, g.by_rows = p.W_transposed;
  g.bias = static_cast<const Element*>(p.bias), g.out = static_cast<Element*>(p.y);
  g.M = p.M, g.N = p.N, g.K = p.K;
  return g;
}

}  // namespace

Status cpu_product(const CpuProductParams& p) {
  if (p.M < 0 || p.N < 1 || p.K < 1) return Status::bad_shape;
  Buffers buffers;
  const int64_t multiplications = p.M * p.N * p.K;
  if (!p.W_transposed && p.M <= kFewRows && (p.dtype == Dtype::f32 || (p.dtype == Dtype::bf16 && features.bf16_dot))) {
    const FewRows few{.left = p.x,
                      .right = p.W,
                      .out = p.y,
                      .M = p.M,
                      .N = p.N,
                      .K = p.K,
                      .ld_left = p.ldx,
                      .ld_right = p.ldw,
                      .dtype = p.dtype,
                      .bias = p.bias};
    return few_rows(few, buffers, threads_worth(multiplications, p.threads)), Status::ok;
  }
  if (p.dtype == Dtype::f32)
    return lora_gemm(gemm_of<LoraGemm>(p), buffers, threads_worth(multiplications, p.threads)), Status::ok;
#ifdef FUSED_LORA_BF16_DOT
  if (p.dtype == Dtype::bf16 && features.bf16_dot)
    return bf16_gemm(gemm_of<Bf16Gemm>(p), buffers, threads_worth(multiplications / 4, p.threads)), Status::ok;
#endif
  return Status::bad_dtype;
}

}  // namespace fused_lora
