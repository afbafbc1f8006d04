// The walk over rows on AMX tiles, forward and backward, around the caller's base product or with it inside.
//
//   forward    h  = s * drop(x) A^T        y  = x W^T + h B^T + bias
//   backward   dh = s * dy B               dx = dy W + mask * (dh A) / (1 - p)
//              dA = dh^T drop(x)           dB = dy^T h       dbias = sum_M dy
//
// The op's optional tensors act on h and dh between the products (between.h), on the way to bf16 once more.
// Rows are walked kScratch bytes of x (or dy) at a time. Each thread copies its rows into blocks, as they lie, and
// takes the low-rank products from there; then every thread multiplies its columns of W by all the blocks. dA, dB and
// dbias gather in one fp32 slab a thread and are summed in thread order, so results repeat bit for bit.
#include "amx.h"
#include "between.h"
#include "scale.h"
#include "walk.h"

#ifdef FUSED_LORA_AMX

namespace fused_lora::cpu {
namespace {

// Not swept, but for the effect of pages and of L2 that bench/NOTES.md tells.
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

// What stands right of shrink: down [depth, R] in pairs, packed a part a thread, of a matrix [R, depth]
// (transposed) or [depth, R].
struct Down {
  const void* src;
  Dtype dtype;
  int64_t depth, R;
  bool transposed;
  uint16_t* pairs = nullptr;  // [sides(R)][sides(depth)]

  void take(Buffers& buffers) { pairs = buffers.take<uint16_t>(sides(R) * sides(depth) * kBlock); }
  void pack(int t, int threads) const {
    const Range k = part(depth, kSide, t, threads);
    if (!pairs || k.begin >= k.end) return;
    uint16_t* to = pairs + k.begin * kSide;
    const int64_t panel = sides(depth) * kBlock, rows = k.end - k.begin;
    if (transposed) pair_panels_transposed(at(src, k.begin, dtype), dtype, depth, to, panel, rows, R);
    else pair_panels(at(src, k.begin * R, dtype), dtype, R, to, panel, rows, R);
  }
};

// Threads worth waking: tiles multiply 16 times as fast as fp32, thin products, which wait for memory, perhaps 4 times;
// reckoned, not swept.
int threads_of(int64_t M, int64_t N, int64_t K, int64_t R, bool inside, int threads) {
  return inside ? threads_worth(M * N * K / 16, threads) : threads_worth(M * (N + K) * R / 4, threads);
}

// What the optional tensors do to 32 rows of low, a thread's [32, Rp] of h or dh in bf16 that are zero past `rows`:
// their work is done in fp32.
template <class Work> void in_fp32(uint16_t* low, int64_t Rp, int64_t rows, float* wide, const Work& work) {
  load_matrix(low, Dtype::bf16, wide, rows, Rp, Rp);
  work(wide);
  store_row(wide, low, Dtype::bf16, rows * Rp);
}

// What a forward works with.
class Forward {
 public:
  Forward(const CpuForwardParams& params, Buffers& buffers)
      : p(params),
        threads(threads_of(p.M, p.N, p.K, p.R, p.W, p.threads)),
        steps(sides(p.K)),
        Rp(sides(p.R) * kSide),
        walked(rows_walked(p.M, p.K)),
        dropout(p.dropout.threshold > 0),
        between(p, Rp),
        down{p.A, p.adapter_dtype, p.K, p.R, true},
        blocks(buffers.take<uint16_t>(walked * steps * kSide)),
        low(buffers.take<uint16_t>(walked * Rp)),
        dropped(dropout || p.x_lora ? buffers.take<uint16_t>(threads * kBlock * steps) : nullptr),
        wide(between ? buffers.take(threads * kSide * Rp) : nullptr),
        y{.left = blocks,
          .right = static_cast<const uint16_t*>(p.W),
          .low = low,
          .thin = p.B,
          .bias = static_cast<const uint16_t*>(p.W || p.out_scale ? p.bias : nullptr),
          .out_scale = p.out_scale,
          .keep = nullptr,
          .out = nullptr,
          .M = walked,
          .N = p.N,
          .K = p.K,
          .R = p.R,
          .ld_right = p.ldw,
          .thin_dtype = p.adapter_dtype,
          .scale = 1.0f,
          .by_rows = p.W_transposed,
          .thin_by_rows = false},
        scratch(y, buffers, threads) {
    down.take(buffers);
  }

