// row_norm: the lengths of the rows of W + s B A, or of s B A, of which B A is never formed.
//
//   n^2 = |W_i|^2 + 2 s * sum_r B * low,     low = W A^T + B (s/2 A A^T)
//
// Used by DoRA, and without W by ALLoRA, once an optimizer step. One walk over W in blocks of kRows rows: both parts of
// low as shrink makes h of x, the squares of a panel while it is in L2, and a row's sum at the end.
// Layouts: W with a row stride, A and B as they lie in their parameters. Tiles: shrink's.
// Numerics: fp32 whatever W's dtype is. Where s B A takes away nearly all of a row of W the two sums cancel, and the
// row is summed as it is. With W a row without length has 1 for it.
// Source: Liu et al., "DoRA", arXiv 2402.09353, with its norm in factors.
#include <cmath>

#include "block_fp32.h"
#include "walk.h"

namespace fused_lora::cpu {
namespace {

constexpr int64_t kLane = kVec;

// squares[rows, kLane] += panel[rows, cols (row stride ld)]^2, lane by lane; rows a multiple of 4, cols of kLane.
void add_squares(BlockFp32::Panel panel, float* squares, int64_t rows, int64_t cols) {
  widest([=]() INLINED {
    for (int64_t i = 0; i < rows; i += 4) {
      Vec8 sums[4], v;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) load(sums[j], squares + (i + j) * kLane);
      for (int64_t k = 0; k < cols; k += kLane)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          load(v, panel.data + (i + j) * panel.ld + k);
          sums[j] += v * v;
        }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) store(squares + (i + j) * kLane, sums[j]);
    }
  });
}

// squares[rows, kLane] += factor * low[rows, cols (row stride Rp)] * B[rows, kPanel], lane by lane.
void add_products(const float* B, const float* low, int64_t Rp, float factor, float* squares, int64_t rows,
                  int64_t cols) {
  widest([=]() INLINED {
    for (int64_t i = 0; i < rows; ++i) {
      Vec8 sum{}, b, v;
      for (int64_t r = 0; r < cols; r += kLane) {
        load(b, B + i * kPanel + r), load(v, low + i * Rp + r);
        sum += b * v;
      }
      load(v, squares + i * kLane);
      v += factor * sum;
      store(squares + i * kLane, v);
    }
  });
}

// |W_n + s B_n A|^2 of one row, summed as it is.
float squared_row(const CpuRowNormParams& p, int64_t n) {
  float total = 0.0f, row[kPanel];
  for (int64_t k = 0; k < p.K; k += kPanel) {
    const int64_t cols = std::min(kPanel, p.K - k);
    load_matrix(at(p.W, n * p.ldw + k, p.dtype), p.dtype, row, 1, cols, cols);
    for (int64_t r = 0; r < p.R; ++r)
      for (int64_t j = 0; j < cols; ++j) row[j] += p.scaling * p.B[n * p.R + r] * p.A[r * p.K + k + j];
    float sum = 0.0f;
    for (int64_t j = 0; j < cols; ++j) sum += row[j] * row[j];
    total += sum;
  }
  return total;
}

INLINE float sum_of_lanes(const float* lanes) {
  float sum = 0.0f;
  for (int64_t j = 0; j < kLane; ++j) sum += lanes[j];
  return sum;
}

}  // namespace
}  // namespace fused_lora::cpu

namespace fused_lora {
using namespace cpu;

Status cpu_row_norm(const CpuRowNormParams& p) {
  if (p.N < 0 || p.K < 1 || p.R < 1) return Status::bad_shape;
  Buffers buffers;
  const int64_t Rp = round_up(p.R, BlockFp32::kRanks);
  const int threads = threads_for(p.N, p.K, p.R, p.threads);
  const BlockFp32::Factor down(buffers, p.A, Dtype::f32, p.K, p.R, Rp, true);
  down.fill();
  // block.low = src[rows, K] A^T; seen(panel, cols) on the way.
  const auto times_A = [&](BlockFp32& block, const void* src, Dtype dtype, int64_t ld, int64_t rows, const auto& seen) {
    for (int64_t k = 0; k < p.K; k += kPanel) {
      const int64_t cols = std::min(kPanel, p.K - k);
      const auto panel = block.panel(at(src, k, dtype), ld, {}, rows, cols);
      block.shrink(panel, down, k, rows, cols);
      seen(panel, cols);
    }
  };
  auto* gram = buffers.take(p.R * Rp);  // s/2 A A^T
  BlockFp32 of_A(buffers, std::min(kRows, round_up(p.R, kStrip)), Dtype::f32, false, p.R);
  for (int64_t r = 0; r < p.R; r += kRows) {
    const int64_t rows = std::min(kRows, p.R - r);
    of_A.clear_low();
    times_A(of_A, p.A + r * p.K, Dtype::f32, p.K, rows, [](auto, int64_t) {});
    of_A.scale_low(0.5f * p.scaling, rows);
    of_A.copy_low(gram + r * Rp, rows);
  }
  const int64_t most = block_rows(p.N, threads);
  std::vector<BlockFp32> of_W;
  std::vector<float*> sums, copies, of_rows;  // [most, kLane]; of B [most, kPanel]; |W_i|^2 [most]
  for (int t = 0; t < threads; ++t) {
    of_W.emplace_back(buffers, most, p.dtype, false, p.R);
    sums.push_back(buffers.take(most * kLane));
    copies.push_back(buffers.take(most * kPanel));
    of_rows.push_back(buffers.take(most));
  }
  const auto body = [&](int t, int64_t n0, int64_t rows) {
    BlockFp32& block = of_W[static_cast<size_t>(t)];
    float *squares = sums[static_cast<size_t>(t)], *copy = copies[static_cast<size_t>(t)],
          *whole = of_rows[static_cast<size_t>(t)];
    const int64_t padded = round_up(rows, kStrip);
    std::fill_n(squares, padded * kLane, 0.0f);
    block.clear_low();
    const auto seen = [&](BlockFp32::Panel panel, int64_t cols) {
      add_squares(panel, squares, padded, round_up(cols, kLane));
    };
    if (p.W) times_A(block, at(p.W, n0 * p.ldw, p.dtype), p.dtype, p.ldw, rows, seen);
    for (int64_t i = 0; i < rows; ++i) whole[i] = sum_of_lanes(squares + i * kLane);
    const auto for_B = [&](const auto& work) {
      for (int64_t r = 0; r < p.R; r += kPanel) {
        const int64_t cols = std::min(kPanel, p.R - r);
        load_panel(p.B + n0 * p.R + r, Dtype::f32, p.R, nullptr, copy, rows, cols);
        work(r, cols);
      }
    };
    for_B([&](int64_t r, int64_t cols) { shrink(copy, kPanel, gram + r * Rp, block.low, padded, cols, Rp); });
    for_B([&](int64_t r, int64_t cols) {
      add_products(copy, block.low + r, Rp, 2.0f * p.scaling, squares, rows, round_up(cols, kLane));
    });
    for (int64_t i = 0; i < rows; ++i) {
      float squared = sum_of_lanes(squares + i * kLane);
      if (squared < whole[i] / 8.0f) squared = squared_row(p, n0 + i);
      const bool none = squared <= 0.0f;
      p.norm[n0 + i] = none ? (p.W ? 1.0f : 0.0f) : std::sqrt(squared);
      if (p.W) p.empty[n0 + i] = none ? 1.0f : 0.0f;
    }
  };
  for_row_blocks(p.N, threads, [](int) {}, body);
  return Status::ok;
}

}  // namespace fused_lora
