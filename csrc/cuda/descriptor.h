// wgmma's matrix descriptor; a file of its own because the emulated GPU of the tests reads what the kernels write.
//
// Source      PTX ISA 9.0, Asynchronous Warpgroup Level Matrix Instructions, matrix descriptor
#pragma once

#include <cstdint>

namespace fused_lora::ptx {

// Shared-memory address, leading and stride offsets in units of 16 bytes, swizzle in bits 62-63 (1: 128, 2: 64, 3: 32
// bytes).
constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes,
                                     int swizzle_bytes) {
  const uint64_t mode = swizzle_bytes == 128 ? 1 : swizzle_bytes == 64 ? 2 : 3;
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{leading_bytes >> 4} << 16 | uint64_t{stride_bytes >> 4} << 32 |
         mode << 62;
}

}  // namespace fused_lora::ptx
