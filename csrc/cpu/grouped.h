// What the two walks over groups of rows share (grouped.cpp, amx_grouped.cpp): their tasks.
#pragma once

#include <atomic>

#include "walk.h"

namespace fused_lora::cpu {

// Runs task(i) for i = 0 .. n - 1 on up to `threads` threads. Their memory is their own, and there may be none left.
template <class Task> void run_tasks(int64_t n, int threads, const Task& task) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> no_memory{false};
  parallel(static_cast<int>(std::min<int64_t>(n, threads)), [&](int) {
    for (int64_t i = next++; i < n && !no_memory; i = next++) try {
        task(i);
      } catch (const std::bad_alloc&) {
        no_memory = true;
      }
  });
  if (no_memory) throw std::bad_alloc();
}

// Some positions of a group.
struct Piece {
  int64_t g, begin, end;
};

// Pieces of all groups: so many that every thread has some, and none smaller than a block.
inline std::vector<Piece> pieces(const CpuGroups& p, int threads) {
  std::vector<Piece> found;
  const int64_t M = p.offsets[p.G];
  const int64_t most = threads > 1 ? round_up((M + 4 * threads - 1) / (4 * threads), kRows) : std::max<int64_t>(M, 1);
  for (int64_t g = 0; g < p.G; ++g)
    for (int64_t m = p.offsets[g]; m < p.offsets[g + 1]; m += most)
      found.push_back({g, m, std::min(p.offsets[g + 1], m + most)});
  return found;
}

inline int threads_of(const CpuGroups& p) { return threads_worth(p.offsets[p.G] * (p.N + p.K) * p.R, p.threads); }

inline Dropout dropout_of(const CpuGroups& p, int64_t g) {
  return {p.seed, p.thresholds ? static_cast<uint32_t>(p.thresholds[g]) : 0};
}

// out[rows] += low thin with low = s_g * in[rows] down, where dropout's mask is in's, or out's in the backward. The
// factors are A^T and B^T, or B and A in the backward.
struct RowsPass {
  bool backward;
  const void* in;           // [M, cols_in], row stride ld_in
  const void* const* down;  // [G]
  const void* const* thin;  // [G]
  void* low;                // [M', R], or null: not kept
  void* out;                // [M, cols_out], contiguous; or null: low alone
  int64_t ld_in, cols_in, cols_out;
};

// Columns n .. n + cols of one gradient, the sum over groups g .. end.
struct Strip {
  bool is_A;
  int64_t g, end, n, cols;
};

inline std::vector<Strip> strips(const CpuGroupedBackwardParams& p, int64_t width) {
  std::vector<Strip> found;
  const auto add = [&](bool is_A, void* const* dst, bool shared, int64_t size) {
    for (int64_t g = 0; dst && g < (shared ? 1 : p.G); ++g)
      for (int64_t n = 0; dst[g] && n < size; n += width)
        found.push_back({is_A, g, shared ? p.G : g + 1, n, std::min(width, size - n)});
  };
  add(true, p.dA, p.shared_A, p.K);
  add(false, p.dB, p.shared_B, p.N);
  return found;
}

#ifdef FUSED_LORA_AMX
// amx_grouped.cpp: both for bf16 x, on tiles.
struct OnTiles {
  static constexpr int64_t kWidth = 1024;  // columns of a strip
  static void by_rows(const CpuGroups& p, const RowsPass& pass, int threads);
  static void gradient(const CpuGroupedBackwardParams& p, const void* dh, const Strip& strip);
};
#endif

}  // namespace fused_lora::cpu
