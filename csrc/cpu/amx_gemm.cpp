// amx_gemm: out = out_scale * (left right + scale * keep * (low thin)) + bias on AMX tiles, a base product with its
// update inside.
//
//   forward   y [M, N]  = x [M, K] W^T + h [M, R] B^T + bias        W, B [columns, depth]: by_rows, thin_by_rows false
//   backward  dx [M, K] = dy [M, N] W  + mask * (dh [M, R] A)       W, A [depth, columns]: by_rows, thin_by_rows true
//   of a W that is given as its transpose by_rows is the other one
//
// Layouts: `left` in blocks (amx.h), `low` padded, the rest as it lies, `out` contiguous.
// Tiles: a task owns a range of rows and of columns. kDepth x kGroup of `right` is packed into pairs (512 KiB in
// L2) and meets all its rows of `left`, 32 at a time, of which the next 32 are on their way; 32 x 32 of sums in four
// tile registers. With several chunks of depth the sums wait in fp32 meanwhile.
// Numerics: one chain of fp32 sums over the depth; the update joins it at its end, or apart under dropout's mask; bias
// and rounding last.
#include "amx.h"
#include "walk.h"

#ifdef FUSED_LORA_AMX

namespace fused_lora::cpu {
namespace {

constexpr int64_t kDepth = 1024, kGroup = 256;  // 512 KiB; 512 columns leave no room in L2 for what passes by
constexpr int64_t kNear = 16;                   // steps of 32 rows of `left` that stay in L1: 32 KiB

// One block of `out`.
struct Block {
  const uint16_t *left, *right;  // [steps] blocks and pairs; none where `out` is added to
  int64_t steps;
  float* sums;  // [4 tiles], from the chunk of depth before this one and for the next one
  bool first, last;
  const uint16_t *low, *thin;  // [32, Rp]; [ranks] pairs
  int64_t Rp, ranks;           // ranks: in steps of 32
  float scale;
  const uint32_t* keep;  // of the first row, or null
  int64_t ld_keep;
  const uint16_t* bias;    // [cols] or null
  const float* out_scale;  // [cols] or null
  uint16_t* out;
  int64_t ldo, rows, cols;
  const int64_t* at;      // row i of it is at[i] of out; or null
  const uint16_t* ahead;  // what to bring into L2 meanwhile, lines of 64 bytes a step
  int64_t lines;
};

BF16_DOT_INLINE void store_sums(float* to) {
  tile_store<0>(to, 64), tile_store<1>(to + 256, 64), tile_store<2>(to + 512, 64), tile_store<3>(to + 768, 64);
}
// The same as rows of 32.
BF16_DOT_INLINE void store_rows(float* to) {
  tile_store<0>(to, 128), tile_store<1>(to + 16, 128), tile_store<2>(to + 512, 128), tile_store<3>(to + 528, 128);
}

// What the tiles have summed up goes out: out_scale * (base[32, 32] + scale * keep * update[32, 32]) + bias, of which
// each may be null.
BF16_DOT_INLINE void store_block(const Block& b, const float* base, const float* update) {
  const __mmask32 there = b.cols >= kSide ? ~0u : (1u << b.cols) - 1;
  const __m512i bias = b.bias ? _mm512_maskz_loadu_epi16(there, b.bias) : __m512i{};
  const __m512 bias_lo = to_fp32(_mm512_castsi512_si256(bias)), bias_hi = to_fp32(_mm512_extracti64x4_epi64(bias, 1)),
               scale = _mm512_set1_ps(b.scale);
  __m512 by_lo = _mm512_set1_ps(1.0f), by_hi = by_lo;
  if (b.out_scale) {
    by_lo = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), b.out_scale);
    by_hi = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), b.out_scale + 16);
  }
  for (int64_t i = 0; i < b.rows; ++i) {
    uint16_t* out = b.out + (b.at ? b.at[i] : i) * b.ldo;
    __m512 lo, hi;
    if (base) {
      lo = _mm512_load_ps(base + kSide * i), hi = _mm512_load_ps(base + kSide * i + 16);
    } else {
      const __m512i before = _mm512_maskz_loadu_epi16(there, out);
      lo = to_fp32(_mm512_castsi512_si256(before)), hi = to_fp32(_mm512_extracti64x4_epi64(before, 1));
    }
    if (update) {
      const uint32_t keep = b.keep ? b.keep[i * b.ld_keep] : ~0u;
      lo = _mm512_mask3_fmadd_ps(scale, _mm512_load_ps(update + kSide * i), lo, static_cast<__mmask16>(keep));
      hi =
          _mm512_mask3_fmadd_ps(scale, _mm512_load_ps(update + kSide * i + 16), hi, static_cast<__mmask16>(keep >> 16));
    }
    const __m512i rounded =
        (__m512i)_mm512_cvtne2ps_pbh(_mm512_fmadd_ps(hi, by_hi, bias_hi), _mm512_fmadd_ps(lo, by_lo, bias_lo));
    _mm512_mask_storeu_epi16(out, there, rounded);
  }
}

