// The CPU back end's two drivers: everything of the LoRA forward and backward but, where the caller gives no W, the
// base products.
//
// Each thread takes a run of rows and walks it in blocks of kRows rows and panels of kPanel columns. x and dy are read
// once; y and dx are updated once or, with W, come out of lora_gemm after the walk. dA^T, dB and dbias gather in one
// fp32 slab a thread; the slabs are summed in thread order, so results repeat bit for bit.
#include "driver.h"

namespace fused_lora::cpu {
namespace {

// What is wrong with a call's numbers.
template <class Params> Status check(const Params& p) {
  const auto known = [](Dtype dtype) { return dtype == Dtype::f32 || dtype == Dtype::f16 || dtype == Dtype::bf16; };
  if (!known(p.dtype) || !known(p.adapter_dtype) || (p.W && (p.dtype != Dtype::f32 || p.adapter_dtype != Dtype::f32)))
    return Status::bad_dtype;
  return p.M < 0 || p.N < 1 || p.K < 1 || p.R < 1 ? Status::bad_shape : Status::ok;
}

const float* floats(const void* p) { return static_cast<const float*>(p); }

// src[rows, cols] in fp32 with row stride ld: itself, or a copy padded with zeros.
const float* fp32(Buffers& buffers, const void* src, Dtype dtype, int64_t rows, int64_t cols, int64_t ld) {
  if (dtype == Dtype::f32 && cols == ld) return static_cast<const float*>(src);
  float* out = buffers.take(rows * ld);
  load_matrix(src, dtype, out, rows, cols, ld);
  return out;
}

// What one thread needs for a block of `rows` rows.
struct Scratch {
  int64_t size;  // of low
  float *panel, *mask, *strip, *low, *h;
  Scratch(Buffers& b, int64_t rows, bool dropout, int64_t Rp)
      : size(rows * Rp),
        panel(b.take(rows * kPanel)),
        mask(dropout ? b.take(rows * kPanel) : nullptr),
        strip(b.take(kStrip * kPanel)),
        low(b.take(size)),
        h(b.take(size)) {}
  void clear_low() { std::fill_n(low, size, 0.0f); }
};

struct Panel {
  const float* data;
  int64_t ld;
};

// Columns [n, n + cols) of a block of rows in fp32: as they lie where whole strips of fp32 need no mask, else in a
// zero-padded copy.
Panel panel_of(Scratch& s, const void* src, Dtype dtype, int64_t ld, int64_t m, int64_t n, int64_t rows, int64_t cols,
               const float* mask) {
  if (dtype == Dtype::f32 && !mask && rows % kStrip == 0 && cols % kStrip == 0)
    return {static_cast<const float*>(src) + m * ld + n, ld};
  load_panel(at(src, m * ld + n, dtype), dtype, ld, mask, s.panel, rows, cols);
  return {s.panel, kPanel};
}

// dst[rows, width] += low[rows, Rp] Q[R, width] (* mask) for panel columns [n, n + cols).
void expand_panel(Scratch& s, const float* Q, int64_t ldq, int64_t R, int64_t Rp, const float* mask, void* dst,
                  Dtype dtype, int64_t ldd, int64_t n, int64_t rows, int64_t cols) {
  const int64_t tiles = dtype == Dtype::f32 && !mask ? cols / (2 * kVec) * (2 * kVec)
                                                     : 0;  // columns that whole register tiles update in place
  for (int64_t m = 0; m < rows; m += kStrip) {
    const float* low = s.low + m * Rp;
    const int64_t height = std::min<int64_t>(kStrip, rows - m), direct = height == kStrip ? tiles : 0;
    char* out = at(dst, m * ldd + n, dtype);
    if (direct) expand(low, Q + n, reinterpret_cast<float*>(out), ldd, direct, R, Rp, ldq);
    if (direct == cols) continue;
    for (int i = 0; i < kStrip; ++i) std::fill_n(s.strip + i * kPanel, round_up(cols - direct, 2 * kVec), 0.0f);
    expand(low, Q + n + direct, s.strip, kPanel, cols - direct, R, Rp, ldq);
    for (int64_t i = 0; i < height; ++i)
      add_row(s.strip + i * kPanel, mask ? mask + (m + i) * kPanel : nullptr, at(out, i * ldd + direct, dtype), dtype,
              cols - direct);
  }
}

// dA, gathered as [K, Rp], and dB from their slabs, side by side.
void store_gradients(const CpuBackwardParams& p, Buffers& buffers, int threads, Slabs& dA, Slabs& dB, int64_t Rp) {
  float* dA_rows = p.dA ? buffers.take(Rp * p.K) : nullptr;
  each_of_two(threads, [&](int i) {
    if (i == 0 && p.dA) {
      load_transposed(dA.sum(), Dtype::f32, dA_rows, p.K, Rp, p.K);
      store_row(dA_rows, p.dA, p.adapter_dtype, p.R * p.K);
    }
    if (i == 1 && p.dB) store_slab(dB.sum(), Rp, p.dB, p.adapter_dtype, p.N, p.R);
  });
}

}  // namespace
}  // namespace fused_lora::cpu

