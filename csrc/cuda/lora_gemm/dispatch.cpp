// lora_gemm's door: checks, then the dtype's instances.
#include "cuda/kernels.h"

namespace fused_lora {

Status lora_gemm_f16(const GemmConfig& config, const GemmParams& p, Target& target);   // f16.cu
Status lora_gemm_bf16(const GemmConfig& config, const GemmParams& p, Target& target);  // bf16.cu

Status lora_gemm(const GemmConfig& c, const GemmParams& p, Target& target) {
  if (!c.valid || p.M < 1 || p.N < 1 || p.K < 1 || p.R < 0 || p.R > kMaxRank || p.K > INT32_MAX - 512)
    return Status::bad_shape;
  const GemmKind& kind = c.kind;
  const void* const mask = kind.backward ? static_cast<const void*>(p.mask) : p.dropout.seed;
  if (kind.dropout != (p.dropout.threshold > 0) || (kind.dropout && !mask) ||
      (kind.rank_tile && (p.R > kind.rank_tile || !p.control)))
    return Status::bad_shape;
  if (c.low_columns > 1 && (c.col_tiles < 2 || c.grid < 2 * kGemmCluster || p.K <= kGemmBlockK || !p.low_sums))
    return Status::bad_shape;
  if ((p.dA || p.dB) && (!kind.gradients || (p.dB && !p.h) || (p.dA && !p.x))) return Status::bad_shape;
  if (p.bias && (p.N % 2 || kind.backward)) return Status::bad_shape;
  if (reinterpret_cast<uintptr_t>(p.bias) % 4 || reinterpret_cast<uintptr_t>(p.low_sums) % 16 || p.ld_low % 2)
    return Status::bad_alignment;
  switch (p.dtype) {
    case Dtype::f16: return lora_gemm_f16(c, p, target);
    case Dtype::bf16: return lora_gemm_bf16(c, p, target);
    default: return Status::bad_dtype;
  }
}

}  // namespace fused_lora
