// scale: dz = out_scale * dy before the backward of y = out_scale * z + bias, for the plan in which somebody else
// multiplies dz by W; and the gradients of scale.h, for every plan.
//
// Layouts: rows of dy and y with a row stride, dz contiguous. One pass over dy and y, in the blocks and panels of the
// walks, four rows at a time.
// Numerics: sums start at zero in each block of rows and join their thread's slab at its end, the slabs in thread
// order, so that rounding errors grow with a block and results repeat bit for bit.
#include "scale.h"

#include <cmath>
#include <limits>

#include "elements.h"

namespace fused_lora::cpu {
namespace {

// Sums of one panel's columns over the rows of a block.
struct Panel {
  alignas(64) float products[kPanel] = {}, squares[kPanel] = {}, dy[kPanel] = {};
};

// dz[cols] = scale * dy. In a loop of its own: GCC vectorises none that stores to dz and to the sums.
template <class T>
INLINE void scale_row(const typename T::type* __restrict dy, const float* __restrict scale,
                      typename T::type* __restrict dz, int64_t cols) {
  for (int64_t n = 0; n < cols; ++n) dz[n] = T::store(T::load(dy[n]) * scale[n]);
}

// H rows of a panel into its sums. T: of dy and y.
template <int H, bool with_y, class T>
INLINE void sum_rows(const typename T::type* __restrict dy, int64_t lddy, const typename T::type* __restrict y,
                     int64_t ldy, const float* __restrict bias, float* __restrict products, float* __restrict squares,
                     float* __restrict sums, int64_t cols) {
  for (int64_t n = 0; n < cols; ++n) {
    float product = 0.0f, square = 0.0f, total = 0.0f;
#pragma GCC unroll 4
    for (int i = 0; i < H; ++i) {
      const float d = T::load(dy[i * lddy + n]);
      total += d;
      if constexpr (with_y) {
        const float rest = T::load(y[i * ldy + n]) - bias[n];
        product += d * rest;
        square += rest * rest;
      }
    }
    sums[n] += total;
    if constexpr (with_y) products[n] += product, squares[n] += square;
  }
}

template <bool with_y, class T>
INLINE void sum_panel(const void* dy0, int64_t lddy, const void* y0, int64_t ldy, const float* bias, int64_t rows,
                      int64_t cols, Panel& to) {
  const auto *dy = static_cast<const typename T::type*>(dy0), *y = static_cast<const typename T::type*>(y0);
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    sum_rows<4, with_y, T>(dy + i * lddy, lddy, y + i * ldy, ldy, bias, to.products, to.squares, to.dy, cols);
  for (; i < rows; ++i)
    sum_rows<1, with_y, T>(dy + i * lddy, lddy, y + i * ldy, ldy, bias, to.products, to.squares, to.dy, cols);
}

void add(const float* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

void scale(const CpuScaleParams& p, Buffers& buffers) {
  const int threads = threads_for(p.M, p.N, 16, p.threads);  // a pass through memory, as wide as a thin product
  ScaleSums sums(p, buffers, threads);
  for_row_blocks(
      p.M, threads, [&](int t) { sums.clear(t); },
      [&](int t, int64_t m, int64_t rows) {
        for (int64_t n = 0; n < p.N; n += kPanel) {
          const int64_t cols = std::min(kPanel, p.N - n);
          widest([=, &p]() INLINED {
            with_elements(p.dtype, [&](auto element) INLINED {
              using T = decltype(element);
              for (int64_t i = m; i < m + rows; ++i)
                scale_row<T>(static_cast<const typename T::type*>(p.dy) + i * p.lddy + n, p.out_scale + n,
                             static_cast<typename T::type*>(p.dz) + i * p.N + n, cols);
            });
          });
          if (sums) sums.gather(t, m, n, rows, cols);
        }
      });
  sums.store();
}

}  // namespace

ScaleSums::ScaleSums(const CpuScaleParams& p, Buffers& buffers, int threads)
    : p_(p),
      sums_(p.dout_scale, round_up(p.N, kLanes)),
      squares_(p.dout_scale, round_up(p.N, kLanes)),
      dbias_(p.dbias, round_up(p.N, kLanes)) {
  for (int t = 0; t < threads; ++t) sums_.add(buffers), squares_.add(buffers), dbias_.add(buffers);
  if (!p.dout_scale) return;
  float* bias = buffers.take(p.N);
  std::fill_n(bias, p.N, 0.0f);
  if (p.bias) load_matrix(p.bias, p.dtype, bias, 1, p.N, p.N);
  bias_ = bias;
}

void ScaleSums::gather(int t, int64_t m, int64_t n0, int64_t rows, int64_t cols) {
  for (int64_t n = n0; n < n0 + cols; n += kPanel) {
    const int64_t width = std::min(kPanel, n0 + cols - n);
    const void *dy = at(p_.dy, m * p_.lddy + n, p_.dtype),
               *y = p_.dout_scale ? at(p_.y, m * p_.ldy + n, p_.dtype) : nullptr;
    Panel panel;
    widest([=, this, &panel]() INLINED {
      with_elements(p_.dtype, [&](auto element) INLINED {
        using T = decltype(element);
        if (y) sum_panel<true, T>(dy, p_.lddy, y, p_.ldy, bias_ + n, rows, width, panel);
        else sum_panel<false, T>(dy, p_.lddy, y, 0, nullptr, rows, width, panel);
      });
    });
    if (p_.dout_scale) add(panel.products, sums_[t] + n, width), add(panel.squares, squares_[t] + n, width);
    if (p_.dbias) add(panel.dy, dbias_[t] + n, width);
  }
}

void ScaleSums::store() {
  if (p_.dout_scale) {
    const float *sums = sums_.sum(), *squares = squares_.sum();
    // as in ops/reference.py, which is asked for these columns
    const float smallest = 2.0f * (p_.dtype == Dtype::f16 ? 0x1p-14f : 0x1p-126f), rows = static_cast<float>(p_.M);
    int64_t lost = 0;
    for (int64_t n = 0; n < p_.N; ++n) {
      const float least = std::max(std::abs(bias_[n]), smallest);
      const bool little = squares[n] <= rows * (least * least);
      p_.dout_scale[n] = little ? std::numeric_limits<float>::quiet_NaN() : sums[n] / p_.out_scale[n];
      lost += little;
    }
    *p_.lost = lost;
  }
  if (p_.dbias) store_row(dbias_.sum(), p_.dbias, p_.dtype, p_.N);
}

}  // namespace fused_lora::cpu

namespace fused_lora {

Status cpu_scale(const CpuScaleParams& p) {
  if (!cpu::known_dtypes(p.dtype, p.dtype)) return Status::bad_dtype;
  if (p.M < 0 || p.N < 1) return Status::bad_shape;
  cpu::Buffers buffers;
  cpu::scale(p, buffers);
  return Status::ok;
}

}  // namespace fused_lora
