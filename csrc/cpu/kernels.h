// The CPU kernels and their common ground: each works on one block of rows and one panel of columns.
//
//   shrink     low = left down         h  = drop(x) A^T     dh = dy B
//   expand     out = out + low thin    y += h B^T           dx += mask * (dh A)
//   wgrad      low^T panel             dA = dh^T drop(x)    dB^T = h^T dy
//   lora_gemm  out = left right + low thin + bias: the base product with its update inside; bf16_gemm in bf16
//
// A walk (forward.cpp, backward.cpp) goes over the row blocks; every product reads a panel of x or dy as it lies or,
// where its dtype or a dropout mask asks for it, from a copy in L2 ([kRows, kPanel] floats = 144 KiB). Sums are fp32.
#pragma once

#include <cstdint>

#include "lora.h"

namespace fused_lora::cpu {

constexpr int kStrip = 12;             // rows of a strip: one AVX-512 register tile or two of AVX2 (simd.h)
constexpr int kVec = 8;                // floats of one vector; R is padded to a multiple
constexpr int64_t kLanes = 16;         // pairs of bf16, or fp32 sums, of one AVX-512 vector (bf16_dot.h)
constexpr int64_t kRows = 8 * kStrip;  // rows of a block; 24 to 192 measured alike on EPYC 9005, 2026-11-24
// Columns of a panel: a multiple of kStrip, 2 * kVec, 2 * kLanes and Philox's 8; 192 and 576 no faster.
constexpr int64_t kPanel = 384;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// shrink.cpp     low[rows, Rp] += panel[rows, cols (row stride ld)] down[cols, Rp].
void shrink(const float* panel, int64_t ld, const float* down, float* low, int64_t rows, int64_t cols, int64_t Rp);

// Memory that a kernel fetches into L2 meanwhile, a share of it with every tile.
struct Fetch {
  const char *next = nullptr, *end = nullptr;
  int64_t share = 0;  // bytes
};
constexpr int kFetches = 2;

// expand.cpp     out[rows, cols (row stride ldo)] += low[rows, Rp] thin[R, cols (row stride ldt)]; cols a multiple of
//                2 * kVec; with ahead[kFetches], or null.
void expand(const float* low, const float* thin, float* out, int64_t ldo, int64_t rows, int64_t cols, int64_t R,
            int64_t Rp, int64_t ldt, Fetch* ahead);
//                out[rows <= kStrip, kPanel] = the same, cols rounded up.
void expand_strip(const float* low, const float* thin, float* out, int64_t rows, int64_t cols, int64_t R, int64_t Rp,
                  int64_t ldt);

// wgrad.cpp      out[Rp, cols (row stride ldo)] += low[rows, Rp]^T panel[rows, cols (row stride ld)]; cols rounded up
//                to a multiple of kLanes.
void wgrad(const float* panel, int64_t ld, const float* low, float* out, int64_t ldo, int64_t rows, int64_t cols,
           int64_t Rp);
//                out[cols] += sum over rows of panel (row stride ld): one panel's share of dbias.
void column_sums(const float* panel, int64_t ld, float* out, int64_t rows, int64_t cols);

// The same for bf16 where features.bf16_dot: pairs along the summed dimension, ranks padded to a multiple of kLanes.
// low[rows, Rp] += panel[rows, 2 * pairs (row stride ld)] down[pairs, Rp].
void shrink_bf16(const uint16_t* panel, int64_t ld, const uint32_t* down, float* low, int64_t rows, int64_t pairs,
                 int64_t Rp);
// out[rows, cols (row stride ldo)] += low[rows rounded up to kStrip, Rp] thin[pairs, cols (row stride ldt)]
// (* scale where kept by bits[rows, cols / 32 (row stride ld_bits)], or 0; without bits all of it); ahead as above.
void expand_bf16(const uint16_t* low, int64_t Rp, const uint32_t* thin, int64_t ldt, const uint32_t* bits,
                 int64_t ld_bits, float scale, uint16_t* out, int64_t ldo, int64_t rows, int64_t cols, int64_t pairs,
                 Fetch* ahead);
// out[Rp, cols (row stride ldo)] += low[pairs, Rp]^T panel[2 * pairs, cols (row stride ld)]; cols rounded up to a
// multiple of 2 * kLanes.
void wgrad_bf16(const uint16_t* panel, int64_t ld, const uint32_t* low, float* out, int64_t ldo, int64_t pairs,
                int64_t cols, int64_t Rp);
// out[cols] += sum over rows of panel; cols rounded up to a multiple of kLanes.
void column_sums_bf16(const uint16_t* panel, int64_t ld, float* out, int64_t rows, int64_t cols);

// lora_gemm.cpp  out = left right + low thin + bias (or + out) in fp32, on all threads: y, or dx, where N and K change
//                places.
struct LoraGemm {
  const float* left;        // [M, K], row stride ld_left
  const float* left_scale;  // [K], of the columns of left; or null
  const float* right;       // by_rows: [K, N], else its transpose [N, K]; row stride ld_right
  const float* low;         // [M, R], row stride ld_low; R may be 0
  const float* thin;        // thin_by_rows: [R, N], else its transpose [N, R]; row stride ld_thin
  const float* bias;        // [N] or null; null where add
  const float* scale;       // [N], of the columns of right and thin; or null
  float* out;               // [M, N], contiguous
  int64_t M, N, K, R, ld_left, ld_right, ld_low, ld_thin;
  bool by_rows, thin_by_rows;
  bool add = false;  // to what out holds
};
class Buffers;  // walk.h
void lora_gemm(const LoraGemm& g, Buffers& buffers, int threads);

// bf16_gemm.cpp  out = out_scale * (left right + scale * keep * (low thin)) + bias in bf16, on all threads, where
//                features.bf16_dot.
struct Bf16Gemm {
  const uint16_t* left;     // [M, K], row stride ld_left
  const float* left_scale;  // [K], of the columns of left, rounded once; or null
  const uint16_t* right;    // by_rows: [K, N], else its transpose [N, K]; row stride ld_right
  const uint16_t* low;      // [M, Rp], zero past R
  const uint32_t* thin;     // [(R + 1) / 2, N] in pairs of ranks, row stride ld_thin, a multiple of 32, zero past N
  const uint32_t* keep;     // [M, ld_keep] bits, the lowest column in the lowest bit; or null
  const uint16_t* bias;     // [N] or null
  const float* out_scale;   // [N] or null
  uint16_t* out;            // [M, N], contiguous
  int64_t M, N, K, R, ld_left, ld_right, Rp, ld_thin, ld_keep;  // R may be 0
  float scale;                                                  // of what is kept
  bool by_rows;
};
void bf16_gemm(const Bf16Gemm& g, Buffers& buffers, int threads);

// dropout.cpp    mask[rows, kPanel] = dropout.scale() or 0 for rows row0.. and columns col0.. of the [M, K] input; col0
//                a multiple of 8.
void dropout_mask(const Dropout& dropout, float* mask, int64_t row0, int64_t col0, int64_t rows, int64_t cols);

// bits[rows, (cols + 31) / 32 (row stride ld)] = which elements of rows row0.. and columns col0.. are kept, the lowest
// column in the lowest bit; bits past cols are any; col0 a multiple of 64. On AVX-512 only.
void dropout_bits(const Dropout& dropout, uint32_t* bits, int64_t ld, int64_t row0, int64_t col0, int64_t rows,
                  int64_t cols);

// convert.cpp
// out[rows, kPanel] = src[rows, cols (row stride ld)] (* mask); columns past cols and rows past rows zero, up to
// multiples of kLanes and kStrip.
void load_panel(const void* src, Dtype dtype, int64_t ld, const float* mask, float* out, int64_t rows, int64_t cols);
// out[rows, kPanel] = bf16 src[rows, cols (row stride ld)], zero where bits[rows, cols / 32 (row stride ld_bits)] are,
// which may be null; columns past cols and rows past rows zero, up to multiples of 2 * kLanes and kStrip. This and
// scale_row_bf16 where features.bf16_dot only.
void copy_panel(const uint16_t* src, int64_t ld, const uint32_t* bits, int64_t ld_bits, uint16_t* out, int64_t rows,
                int64_t cols);
// to[n] = bf16 src[n] * scale[n], rounded once.
void scale_row_bf16(const uint16_t* src, const float* scale, uint16_t* to, int64_t n);
// dst[0, n) = src[0, n).
void store_row(const float* src, void* dst, Dtype dtype, int64_t n);
// dst[0, n) += src[0, n) (* mask[0, n)), added in fp32 and rounded once.
void add_row(const float* src, const float* mask, void* dst, Dtype dtype, int64_t n);
// out[rows, cols (row stride ldo)] = scale[cols] * out + bias[cols], or 0 without a bias, rounded once.
void scale_panel(void* out, int64_t ldo, Dtype dtype, const float* scale, const void* bias, int64_t rows, int64_t cols);
// out[rows, cols (row stride ldo)] += factor * src[rows, cols], src of a dtype, out fp32.
void add_matrix(const void* src, Dtype dtype, float factor, float* out, int64_t rows, int64_t cols, int64_t ldo);
// out[rows, ldo] = src[rows, cols] in fp32; columns past cols up to ldo zero.
void load_matrix(const void* src, Dtype dtype, float* out, int64_t rows, int64_t cols, int64_t ldo);
// out[cols, ldo] = src[rows, cols]^T in fp32; columns past rows up to ldo zero.
void load_transposed(const void* src, Dtype dtype, float* out, int64_t rows, int64_t cols, int64_t ldo);
// out[pairs, cols] = (src[2p, n], src[2p + 1, n]), of bf16 src[2 * pairs, cols]; cols a multiple of kLanes, and only
// where features.bf16_dot.
void pair_rows(const uint16_t* src, uint32_t* out, int64_t pairs, int64_t cols);

}  // namespace fused_lora::cpu
