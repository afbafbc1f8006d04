// The CPU kernels' common ground: fp32 panels in cache. Each works on one block of rows and one panel of columns.
//
// A driver (lora.cpp) walks row blocks; per panel it copies x or dy into an fp32 buffer once (dtype conversion, dropout), and every
// product reads that buffer: [kRows, kPanel] floats = 90 KiB, in L2. All products are fp32 with fp32 accumulation.
#pragma once

#include <cstdint>

#include "lora.h"

namespace fused_lora::cpu {

constexpr int kStrip = 12;               // rows of a strip: one AVX-512 register tile or two of AVX2 (simd.h)
constexpr int kVec = 8;                  // floats of one vector; R is padded to a multiple
constexpr int64_t kRows = 8 * kStrip;    // rows of a block; 24 to 192 measured alike on EPYC 9005, 2026-11-24
constexpr int64_t kPanel = 240;          // columns of a panel: a multiple of kStrip, 2 * kVec and Philox's 8

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// shrink.cpp     out[rows, Rp] += panel[rows, cols] P[cols, Rp]; rows a multiple of kStrip.
void shrink(const float* panel, const float* P, float* out, int64_t rows, int64_t cols, int64_t Rp);

// wgrad.cpp      out[cols, Rp] += panel[rows, cols]^T H[rows, Rp], cols rounded up to a multiple of kStrip.
void wgrad(const float* panel, const float* H, float* out, int64_t rows, int64_t cols, int64_t Rp);

// wgrad.cpp      out[cols] += sum over rows of panel: one panel's share of dbias.
void column_sums(const float* panel, float* out, int64_t rows, int64_t cols);

// expand.cpp     out[kStrip, cols (row stride ldo)] += H[kStrip, Rp] Q[R, cols (row stride ldq)]; cols rounded up to a multiple of 2 * kVec.
void expand(const float* H, const float* Q, float* out, int64_t ldo, int64_t cols, int64_t R, int64_t Rp, int64_t ldq);

// dropout.cpp    mask[rows, kPanel] = scale or 0 for rows row0.. and columns col0.. of the [M, K] input; col0 a multiple of 8.
void dropout_mask(const Dropout& dropout, float* mask, int64_t row0, int64_t col0, int64_t rows, int64_t cols);

// convert.cpp
// out[rows, kPanel] = src[rows, cols (row stride ld)] (* mask); columns past cols and rows past rows zero, each up to a multiple of kStrip.
void load_panel(const void* src, Dtype dtype, int64_t ld, const float* mask, float* out, int64_t rows, int64_t cols);
// dst[0, n) = src[0, n).
void store_row(const float* src, void* dst, Dtype dtype, int64_t n);
// dst[0, n) += src[0, n) (* mask[0, n)), added in fp32 and rounded once.
void add_row(const float* src, const float* mask, void* dst, Dtype dtype, int64_t n);
// out[rows, ldo] = src[rows, cols] in fp32; columns past cols up to ldo zero.
void load_matrix(const void* src, Dtype dtype, float* out, int64_t rows, int64_t cols, int64_t ldo);
// out[cols, ldo] = src[rows, cols]^T in fp32; columns past rows up to ldo zero.
void load_transposed(const void* src, Dtype dtype, float* out, int64_t rows, int64_t cols, int64_t ldo);

}  // namespace fused_lora::cpu
