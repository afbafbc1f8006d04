// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) and the LoRA dropout mask drawn
// from it.
//
// Element (row, col) of the [M, K] input belongs to the group of eight columns col / 8. One call with
// key = seed and counter = (col / 8, row, 0, 0) yields 4 words = eight 16-bit draws; draw (col % 8) decides: keep iff
// draw >= threshold. The mask depends on nothing else, so every kernel, tile shape and back end draws the same one.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FUSED_LORA_HD __host__ __device__ __forceinline__
#else
#define FUSED_LORA_HD inline __attribute__((always_inline))
#endif

namespace fused_lora {

// Both halves of a product. On a GPU one instruction; spelled as 64-bit numbers nvcc 13 adds an addition of zero to
// each, and instructions beside wgmma cost it time.
FUSED_LORA_HD uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

struct Philox {
  uint32_t w[4];  // the eight draws: w[j / 2] >> 16 * (j % 2) & 0xffff

  FUSED_LORA_HD Philox(uint64_t seed, uint32_t row, uint32_t group) : w{group, row, 0u, 0u} {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = wide_product(0xD2511F53u, w[0]), p1 = wide_product(0xCD9E8D57u, w[2]);
      const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ w[1] ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ w[3] ^ k1;
      w[1] = static_cast<uint32_t>(p1);
      w[3] = static_cast<uint32_t>(p0);
      w[0] = n0;
      w[2] = n2;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
  FUSED_LORA_HD uint32_t draw(int j) const { return w[j / 2] >> (16 * (j % 2)) & 0xffffu; }
  // Whether draw j is kept, without cutting it out of its word.
  FUSED_LORA_HD bool keeps(int j, uint32_t threshold) const {
    return (j % 2 ? w[j / 2] : w[j / 2] << 16) >= threshold << 16;
  }
  // The eight of them as bits.
  FUSED_LORA_HD uint32_t kept(uint32_t threshold) const {
    uint32_t bits = 0;
    for (int j = 0; j < 8; ++j) bits |= keeps(j, threshold) ? 1u << j : 0u;
    return bits;
  }
};

}  // namespace fused_lora
