// The two drivers of lora.cpp for bf16 x on CPUs that multiply bf16 directly (bf16.cpp).
//
// What differs: a panel of x or dy is read where it lies; A, B, h and dh are rounded to bf16 for the products that
// follow (as every other back end does), dropout masks x to 0 or itself and its factor joins the fp32 sums, and the
// slabs of dA and dB lie as [R, width].
#include "driver.h"

#ifdef FUSED_LORA_BF16_DOT

namespace fused_lora::cpu {
namespace {

constexpr int64_t kTile = 2 * kLanes;  // columns of a register tile

const uint16_t* bf16(const void* p) { return static_cast<const uint16_t*>(p); }
uint16_t* bf16(void* p) { return static_cast<uint16_t*>(p); }

// A or B as the kernels read it: src[rows, cols] itself, or a bf16 copy [to_rows, to_cols] padded with zeros.
const uint16_t* adapter(uint16_t* out, const void* src, Dtype dtype, int64_t rows, int64_t cols, int64_t to_rows,
                        int64_t to_cols) {
  if (dtype == Dtype::bf16 && rows == to_rows && cols == to_cols) return bf16(src);
  std::fill_n(out + rows * to_cols, (to_rows - rows) * to_cols, uint16_t{0});
  if (cols == to_cols && dtype == Dtype::f32) {
    store_row(static_cast<const float*>(src), out, Dtype::bf16, rows * cols);
    return out;
  }
  for (int64_t m = 0; m < rows; ++m) {
    if (dtype == Dtype::bf16) std::copy_n(bf16(src) + m * cols, cols, out + m * to_cols);
    else store_row(static_cast<const float*>(src) + m * cols, out + m * to_cols, Dtype::bf16, cols);
    std::fill_n(out + m * to_cols + cols, to_cols - cols, uint16_t{0});
  }
  return out;
}

// A or B in pairs along the summed dimension. Memory is taken by the calling thread, filled by any.
struct Pairs {
  const void* src;  // [rows, cols]
  Dtype dtype;
  int64_t rows, cols, ld;
  bool of_rows;
  uint16_t* rounded;
  // of_rows: [(rows + 1) / 2, ld] of (src[2p, n], src[2p + 1, n]); else [(cols + 1) / 2, ld] of (src[n, 2q],
  // src[n, 2q + 1]); zero elsewhere
  uint32_t* data;

  Pairs(Buffers& b, bool wanted, const void* src, Dtype dtype, int64_t rows, int64_t cols, int64_t ld, bool of_rows)
      : src(wanted ? src : nullptr),
        dtype(dtype),
        rows(rows),
        cols(cols),
        ld(ld),
        of_rows(of_rows),
        rounded(nullptr),
        data(nullptr) {
    if (!wanted) return;
    rounded = b.take<uint16_t>(of_rows ? round_up(rows, 2) * ld : rows * round_up(cols, 2));
    data = b.take<uint32_t>((of_rows ? (rows + 1) / 2 : (cols + 1) / 2) * ld);
  }
  void fill() const {
    if (!src) return;
    if (of_rows) {
      const int64_t pairs = (rows + 1) / 2;
      pair_rows(adapter(rounded, src, dtype, rows, cols, 2 * pairs, ld), ld, data, ld, pairs, ld);
    } else {
      const int64_t pairs = (cols + 1) / 2;
      load_transposed(adapter(rounded, src, dtype, rows, cols, rows, 2 * pairs), Dtype::f32,
                      reinterpret_cast<float*>(data), rows, pairs, ld);
    }
  }
};

// What one thread needs for a block of `rows` rows.
struct Scratch {
  int64_t rows;               // a multiple of kStrip
  float *mask, *low;          // [rows, kPanel]; [rows, Rp] sums of h or dh
  uint16_t *panel, *rounded;  // [rows, kPanel]; [rows, Rp] low in bf16
  uint32_t* low_pairs;        // [rows / 2, Rp] rounded, rows in pairs
  Scratch(Buffers& b, int64_t rows, bool dropout, int64_t Rp)
      : rows(rows),
        mask(dropout ? b.take(rows * kPanel) : nullptr),
        low(b.take(rows * Rp)),
        panel(b.take<uint16_t>(rows * kPanel)),
        rounded(b.take<uint16_t>(rows * Rp)),
        low_pairs(b.take<uint32_t>(rows / 2 * Rp)) {}