  void run() {
    parallel(threads, [&](int t) { down.pack(t, threads); });
    for (int64_t m0 = 0; m0 < p.M; m0 += walked) {
      y.M = std::min(walked, p.M - m0);
      y.out = static_cast<uint16_t*>(p.y) + m0 * p.N;
      parallel(threads, [&](int t) { rows_of_thread(t, m0); });
      amx_gemm(y, scratch);
    }
  }

 private:
  // x in blocks, h and low of thread t's rows among y.M from m0 on.
  void rows_of_thread(int t, int64_t m0) const {
    const Tiles tiles;
    const Range own = part(y.M, kSide, t, threads);
    for (int64_t m = own.begin; m < own.end; m += kSide) {
      const int64_t rows = std::min(kSide, own.end - m);
      const auto* x = static_cast<const uint16_t*>(p.x) + (m0 + m) * p.ldx;
      uint16_t *whole = blocks + m * steps * kSide, *left = dropped ? dropped + t * kBlock * steps : whole;
      const uint16_t* input = p.x_lora ? static_cast<const uint16_t*>(p.x_lora) + (m0 + m) * p.ldx_lora : x;
      const int64_t ld = p.x_lora ? p.ldx_lora : p.ldx;
      uint16_t* both = p.W && !p.x_lora ? whole : nullptr;  // where the low-rank path's input is x
      if (dropout) to_dropped_blocks(input, ld, p.dropout, m0 + m, both, left, nullptr, rows, p.K);
      else to_blocks(input, ld, left, rows, p.K);
      if (p.x_lora && p.W) to_blocks(x, p.ldx, whole, rows, p.K);
      shrink_amx(left, down.pairs, p.scaling * p.dropout.scale(), low + m * Rp, Rp, rows, steps, p.R);
      unpad_low(low + m * Rp, Rp, static_cast<uint16_t*>(p.h) + (m0 + m) * p.R, p.R, rows, p.R);
      if (between)
        in_fp32(low + m * Rp, Rp, rows, wide + t * kSide * Rp, [&](float* h) {
          between.add_h_in(h, m0 + m, rows);
          between.times_gate(h, m0 + m, rows);
        });
    }
  }

  const CpuForwardParams& p;
  int threads;
  int64_t steps, Rp, walked;
  bool dropout;
  Between between;
  Down down;
  uint16_t *blocks, *low, *dropped;  // [walked, K]; [walked, Rp]; a thread's 32 rows of dropped x or x_lora, or null
  float* wide;                       // a thread's [32, Rp], or null
  AmxGemm y;
  AmxScratch scratch;
};

// dA [R, width] (ranks_first) or dB [width, R], and the slabs [sides(R) * 32, sides(width) * 32] it gathers in.
struct Gradient {
  void* dst;
  Dtype dtype;
  int64_t width, R;
  bool ranks_first;
  Slabs slabs{dst != nullptr, round_up(R, kSide) * round_up(width, kSide)};

  AmxSums of_thread(int t) {
    const int64_t cols = round_up(width, kSide);
    return {.to = slabs[t], .ld = cols, .cols = cols, .turned = false, .add = true, .factor = 1.0f};
  }

