// Vectors for the fp32 CPU kernels, and the run-time choice of instruction set for all.
//
// `widest` runs a body compiled for AVX-512, AVX2 or the baseline, whichever this CPU has; what the body inlines is
// compiled with it. Templates with a target attribute rather than target_clones: GCC before 12 and clang dispatch
// clones by single features only, and musl has none. The register tile depends on the registers there are: 12 x 16
// (12 zmm) or 6 x 16 (12 ymm) accumulators. GCC's vector types rather than plain inner loops: GCC 12 keeps a tile in
// registers only with them (94 against 2.5 GFLOP/s on one EPYC 7003 core, M=48, K=256, 2026-11-23).
#pragma once

#include <cstdint>

#include "cpu_features.h"

// clang passes no vector by value to a function that is compiled for less, inlined or not: by reference throughout.
#define INLINED __attribute__((always_inline))
#define INLINE inline INLINED

namespace fused_lora::cpu {

INLINE bool avx512() { return features.avx512; }

#if defined(__x86_64__) && defined(__GNUC__)

// By value: a body's captures are then locals of the loops, which no store can change.
template <class Body>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2"))) void run_avx512(Body body) {
  body();
}
template <class Body> __attribute__((target("avx2,fma,bmi2"))) void run_avx2(Body body) { body(); }

// Calls a body, a lambda that is INLINED and captures by value.
template <class Body> void widest(Body body) {
  if (avx512()) run_avx512(body);
  else if (features.avx2) run_avx2(body);
  else body();
}

#else

template <class Body> void widest(Body body) { body(); }

#endif

typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec16 __attribute__((vector_size(64)));

// The same for a body that is written for one vector type: called with Lanes<Vec16> for AVX-512, else Lanes<Vec8>.
template <class V> struct Lanes {
  using Vector = V;
};
template <class Body> void widest_vector(Body body) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (avx512()) return run_avx512([=]() INLINED { body(Lanes<Vec16>{}); });
  if (features.avx2) return run_avx2([=]() INLINED { body(Lanes<Vec8>{}); });
#endif
  body(Lanes<Vec8>{});
}

// Unaligned.
template <class V> INLINE void load(V& v, const float* p) { __builtin_memcpy(&v, p, sizeof v); }
template <class V> INLINE void store(float* p, const V& v) { __builtin_memcpy(p, &v, sizeof v); }

// out[MR, NV vectors] += x[i * rs + q * cs] * p[q, :], q = 0 .. k - 1: the register tile of every fp32 product.
// shrink: rs = row stride, cs = 1. wgrad: x = low^T, rs = 1. expand: x = low. Sums start at zero and join `out`
// at the end (without kAdd they replace it): rounding errors grow with one panel or block, not with all of K or M.
template <int MR, class V, int NV, bool kAdd = true>
INLINE void tile(const float* x, int64_t rs, int64_t cs, const float* p, int64_t ldp, int64_t k, float* out,
                 int64_t ldo) {
  constexpr int W = sizeof(V) / sizeof(float);
  V acc[MR][NV] = {};
  for (int64_t q = 0; q < k; ++q) {
    V b[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) load(b[j], p + q * ldp + W * j);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const float a = x[i * rs + q * cs];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] += a * b[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      V sum{};
      if (kAdd) load(sum, out + i * ldo + W * j);
      sum += acc[i][j];
      store(out + i * ldo + W * j, sum);
    }
}

}  // namespace fused_lora::cpu
