// lora_gemm: out = left right + low thin + bias in fp32, a base product with its low-rank update inside.
//
//   forward   y [M, N]  = x [M, K] W^T + h [M, R] B^T + bias      W, B [columns, depth]: by_rows, thin_by_rows false
//             with a scale of the columns W and B are packed times it; left likewise is copied times its own
//   backward  dx [M, K] = dy [M, N] W  + dh [M, R] A              W, A [depth, columns]: by_rows, thin_by_rows true
//   of a W that is given as its transpose by_rows is the other one
//
// Layouts: rows of every operand with a row stride, `out` contiguous.
// Tiles: the update is R more steps of the summed dimension: `thin` lies below `right`, `low` beside `left`. A task
// owns a range of rows and columns and walks it in blocks of kWidth columns and kDepth steps. A block of `right` is
// packed once into panels of 32 columns (768 KiB in L2) and meets strips of up to 12 rows of `left` (18 KiB in L1) in
// register tiles of 12 x 32 (AVX-512) or 6 x 16. A strip's rows are copied kPitch apart, a constant, so that one
// pointer reaches all of them: GCC keeps row strides out of registers and reloads them in the loop.
// Numerics: sums start afresh in every block, so that rounding errors grow with kDepth and not with all of K; the first
// block stores its sums and adds the bias, or adds them where `add`, the others add theirs.
// Source of the loop order: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3),
// 2008.
#include "pack.h"
#include "strips.h"
#include "walk.h"

