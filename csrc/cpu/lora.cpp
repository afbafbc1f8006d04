// The CPU back end's two drivers: everything of the LoRA forward and backward but the base products x W^T and dy W.
//
// Each thread takes a run of rows and walks it in blocks of kRows rows and panels of kPanel columns. x and dy are read once, y and dx are
// written once. dA^T, dB and dbias gather in one fp32 slab a thread; the slabs are summed in thread order, so results repeat bit for bit.
#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace fused_lora::cpu {
namespace {

using Buffer = std::unique_ptr<float[]>;
Buffer buffer(int64_t n) { return Buffer(new float[static_cast<size_t>(n)]); }
Buffer zeros(int64_t n) { return Buffer(new float[static_cast<size_t>(n)]()); }

int64_t item_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }
const char* at(const void* base, int64_t elements, Dtype dtype) { return static_cast<const char*>(base) + elements * item_size(dtype); }
char* at(void* base, int64_t elements, Dtype dtype) { return static_cast<char*>(base) + elements * item_size(dtype); }

bool known(Dtype dtype) { return dtype == Dtype::f32 || dtype == Dtype::f16 || dtype == Dtype::bf16; }

// Threads worth waking for M rows: at least one strip each, and enough arithmetic to pay for the wake-up (about 5 us).
int threads_for(int64_t M, int64_t width, int64_t R, int threads) {
  const int64_t strips = (M + kStrip - 1) / kStrip, by_work = 1 + M * width * R / (1 << 18);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({threads, strips, by_work})));
}

// Calls body(thread, first row, rows) with rows <= kRows for every block of every thread's run of strips.
template <class Body> void for_row_blocks(int64_t M, int threads, const Body& body) {
  const int64_t strips = (M + kStrip - 1) / kStrip;
  parallel(threads, [&](int t) {
    const int64_t begin = strips * t / threads * kStrip, end = std::min(M, strips * (t + 1) / threads * kStrip);
    for (int64_t m = begin; m < end; m += kRows) body(t, m, std::min(kRows, end - m));
  });
}

// A^T or B in fp32 as the right operand of shrink: [width, Rp], ranks past R zero.
Buffer shrink_operand(const void* src, Dtype dtype, int64_t width, int64_t R, int64_t Rp, bool transposed) {
  Buffer P = buffer(width * Rp);
  if (transposed) load_transposed(src, dtype, P.get(), R, width, Rp);
  else load_matrix(src, dtype, P.get(), width, R, Rp);
  return P;
}

// What one thread needs for a block of `rows` rows.
struct Scratch {
  int64_t size;  // of low
  Buffer panel, mask, strip, low, h;
  Scratch(int64_t rows, bool dropout, int64_t Rp)
      : size(rows * Rp), panel(buffer(rows * kPanel)), mask(dropout ? buffer(rows * kPanel) : nullptr), strip(buffer(kStrip * kPanel)), low(buffer(size)), h(buffer(size)) {}
  void clear_low() { std::fill_n(low.get(), size, 0.0f); }
};

// Rows of the largest block that a thread will see.
int64_t block_rows(int64_t M, int threads) { return std::min(kRows, round_up((M + threads - 1) / threads, kStrip) + kStrip); }

// dst[rows, width] = low[rows, Rp] Q[R, width] (+ add) (* mask) for panel columns [n, n + cols).
void expand_panel(Scratch& s, const float* Q, int64_t ldq, int64_t R, int64_t Rp, const float* add, const float* mask, void* dst, Dtype dtype,
                  int64_t ldd, int64_t n, int64_t rows, int64_t cols) {
  for (int64_t m = 0; m < rows; m += kStrip) {
    expand(s.low.get() + m * Rp, Q + n, s.strip.get(), cols, R, Rp, ldq);
    for (int64_t i = 0; i < std::min<int64_t>(kStrip, rows - m); ++i)
      store_row(s.strip.get() + i * kPanel, add ? add + n : nullptr, mask ? mask + (m + i) * kPanel : nullptr, at(dst, (m + i) * ldd + n, dtype), dtype, cols);
  }
}

// out = sum of slabs[t], in thread order, into slabs[0].
float* sum(std::vector<Buffer>& slabs, int64_t n) {
  float* out = slabs[0].get();
  for (size_t t = 1; t < slabs.size(); ++t)
    for (int64_t i = 0; i < n; ++i) out[i] += slabs[t][i];
  return out;
}

// dst[width, R] (or [R, width] if transposed) = slab[width, Rp] in dtype.
void store_slab(const float* slab, void* dst, Dtype dtype, int64_t width, int64_t R, int64_t Rp, bool transposed) {
  if (transposed) {
    const Buffer out = buffer(Rp * width);
    load_transposed(slab, Dtype::f32, out.get(), width, Rp, width);
    return store_row(out.get(), nullptr, nullptr, dst, dtype, R * width);
  }
  if (R == Rp) return store_row(slab, nullptr, nullptr, dst, dtype, width * R);
  for (int64_t n = 0; n < width; ++n) store_row(slab + n * Rp, nullptr, nullptr, at(dst, n * R, dtype), dtype, R);
}

}  // namespace
}  // namespace fused_lora::cpu

