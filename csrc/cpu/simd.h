// Vectors for the CPU kernels and the run-time choice of instruction set.
//
// CLONES compiles a function for AVX-512, AVX2 and the baseline and picks at load time; what it inlines is compiled with it.
// GCC's vector types rather than plain inner loops: GCC 12 keeps a 6 x 16 tile in registers only with them (94 against 2.5 GFLOP/s
// on one EPYC 7003 core, M=48, K=256, 2026-11-23).
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

namespace fused_lora::cpu {

typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));

INLINE Vec& vec(float* p) { return *reinterpret_cast<Vec*>(p); }
INLINE const Vec& vec(const float* p) { return *reinterpret_cast<const Vec*>(p); }

// out[MR, 8 NV] += x[i * rs + q * cs] * p[q, :], q = 0 .. k - 1: the register tile of shrink (cs = 1) and wgrad (rs = 1).
template <int MR, int NV>
INLINE void tile(const float* x, int64_t rs, int64_t cs, const float* p, int64_t ldp, int64_t k, float* out, int64_t ldo) {
  Vec acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] = vec(out + i * ldo + 8 * j);
  for (int64_t q = 0; q < k; ++q) {
    Vec b[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) b[j] = vec(p + q * ldp + 8 * j);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const float a = x[i * rs + q * cs];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] += a * b[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) vec(out + i * ldo + 8 * j) = acc[i][j];
}

}  // namespace fused_lora::cpu
