// One element of each dtype, to and from fp32.
//
// Loads are exact; every store rounds to nearest even, once. Integer arithmetic, so that whole loops of it vectorise on
// every instruction set (no F16C or AVX512-BF16 needed).
#pragma once

#include <cstring>

#include "lora.h"
#include "simd.h"

namespace fused_lora::cpu {

INLINE float as_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
INLINE uint32_t as_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

struct F32 {
  using type = float;
  static INLINE float load(float v) { return v; }
  static INLINE float store(float v) { return v; }
};

struct BF16 {
  using type = uint16_t;
  static INLINE float load(uint16_t v) { return as_float(uint32_t{v} << 16); }
  static INLINE uint16_t store(float v) {
    const uint32_t u = as_bits(v);
    const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};

struct F16 {
  using type = uint16_t;
  static INLINE float load(uint16_t v) {
    // Exponent and mantissa moved into fp32's places are the value times 2^-112, subnormals included.
    const uint32_t magnitude = uint32_t{v & 0x7fffu} << 13, sign = uint32_t{v & 0x8000u} << 16;
    const float finite = as_float(magnitude) * 0x1p112f;
    return as_float(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : as_bits(finite)));
  }
  static INLINE uint16_t store(float v) {
    const uint32_t u = as_bits(v), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
    const uint32_t subnormal = as_bits(as_float(a) + 0.5f) - as_bits(0.5f);  // the ulp at 0.5 is fp16's smallest step
    const uint32_t normal = (a + 0xc8000fffu + (a >> 13 & 1u)) >> 13;  // exponent re-biased, round to nearest even
    const uint32_t special = a > 0x7f800000u ? 0x7e00u : 0x7c00u;      // NaN, or overflow to infinity
    return static_cast<uint16_t>(sign | (a >= 0x47800000u ? special : a < 0x38800000u ? subnormal : normal));
  }
};

// Calls body(T{}) for the T of a dtype; body is INLINED.
template <class Body> INLINE void with_elements(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f32: return body(F32{});
    case Dtype::f16: return body(F16{});
    case Dtype::bf16: return body(BF16{});
  }
}

}  // namespace fused_lora::cpu