namespace fused_lora {
using namespace cpu;

bool cpu_prefers_lora_gemm() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_is(
      "amd");  // MKL runs 32-byte vectors there; Intel's CPUs are not measured and keep PyTorch's product
#else
  return false;
#endif
}

Status cpu_forward(const CpuForwardParams& p) {
  if (const Status status = check(p); status != Status::ok) return status;
  if (p.dtype == Dtype::bf16 && has_bf16_dot()) return forward_bf16(p);
  const int64_t Rp = round_up(p.R, kVec), ldq = round_up(p.N, 2 * kVec);
  const int threads = threads_for(p.M, p.N + p.K, p.R, p.threads);
  Buffers buffers;
  float *P = buffers.take(p.K * Rp), *Q = p.W ? nullptr : buffers.take(p.R * ldq);  // A^T, B^T
  each_of_two(Q ? threads : 1, [&](int i) {
    if (i == 0) load_transposed(p.A, p.adapter_dtype, P, p.R, p.K, Rp);
    else if (Q) load_transposed(p.B, p.adapter_dtype, Q, p.N, p.R, ldq);
  });
  std::vector<Scratch> scratch;
  for (int t = 0; t < threads; ++t)
    scratch.emplace_back(buffers, block_rows(p.M, threads), p.dropout.threshold > 0, Rp);

  for_row_blocks(
      p.M, threads, [](int) {},
      [&](int t, int64_t m, int64_t rows) {
        Scratch& s = scratch[static_cast<size_t>(t)];
        s.clear_low();
        for (int64_t k = 0; k < p.K; k += kPanel) {
          const int64_t cols = std::min(kPanel, p.K - k);
          if (s.mask) dropout_mask(p.dropout, s.mask, m, k, rows, cols);
          const Panel x = panel_of(s, p.x, p.dtype, p.ldx, m, k, rows, cols, s.mask);
          shrink(x.data, x.ld, P + k * Rp, s.low, round_up(rows, kStrip), cols, Rp);
        }
        for (int64_t i = 0; i < rows * Rp; ++i) s.low[i] *= p.scaling;
        store_slab(s.low, Rp, at(p.h, m * p.R, p.dtype), p.dtype, rows, p.R);
        for (int64_t n = 0; Q && n < p.N; n += kPanel)
          expand_panel(s, Q, ldq, p.R, Rp, nullptr, at(p.y, m * p.N, p.dtype), p.dtype, p.N, n, rows,
                       std::min(kPanel, p.N - n));
      });
  if (p.W) {
    const LoraGemm y{floats(p.x), floats(p.W), floats(p.h), floats(p.B), floats(p.bias), static_cast<float*>(p.y),
                     p.M,         p.N,         p.K,         p.R,         p.ldx,          p.ldw,
                     p.R,         p.R,         false};
    lora_gemm(y, buffers, threads_worth(p.M * p.N * p.K, p.threads));
  }
  return Status::ok;
}

