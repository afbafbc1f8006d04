// Detects what cpu_features.h describes, once.
#include "cpu_features.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "tiles.h"

namespace fused_lora::cpu {
namespace {

// The place of FUSED_LORA_MAX_CPU_ISA's value in the list: 4 without it, -1 for a word that is not in the list.
int highest() {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
  const char* wanted = std::getenv("FUSED_LORA_MAX_CPU_ISA");
  if (!wanted) return 4;
  for (int i = 0; i < 5; ++i)
    if (std::strcmp(wanted, kNames[i]) == 0) return i;
  return -1;
}

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)

Features detect() {
  __builtin_cpu_init();
  const int most = highest();
  Features f;
  f.avx2 =
      most >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  f.avx512 = most >= 2 && f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef FUSED_LORA_BF16_DOT
  f.bf16_dot = most >= 3 && f.avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#ifdef FUSED_LORA_AMX
  f.amx = most >= 4 && f.bf16_dot && tiles_permitted();
#endif
  return f;
}

#else

Features detect() { return {}; }

#endif

}  // namespace

const Features features = detect();

void check_max_isa() {
  if (highest() < 0)
    throw std::invalid_argument(
        std::string("FUSED_LORA_MAX_CPU_ISA must be baseline, avx2, avx512, avx512_bf16 or amx; got ") +
        std::getenv("FUSED_LORA_MAX_CPU_ISA"));
}

}  // namespace fused_lora::cpu
