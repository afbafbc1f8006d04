// The walk over rows on AMX tiles, forward and backward, around the caller's base product or with it inside.
//
//   forward    h  = s * drop(x) A^T        y  = x W^T + h B^T + bias
//   backward   dh = s * dy B               dx = dy W + mask * (dh A) / (1 - p)
//              dA = dh^T drop(x)           dB = dy^T h       dbias = sum_M dy
//
// Rows are walked kScratch bytes of x (or dy) at a time. Each thread copies its rows into blocks, as they lie, and takes
// the low-rank products from there; then every thread multiplies its columns of W by all the blocks. dA, dB and dbias
// gather in one fp32 slab a thread and are summed in thread order, so results repeat bit for bit.
#include "amx.h"
#include "walk.h"

#ifdef FUSED_LORA_AMX

namespace fused_lora::cpu {
namespace {

constexpr int64_t kScratch = 8 << 20;       // bytes of x or dy that lie in blocks at a time
constexpr int64_t kRowsAtOnce = 256;        // of a thread: what one wgrad sums up
constexpr int64_t kBlockBytes = 512 << 10;  // of a thread's rows: half of L2, or 32 rows

// Rows walked at a time, for operands up to `width` wide.
int64_t rows_walked(int64_t M, int64_t width) {
  return std::min(sides(M), std::max<int64_t>(8, kScratch / (sides(width) * kBlock * 2))) * kSide;
}
int64_t rows_of_block(int64_t width) {
  return std::clamp<int64_t>(kBlockBytes / (width * 2) / kSide * kSide, kSide, kRowsAtOnce);
}

struct Rows {
  int64_t begin, end;
};
// Thread t's part of [0, rows), cut at multiples of 32.
Rows part(int64_t rows, int t, int threads) {
  return {sides(rows) * t / threads * kSide, std::min(rows, sides(rows) * (t + 1) / threads * kSide)};
}

// down [depth, R] in pairs, [sides(R)][sides(depth)]: of a matrix [R, depth] (transposed) or [depth, R].
uint16_t* take_down(Buffers& buffers, int64_t depth, int64_t R) {
  return buffers.take<uint16_t>(sides(R) * sides(depth) * kBlock);
}
void pack_down(const void* src, Dtype dtype, uint16_t* down, int64_t depth, int64_t R, bool transposed, int t, int n) {
  const Rows k = part(depth, t, n);
  if (k.begin >= k.end) return;
  uint16_t* to = down + k.begin * kSide;
  const int64_t panel = sides(depth) * kBlock;
  if (transposed) pair_panels_transposed(at(src, k.begin, dtype), dtype, depth, to, panel, k.end - k.begin, R);
  else pair_panels(at(src, k.begin * R, dtype), dtype, R, to, panel, k.end - k.begin, R);
}

int threads_of(int64_t M, int64_t N, int64_t K, int64_t R, bool inside, int threads) {
  return inside ? threads_worth(M * N * K / 16, threads) : threads_worth(M * (N + K) * R / 4, threads);
}

void store_h(const uint16_t* low, int64_t Rp, uint16_t* h, int64_t rows, int64_t R) {
  for (int64_t i = 0; i < rows; ++i) std::copy_n(low + i * Rp, R, h + i * R);
}
void load_h(const uint16_t* h, int64_t R, uint16_t* low, int64_t Rp, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(h + i * R, R, low + i * Rp);
    std::fill_n(low + i * Rp + R, Rp - R, uint16_t{0});
  }
  std::fill_n(low + rows * Rp, (round_up(rows, kSide) - rows) * Rp, uint16_t{0});
}

}  // namespace

