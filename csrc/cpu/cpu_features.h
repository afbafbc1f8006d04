// Which instruction sets the CPU kernels use: what this CPU and its system offer, up to FUSED_LORA_MAX_CPU_ISA.
//
// FUSED_LORA_MAX_CPU_ISA = baseline | avx2 | avx512 | avx512_bf16 | amx in the environment, read once when the library
// is loaded, leaves out what comes later in this list: for tests of every path on one machine, and for who wants the
// same sums on several.
#pragma once

// What the compiler and its assembler can make. `features` holds nothing that is not made.
#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 10 || __clang_major__ >= 12)
#define FUSED_LORA_BF16_DOT
#if __GNUC__ >= 11 || __clang_major__ >= 12
#define FUSED_LORA_AMX
#endif
#endif

namespace fused_lora::cpu {

struct Features {
  bool avx2 = false;      // with FMA and BMI2
  bool avx512 = false;    // F, BW, DQ, VL
  bool bf16_dot = false;  // AVX512-BF16: vdpbf16ps
  bool amx = false;       // AMX-BF16 tiles, and the kernel's permission to use them
};

extern const Features features;

// Throws std::invalid_argument where FUSED_LORA_MAX_CPU_ISA is none of the above.
void check_max_isa();

}  // namespace fused_lora::cpu