  // Columns [begin, end) of dst = the slabs' sum * factor (* c[width]).
  void store(float factor, const float* c, Range columns) const {
    const int64_t ld = round_up(width, kSide);
    float sums[kSide * kSide];
    for (int64_t n = columns.begin; dst && n < columns.end; n += kSide)
      for (int64_t r = 0; r < R; r += kSide) {
        const int64_t cols = std::min(kSide, columns.end - n), ranks = std::min(kSide, R - r);
        for (int64_t i = 0; i < ranks; ++i) slabs.sum((r + i) * ld + n, cols, factor, sums + i * kSide);
        for (int64_t i = 0; c && i < ranks; ++i)
          for (int64_t j = 0; j < cols; ++j) sums[i * kSide + j] *= c[n + j];
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

// What a backward works with.
class Backward {
 public:
  Backward(const CpuBackwardParams& params, Buffers& buffers)
      : p(params),
        threads(threads_of(p.M, p.N, p.K, p.R, p.dx && p.W, p.threads)),
        N_steps(sides(p.N)),
        K_steps(sides(p.K)),
        Rp(sides(p.R) * kSide),
        walked(rows_walked(p.M, std::max(p.N, p.K))),
        at_once(rows_of_block(std::max(p.N, p.K))),
        need_dh(p.dx || p.dx_lora || p.dA || p.dh_in || p.dgate),
        between(p, Rp),
        down{p.B, p.adapter_dtype, p.N, p.R, false},
        down_c{p.row_scale && p.dA ? scaled_rows(buffers, p.B, p.adapter_dtype, p.row_scale, p.N, p.R) : nullptr,
               Dtype::f32, p.N, p.R, false},
        blocks(buffers.take<uint16_t>(walked * N_steps * kSide)),
        low(buffers.take<uint16_t>(walked * Rp)),
        bits(p.dropout.threshold > 0 && need_dh ? buffers.take<uint32_t>(walked * K_steps) : nullptr),
        dA{p.dA, p.adapter_dtype, p.K, p.R, true},
        dB{p.dB, p.adapter_dtype, p.N, p.R, false},
        dbias(p.dbias && !p.out_scale, N_steps * kSide),
        scale_sums(scale_params(p), buffers, threads),
        dx{.left = blocks,
           .right = static_cast<const uint16_t*>(p.W),
           .low = low,
           .thin = p.A,
           .bias = nullptr,
           .out_scale = nullptr,
           .keep = p.dx_lora ? nullptr : bits,
           .out = nullptr,
           .M = walked,
           .N = p.K,
           .K = p.N,
           .R = p.dx_lora ? 0 : p.R,
           .ld_right = p.ldw,
           .thin_dtype = p.adapter_dtype,
           .scale = p.dropout.scale(),
           .by_rows = !p.W_transposed,
           .thin_by_rows = true},
        dx_lora(dx),
        scratch(dx, buffers, p.dx ? threads : 0),
        scratch_lora(update_alone(dx_lora), buffers, p.dx_lora ? threads : 0) {
    if (need_dh) down.take(buffers);
    if (down_c.src) down_c.take(buffers);
    for (int t = 0; t < threads; ++t) {
      dA.slabs.add(buffers), dB.slabs.add(buffers), dbias.add(buffers);
      owns.push_back({buffers.take<uint16_t>(at_once * K_steps * kSide), buffers.take<uint16_t>(at_once * Rp),
                      buffers.take<uint16_t>(at_once * Rp), buffers.take<uint16_t>(at_once * 2 * kSide),
                      down_c.src ? buffers.take<uint16_t>(at_once * Rp) : nullptr,
                      between ? buffers.take(2 * kSide * Rp) : nullptr});
    }
  }

  void run() {
    parallel(threads, [&](int t) {
      down.pack(t, threads), down_c.pack(t, threads);
      dA.slabs.clear(t), dB.slabs.clear(t), dbias.clear(t), scale_sums.clear(t);
    });
    for (int64_t m0 = 0; m0 < p.M; m0 += walked) {
      dx.M = dx_lora.M = std::min(walked, p.M - m0);
      dx.out = static_cast<uint16_t*>(p.dx) + m0 * p.K;
      dx_lora.out = static_cast<uint16_t*>(p.dx_lora) + m0 * p.K;
      parallel(threads, [&](int t) { rows_of_thread(t, m0); });
      if (p.dx) amx_gemm(dx, scratch);
      if (p.dx_lora) amx_gemm(dx_lora, scratch_lora);
    }
    parallel(threads, [&](int t) {
      dA.store(p.dropout.scale(), nullptr, part(p.K, kSide, t, threads));
      dB.store(1.0f, p.row_scale, part(p.N, kSide, t, threads));
    });
    if (dbias) store_row(dbias.sum(), p.dbias, p.dtype, p.N);
    scale_sums.store();
  }

 private:
  // A thread's own: x [at_once, K] in blocks, h [at_once, Rp], h or dh transposed, pairs for wgrad, dh_c [at_once, Rp],
  // two of [32, Rp] in fp32; null where nobody needs them.
  struct Own {
    uint16_t *x, *h, *lowT, *pairs, *dh_c;
    float* wide;
  };

  // What is dx_lora's: the update, added to what is there.
  AmxGemm& update_alone(AmxGemm& g) const {
    g.right = nullptr;
    g.keep = bits;
    g.R = p.R;
    return g;
  }

  // dy in blocks, dh, and the shares of dA, dB and dbias, of thread t's rows among dx.M from m0 on.
  void rows_of_thread(int t, int64_t m0) {
    const Tiles tiles;
    const Range all = part(dx.M, kSide, t, threads);
    for (int64_t m = all.begin; m < all.end; m += at_once) {
      const int64_t rows = std::min(at_once, all.end - m);
      from_dy(t, m0, m, rows);
      if (need_dh) from_x(t, m0, m, rows);
    }
  }

  void from_dy(int t, int64_t m0, int64_t m, int64_t rows) {
    const Own& own = owns[static_cast<size_t>(t)];
    uint16_t* left = blocks + m * N_steps * kSide;
    for (int64_t i = 0; i < rows; i += kSide) {
      const auto* dy = static_cast<const uint16_t*>(p.dy) + (m0 + m + i) * p.lddy;
      const int64_t height = std::min(kSide, rows - i);
      uint16_t* to = left + i * N_steps * kSide;
      if (p.out_scale) to_scaled_blocks(dy, p.lddy, p.out_scale, to, height, p.N);
      else to_blocks(dy, p.lddy, to, height, p.N);
      if (scale_sums) scale_sums.gather(t, m0 + m + i, 0, height, p.N);
      const float factor = between ? 1.0f : p.scaling;
      if (need_dh) shrink_amx(to, down.pairs, factor, low + (m + i) * Rp, Rp, height, N_steps, p.R);
      if (own.dh_c) shrink_amx(to, down_c.pairs, factor, own.dh_c + i * Rp, Rp, height, N_steps, p.R);
      if (between) act_between(own, m0 + m + i, i, low + (m + i) * Rp, height);
    }
    if (dbias) column_sums_amx(left, dbias[t], sides(rows), N_steps);
    if (!p.dB) return;
    if (!between) pad_low(static_cast<const uint16_t*>(p.h) + (m0 + m) * p.R, p.R, own.h, Rp, rows, p.R);
    transpose_low(own.h, Rp, own.lowT, round_up(rows, kSide));
    wgrad_amx(left, own.lowT, dB.of_thread(t), own.pairs, sides(rows), N_steps, p.R);
  }

  // What the optional tensors do to 32 rows of dh, of dh_c and of h; the first is row `row` of the call, row i of own.
  void act_between(const Own& own, int64_t row, int64_t i, uint16_t* dh, int64_t rows) const {
    float *ungated = own.wide, *other = own.wide + kSide * Rp;
    if (p.h) {
      uint16_t* h = own.h + i * Rp;
      load_matrix(static_cast<const uint16_t*>(p.h) + row * p.R, Dtype::bf16, ungated, rows, p.R, Rp);
      between.add_h_in(ungated, row, rows);
      std::copy_n(ungated, rows * Rp, other);
      between.times_gate(other, row, rows);
      store_row(other, h, Dtype::bf16, rows * Rp);
      std::fill_n(h + rows * Rp, (kSide - rows) * Rp, uint16_t{0});
    }
    if (need_dh) in_fp32(dh, Rp, rows, other, [&](float* t) { between.gradient(t, ungated, row, rows); });
    if (own.dh_c) in_fp32(own.dh_c + i * Rp, Rp, rows, other, [&](float* t) { between.gradient_c(t, row, rows); });
  }

  void from_x(int t, int64_t m0, int64_t m, int64_t rows) {
    const Own& own = owns[static_cast<size_t>(t)];
    uint32_t* keep = bits ? bits + m * K_steps : nullptr;
    if (!p.dA) {
      if (keep) dropout_bits(p.dropout, keep, K_steps, m0 + m, 0, rows, p.K);
      return;
    }
    const auto* x = static_cast<const uint16_t*>(p.x) + (m0 + m) * p.ldx;
    if (keep) to_dropped_blocks(x, p.ldx, p.dropout, m0 + m, nullptr, own.x, keep, rows, p.K);
    else to_blocks(x, p.ldx, own.x, rows, p.K);
    transpose_low(own.dh_c ? own.dh_c : low + m * Rp, Rp, own.lowT, round_up(rows, kSide));
    wgrad_amx(own.x, own.lowT, dA.of_thread(t), own.pairs, sides(rows), K_steps, p.R);
  }

  const CpuBackwardParams& p;
  int threads;
  int64_t N_steps, K_steps, Rp, walked, at_once;
  bool need_dh;
  Between between;
  Down down, down_c;
  uint16_t *blocks, *low;  // [walked, N]; [walked, Rp] dh
  uint32_t* bits;          // [walked, sides(K)] of x that is kept, or null
  Gradient dA, dB;
  Slabs dbias;
  ScaleSums scale_sums;
  AmxGemm dx, dx_lora;  // dx_lora: the update alone, where it does not go to dx
  AmxScratch scratch, scratch_lora;
  std::vector<Own> owns;
};

}  // namespace

void amx_forward(const CpuForwardParams& p, Buffers& buffers) { Forward(p, buffers).run(); }
void amx_backward(const CpuBackwardParams& p, Buffers& buffers) { Backward(p, buffers).run(); }

}  // namespace fused_lora::cpu

#endif
