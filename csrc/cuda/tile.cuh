// What the mma.sync kernels (shrink.cu, wgrad.cu) share: tiles of 2-byte elements in shared memory, filled by cp.async,
// masked in place; and the masking itself, which lora_gemm's forward with dropout does, too.
//
// A tile is kRows rows of kCols elements; its 16-byte chunks are swizzled so that the 8 rows that one ldmatrix phase
// reads lie in different banks. Thread t of kThreads moves the chunks t, t + kThreads, ...: it may mask what it moved
// itself before the block syncs.
#pragma once

#include "../philox.h"
#include "ptx.cuh"

namespace fused_lora {

// The eight elements of v, of the columns that `draws` is for, with those that the dropout mask drops zeroed.
PTX_FN uint4 drop(const uint4& v, const Philox& draws, uint32_t threshold) {
  uint32_t keep[4];
#pragma unroll
  for (int w = 0; w < 4; ++w)
    keep[w] = (draws.keeps(2 * w, threshold) ? 0xffffu : 0u) | (draws.keeps(2 * w + 1, threshold) ? 0xffff0000u : 0u);
  return uint4{v.x & keep[0], v.y & keep[1], v.z & keep[2], v.w & keep[3]};
}

template <int kRows_, int kCols_> struct Tile {
  static constexpr int kRows = kRows_, kCols = kCols_, kChunks = kCols / 8, kBytes = kRows * kCols * 2;
  static_assert(kChunks == 2 || kChunks == 4 || kChunks % 8 == 0);

  // Byte offset of chunk `chunk` of row `row`.
  static PTX_FN int offset(int row, int chunk) {
    if constexpr (kChunks >= 8) return (row * kChunks + (chunk ^ (row & 7))) * 16;
    else return (row * kChunks + (chunk ^ (row / (8 / kChunks) % kChunks))) * 16;
  }

  // The part of the [rows, cols] matrix src (row stride ld) at (row0, col0); zeros outside. cols is a multiple of 8, or
  // col0 + kCols <= cols.
  template <int kThreads, class T>
  static PTX_FN void load(uint8_t* tile, const T* src, int64_t ld, int64_t row0, int64_t col0, int64_t rows,
                          int64_t cols, int thread) {
#pragma unroll
    for (int i = thread; i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool valid = row0 + row < rows && col0 + chunk * 8 < cols;
      ptx::cp_async(tile + offset(row, chunk), valid ? src + (row0 + row) * ld + col0 + chunk * 8 : src, valid);
    }
  }

  // Zeroes what the dropout mask drops, in the chunks that this thread loaded; the factor 1 / (1 - p) is the caller's.
  // Some at once: a Philox call is a chain of 20 products, and few warps are there to fill the time between them.
  template <int kThreads>
  static PTX_FN void drop(uint8_t* tile, uint64_t seed, uint32_t threshold, int64_t row0, int64_t col0, int thread) {
    constexpr int kAtOnce = kRows * kChunks / kThreads > 4 ? 2 : 4;  // a larger tile's kernel has no more registers
#pragma unroll kAtOnce
    for (int i = thread; i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      uint4& v = *reinterpret_cast<uint4*>(tile + offset(row, chunk));
      v = fused_lora::drop(v, Philox(seed, static_cast<uint32_t>(row0 + row), static_cast<uint32_t>(col0 / 8 + chunk)),
                           threshold);
    }
  }
};

}  // namespace fused_lora