void amx_forward(const CpuForwardParams& p, Buffers& buffers) {
  const int threads = threads_of(p.M, p.N, p.K, p.R, p.W, p.threads);
  const int64_t steps = sides(p.K), Rp = sides(p.R) * kSide, walked = rows_walked(p.M, p.K);
  const bool dropout = p.dropout.threshold > 0;
  uint16_t *down = take_down(buffers, p.K, p.R), *blocks = buffers.take<uint16_t>(walked * steps * kSide),
           *low = buffers.take<uint16_t>(walked * Rp);
  uint16_t* masked = dropout ? buffers.take<uint16_t>(threads * kBlock * steps) : nullptr;
  AmxGemm y{.left = blocks,
            .right = static_cast<const uint16_t*>(p.W),
            .low = low,
            .thin = p.B,
            .bias = static_cast<const uint16_t*>(p.bias),
            .keep = nullptr,
            .out = nullptr,
            .M = walked,
            .N = p.N,
            .K = p.K,
            .R = p.R,
            .ld_right = p.ldw,
            .thin_dtype = p.adapter_dtype,
            .scale = 1.0f,
            .by_rows = false};
  const AmxScratch scratch(y, buffers, threads);
  parallel(threads, [&](int t) { pack_down(p.A, p.adapter_dtype, down, p.K, p.R, true, t, threads); });

  for (int64_t m0 = 0; m0 < p.M; m0 += walked) {
    const int64_t M = std::min(walked, p.M - m0);
    parallel(threads, [&](int t) {
      const Tiles tiles;
      const Rows own = part(M, t, threads);
      for (int64_t m = own.begin; m < own.end; m += kSide) {
        const int64_t rows = std::min(kSide, own.end - m);
        const auto* x = static_cast<const uint16_t*>(p.x) + (m0 + m) * p.ldx;
        uint16_t *to = blocks + m * steps * kSide, *left = to;
        if (dropout) {
          left = masked + t * kBlock * steps;
          to_dropped_blocks(x, p.ldx, p.dropout, m0 + m, p.W ? to : nullptr, left, nullptr, rows, p.K);
        } else {
          to_blocks(x, p.ldx, to, rows, p.K);
        }
        shrink_amx(left, down, p.scaling * p.dropout.scale(), low + m * Rp, Rp, 1, steps, p.R);
        store_h(low + m * Rp, Rp, static_cast<uint16_t*>(p.h) + (m0 + m) * p.R, rows, p.R);
      }
    });
    y.M = M;
    y.out = static_cast<uint16_t*>(p.y) + m0 * p.N;
    amx_gemm(y, scratch);
  }
}

namespace {

// dA [R, width] (ranks_first) or dB [width, R], and the slabs [sides(R) * 32, sides(width) * 32] it gathers in.
struct Gradient {
  void* dst;
  Dtype dtype;
  int64_t width, R;
  bool ranks_first;
  Slabs slabs{dst != nullptr, round_up(R, kSide) * round_up(width, kSide)};

  // Columns [n0, n1) of dst = the slabs' sum * factor.
  void store(float factor, int64_t n0, int64_t n1) {
    const int64_t ld = round_up(width, kSide);
    float sums[kSide * kSide];
    for (int64_t n = n0; n < n1; n += kSide)
      for (int64_t r = 0; r < R; r += kSide) {
        const int64_t cols = std::min(kSide, n1 - n), ranks = std::min(kSide, R - r);
        for (int64_t i = 0; i < ranks; ++i) slabs.sum(r * ld + i * ld + n, cols, factor, sums + i * kSide);
        if (ranks_first) {
          for (int64_t i = 0; i < ranks; ++i)
            store_row(sums + i * kSide, at(dst, (r + i) * width + n, dtype), dtype, cols);
          continue;
        }
        float turned[kSide];
        for (int64_t j = 0; j < cols; ++j) {
          for (int64_t i = 0; i < ranks; ++i) turned[i] = sums[i * kSide + j];
          store_row(turned, at(dst, (n + j) * R + r, dtype), dtype, ranks);
        }
      }
  }
};

}  // namespace

