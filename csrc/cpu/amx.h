// bf16 on AMX tiles: what the products of tiles (tiles.h) read and write.
//
// An operand lies in blocks or in pairs, both padded with zeros to whole tiles:
//   blocks  [rows / 32][depth / 32] blocks of 32 rows by 32: what stands left of a product, two tiles a block
//   pairs   [depth / 32][columns / 16] tiles of 16 pairs of rows by 16 columns: what stands right of it
#pragma once

#include <vector>

#include "bf16_dot.h"
#include "kernels.h"
#include "simd.h"
#include "tiles.h"
#include "transpose_avx512.h"
#include "walk.h"

#ifdef FUSED_LORA_AMX

namespace fused_lora::cpu {

constexpr int64_t kTile = 512;            // bf16 of a tile
constexpr int64_t kSide = 32;             // rows and columns of a block
constexpr int64_t kBlock = 2 * kTile;     // bf16 of a block
constexpr int64_t kSums = kSide * kSide;  // fp32 sums of four tiles

// The first n of 16, none for n <= 0.
BF16_DOT_INLINE __mmask16 first16(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0);
}

// Two tiles of 16 columns each from an even and an odd row of 32: unpacking works within 128 bits, so its input is
// brought in the order that leaves columns in theirs.
BF16_DOT_INLINE void store_pair(uint16_t* to, __m512i even, __m512i odd) {
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  const __m512i e = _mm512_permutexvar_epi64(order, even), o = _mm512_permutexvar_epi64(order, odd);
  _mm512_store_si512(to, _mm512_unpacklo_epi16(e, o));
  _mm512_store_si512(to + kTile, _mm512_unpackhi_epi16(e, o));
}

// Blocks or pairs of n rows or columns, in units of 32.
inline int64_t sides(int64_t n) { return (n + kSide - 1) / kSide; }

// amx_pack.cpp
// blocks[sides(rows)][sides(cols)] = src[rows, cols (row stride ld)]; with `at` row i is at[i] of src.
void to_blocks(const uint16_t* src, int64_t ld, uint16_t* blocks, int64_t rows, int64_t cols,
               const int64_t* at = nullptr);
// The same of src * scale[cols], rounded once.
void to_scaled_blocks(const uint16_t* src, int64_t ld, const float* scale, uint16_t* blocks, int64_t rows,
                      int64_t cols);
// As to_blocks into `whole` and, with dropout of rows row0.. (+ at) and columns col0.., a multiple of 64, into
// `dropped`; bits[rows, sides(cols)]: what it keeps.
// `whole` and `bits` may be null. Drawn here, while x is on its way from memory: apart it would take 4 % of a layer's
// time more.
void to_dropped_blocks(const uint16_t* src, int64_t ld, const Dropout& dropout, int64_t row0, uint16_t* whole,
                       uint16_t* dropped, uint32_t* bits, int64_t rows, int64_t cols, int64_t col0 = 0,
                       const int64_t* at = nullptr);
// pairs of src[depth, cols (row stride ld)], panels of 32 columns `panel` bf16 apart: [cols / 32][depth / 32][2 tiles].
void pair_panels(const void* src, Dtype dtype, int64_t ld, uint16_t* pairs, int64_t panel, int64_t depth, int64_t cols);
// The same of src^T, where src is [cols, depth (row stride ld)].
void pair_panels_transposed(const void* src, Dtype dtype, int64_t ld, uint16_t* pairs, int64_t panel, int64_t depth,
                            int64_t cols);
// h[rows, R (row stride ld)] = low[rows, Rp], zero past R; and low[rows rounded up to 32, Rp] = h, zero past both.
void unpad_low(const uint16_t* low, int64_t Rp, uint16_t* h, int64_t ld, int64_t rows, int64_t R);
void pad_low(const uint16_t* h, int64_t ld, uint16_t* low, int64_t Rp, int64_t rows, int64_t R);
// tiles[Rp / 16][rows / 32] of 16 ranks by 32 rows, of low[rows, Rp]: the left side of wgrad. Both multiples of 32.
void transpose_low(const uint16_t* low, int64_t Rp, uint16_t* tiles, int64_t rows);

// amx_low_rank.cpp, within a Tiles
// low[32, Rp] = factor * blocks[steps] down, in bf16, zero past `rows` and R; down: pairs, panels of 32 ranks
// `steps * kBlock` apart.
void shrink_amx(const uint16_t* blocks, const uint16_t* down, float factor, uint16_t* low, int64_t Rp, int64_t rows,
                int64_t steps, int64_t R);
// to[R, cols (row stride ld)], or turned [cols, R (row stride ld)], = factor * lowT blocks[n][steps] (+ to where add),
// for lowT of transpose_low; pairs: [n][4 tiles] scratch.
struct AmxSums {
  float* to;
  int64_t ld, cols;
  bool turned, add;
  float factor;
};
void wgrad_amx(const uint16_t* blocks, const uint16_t* lowT, const AmxSums& sums, uint16_t* pairs, int64_t n,
               int64_t steps, int64_t R);
// out[cols] += sum over the 32 * n rows of blocks[n][steps].
void column_sums_amx(const uint16_t* blocks, float* out, int64_t n, int64_t steps);

// amx_gemm.cpp: out = out_scale * (left right + scale * keep * (low thin)) + bias; without right, `out` itself stands
// for left right.
struct AmxGemm {
  const uint16_t* left;    // blocks[sides(M)][sides(K)]
  const uint16_t* right;   // by_rows: [K, N], else its transpose [N, K]; row stride ld_right; or null
  const uint16_t* low;     // [M rounded up to 32, Rp], bf16
  const void* thin;        // thin_by_rows: [R, N], else its transpose [N, R]; contiguous, thin_dtype
  const uint16_t* bias;    // [N] or null
  const float* out_scale;  // [N] or null
  const uint32_t* keep;    // [M, sides(N)] bits, or null: then scale is 1, or R is 0
  uint16_t* out;           // [M, N], contiguous
  int64_t M, N, K, R, ld_right;
  Dtype thin_dtype;
  float scale;
  bool by_rows, thin_by_rows;
  const int64_t* rows = nullptr;  // [M], which rows of a larger `out` these are; null: all in their order
};
// What its tasks need, for products of at most g's sizes.
struct AmxScratch {
  AmxScratch(const AmxGemm& g, Buffers& buffers, int threads);
  Split split;
  std::vector<uint16_t*> groups;
  std::vector<float*> sums;
};
void amx_gemm(const AmxGemm& g, const AmxScratch& scratch);

// amx_walk.cpp: the whole forward or backward for bf16 x.
void amx_forward(const CpuForwardParams& p, Buffers& buffers);
void amx_backward(const CpuBackwardParams& p, Buffers& buffers);

}  // namespace fused_lora::cpu

#endif