Status cpu_backward(const CpuBackwardParams& p) {
  if (const Status status = check(p); status != Status::ok) return status;
  if (p.dtype == Dtype::bf16 && has_bf16_dot()) return backward_bf16(p);
  const int64_t Rp = round_up(p.R, kVec), ldq = round_up(p.K, 2 * kVec), Np = round_up(p.N, kStrip),
                Kp = round_up(p.K, kStrip);
  const int threads = threads_for(p.M, p.N + p.K, p.R, p.threads);
  const bool need_dh = p.dx || p.dA, dropout = p.dropout.threshold > 0;
  const bool own = p.dx && p.W,
             inside = own && !dropout;  // dx by lora_gemm; with the update, which dropout's mask keeps out, inside
  Buffers buffers;
  float* dh = inside ? buffers.take(p.M * Rp) : nullptr;  // [M, Rp]
  const LoraGemm dx{floats(p.dy), floats(p.W), dh,  floats(p.A),      nullptr, static_cast<float*>(p.dx),
                    p.M,          p.K,         p.N, inside ? p.R : 0, p.lddy,  p.ldw,
                    Rp,           p.K,         true};
  if (own && dropout) lora_gemm(dx, buffers, threads_worth(p.M * p.N * p.K, p.threads));
  const float *P = need_dh ? fp32(buffers, p.B, p.adapter_dtype, p.N, p.R, Rp) : nullptr,
              *Q = p.dx && !inside ? fp32(buffers, p.A, p.adapter_dtype, p.R, p.K, ldq) : nullptr;
  std::vector<Scratch> scratch;
  Slabs dA(p.dA, Kp * Rp), dB(p.dB, Np * Rp), dbias(p.dbias, p.N);
  for (int t = 0; t < threads; ++t) {
    scratch.emplace_back(buffers, block_rows(p.M, threads), dropout, Rp);
    dA.add(buffers), dB.add(buffers), dbias.add(buffers);
  }

  const auto clear = [&](int t) { dA.clear(t), dB.clear(t), dbias.clear(t); };
  for_row_blocks(p.M, threads, clear, [&](int t, int64_t m, int64_t rows) {
    Scratch& s = scratch[static_cast<size_t>(t)];
    if (p.dB) load_matrix(at(p.h, m * p.R, p.dtype), p.dtype, s.h, rows, p.R, Rp);
    s.clear_low();
    for (int64_t n = 0; n < p.N; n += kPanel) {  // one read of dy: dh, dB, dbias
      const int64_t cols = std::min(kPanel, p.N - n);
      const Panel dy = panel_of(s, p.dy, p.dtype, p.lddy, m, n, rows, cols, nullptr);
      if (need_dh) shrink(dy.data, dy.ld, P + n * Rp, s.low, round_up(rows, kStrip), cols, Rp);
      if (p.dB) wgrad(dy.data, dy.ld, s.h, dB[t] + n * Rp, rows, cols, Rp);
      if (p.dbias) column_sums(dy.data, dy.ld, dbias[t] + n, rows, cols);
    }
    for (int64_t i = 0; i < rows * Rp; ++i) s.low[i] *= p.scaling;
    for (int64_t k = 0; need_dh && k < p.K; k += kPanel) {  // one read of x, one write of dx, one mask for both
      const int64_t cols = std::min(kPanel, p.K - k);
      if (s.mask) dropout_mask(p.dropout, s.mask, m, k, rows, cols);
      if (p.dA) {
        const Panel x = panel_of(s, p.x, p.dtype, p.ldx, m, k, rows, cols, s.mask);
        wgrad(x.data, x.ld, s.low, dA[t] + k * Rp, rows, cols, Rp);
      }
      if (Q) expand_panel(s, Q, ldq, p.R, Rp, s.mask, at(p.dx, m * p.K, p.dtype), p.dtype, p.K, k, rows, cols);
    }
    if (dh) std::copy_n(s.low, rows * Rp, dh + m * Rp);
  });

  if (inside) lora_gemm(dx, buffers, threads_worth(p.M * p.N * p.K, p.threads));
  store_gradients(p, buffers, threads, dA, dB, Rp);
  if (p.dbias) store_row(dbias.sum(), p.dbias, p.dtype, p.N);
  return Status::ok;
}

}  // namespace fused_lora
