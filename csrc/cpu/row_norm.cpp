// row_norm: the lengths of the rows of W + s B A, or of s B A, of which B A is never formed.
//
//   n^2 = |W_i|^2 + s * sum_r B * (2 W A^T + s B (A A^T))
//
// Used by DoRA, and without W by ALLoRA, once an optimizer step. One walk over W in blocks of kRows rows: W A^T as
// shrink makes h of x, and a row's sum follows at once.
// Layouts: W with a row stride, A and B as they lie in their parameters. Tiles: shrink's.
// Numerics: fp32 whatever W's dtype is. With W a row without length, or with less than none by rounding, has 1 for it.
// Source: Liu et al., "DoRA", arXiv 2402.09353, with its norm in factors.
#include <cmath>

#include "block_fp32.h"
#include "walk.h"

namespace fused_lora {
using namespace cpu;

Status cpu_row_norm(const CpuRowNormParams& p) {
  if (p.N < 0 || p.K < 1 || p.R < 1) return Status::bad_shape;
  Buffers buffers;
  const int64_t Rp = round_up(p.R, BlockFp32::kRanks);
  const int threads = threads_for(p.N, p.K, p.R, p.threads);
  const BlockFp32::Factor down(buffers, p.A, Dtype::f32, p.K, p.R, Rp, true);
  down.fill();
  // block.low = src[rows, K] A^T
  const auto times_A = [&](BlockFp32& block, const void* src, Dtype dtype, int64_t ld, int64_t rows) {
    block.clear_low();
    for (int64_t k = 0; k < p.K; k += kPanel) {
      const int64_t cols = std::min(kPanel, p.K - k);
      block.shrink(block.panel(at(src, k, dtype), ld, {}, rows, cols), down, k, rows, cols);
    }
  };
  auto* gram = buffers.take(p.R * Rp);  // A A^T
  BlockFp32 of_A(buffers, std::min(kRows, round_up(p.R, kStrip)), Dtype::f32, false, p.R);
  for (int64_t r = 0; r < p.R; r += kRows) {
    const int64_t rows = std::min(kRows, p.R - r);
    times_A(of_A, p.A + r * p.K, Dtype::f32, p.K, rows);
    of_A.copy_low(gram + r * Rp, rows);
  }
  std::vector<BlockFp32> blocks;
  std::vector<float*> inners;
  for (int t = 0; t < threads; ++t) {
    blocks.emplace_back(buffers, block_rows(p.N, threads), p.dtype, false, p.R);
    inners.push_back(buffers.take(Rp));
  }
  const auto body = [&](int t, int64_t n0, int64_t rows) {
    BlockFp32& block = blocks[static_cast<size_t>(t)];
    float* inner = inners[static_cast<size_t>(t)];
    if (p.W) times_A(block, at(p.W, n0 * p.ldw, p.dtype), p.dtype, p.ldw, rows);
    else block.clear_low();
    const float *B = p.B + n0 * p.R, *low = block.low, *squares = p.W ? p.squares + n0 : nullptr;
    float *norm = p.norm + n0, *empty = p.W ? p.empty + n0 : nullptr;
    const int64_t R = p.R;
    const float s = p.scaling;
    widest([=]() INLINED {
      for (int64_t i = 0; i < rows; ++i) {
        const float* b = B + i * R;
        for (int64_t r = 0; r < R; ++r) inner[r] = 2.0f * low[i * Rp + r];
        for (int64_t q = 0; q < R; ++q) {
          const float factor = s * b[q];
          for (int64_t r = 0; r < R; ++r) inner[r] += factor * gram[q * Rp + r];
        }
        float sum = 0.0f;
        for (int64_t r = 0; r < R; ++r) sum += b[r] * inner[r];
        const float squared = (squares ? squares[i] : 0.0f) + s * sum;
        const bool none = squared <= 0.0f;
        norm[i] = none ? (empty ? 1.0f : 0.0f) : std::sqrt(squared);
        if (empty) empty[i] = none ? 1.0f : 0.0f;
      }
    });
  };
  for_row_blocks(p.N, threads, [](int) {}, body);
  return Status::ok;
}

}  // namespace fused_lora