namespace fused_lora {
using namespace cpu;

Status cpu_forward(const CpuForwardParams& p) {
  if (!known(p.dtype) || !known(p.adapter_dtype)) return Status::bad_dtype;
  if (p.M < 0 || p.N < 1 || p.K < 1 || p.R < 1) return Status::bad_shape;
  const int64_t Rp = round_up(p.R, kVec), ldq = round_up(p.N, 2 * kVec);
  const int threads = threads_for(p.M, p.N + p.K, p.R, p.threads);
  const Buffer P = shrink_operand(p.A, p.adapter_dtype, p.K, p.R, Rp, true), Q = buffer(p.R * ldq), bias = p.bias ? buffer(p.N) : nullptr;
  load_transposed(p.B, p.adapter_dtype, Q.get(), p.N, p.R, ldq);
  if (bias) load_matrix(p.bias, p.dtype, bias.get(), 1, p.N, p.N);
  std::vector<Scratch> scratch;
  for (int t = 0; t < threads; ++t) scratch.emplace_back(block_rows(p.M, threads), p.dropout.threshold > 0, Rp);

  for_row_blocks(p.M, threads, [&](int t, int64_t m, int64_t rows) {
    Scratch& s = scratch[static_cast<size_t>(t)];
    s.clear_low();
    for (int64_t k = 0; k < p.K; k += kPanel) {
      const int64_t cols = std::min(kPanel, p.K - k);
      if (s.mask) dropout_mask(p.dropout, s.mask.get(), m, k, rows, cols);
      load_panel(at(p.x, m * p.ldx + k, p.dtype), p.dtype, p.ldx, s.mask.get(), s.panel.get(), rows, cols);
      shrink(s.panel.get(), P.get() + k * Rp, s.low.get(), round_up(rows, kStrip), cols, Rp);
    }
    for (int64_t i = 0; i < rows * Rp; ++i) s.low[i] *= p.scaling;
    store_slab(s.low.get(), at(p.h, m * p.R, p.dtype), p.dtype, rows, p.R, Rp, false);
    for (int64_t n = 0; n < p.N; n += kPanel)
      expand_panel(s, Q.get(), ldq, p.R, Rp, bias.get(), nullptr, at(p.y, m * p.N, p.dtype), p.dtype, p.N, n, rows, std::min(kPanel, p.N - n));
  });
  return Status::ok;
}

Status cpu_backward(const CpuBackwardParams& p) {
  if (!known(p.dtype) || !known(p.adapter_dtype)) return Status::bad_dtype;
  if (p.M < 0 || p.N < 1 || p.K < 1 || p.R < 1) return Status::bad_shape;
  const int64_t Rp = round_up(p.R, kVec), ldq = round_up(p.K, 2 * kVec), Np = round_up(p.N, kStrip), Kp = round_up(p.K, kStrip);
  const int threads = threads_for(p.M, p.N + p.K, p.R, p.threads);
  const bool need_dh = p.dx || p.dA;
  const Buffer P = need_dh ? shrink_operand(p.B, p.adapter_dtype, p.N, p.R, Rp, false) : nullptr, Q = p.dx ? buffer(p.R * ldq) : nullptr;
  if (Q) load_matrix(p.A, p.adapter_dtype, Q.get(), p.R, p.K, ldq);
  std::vector<Scratch> scratch;
  std::vector<Buffer> dA, dB, dbias;
  for (int t = 0; t < threads; ++t) {
    scratch.emplace_back(block_rows(p.M, threads), p.dropout.threshold > 0, Rp);
    if (p.dA) dA.push_back(zeros(Kp * Rp));
    if (p.dB) dB.push_back(zeros(Np * Rp));
    if (p.dbias) dbias.push_back(zeros(p.N));
  }

  for_row_blocks(p.M, threads, [&](int t, int64_t m, int64_t rows) {
    const auto index = static_cast<size_t>(t);
    Scratch& s = scratch[index];
    if (p.dB) load_matrix(at(p.h, m * p.R, p.dtype), p.dtype, s.h.get(), rows, p.R, Rp);
    s.clear_low();
    for (int64_t n = 0; n < p.N; n += kPanel) {  // one read of dy: dh, dB, dbias
      const int64_t cols = std::min(kPanel, p.N - n);
      load_panel(at(p.dy, m * p.lddy + n, p.dtype), p.dtype, p.lddy, nullptr, s.panel.get(), rows, cols);
      if (need_dh) shrink(s.panel.get(), P.get() + n * Rp, s.low.get(), round_up(rows, kStrip), cols, Rp);
      if (p.dB) wgrad(s.panel.get(), s.h.get(), dB[index].get() + n * Rp, rows, cols, Rp);
      if (p.dbias) column_sums(s.panel.get(), dbias[index].get() + n, rows, cols);
    }
    for (int64_t i = 0; i < rows * Rp; ++i) s.low[i] *= p.scaling;
    for (int64_t k = 0; need_dh && k < p.K; k += kPanel) {  // one read of x, one write of dx, one mask for both
      const int64_t cols = std::min(kPanel, p.K - k);
      if (s.mask) dropout_mask(p.dropout, s.mask.get(), m, k, rows, cols);
      if (p.dA) {
        load_panel(at(p.x, m * p.ldx + k, p.dtype), p.dtype, p.ldx, s.mask.get(), s.panel.get(), rows, cols);
        wgrad(s.panel.get(), s.low.get(), dA[index].get() + k * Rp, rows, cols, Rp);
      }
      if (p.dx) expand_panel(s, Q.get(), ldq, p.R, Rp, nullptr, s.mask.get(), at(p.dx, m * p.K, p.dtype), p.dtype, p.K, k, rows, cols);
    }
  });

  if (p.dA) store_slab(sum(dA, p.K * Rp), p.dA, p.adapter_dtype, p.K, p.R, Rp, true);
  if (p.dB) store_slab(sum(dB, p.N * Rp), p.dB, p.adapter_dtype, p.N, p.R, Rp, false);
  if (p.dbias) store_row(sum(dbias, p.N), nullptr, nullptr, p.dbias, p.dtype, p.N);
  return Status::ok;
}

}  // namespace fused_lora