namespace fused_lora::cpu {
namespace {

// 256 to 768 by 160 to 480: within noise on EPYC 9004, 2026-11-24; 192 to 384 by 512 on a Xeon with AMX, 2026-11-26.
// Several strips at a time against each panel, so that the panel stays in L1: 3 % slower there.
constexpr int64_t kDepth = 384, kWidth = 512;
constexpr int64_t kPitch = kDepth + 16;  // floats between the rows of a strip; not a power of two

// The first steps of a block of `right` by rows, from which the first strip copies whole panels as it reads them: the
// copy costs nothing beside its multiplications. Nothing to copy where steps is 0. (dx, dA and dB of 64 rows 0.86 to
// 0.90, of 256 rows 0.96 of the time with all of the block packed before; Xeon with AMX, 2026-11-26.)
struct Unpacked {
  const float* rows = nullptr;  // [steps, width (row stride ld)]
  int64_t ld = 0, steps = 0;
};

constexpr int64_t kStepsAhead = 24;  // what is read so is fetched before

// Whether the rows of `right` are read so: at a stride of whole pages they meet in the same lines of the L1, and the
// product of 512 rows takes 3 to 5 % longer.
INLINE bool copied_as_read(const LoraGemm& g) { return g.by_rows && !g.scale && g.ld_right % 1024 != 0; }

// One strip against every panel of a block.
struct Strip {
  const float* rows;  // [height, depth (row stride kPitch)]
  float* panels;      // [width / 32, depth, 32]
  Unpacked unpacked;
  int64_t depth, width;
  float* out;  // [height, width (row stride ldo)]
  int64_t ldo;
  bool add;           // to what out holds
  const float* bias;  // [width] or null
  const float* next;  // the rows of `left` that the next strip is copied from, [height, depth (row stride ld_next)]
  int64_t ld_next;
};

// Fetches into L2 what the next strip is copied from, the share of the panel at column n.
template <int H> INLINE void fetch_ahead(const Strip& s, int64_t n) {
  const int64_t end = s.depth * std::min(n + kColumns, s.width) / s.width;
  for (int64_t k = s.depth * n / s.width; k < end; k += 16)
#pragma GCC unroll 12
    for (int i = 0; i < H; ++i) __builtin_prefetch(s.next + i * s.ld_next + k, 0, 2);
}

// out[H, two vectors] (= or, where add, +=) rows[H, depth] panel[depth, two vectors] + bias.
template <int H, class V>
INLINE void gemm_tile(const float* rows, float* panel, Unpacked from, int64_t depth, float* out, int64_t ldo, bool add,
                      const float* bias) {
  constexpr int kLane = sizeof(V) / sizeof(float);
  V acc[H][2] = {};
#pragma GCC unroll 12
  for (int i = 0; i < H; ++i) {  // what the tile stores to
    __builtin_prefetch(out + i * ldo, 1);
    if (kLane == 16) __builtin_prefetch(out + i * ldo + kLane, 1);
  }
  const auto step = [&](int64_t k, V b0, V b1) INLINED {
#pragma GCC unroll 12
    for (int i = 0; i < H; ++i) {
      const float a = rows[i * kPitch + k];
      acc[i][0] += a * b0;
      acc[i][1] += a * b1;
    }
  };
  V b0, b1;
  for (int64_t k = 0; k < from.steps; ++k) {
    const float* right = from.rows + k * from.ld;
    __builtin_prefetch(right + kStepsAhead * from.ld), __builtin_prefetch(right + kStepsAhead * from.ld + kLane);
    load(b0, right), load(b1, right + kLane);
    store(panel + k * kColumns, b0), store(panel + k * kColumns + kLane, b1);
    step(k, b0, b1);
  }
  for (int64_t k = from.steps; k < depth; ++k) {
    load(b0, panel + k * kColumns), load(b1, panel + k * kColumns + kLane);
    step(k, b0, b1);
  }
  b0 = V{}, b1 = V{};
  if (bias) load(b0, bias), load(b1, bias + kLane);
#pragma GCC unroll 12
  for (int i = 0; i < H; ++i) {
    float* y = out + i * ldo;
    V y0 = b0, y1 = b1;
    if (add) load(y0, y), load(y1, y + kLane);
    acc[i][0] += y0, acc[i][1] += y1;
    store(y, acc[i][0]), store(y + kLane, acc[i][1]);
  }
}

// out[H, 32] likewise.
template <int H, class V>
INLINE void tiles(const float* rows, float* panel, Unpacked from, int64_t depth, float* out, int64_t ldo, bool add,
                  const float* bias) {
  if constexpr (sizeof(V) == kColumns * sizeof(float) / 2) {
    gemm_tile<H, V>(rows, panel, from, depth, out, ldo, add, bias);
  } else {
    constexpr int kUpper = (H + 1) / 2, kLower = H / 2;
    for (int64_t n = 0; n < kColumns; n += kColumns / 2) {
      const float* b = bias ? bias + n : nullptr;
      const Unpacked half{from.steps ? from.rows + n : nullptr, from.ld, from.steps};
      gemm_tile<kUpper, V>(rows, panel + n, half, depth, out + n, ldo, add, b);
      if constexpr (kLower > 0)
        gemm_tile<kLower, V>(rows + kUpper * kPitch, panel + n, {}, depth, out + kUpper * ldo + n, ldo, add, b);
    }
  }
}

template <int H, class V> INLINE void multiply(const Strip& s) {
  for (int64_t n = 0; n < s.width; n += kColumns) {
    float* panel = s.panels + n * s.depth;
    const float* bias = s.bias ? s.bias + n : nullptr;
    const int64_t cols = s.width - n;
    fetch_ahead<H>(s, n);
    if (cols >= kColumns) {
      const Unpacked from{s.unpacked.rows + n, s.unpacked.ld, s.unpacked.steps};
      tiles<H, V>(s.rows, panel, from, s.depth, s.out + n, s.ldo, s.add, bias);
      continue;
    }
    float edge[H * kColumns];
    tiles<H, V>(s.rows, panel, {}, s.depth, edge, kColumns, false, nullptr);
    for (int64_t i = 0; i < H; ++i)
      for (int64_t j = 0; j < cols; ++j) {
        float& y = s.out[i * s.ldo + n + j];
        y = (s.add ? y : bias ? bias[j] : 0.0f) + edge[i * kColumns + j];
      }
  }
}

constexpr int64_t kStripSize = kStrip * kPitch;
// Floats of one task's strip, and of its packed block below it.
int64_t buffer_size(const LoraGemm& g) {
  return kStripSize + std::min(kWidth, round_up(g.N, kColumns)) * std::min(kDepth, round_up(g.K + g.R, 8));
}

// Steps [k, k + depth) of the columns [n, n + width): those below g.K are of `right`, the others of `thin`.
struct Block {
  int64_t n, width, k, depth;
  INLINE int64_t base(const LoraGemm& g) const { return std::clamp<int64_t>(g.K - k, 0, depth); }
  INLINE int64_t first_rank(const LoraGemm& g) const { return std::max<int64_t>(k - g.K, 0); }
};

// panels[width / 32, depth, 32], columns past width zero; without the whole panels that are copied as they are read.
template <class V> INLINE void pack_block(const LoraGemm& g, const Block& b, float* panels) {
  const int64_t base = b.base(g), ranks = b.depth - base, r = b.first_rank(g), stride = b.depth * kColumns;
  float* below = panels + base * kColumns;
  const float* scale = g.scale ? g.scale + b.n : nullptr;
  if (g.by_rows) {
    const int64_t whole = copied_as_read(g) ? b.width / kColumns * kColumns : 0;
    pack_rows(g.right + b.k * g.ld_right + b.n + whole, g.ld_right, scale ? scale + whole : nullptr,
              panels + whole * b.depth, stride, base, b.width - whole);
  } else {
    pack_columns<V>(g.right + b.n * g.ld_right + b.k, g.ld_right, scale, panels, stride, base, b.width);
  }
  if (!ranks) return;
  if (g.thin_by_rows) pack_rows(g.thin + r * g.ld_thin + b.n, g.ld_thin, scale, below, stride, ranks, b.width);
  else pack_columns<V>(g.thin + b.n * g.ld_thin + r, g.ld_thin, scale, below, stride, ranks, b.width);
}

// strip[height, depth (row stride kPitch)] = rows m.. of `left` and `low`.
INLINE void pack_strip(const LoraGemm& g, const Block& b, float* strip, int64_t m, int64_t height) {
  const int64_t base = b.base(g), ranks = b.depth - base;
  for (int64_t i = 0; i < height; ++i) {
    float* to = strip + i * kPitch;
    const float* from = g.left + (m + i) * g.ld_left + b.k;
    if (g.left_scale)
      for (int64_t k = 0; k < base; ++k) to[k] = from[k] * g.left_scale[b.k + k];
    else std::copy_n(from, base, to);
    if (ranks) std::copy_n(g.low + (m + i) * g.ld_low + b.first_rank(g), ranks, to + base);
  }
}

template <class V> INLINE void task(const LoraGemm& g, Range rows, Range cols, float* buffer) {
  const int64_t steps = g.K + g.R, blocks = (steps + kDepth - 1) / kDepth,
                step = round_up((steps + blocks - 1) / blocks, 8);
  float *strip = buffer, *panels = buffer + kStripSize;
  for (int64_t n = cols.begin; n < cols.end; n += kWidth)
    for (int64_t k = 0; k < steps; k += step) {
      const Block b{n, std::min(kWidth, cols.end - n), k, std::min(step, steps - k)};
      pack_block<V>(g, b, panels);
      const int64_t copied = copied_as_read(g) ? b.base(g) : 0;
      for_strips(rows.begin, rows.end, [&](int64_t, int64_t m, auto height) INLINED {
        constexpr int H = decltype(height)::value;
        pack_strip(g, b, strip, m, H);
        multiply<H, V>({.rows = strip,
                        .panels = panels,
                        .unpacked = {g.right + b.k * g.ld_right + b.n, g.ld_right, m == rows.begin ? copied : 0},
                        .depth = b.depth,
                        .width = b.width,
                        .out = g.out + m * g.N + n,
                        .ldo = g.N,
                        .add = g.add || k > 0,
                        .bias = k == 0 && g.bias ? g.bias + n : nullptr,
                        .next = g.left + (m + H) * g.ld_left + k,
                        .ld_next = g.ld_left});
      });
    }
}

}  // namespace

void lora_gemm(const LoraGemm& g, Buffers& buffers, int threads) {
  const Split split = split_of(g.M, g.N, threads);
  const int64_t size = round_up(buffer_size(g), 16);
  float* buffer = buffers.take(split.tasks() * size);
  parallel(split.tasks(), [&](int t) {
    const Range rows = split.rows(t, g.M, kStrip), cols = split.cols(t, g.N, kColumns);
    float* own = buffer + t * size;
    widest_vector([=, &g](auto lanes) INLINED { task<typename decltype(lanes)::Vector>(g, rows, cols, own); });
  });
}

}  // namespace fused_lora::cpu
