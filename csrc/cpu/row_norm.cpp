// row_norm: the lengths of the rows of W + s B A, or of s B A, of which B A is never formed.
//
//   n^2 = |W_i|^2 + 2 s * sum_r B * low,     low = W A^T + B (s/2 A A^T)
//
// Used by DoRA, and without W by ALLoRA, once an optimizer step. One walk over W in blocks of kRows rows: a strip of
// kStrip rows and a panel of kPanel columns gives its parts of W A^T and |W_i|^2 while the strip after it is fetched.
// Layouts: W with a row stride, A and B as they lie in their parameters. Tiles: 12 rows by 16 ranks, AVX2 4 by 16; a
// panel of A^T (24 KiB at R = 16) and a strip (18 KiB) stay in L1.
// Numerics: fp32 whatever W's dtype is. Where s B A takes away nearly all of a row of W the two sums cancel, and the
// row is summed as it is.
// Source: Liu et al., "DoRA", arXiv 2402.09353, with its norm in factors.
#include <cmath>
#include <numeric>

#include "walk.h"

namespace fused_lora::cpu {
namespace {

constexpr int64_t kLane = kLanes;  // floats of a row's sum of squares
constexpr int64_t kGroup = 16;     // ranks of a register tile

// Where to fetch from: the first row's address, bytes from row to row, and for kLanes columns.
struct Ahead {
  uintptr_t first, row, columns;
};

// low[MR, ranks (row stride Rp)] += x[MR, k] down[k, ranks] for as many ranks as NV vectors have; k a multiple of
// kLanes. The first time also squares[MR, kLane] += x^2 lane by lane, and as much is fetched from `ahead`: W comes from
// memory, and the products do not wait for it so.
template <int MR, class V, int NV, bool kFirst>
INLINE void strip_tile(const float* x, int64_t ld, const float* down, int64_t k, float* low, int64_t Rp, float* squares,
                       const Ahead& ahead) {
  constexpr int W = sizeof(V) / sizeof(float);
  V acc[MR][NV] = {}, sums[MR] = {}, v, b[NV];
  uintptr_t next = ahead.first;
  for (int64_t q = 0; q < k; q += kLanes, next += ahead.columns) {
#pragma GCC unroll 16
    for (int i = 0; kFirst && i < MR; ++i)
      for (int j = 0; j < kLanes; j += W) {
        load(v, x + i * ld + q + j);
        sums[i] += v * v;
      }
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
      if (kFirst && j < MR)
        __builtin_prefetch(reinterpret_cast<const void*>(next + static_cast<uintptr_t>(j) * ahead.row), 0, 2);
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) load(b[n], down + ((q + j) * NV + n) * W);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const float a = x[i * ld + q + j];
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) acc[i][n] += a * b[n];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    if (kFirst) {
      load(v, squares + i * kLane);
      v += sums[i];
      store(squares + i * kLane, v);
    }
#pragma GCC unroll 2
    for (int n = 0; n < NV; ++n) {
      load(v, low + i * Rp + n * W);
      v += acc[i][n];
      store(low + i * Rp + n * W, v);
    }
  }
}

// A^T in groups of ranks, [depth, kGroup] each, the last perhaps of kVec; zero past K and R.
struct Down {
  int64_t depth, Rp;  // K rounded up to kLanes; R to kVec
  float* data;

  Down(const CpuRowNormParams& p, Buffers& buffers)
      : depth(round_up(p.K, kLanes)),
        Rp(round_up(p.R, kVec)),
        data(buffers.take(depth * Rp)) {
    for (int64_t r = 0; r < p.R; r += kGroup) {
      const int64_t ranks = std::min(kGroup, Rp - r);
      float* group = data + r * depth;
      load_transposed(p.A + r * p.K, Dtype::f32, group, std::min(ranks, p.R - r), p.K, ranks);
      std::fill_n(group + p.K * ranks, (depth - p.K) * ranks, 0.0f);
    }
  }
};

// The same for kStrip rows and all ranks, where x begins at column k0.
void strip(const float* x, int64_t ld, const Down& all, int64_t k0, int64_t k, float* low, float* squares,
           const Ahead& ahead) {
  widest_vector([=, data = all.data, depth = all.depth, Rp = all.Rp]<class L>(L) INLINED {
    using V = typename L::Vector;
    constexpr int kHeight = sizeof(V) == sizeof(Vec16) ? kStrip : 4, kVectors = sizeof(V) == sizeof(Vec16) ? 1 : 2;
    for (int64_t m = 0; m < kStrip; m += kHeight) {
      const float *rows = x + m * ld, *down = data + k0 * std::min(kGroup, Rp);
      const Ahead next{ahead.first + static_cast<uintptr_t>(m) * ahead.row, ahead.row, ahead.columns};
      float *to = low + m * Rp, *sums = squares + m * kLane;
      if (Rp == kVec) strip_tile<kHeight, Vec8, 1, true>(rows, ld, down, k, to, Rp, sums, next);
      else strip_tile<kHeight, V, kVectors, true>(rows, ld, down, k, to, Rp, sums, next);
      for (int64_t r = kGroup; r < Rp; r += kGroup) {
        const bool whole = Rp - r >= kGroup;
        down = data + r * depth + k0 * (whole ? kGroup : kVec);
        if (whole) strip_tile<kHeight, V, kVectors, false>(rows, ld, down, k, to + r, Rp, nullptr, next);
        else strip_tile<kHeight, Vec8, 1, false>(rows, ld, down, k, to + r, Rp, nullptr, next);
      }
    }
  });
}

