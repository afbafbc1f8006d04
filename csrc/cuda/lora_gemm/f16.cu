// lora_gemm in fp16; see kernel.cuh.
#include "launch.cuh"

namespace fused_lora {

Status lora_gemm_f16(const GemmConfig& config, const GemmParams& p, Target& target) {
  return gemm::choose_width<__half>(config, p, target);
}

}  // namespace fused_lora