void amx_backward(const CpuBackwardParams& p, Buffers& buffers) {
  const bool need_dh = p.dx || p.dA, dropout = p.dropout.threshold > 0, inside = p.dx && p.W;
  const int threads = threads_of(p.M, p.N, p.K, p.R, inside, p.threads);
  const int64_t wide = std::max(p.N, p.K), N_steps = sides(p.N), K_steps = sides(p.K), Rp = sides(p.R) * kSide,
                walked = rows_walked(p.M, wide), at_once = rows_of_block(wide);
  const float scale = p.dropout.scale();
  uint16_t *down = need_dh ? take_down(buffers, p.N, p.R) : nullptr, *low = buffers.take<uint16_t>(walked * Rp),
           *blocks = buffers.take<uint16_t>(walked * N_steps * kSide);
  uint32_t* bits = dropout ? buffers.take<uint32_t>(walked * K_steps) : nullptr;
  Gradient dA{p.dA, p.adapter_dtype, p.K, p.R, true}, dB{p.dB, p.adapter_dtype, p.N, p.R, false};
  Slabs dbias(p.dbias, N_steps * kSide);
  struct Own {
    uint16_t *x, *h, *lowT, *pairs;
  };
  std::vector<Own> owns;
  for (int t = 0; t < threads; ++t) {
    dA.slabs.add(buffers), dB.slabs.add(buffers), dbias.add(buffers);
    owns.push_back({buffers.take<uint16_t>(at_once * K_steps * kSide), buffers.take<uint16_t>(at_once * Rp),
                    buffers.take<uint16_t>(at_once * Rp), buffers.take<uint16_t>(at_once * 2 * kSide)});
  }
  AmxGemm dx{.left = blocks,
             .right = static_cast<const uint16_t*>(p.W),
             .low = low,
             .thin = p.A,
             .bias = nullptr,
             .keep = bits,
             .out = nullptr,
             .M = walked,
             .N = p.K,
             .K = p.N,
             .R = p.R,
             .ld_right = p.ldw,
             .thin_dtype = p.adapter_dtype,
             .scale = scale,
             .by_rows = true};
  const AmxScratch scratch(dx, buffers, p.dx ? threads : 0);
  parallel(threads, [&](int t) {
    if (need_dh) pack_down(p.B, p.adapter_dtype, down, p.N, p.R, false, t, threads);
    dA.slabs.clear(t), dB.slabs.clear(t), dbias.clear(t);
  });

  for (int64_t m0 = 0; m0 < p.M; m0 += walked) {
    const int64_t M = std::min(walked, p.M - m0);
    parallel(threads, [&](int t) {
      const Tiles tiles;
      const Own& own = owns[static_cast<size_t>(t)];
      const Rows all = part(M, t, threads);
      for (int64_t m = all.begin; m < all.end; m += at_once) {
        const int64_t rows = std::min(at_once, all.end - m), n = sides(rows);
        uint16_t *left = blocks + m * N_steps * kSide, *dh = low + m * Rp;
        for (int64_t i = 0; i < rows; i += kSide) {
          const int64_t height = std::min(kSide, rows - i);
          uint16_t* to = left + i * N_steps * kSide;
          to_blocks(static_cast<const uint16_t*>(p.dy) + (m0 + m + i) * p.lddy, p.lddy, to, height, p.N);
          if (need_dh) shrink_amx(to, down, p.scaling, dh + i * Rp, Rp, 1, N_steps, p.R);
        }
        if (p.dbias) column_sums_amx(left, dbias[t], n, N_steps);
        if (p.dB) {
          load_h(static_cast<const uint16_t*>(p.h) + (m0 + m) * p.R, p.R, own.h, Rp, rows);
          transpose_low(own.h, Rp, own.lowT, n * kSide);
          wgrad_amx(left, own.lowT, dB.slabs[t], own.pairs, n, N_steps, p.R);
        }
        uint32_t* keep = dropout ? bits + m * K_steps : nullptr;
        if (p.dA) {
          const auto* x = static_cast<const uint16_t*>(p.x) + (m0 + m) * p.ldx;
          if (dropout) to_dropped_blocks(x, p.ldx, p.dropout, m0 + m, nullptr, own.x, keep, rows, p.K);
          else to_blocks(x, p.ldx, own.x, rows, p.K);
          transpose_low(dh, Rp, own.lowT, n * kSide);
          wgrad_amx(own.x, own.lowT, dA.slabs[t], own.pairs, n, K_steps, p.R);
        } else if (keep) {
          dropout_bits(p.dropout, keep, m0 + m, rows, p.K);
        }
      }
    });
    if (!p.dx) continue;
    dx.M = M;
    dx.out = static_cast<uint16_t*>(p.dx) + m0 * p.K;
    amx_gemm(dx, scratch);
  }
  parallel(threads, [&](int t) {
    const Rows k = part(p.K, t, threads), n = part(p.N, t, threads);
    if (p.dA) dA.store(scale, k.begin, k.end);
    if (p.dB) dB.store(1.0f, n.begin, n.end);
  });
  if (p.dbias) store_row(dbias.sum(), p.dbias, p.dtype, p.N);
}

}  // namespace fused_lora::cpu

#endif