// squares[rows, kLane] += factor * low[rows, cols (row stride Rp)] * B[rows, kPanel], lane by lane.
void add_products(const float* B, const float* low, int64_t Rp, float factor, float* squares, int64_t rows,
                  int64_t cols) {
  widest([=]() INLINED {
    for (int64_t i = 0; i < rows; ++i) {
      Vec8 sum{}, b, v;
      for (int64_t r = 0; r < cols; r += kVec) {
        load(b, B + i * kPanel + r), load(v, low + i * Rp + r);
        sum += b * v;
      }
      load(v, squares + i * kLane);
      v += factor * sum;
      store(squares + i * kLane, v);
    }
  });
}

// Rows of a matrix, and what they give; as many as `rows` rounded up to kStrip.
struct Block {
  const void* data;
  int64_t rows, ld;
  Dtype dtype;
  float *low, *squares;  // [rows, Rp], [rows, kLane]
};

// low = data A^T, squares = data^2 by lanes; copy: [kStrip, kPanel] at least.
void meet(const Block& block, const Down& down, int64_t K, float* copy) {
  const int64_t padded = round_up(block.rows, kStrip), row_bytes = block.ld * item_size(block.dtype);
  std::fill_n(block.low, padded * down.Rp, 0.0f);
  std::fill_n(block.squares, padded * kLane, 0.0f);
  for (int64_t k = 0; k < K; k += kPanel)
    for (int64_t m = 0; m < block.rows; m += kStrip) {
      const int64_t cols = std::min(kPanel, K - k), height = std::min<int64_t>(kStrip, block.rows - m);
      const char* x = at(block.data, m * block.ld + k, block.dtype);
      const bool as_it_lies = block.dtype == Dtype::f32 && height == kStrip && cols % kLanes == 0;
      if (!as_it_lies) load_panel(x, block.dtype, block.ld, nullptr, copy, height, cols);
      // the next strip of the panel; else the next panel; else the block after this one
      const int64_t there = m + kStrip < block.rows ? (m + kStrip) * block.ld + k
                            : k + kPanel < K        ? k + kPanel
                                                    : block.rows * block.ld;
      const Ahead ahead{
          reinterpret_cast<uintptr_t>(block.data) + static_cast<uintptr_t>(there * item_size(block.dtype)),
          static_cast<uintptr_t>(row_bytes), static_cast<uintptr_t>(kLanes * item_size(block.dtype))};
      strip(as_it_lies ? reinterpret_cast<const float*>(x) : copy, as_it_lies ? block.ld : kPanel, down, k,
            round_up(cols, kLanes), block.low + m * down.Rp, block.squares + m * kLane, ahead);
    }
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
  const Down down(p, buffers);
  const int64_t Rp = down.Rp, threads = threads_for(p.N, p.K, p.R, p.threads);
  const int64_t most = block_rows(p.N, static_cast<int>(threads)), ranks = round_up(p.R, kStrip);
  std::vector<float*> lows, lanes, copies, wholes;  // [most, Rp]; [most, kLane]; of B [most, kPanel]; |W_i|^2 [most]
  std::vector<int64_t> empty(static_cast<size_t>(threads));
  for (int64_t t = 0; t < threads; ++t) {
    lows.push_back(buffers.take(most * Rp));
    lanes.push_back(buffers.take(most * kLane));
    copies.push_back(buffers.take(most * kPanel));
    wholes.push_back(buffers.take(most));
  }
  auto* gram = buffers.take(ranks * Rp);  // s/2 A A^T
  meet({p.A, p.R, p.K, Dtype::f32, gram, buffers.take(ranks * kLane)}, down, p.K, copies[0]);
  for (int64_t i = 0; i < p.R * Rp; ++i) gram[i] *= 0.5f * p.scaling;
  const auto body = [&](int thread, int64_t n0, int64_t rows) {
    const auto t = static_cast<size_t>(thread);
    float *low = lows[t], *squares = lanes[t], *copy = copies[t], *whole = wholes[t];
    const int64_t padded = round_up(rows, kStrip);
    if (p.W) meet({at(p.W, n0 * p.ldw, p.dtype), rows, p.ldw, p.dtype, low, squares}, down, p.K, copy);
    else std::fill_n(low, padded * Rp, 0.0f), std::fill_n(squares, padded * kLane, 0.0f);
    for (int64_t i = 0; i < rows; ++i) whole[i] = sum_of_lanes(squares + i * kLane);
    const auto for_B = [&](const auto& work) {
      for (int64_t r = 0; r < p.R; r += kPanel) {
        const int64_t cols = std::min(kPanel, p.R - r);
        load_panel(p.B + n0 * p.R + r, Dtype::f32, p.R, nullptr, copy, rows, cols);
        work(r, cols);
      }
    };
    for_B([&](int64_t r, int64_t cols) { shrink(copy, kPanel, gram + r * Rp, low, rows, cols, Rp); });
    for_B([&](int64_t r, int64_t cols) {
      add_products(copy, low + r, Rp, 2.0f * p.scaling, squares, rows, round_up(cols, kVec));
    });
    for (int64_t i = 0; i < rows; ++i) {
      float squared = sum_of_lanes(squares + i * kLane);
      if (p.W && squared < whole[i] / 8.0f) squared = squared_row(p, n0 + i);  // else rounding may make it negative
      if (squared <= 0.0f) ++empty[t];
      p.norm[n0 + i] = std::sqrt(std::max(squared, 0.0f));
    }
  };
  for_row_blocks(p.N, static_cast<int>(threads), [](int) {}, body);
  if (p.empty) *p.empty = std::accumulate(empty.begin(), empty.end(), int64_t{0});
  return Status::ok;
}

}  // namespace fused_lora
