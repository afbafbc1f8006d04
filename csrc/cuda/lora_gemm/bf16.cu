// lora_gemm in bf16; see kernel.cuh.
#include "launch.cuh"

namespace fused_lora {

Status lora_gemm_bf16(const GemmConfig& config, const GemmParams& p, Target& target) {
  return gemm::choose_width<__nv_bfloat16>(config, p, target);
}

}  // namespace fused_lora
