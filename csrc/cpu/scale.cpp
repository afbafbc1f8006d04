// scale: what comes before the backward of y = out_scale * z + bias.
//
//   dz = out_scale * dy      sums = sum_M dy * (y - bias)      squares = sum_M (y - bias)^2      dbias = sum_M dy
//
// Layouts: rows of dy and y with a row stride, dz contiguous. One pass over dy and y, in the blocks and panels of the
// walks, four rows at a time.
// Numerics: sums start at zero in each block of 96 rows and join their thread's slab at its end, the slabs in thread
// order, so that rounding errors grow with a block and results repeat bit for bit.
#include "elements.h"
#include "walk.h"

namespace fused_lora::cpu {
namespace {

// Sums of one panel's columns over the rows of a block.
struct Sums {
  alignas(64) float dy_y[kPanel] = {}, squares[kPanel] = {}, dy[kPanel] = {};
};

// H rows of a panel. T: of dy, y, bias, dz. `rest` and `sums` where with_y.
template <int H, bool with_y, class T>
INLINE void rows_of(const typename T::type* dy, int64_t lddy, const typename T::type* y, int64_t ldy, const float* bias,
                    const float* scale, typename T::type* dz, int64_t lddz, int64_t cols, Sums& sums) {
  for (int64_t n = 0; n < cols; ++n) {
    float dy_y = 0.0f, squares = 0.0f, total = 0.0f;
#pragma GCC unroll 4
    for (int i = 0; i < H; ++i) {
      const float d = T::load(dy[i * lddy + n]);
      dz[i * lddz + n] = T::store(d * scale[n]);
      total += d;
      if (with_y) {
        const float rest = T::load(y[i * ldy + n]) - bias[n];
        dy_y += d * rest;
        squares += rest * rest;
      }
    }
    sums.dy[n] += total;
    if (with_y) sums.dy_y[n] += dy_y, sums.squares[n] += squares;
  }
}

template <bool with_y, class T>
INLINE void panel_of(const CpuScaleParams& p, int64_t m, int64_t n, int64_t rows, int64_t cols, const float* bias,
                     Sums& sums) {
  using E = typename T::type;
  const E *dy = static_cast<const E*>(p.dy) + m * p.lddy + n,
          *y = with_y ? static_cast<const E*>(p.y) + m * p.ldy + n : nullptr;
  E* dz = static_cast<E*>(p.dz) + m * p.N + n;
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    rows_of<4, with_y, T>(dy + i * p.lddy, p.lddy, y + i * p.ldy, p.ldy, bias, p.out_scale + n, dz + i * p.N, p.N, cols,
                          sums);
  for (; i < rows; ++i)
    rows_of<1, with_y, T>(dy + i * p.lddy, p.lddy, y + i * p.ldy, p.ldy, bias, p.out_scale + n, dz + i * p.N, p.N, cols,
                          sums);
}

void add(const float* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

void scale(const CpuScaleParams& p, Buffers& buffers) {
  const int64_t Np = round_up(p.N, kLanes);
  const int threads = threads_for(p.M, p.N, 16, p.threads);  // a pass through memory, as wide as a thin product
  Slabs sums(p.sums, Np), squares(p.sums, Np), dbias(p.dbias, Np);
  for (int t = 0; t < threads; ++t) sums.add(buffers), squares.add(buffers), dbias.add(buffers);
  float* bias = buffers.take(Np);
  std::fill_n(bias, Np, 0.0f);
  if (p.bias) load_matrix(p.bias, p.dtype, bias, 1, p.N, Np);
  const auto clear = [&](int t) { sums.clear(t), squares.clear(t), dbias.clear(t); };
  for_row_blocks(p.M, threads, clear, [&](int t, int64_t m, int64_t rows) {
    for (int64_t n = 0; n < p.N; n += kPanel) {
      const int64_t cols = std::min(kPanel, p.N - n);
      Sums block;
      widest([=, &p, &block]() INLINED {
        with_elements(p.dtype, [&](auto element) INLINED {
          using T = decltype(element);
          if (p.sums) panel_of<true, T>(p, m, n, rows, cols, bias + n, block);
          else panel_of<false, T>(p, m, n, rows, cols, bias + n, block);
        });
      });
      if (p.sums) add(block.dy_y, sums[t] + n, cols), add(block.squares, squares[t] + n, cols);
      if (p.dbias) add(block.dy, dbias[t] + n, cols);
    }
  });
  if (p.sums) std::copy_n(sums.sum(), p.N, p.sums), std::copy_n(squares.sum(), p.N, p.squares);
  if (p.dbias) store_row(dbias.sum(), p.dbias, p.dtype, p.N);
}

}  // namespace
}  // namespace fused_lora::cpu

namespace fused_lora {

Status cpu_scale(const CpuScaleParams& p) {
  if (p.dtype != Dtype::f32 && p.dtype != Dtype::f16 && p.dtype != Dtype::bf16) return Status::bad_dtype;
  if (p.M < 0 || p.N < 1) return Status::bad_shape;
  cpu::Buffers buffers;
  cpu::scale(p, buffers);
  return Status::ok;
}

}  // namespace fused_lora