  // rounded = low * factor.
  void round_low(int64_t Rp, float factor) {
    for (int64_t i = 0; i < rows * Rp; ++i) low[i] *= factor;
    store_row(low, rounded, Dtype::bf16, rows * Rp);
  }
};

struct Panel {
  const uint16_t* data;
  int64_t ld;
};

// Columns [n, n + cols) of a block of rows, as they lie or, masked or ragged, in a copy padded with zeros to whole
// tiles.
Panel panel_of(Scratch& s, const void* src, int64_t ld, int64_t m, int64_t n, int64_t rows, int64_t cols,
               const float* mask) {
  const uint16_t* from = bf16(src) + m * ld + n;
  if (!mask && rows % kStrip == 0 && cols % kTile == 0) return {from, ld};
  copy_panel(from, ld, mask, s.panel, rows, cols);
  return {s.panel, kPanel};
}

// dA, gathered as [Rp, Kp] without dropout's factor, and dB, gathered as [Rp, Np], from their slabs, side by side.
void store_gradients(const CpuBackwardParams& p, Buffers& buffers, int threads, Slabs& dA, Slabs& dB, int64_t Rp) {
  const int64_t Np = round_up(p.N, kTile), Kp = round_up(p.K, kTile);
  float* dB_rows = p.dB ? buffers.take(Np * Rp) : nullptr;
  each_of_two(threads, [&](int i) {
    if (i == 0 && p.dA) {
      float* out = dA.sum();
      for (int64_t j = 0; p.dropout.threshold > 0 && j < Rp * Kp; ++j) out[j] *= p.dropout.scale();
      store_slab(out, Kp, p.dA, p.adapter_dtype, p.R, p.K);
    }
    if (i == 1 && p.dB) {
      load_transposed(dB.sum(), Dtype::f32, dB_rows, Rp, Np, Rp);
      store_slab(dB_rows, Rp, p.dB, p.adapter_dtype, p.N, p.R);
    }
  });
}

}  // namespace

Status forward_bf16(const CpuForwardParams& p) {
  const int64_t Rp = round_up(p.R, kLanes), ldq = round_up(p.N, kTile);
  const int threads = threads_for(p.M, p.N + p.K, p.R, p.threads);
  const bool dropout = p.dropout.threshold > 0;
  Buffers buffers;
  const Pairs A(buffers, true, p.A, p.adapter_dtype, p.R, p.K, Rp, false),
      B(buffers, true, p.B, p.adapter_dtype, p.N, p.R, ldq, false);
  each_of_two(threads, [&](int i) { i == 0 ? A.fill() : B.fill(); });
  const uint32_t *P = A.data, *Q = B.data;
  std::vector<Scratch> scratch;
  for (int t = 0; t < threads; ++t) scratch.emplace_back(buffers, block_rows(p.M, threads), dropout, Rp);

  for_row_blocks(
      p.M, threads, [](int) {},
      [&](int t, int64_t m, int64_t rows) {
        Scratch& s = scratch[static_cast<size_t>(t)];
        std::fill_n(s.low, s.rows * Rp, 0.0f);
        for (int64_t k = 0; k < p.K; k += kPanel) {
          const int64_t cols = std::min(kPanel, p.K - k);
          if (dropout) dropout_mask(p.dropout, s.mask, m, k, rows, cols);
          const Panel x = panel_of(s, p.x, p.ldx, m, k, rows, cols, s.mask);
          shrink_bf16(x.data, x.ld, P + k / 2 * Rp, s.low, round_up(rows, kStrip), (cols + 1) / 2, Rp);
        }
        s.round_low(Rp, dropout ? p.scaling * p.dropout.scale() : p.scaling);
        for (int64_t i = 0; i < rows; ++i) std::copy_n(s.rounded + i * Rp, p.R, bf16(p.h) + (m + i) * p.R);
        for (int64_t n = 0; n < p.N; n += kPanel)
          expand_bf16(s.rounded, Rp, Q + n, ldq, nullptr, bf16(p.y) + m * p.N + n, p.N, rows, std::min(kPanel, p.N - n),
                      (p.R + 1) / 2);
      });
  return Status::ok;
}

Status backward_bf16(const CpuBackwardParams& p) {
  const int64_t Rp = round_up(p.R, kLanes), Np = round_up(p.N, kTile), Kp = round_up(p.K, kTile);
  const int threads = threads_for(p.M, p.N + p.K, p.R, p.threads);
  const bool dropout = p.dropout.threshold > 0, need_dh = p.dx || p.dA;
  Buffers buffers;
  const Pairs B(buffers, need_dh, p.B, p.adapter_dtype, p.N, p.R, Rp, true),
      A(buffers, p.dx, p.A, p.adapter_dtype, p.R, p.K, Kp, true);
  each_of_two(threads, [&](int i) { i == 0 ? B.fill() : A.fill(); });
  const uint32_t *P = B.data, *Q = A.data;
  std::vector<Scratch> scratch;
  Slabs dA(p.dA, Rp * Kp), dB(p.dB, Rp * Np), dbias(p.dbias, Np);
  for (int t = 0; t < threads; ++t) {
    scratch.emplace_back(buffers, block_rows(p.M, threads), dropout, Rp);
    dA.add(buffers), dB.add(buffers), dbias.add(buffers);
  }

  const auto clear = [&](int t) { dA.clear(t), dB.clear(t), dbias.clear(t); };
  for_row_blocks(p.M, threads, clear, [&](int t, int64_t m, int64_t rows) {
    Scratch& s = scratch[static_cast<size_t>(t)];
    const int64_t height = round_up(rows, kStrip), pairs = height / 2;
    std::fill_n(s.low, s.rows * Rp, 0.0f);
    if (p.dB) {
      std::fill_n(s.rounded, height * Rp, uint16_t{0});
      for (int64_t i = 0; i < rows; ++i) std::copy_n(bf16(p.h) + (m + i) * p.R, p.R, s.rounded + i * Rp);
      pair_rows(s.rounded, Rp, s.low_pairs, Rp, pairs, Rp);
    }
    for (int64_t n = 0; n < p.N; n += kPanel) {  // one read of dy: dh, dB, dbias
      const int64_t cols = std::min(kPanel, p.N - n);
      const Panel dy = panel_of(s, p.dy, p.lddy, m, n, rows, cols, nullptr);
      if (need_dh) shrink_bf16(dy.data, dy.ld, P + n / 2 * Rp, s.low, height, (cols + 1) / 2, Rp);
      if (p.dB) wgrad_bf16(dy.data, dy.ld, s.low_pairs, dB[t] + n, Np, pairs, cols, Rp);
      if (p.dbias) column_sums_bf16(dy.data, dy.ld, dbias[t] + n, rows, cols);
    }
    if (!need_dh) return;
    s.round_low(Rp, p.scaling);
    if (p.dA) pair_rows(s.rounded, Rp, s.low_pairs, Rp, pairs, Rp);
    for (int64_t k = 0; k < p.K; k += kPanel) {  // one read of x, one write of dx, one mask for both
      const int64_t cols = std::min(kPanel, p.K - k);
      if (dropout) dropout_mask(p.dropout, s.mask, m, k, rows, cols);
      if (p.dA) {
        const Panel x = panel_of(s, p.x, p.ldx, m, k, rows, cols, s.mask);
        wgrad_bf16(x.data, x.ld, s.low_pairs, dA[t] + k, Kp, pairs, cols, Rp);
      }
      if (p.dx) expand_bf16(s.rounded, Rp, Q + k, Kp, s.mask, bf16(p.dx) + m * p.K + k, p.K, rows, cols, (p.R + 1) / 2);
    }
  });

  store_gradients(p, buffers, threads, dA, dB, Rp);
  if (p.dbias) store_row(dbias.sum(), p.dbias, Dtype::bf16, p.N);
  return Status::ok;
}

}  // namespace fused_lora::cpu

#endif