BF16_DOT_INLINE void multiply(const Block& b, float* scratch) {
  if (b.first) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  } else {
    tile_load<0>(b.sums, 64), tile_load<1>(b.sums + 256, 64);
    tile_load<2>(b.sums + 512, 64), tile_load<3>(b.sums + 768, 64);
  }
  const uint16_t *left = b.left, *right = b.right, *ahead = b.ahead;
  for (int64_t k = 0; k < b.steps; ++k, left += kBlock, right += kBlock) {
    tile_load<4>(left, 64), tile_stream<6>(right, 64), tile_dot<0, 4, 6>();
    tile_stream<7>(right + kTile, 64), tile_dot<1, 4, 7>();
    tile_load<5>(left + kTile, 64), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
    for (int64_t i = 0; i < b.lines; ++i, ahead += kSide) _mm_prefetch(ahead, _MM_HINT_T1);
    if (b.last) {
      __builtin_prefetch(b.out + (2 * k) % kSide * b.ldo, 1);
      __builtin_prefetch(b.out + (2 * k + 1) % kSide * b.ldo, 1);
    }
  }
  if (!b.last) return store_sums(b.sums);
  const bool apart = b.steps == 0 || (b.keep && b.ranks);  // the update from the base product
  float* update = scratch + kSums;
  if (apart && b.steps) {
    store_rows(scratch);
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  const uint16_t *low = b.low, *thin = b.thin;
  for (int64_t r = 0; r < b.ranks; ++r, low += kSide, thin += kBlock) {
    tile_load<4>(low, b.Rp * 2), tile_load<6>(thin, 64), tile_dot<0, 4, 6>();
    tile_load<7>(thin + kTile, 64), tile_dot<1, 4, 7>();
    tile_load<5>(low + 16 * b.Rp, b.Rp * 2), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
  }
  store_rows(apart ? update : scratch);
  store_block(b, b.steps ? scratch : nullptr, apart ? update : nullptr);
}

int64_t group_size(const AmxGemm& g) {
  const int64_t deep = g.right ? std::min(kDepth, sides(g.K) * kSide) : 0;
  return std::min(kGroup, sides(g.N) * kSide) * (deep + round_up(g.R, kSide));
}

BF16_DOT void pack(bool by_rows, const void* src, Dtype dtype, int64_t ld, int64_t k, int64_t n, uint16_t* pairs,
                   int64_t depth, int64_t cols) {
  const int64_t panel = sides(depth) * kBlock;
  if (by_rows) pair_panels(at(src, k * ld + n, dtype), dtype, ld, pairs, panel, depth, cols);
  else pair_panels_transposed(at(src, n * ld + k, dtype), dtype, ld, pairs, panel, depth, cols);
}

BF16_DOT void task(const AmxGemm& g, Range rows, Range cols, uint16_t* group, float* sums) {
  alignas(64) float scratch[2 * kSums];
  const Tiles tiles;
  const int64_t all = sides(g.K), ranks = sides(g.R), Rp = ranks * kSide;
  const int64_t depth = g.right ? g.K : 1;
  const bool several = depth > kDepth;
  for (int64_t n0 = cols.begin; n0 < cols.end; n0 += kGroup) {
    const int64_t width = std::min(kGroup, cols.end - n0), panels = sides(width);
    uint16_t* thin = group + (g.right ? std::min(kDepth, all * kSide) : 0) * panels * kSide;
    if (g.R) pack(g.thin_by_rows, g.thin, g.thin_dtype, g.thin_by_rows ? g.N : g.R, 0, n0, thin, g.R, width);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t deep = std::min(kDepth, depth - k), steps = g.right ? sides(deep) : 0;
      if (steps) pack(g.by_rows, g.right, Dtype::bf16, g.ld_right, k, n0, group, deep, width);
      for (int64_t m = rows.begin; m < rows.end; m += kSide)
        for (int64_t s = 0; s == 0 || s < steps; s += kNear) {
          const int64_t near = std::min(kNear, steps - s);
          const uint16_t* left = g.left + (m / kSide * all + k / kSide + s) * kBlock;
          for (int64_t n = 0; n < panels; ++n) {
            const int64_t lines = m + kSide < rows.end ? (kSide + panels - 1) / panels : 0;
            multiply({.left = left,
                      .right = group + (n * steps + s) * kBlock,
                      .steps = near,
                      .sums = sums + ((several ? (m - rows.begin) / kSide * sides(kGroup) : 0) + n) * kSums,
                      .first = k == 0 && s == 0,
                      .last = k + kDepth >= depth && s + kNear >= steps,
                      .low = g.low + m * Rp,
                      .thin = thin + n * ranks * kBlock,
                      .Rp = Rp,
                      .ranks = ranks,
                      .scale = g.scale,
                      .keep = g.keep ? g.keep + m * sides(g.N) + (n0 / kSide + n) : nullptr,
                      .ld_keep = sides(g.N),
                      .bias = g.bias ? g.bias + n0 + n * kSide : nullptr,
                      .out_scale = g.out_scale ? g.out_scale + n0 + n * kSide : nullptr,
                      .out = g.out + (g.rows ? 0 : m * g.N) + n0 + n * kSide,
                      .ldo = g.N,
                      .rows = std::min(kSide, rows.end - m),
                      .cols = std::min(kSide, width - n * kSide),
                      .at = g.rows ? g.rows + m : nullptr,
                      .ahead = left + all * kBlock + n * near * lines * kSide,
                      .lines = lines},
                     scratch);
          }
        }
    }
  }
}

}  // namespace

AmxScratch::AmxScratch(const AmxGemm& g, Buffers& buffers, int threads)
    : split(split_tasks(sides(g.M), sides(g.N), sides(g.N), threads)) {
  const bool several = g.right && g.K > kDepth;
  const int64_t rows = several ? (sides(g.M) + split.by_rows - 1) / split.by_rows * kSide : kSide;
  for (int t = 0; threads && t < split.tasks(); ++t) {
    groups.push_back(buffers.take<uint16_t>(group_size(g)));
    sums.push_back(buffers.take(rows * kGroup));
  }
}

void amx_gemm(const AmxGemm& g, const AmxScratch& scratch) {
  const Split& split = scratch.split;
  parallel(split.tasks(), [&](int t) {
    const size_t i = static_cast<size_t>(t);
    task(g, split.rows(t, g.M, kSide), split.cols(t, g.N, kSide), scratch.groups[i], scratch.sums[i]);
  });
}

}  // namespace fused_lora::cpu

#endif
